"""What parts can be merged into: a module with a weight, as the map that it computes."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..rules.affine import Affine
from ..structure.layers import CONVS, is_norm, linear_shape, named_children, shape_of
from .obstacles import tensor_of


class MergeTarget(NamedTuple):
    """A module with a weight, and what it computes as a map that parts can be merged into.

    pointwise  whether the map is all that it does to its input, position by position
    turned     whether it keeps its weight as (in, out)
    """

    module: Any
    map: Affine
    pointwise: bool
    turned: bool = False

    @property
    def kind(self) -> str:
        return "nn.Linear" if type(self.module) is nn.Linear else type(self.module).__name__

    def weight(self) -> Tensor:
        """The map's weight in the shape that the module keeps it in."""
        weight = self.map.weight.t() if self.turned else self.map.weight
        return weight.reshape(self.module.weight.shape)


def merge_target(module: nn.Module) -> MergeTarget | None:
    """The map of a module; None where it has none that parts could be merged into.

    >>> merge_target(nn.Conv2d(3, 8, 4)).map.weight.shape
    torch.Size([8, 48])
    """
    weight = tensor_of(module, "weight")  # a buffer, where a frozen weight was computed once
    if weight is None:
        return None
    map, bare = Affine(weight, tensor_of(module, "bias")), _twin(module, 1.0)
    if isinstance(module, nn.Linear):
        return MergeTarget(module, map, True) if type(module).forward is nn.Linear.forward else None
    if isinstance(module, CONVS):
        return _convolution(module, Affine(weight.flatten(1), map.bias))
    if weight.is_meta:
        return MergeTarget(module, map, False)
    if is_norm(bare):
        return MergeTarget(module, map, False) if weight.dim() == 1 and _scales_last(bare) else None
    if linear_shape(bare) and _turns(bare):
        return MergeTarget(module, Affine(weight.t(), map.bias), True, turned=True)
    return None


def _convolution(module: Any, map: Affine) -> MergeTarget | None:
    if type(module).forward not in [kind.forward for kind in CONVS]:
        return None
    padded = any(module.padding) if isinstance(module.padding, tuple) else True
    return MergeTarget(
        module, map, linear_shape(module) is not None and module.groups == 1 and not padded
    )


def _turns(module: nn.Module) -> bool:
    """Whether it is x @ weight + bias, as GPT-2's Conv1D is; tried on a few numbers."""
    known, weight = shape_of(module), module._parameters.get("weight")
    if weight is None or known is None or weight.shape != known[:2]:
        return False
    x = torch.linspace(-1, 1, known.width, device=weight.device, dtype=weight.dtype)[None]
    bias = module._parameters.get("bias")
    want = x @ weight if bias is None else x @ weight + bias
    return _gives(module, x, want)


def _scales_last(module: nn.Module) -> bool:
    """Whether weight and bias are the last that a norm does, weight x + bias; tried on a copy.

    (Gemma's norms scale by 1 + weight.)
    """
    known, weight = shape_of(module), module._parameters.get("weight")
    if weight is None or known is None or known.width != weight.numel():
        return False
    x = torch.linspace(-1, 2, 2 * known.width, device=weight.device, dtype=weight.dtype)
    x = x.reshape(2, known.width)
    scale = torch.linspace(1, 2, known.width, device=weight.device, dtype=weight.dtype)
    was = _tried(_twin(module, 1.0), _laid(x, module))
    return was is not None and _gives(
        _twin(module, scale), _laid(x, module), was * _laid(scale[None], module)
    )


def _twin(module: nn.Module, scale: Tensor | float) -> nn.Module:
    """The module in eval mode with other weights, and nothing that was added to it."""
    other = copy.copy(module)
    named = module._parameters.items()
    scaled = {n: p if p is None else nn.Parameter(p.detach() * scale) for n, p in named}
    other.__dict__.update(_parameters=scaled, _modules=named_children(module), training=False)
    return other


def _laid(x: Tensor, module: nn.Module) -> Tensor:
    """Rows (n, width) as an input of the module: (n, width, 1, 1) for maps."""
    known = shape_of(module)
    maps = known is not None and known.axis == 1
    dims = 3 if isinstance(module, nn.BatchNorm3d) else 1 if _one(module) else 2
    return x.reshape(*x.shape, *[1] * dims) if maps else x


def _one(module: nn.Module) -> bool:
    return isinstance(module, (nn.BatchNorm1d, nn.InstanceNorm1d))


def _tried(module: nn.Module, x: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            out: Tensor = type(module).forward(module, x)
    except (RuntimeError, TypeError, ValueError):
        return None
    return out


def _gives(module: nn.Module, x: Tensor, want: Tensor) -> bool:
    out = _tried(module, x)
    size = 16 * torch.finfo(want.dtype).eps * max(float(want.abs().max()), 1.0)
    if out is None or out.shape != want.shape:
        return False
    return bool(((out - want).abs() <= size).all())
