"""Merge: fold linear parts into the modules with weights that they stand at, and unmerge."""

from __future__ import annotations

from collections import Counter
from typing import TypeVar

import torch
from torch import nn

from .errors import OperationError
from .fold import Held, hold
from .graft import Graft, is_replaced
from .insertion import Step
from .leaf import forward_of
from .operate import operated
from .part import Affine, affine
from .room import Operation

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model) -> Model:
    """Fold all parts into the base: the same answers at the speed of the base; returns the model.

    Parts must be linear (nn.Linear, nn.Sequential of these, or a module with a method `affine()`
    that returns weight (out, in), or (out,) where it scales each feature, and bias (out,) or
    None), at an nn.Linear, a convolution, or, where they scale after it, a norm, that shares its
    weight with nothing. The base keeps its keys; parts stay in `model.surgery`, unused, and the
    weights as they were are kept, so that `unmerge` and `revert` are exact.

    Raises OperationError where a part cannot be merged, or all are already, model untouched.

    >>> from surgery import apply, at, parallel
    >>> model = apply(nn.Sequential(nn.Linear(2, 2)), at("0", parallel(lambda s: nn.Linear(2, 2))))
    >>> x, y = torch.ones(1, 2), model(torch.ones(1, 2))
    >>> torch.allclose(merge(model)(x), y), torch.equal(unmerge(model)(x), y)
    (True, True)
    """
    done = operated(model, "merge(model)")
    exact = [torch.autocast(device, enabled=False) for device in ("cpu", "cuda")]
    with torch.no_grad(), exact[0], exact[1]:
        _fold(model, done)
    return model


def _fold(model: nn.Module, done: list[Operation]) -> None:
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    held: dict[int, tuple[Graft, Held]] = {}
    grafts = [graft for operation in done for graft in operation.grafts]
    bases = {graft: _held(graft, uses) for graft in grafts}
    steps = [(graft, step) for graft in grafts for step in graft.steps]
    for graft, step in sorted(steps, key=lambda it: it[1].place != "instead"):  # others around it
        base = bases[graft]
        _, known = held.get(id(base.module), (graft, base))
        held[id(base.module)] = graft, known._replace(map=_folded(known, step, graft.path))
    changes = [(it.module, *_written(it, graft)) for graft, it in held.values()]
    try:
        done[-1].fold(changes)
        for operation in done:
            operation.merged = True
    except BaseException:
        for operation in done:
            operation.unfold()
        raise


def unmerge(model: Model) -> Model:
    """Take merged parts out again: the operated model it was, bit for bit.

    Raises OperationError where nothing is merged. For an example see `merge`.

    >>> unmerge(nn.Linear(2, 2))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    surgery.errors.OperationError: unmerge(model): this Linear was never operated...
    """
    done = operated(model, "unmerge(model)", merged=True)
    for operation in reversed(done):
        operation.unfold()
    return model


def _held(graft: Graft, uses: Counter[int]) -> Held:
    """The map of a graft's module, as its weights hold it. Raises OperationError."""
    module = graft.entry
    kinds = _kinds(graft)
    own = forward_of(module) is not type(module).forward and not is_replaced(module)
    held = hold(module) if graft.exit is module and not own else None
    if held is None:
        kind = "a span" if graft.exit is not module else f"a {type(module).__name__}"
        kind += " with a forward of its own" if own else ""
        raise OperationError(
            f"merge(model) at {graft.path}",
            f"{kinds} stands at {kind}, and only what stands at an nn.Linear, a convolution or a "
            "norm with weights can be folded.",
            "Put such parts on these themselves, or leave the model unmerged.",
        )
    if held.module.weight.is_meta:
        raise OperationError(
            f"merge(model) at {graft.path}", "it is on the meta device.", "Give it memory first."
        )
    if uses[id(held.module.weight)] > 1:
        raise OperationError(
            f"merge(model) at {graft.path}",
            f"its weight is used elsewhere too, so {kinds} cannot be folded into it.",
            "Leave the model unmerged.",
        )
    return held


def _folded(held: Held, step: Step, path: str) -> Affine:
    """The map of a site with one more step, around what came before."""
    map, part = held.map, affine(step.part)
    if part is None or step.place in ("into", "among"):
        raise OperationError(
            f"merge(model) at {path}",
            f"{type(step.part).__name__} is not linear, so it cannot be folded into a weight.",
            "Leave the model unmerged, or use a method that merges (a linear part).",
        )
    if step.place != "after" and not held.pointwise:
        raise OperationError(
            f"merge(model) at {path}",
            f"{type(step.part).__name__} acts on the input of a {type(held.module).__name__}, "
            "which mixes or norms it first: it cannot be folded into its weight.",
            "Put it after the module, or leave the model unmerged.",
        )
    if part.weight.dim() == 2 and getattr(held.module, "groups", 1) > 1:
        raise OperationError(
            f"merge(model) at {path}",
            f"{type(step.part).__name__} mixes the groups of a {type(held.module).__name__}.",
            "Leave the model unmerged, or use a part that scales each feature.",
        )
    if step.place == "instead":
        return part
    if step.place == "beside":
        return map.plus(part.times(step.scale if step.scale is not None else 1.0))
    through = part.after(map) if step.place == "after" else map.after(part)
    if step.scale is None:
        return through
    if step.place == "after":
        return map.plus(through.times(step.scale))
    return map.plus(_without_bias(through, map).times(step.scale))


def _without_bias(through: Affine, map: Affine) -> Affine:
    """f(x + p(x)) = f(x) + W p(x): the bias of f counts once."""
    if map.bias is None or through.bias is None:
        return through
    return Affine(through.weight, through.bias - map.bias)


def _kinds(graft: Graft) -> str:
    """The parts there, in words."""
    return ", ".join(dict.fromkeys(type(step.part).__name__ for step in graft.steps))


def _written(held: Held, graft: Graft) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and the bias that the module is to have. Raises OperationError."""
    if held.module._parameters.get("bias") is None and held.map.bias is not None:
        raise OperationError(
            f"merge(model) at {graft.path}",
            f"{_kinds(graft)} adds a bias, and this {held.kind} has none to fold it into.",
            "Make the part without a bias, or leave it unmerged.",
        )
    if (held.map.weight.dim() == 1) is not (held.module.weight.dim() == 1):
        raise OperationError(
            f"merge(model) at {graft.path}",
            f"{_kinds(graft)} mixes features, and this {held.kind} holds one number for each.",
            "Put it on the linear modules that read it, or leave it unmerged.",
        )
    return held.weight(), held.map.bias
