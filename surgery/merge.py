"""Merge: fold linear parts into the linear modules they stand at, and take them out again."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from .errors import OperationError
from .graft import Graft, Step, is_replaced
from .leaf import forward_of
from .operate import operated
from .part import Affine, affine

Model = TypeVar("Model", bound=nn.Module)


class _Folded(NamedTuple):
    """What a module will hold once its grafts are folded into it."""

    module: nn.Linear
    path: str
    map: Affine


@torch.no_grad()
def merge(model: Model) -> Model:
    """Fold all parts into the base: the same answers at the speed of the base; returns the model.

    Parts must be linear (nn.Linear, nn.Sequential of these, or a module with a method
    `affine()` that returns weight (out, in) and bias (out,) or None), at an nn.Linear that shares
    its weight with nothing. The base keeps its keys; parts stay in `model.surgery`, unused, and the
    weights as they were are kept, so that `unmerge` and `revert` are exact.

    Raises OperationError where a part cannot be merged, or all are already, model untouched.

    >>> from surgery import apply, at, parallel
    >>> model = apply(nn.Sequential(nn.Linear(2, 2)), at("0", parallel(lambda s: nn.Linear(2, 2))))
    >>> x, y = torch.ones(1, 2), model(torch.ones(1, 2))
    >>> torch.allclose(merge(model)(x), y), torch.equal(unmerge(model)(x), y)
    (True, True)
    """
    done = operated(model, "merge(model)")
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    folded: dict[int, _Folded] = {}
    for graft in [graft for operation in done for graft in operation.grafts]:
        linear = _linear(graft, uses)
        known = folded.get(id(linear), _Folded(linear, graft.path, _of(linear)))
        folded[id(linear)] = known._replace(map=_after(known.map, graft))
    for each in folded.values():
        if each.module.bias is None and each.map.bias is not None:
            raise OperationError(
                f"merge(model) at {each.path}",
                "a part there adds a bias, and this nn.Linear has none to fold it into.",
                "Make the part without a bias, or leave it unmerged.",
            )
    try:
        done[-1].fold([(f.module, f.map.weight, f.map.bias) for f in folded.values()])
        for operation in done:
            operation.merged = True
    except BaseException:
        for operation in done:
            operation.unfold()
        raise
    return model


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


def _linear(graft: Graft, uses: Counter[int]) -> nn.Linear:
    """The nn.Linear that a graft's parts can be folded into. Raises OperationError."""
    module = graft.entry
    kinds = ", ".join(dict.fromkeys(type(step.part).__name__ for step in graft.steps))
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    own = forward_of(module) is not type(module).forward and not is_replaced(module)
    if graft.exit is not module or not plain or own:
        kind = "a span" if graft.exit is not module else f"a {type(module).__name__}"
        kind += " with a forward of its own" if own else ""
        raise OperationError(
            f"merge(model) at {graft.path}",
            f"{kinds} stands at {kind}, and only what stands at an nn.Linear can be folded.",
            "Put such parts on the linears themselves, or leave the model unmerged.",
        )
    assert isinstance(module, nn.Linear)
    if uses[id(module.weight)] > 1:
        raise OperationError(
            f"merge(model) at {graft.path}",
            f"its weight is used elsewhere too, so {kinds} cannot be folded into it.",
            "Leave the model unmerged.",
        )
    return module


def _of(linear: nn.Linear) -> Affine:
    return Affine(linear.weight, linear.bias)


def _after(map: Affine, graft: Graft) -> Affine:
    """The map of a site with a graft's steps folded in, each around what came before."""
    for step in graft.steps:
        map = _folded(map, step, graft.path)
    return map


def _folded(map: Affine, step: Step, path: str) -> Affine:
    part = affine(step.part)
    if part is None:
        raise OperationError(
            f"merge(model) at {path}",
            f"{type(step.part).__name__} is not linear, so it cannot be folded into a weight.",
            "Leave the model unmerged, or use a method that merges (a linear part).",
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
