"""Merge: linear parts become part of the weights that they stand at; and unmerge."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..errors import OperationError
from ..rules.affine import Affine, affine
from ..structure.layers import CONVS, forward_of, is_norm, linear_shape, named_children, shape_of
from .apply import operated
from .conditions import DISABLED, MAKING, WRITING, check_state
from .hooks import HookedSite, is_replaced
from .journal import completed
from .operation import Operation
from .tokens import Action
from .trained import check_undoable
from .watch import check_watched

Model = TypeVar("Model", bound=nn.Module)


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
    weight: Any = module._parameters.get("weight")
    if weight is None:
        return None
    map, bare = Affine(weight, module._parameters.get("bias")), _twin(module, 1.0)
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
    known, weight = shape_of(module), module._parameters["weight"]
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
    known, weight = shape_of(module), module._parameters["weight"]
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


def merge(model: Model) -> Model:
    """Merge all parts into the base: the same answers at the speed of the base; returns the model.

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
    check_state(model, "merge(model)", WRITING, MAKING, DISABLED)
    for operation in done:
        operation.start.check(OperationError, "merge(model)")
        check_watched(operation, "merge(model)")
    exact = [torch.autocast(device, enabled=False) for device in ("cpu", "cuda")]
    with torch.no_grad(), exact[0], exact[1]:
        _merge(model, done)
    return model


def _merge(model: nn.Module, done: list[Operation]) -> None:
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    hooked_sites = [hooked for operation in done for hooked in operation.hooked_sites]
    targets = {hooked: _target(hooked, uses) for hooked in hooked_sites}
    actions = [(hooked, action) for hooked in hooked_sites for action in hooked.actions]
    actions.sort(key=lambda pair: pair[1].place != "instead")  # what replaces first, others around
    merged: dict[int, tuple[HookedSite, MergeTarget]] = {}
    for hooked, action in actions:
        module = id(targets[hooked].module)
        _, target = merged.get(module, (hooked, targets[hooked]))
        merged[module] = hooked, target._replace(map=_with(target, action, hooked.path))
    changes = [(target.module, *_weights(target, hooked)) for hooked, target in merged.values()]
    journal = done[-1].merge_journal
    try:
        for module, weight, bias in changes:
            journal.write(module, "weight", weight)
            if bias is not None:
                journal.write(module, "bias", bias)
        for operation in done:
            journal.set(operation, "merged", True)
    except BaseException:
        journal.undo()
        raise


def unmerge(model: Model) -> Model:
    """Take merged parts out again: the operated model it was, bit for bit.

    Raises OperationError where nothing is merged. For an example see `merge`.

    >>> unmerge(nn.Linear(2, 2))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    surgery.errors.OperationError: unmerge(model): this Linear was never operated...
    """
    done = operated(model, "unmerge(model)", merged=True)
    check_state(model, "unmerge(model)", WRITING, MAKING, DISABLED)
    journals = [operation.merge_journal for operation in reversed(done)]
    check_undoable(model, journals, call="unmerge(model)")
    completed(lambda: [journal.undo() for journal in journals])
    return model


def _target(hooked: HookedSite, uses: Counter[int]) -> MergeTarget:
    """The map of the module of a hooked site, as its weights hold it. Raises OperationError."""
    module, kinds, call = hooked.entry, _kinds(hooked), f"merge(model) at {hooked.path}"
    wrapped = forward_of(module) is not type(module).forward and not is_replaced(module)
    target = merge_target(module) if hooked.exit is module and not wrapped else None
    if target is None:
        kind = "a span" if hooked.exit is not module else f"a {type(module).__name__}"
        kind += " with a forward of its own" if wrapped else ""
        raise OperationError(
            call,
            f"{kinds} stands at {kind}, and only what stands at an nn.Linear, a convolution or a "
            "norm with weights can be folded.",
            "Put such parts on these themselves, or leave the model unmerged.",
        )
    if target.module.weight.is_meta:
        raise OperationError(call, "it is on the meta device.", "Give it memory first.")
    if uses[id(target.module.weight)] > 1:
        raise OperationError(
            call,
            f"its weight is used elsewhere too, so {kinds} cannot be folded into it.",
            "Leave the model unmerged.",
        )
    return target


def _with(target: MergeTarget, action: Action, path: str) -> Affine:
    """The map of a site with one more action, around what came before."""
    map, part = target.map, affine(action.part)
    if part is None or action.place in ("into", "among"):
        raise OperationError(
            f"merge(model) at {path}",
            f"{type(action.part).__name__} is not linear, so it cannot be folded into a weight.",
            "Leave the model unmerged, or use a method that merges (a linear part).",
        )
    if action.place != "after" and not target.pointwise:
        raise OperationError(
            f"merge(model) at {path}",
            f"{type(action.part).__name__} acts on the input of a {type(target.module).__name__}, "
            "which mixes or norms it first: it cannot be folded into its weight.",
            "Put it after the module, or leave the model unmerged.",
        )
    if part.weight.dim() == 2 and getattr(target.module, "groups", 1) > 1:
        raise OperationError(
            f"merge(model) at {path}",
            f"{type(action.part).__name__} mixes the groups of a {type(target.module).__name__}.",
            "Leave the model unmerged, or use a part that scales each feature.",
        )
    if action.place == "instead":
        return part
    if action.place == "beside":
        return map.plus(part.times(action.scale if action.scale is not None else 1.0))
    through = part.after(map) if action.place == "after" else map.after(part)
    if action.scale is None:
        return through
    if action.place == "after":
        return map.plus(through.times(action.scale))
    return map.plus(_without_bias(through, map).times(action.scale))


def _without_bias(through: Affine, map: Affine) -> Affine:
    """f(x + p(x)) = f(x) + W p(x): the bias of f counts once."""
    if map.bias is None or through.bias is None:
        return through
    return Affine(through.weight, through.bias - map.bias)


def _kinds(hooked: HookedSite) -> str:
    """The parts there, in words."""
    return ", ".join(dict.fromkeys(type(action.part).__name__ for action in hooked.actions))


def _weights(target: MergeTarget, hooked: HookedSite) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and the bias that the module is to have. Raises OperationError."""
    if target.module._parameters.get("bias") is None and target.map.bias is not None:
        raise OperationError(
            f"merge(model) at {hooked.path}",
            f"{_kinds(hooked)} adds a bias, and this {target.kind} has none to fold it into.",
            "Make the part without a bias, or leave it unmerged.",
        )
    if (target.map.weight.dim() == 1) is not (target.module.weight.dim() == 1):
        raise OperationError(
            f"merge(model) at {hooked.path}",
            f"{_kinds(hooked)} mixes features, and this {target.kind} holds one number for each.",
            "Put it on the linear modules that read it, or leave it unmerged.",
        )
    return target.weight(), target.map.bias
