"""Whether a part fits what it is given, and what it gives what is needed; if not, in words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._text import first_few
from ..errors import GraftError


def check_one_shape(x: Tensor, base: Tensor, path: str) -> None:
    """Raise GraftError where tensors are nested."""
    if x.is_nested or base.is_nested:
        raise GraftError(
            f"the graft at {path or 'the model'}",
            "it was given a nested tensor, and parts take tensors of one shape.",
            "Give padded tensors (nn.TransformerEncoder(..., enable_nested_tensor=False)).",
        )


def run(part: nn.Module, x: Tensor, heard: list[Tensor | None], width: int, path: str) -> Any:
    """The answer of a part. Raises GraftError where it may not take what it is given."""
    try:
        return part(x, *heard)
    except RuntimeError as error:
        fact, remedy = _misfit(part, x, width)
        if not fact:
            raise
        name = f"{type(part).__name__} at {path or 'the model'}"
        raise GraftError(name, f"it was given {_described(x)}, {fact}.", remedy) from error


def _misfit(part: nn.Module, x: Tensor, width: int) -> tuple[str, str]:
    """Why a part may not take what it was given, and what to do; "" where it should."""
    if width and x.shape[-1] != width:
        return f"and the place was taken to have {width} features", (
            "Put the rule on a module with weights of that width, or give the width yourself."
        )
    kinds = {p.dtype for p in part.parameters() if p.is_floating_point()}
    if x.is_floating_point() and kinds and x.dtype not in kinds:
        names = first_few(str(kind).removeprefix("torch.") for kind in kinds)
        return f"and its own tensors are {names}", (
            f"Cast the parts, model.surgery.to({x.dtype}), or run under torch.autocast."
        )
    return "", ""


def fitting(
    part: nn.Module, out: Any, base: Tensor, ends: tuple[nn.Module, nn.Module], path: str
) -> Tensor:
    """What a part gives, as `base` is. Raises GraftError where it is of another shape or kind.

    ends  the modules with which the site begins and ends
    """
    if isinstance(out, Tensor) and base.dim() == 2 < out.dim():
        out = out.flatten(0, -2)  # tokens in a row, as mixtures of experts give them
    if isinstance(out, Tensor) and out.shape == base.shape:
        if out.dtype == base.dtype:
            return out
        if torch.is_autocast_enabled(base.device.type):
            return out.to(base.dtype)
    want, got = _described(base), _described(out)
    if isinstance(out, Tensor) and (stride := _stride(ends[0])) and out.shape != base.shape:
        want += f" (the module has stride {stride}, and a part beside it sees every position)"
    remedy = "A part is given features on the last axis, site.width of them, returns site.out."
    if ends[0] is not ends[1]:
        remedy += " With apply(..., example=inputs) a forward tells where to begin."
    raise GraftError(
        f"{type(part).__name__} at {path or 'the model'}",
        f"it returned {got} where {want} is needed.",
        remedy,
    )


def feature_axis(x: Tensor, axis: int, width: int) -> int:
    """Where features lie: as the model's weights tell, but where so many lie on the other only."""
    if width and x.dim() > 1 and x.shape[axis] != width and x.shape[-axis] == width:
        return -axis
    return axis


def _stride(module: nn.Module) -> str:
    """That of a module which makes a map smaller; "" where it does not."""
    stride = getattr(module, "stride", 1)
    sides = stride if isinstance(stride, tuple) else (stride,)
    return str(stride) if any(isinstance(n, int) and n > 1 for n in sides) else ""


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
