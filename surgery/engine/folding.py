"""What weights become when the parts at them are folded in; nothing is changed here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .._shards import cut, gathered, is_distributed, whole
from .._text import first_few
from ..errors import OperationError
from ..rules.affine import Affine, affine, joined
from ..structure.layers import CONVS, forward_of
from ..structure.memory import Memory, own_form
from .hooked_weights import HookedWeight
from .hooks import HookedSite, is_replaced
from .journal import owner_of
from .merge_targets import MergeTarget, merge_target
from .obstacles import tensor_of
from .tokens import LINEAR, Action

HALF = 16  # bits: below 32, sums are made in float32 and rounded once


class Fold(NamedTuple):
    """A module, and the weight and bias that it is to have, by name.

    kept  the share of the change that is left once it is rounded to the dtype of the weight
    """

    path: str
    module: nn.Module
    tensors: dict[str, Tensor]
    kept: float

    @property
    def moves(self) -> bool:
        """Whether they are others than it has, by more than rounding (a scale of nearly 1)."""
        return any(_apart(new, tensor_of(self.module, n)) for n, new in self.tensors.items())


def written(folds: Iterable[Fold]) -> list[tuple[nn.Module, str, Tensor]]:
    """Module, name and new value of each tensor."""
    return [(f.module, name, tensor) for f in folds for name, tensor in f.tensors.items()]


def _apart(new: Tensor, old: Tensor | None) -> bool:
    if old is None:
        return bool(new.any())
    most = 16 * torch.finfo(old.dtype).eps * float(old.abs().max() if old.numel() else 0)
    return bool(((new - old).abs() > most).any())


class Fine(TorchFunctionMode):
    """While it lasts, torch computes in float32 with what it is given in half precision."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, _fine, (args, kwargs or {}))
        return func(*args, **kwargs)


def _fine(tensor: Tensor) -> Tensor:
    half = tensor.is_floating_point() and torch.finfo(tensor.dtype).bits <= HALF
    return tensor.float() if half else tensor


def _fine_map(map: Affine) -> Affine:
    return Affine(_fine(map.weight), None if map.bias is None else _fine(map.bias))


def folded(
    model: nn.Module, hooked_sites: list[HookedSite], read_besides: set[str] | None = None
) -> list[Fold]:
    """What the modules at some sites become. Raises OperationError where that cannot be.

    read_besides  paths of sites whose weight the model reads without calling the module, too
    """
    here, memory = {id(module) for module in model.modules()}, Memory(model)
    at_weights = [hooked for hooked in hooked_sites if isinstance(hooked, HookedWeight)]
    of_weights = _folded_weights(at_weights, here, memory)
    others = [hooked for hooked in hooked_sites if hooked not in at_weights]
    of_modules = _folded_modules(others, here, memory, read_besides or set())
    weights = {(id(fold.module), name) for fold in of_weights for name in fold.tensors}
    for hooked, fold in of_modules:
        if any((id(fold.module), name) in weights for name in fold.tensors):
            raise _refused(hooked, "weight", ": parts stand at the parameter itself, too")
    return [*of_weights, *(fold for _, fold in of_modules)]


def _folded_modules(
    hooked_sites: list[HookedSite], here: set[int], memory: Memory, read_besides: set[str]
) -> list[tuple[HookedSite, Fold]]:
    """What modules become that parts stand at."""
    actions: dict[int, list[tuple[HookedSite, Action]]] = {}
    for hooked in hooked_sites:
        module: Any = hooked.entry
        with gathered([module]):
            _target(hooked, here)
        _check_memory(hooked, module.weight, "weight", memory)
        if hooked.path in read_besides:
            raise _refused(hooked, "weight", ": the model reads it without calling the module")
        there = actions.setdefault(id(module), [])
        there += [(hooked, action) for action in hooked.actions]
    return [_folded_module(there, here, memory) for there in actions.values()]


def _folded_module(
    actions: list[tuple[HookedSite, Action]], here: set[int], memory: Memory
) -> tuple[HookedSite, Fold]:
    """What one module becomes; the last site there. What is in pieces is whole for that long."""
    actions = sorted(actions, key=lambda pair: pair[1].place != "instead")  # what replaces first
    hooked = actions[-1][0]
    module: Any = hooked.entry
    was = {name: tensor_of(module, name) for name in ("weight", "bias")}
    with gathered([module, *_inner(actions)]):
        target = _target(hooked, here)
        with Fine():
            for site, action in actions:
                target = target._replace(map=_with(target, action, site))
        fold = _rounded(target, hooked)
        now, bias = tensor_of(module, "bias"), fold.tensors.get("bias")
        moved = now is not None and bias is not None and not torch.equal(bias, now)
    if moved and was["bias"] is not None:
        _check_memory(hooked, was["bias"], "bias", memory)
    return hooked, fold._replace(tensors=_cut(fold.tensors, was))


def _inner(actions: Iterable[tuple[HookedSite, Action]]) -> Iterator[nn.Module]:
    """The modules that their parts are made of."""
    return (module for _, action in actions for module in action.part.modules())


def _cut(new: Mapping[str, Tensor], was: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """New values, each as the tensor lies that it is for."""
    pairs = {name: (tensor, was.get(name)) for name, tensor in new.items()}
    return {name: new if old is None else cut(new, old) for name, (new, old) in pairs.items()}


def _folded_weights(
    hooked_weights: list[HookedWeight], here: set[int], memory: Memory
) -> list[Fold]:
    """What parameters become that parts stand at, each with its bias: what readers see."""
    folds: dict[tuple[int, str], Fold] = {}
    for hooked in hooked_weights:
        read = hooked.reads[0]
        if id(read.holder) not in here:
            raise _gone(hooked, read.holder)
        names = [name for name in (read.name, read.bias) if name]
        known = folds.get((id(read.holder), read.name))
        kept = {name: hooked.kept(name) for name in names}
        now = {name: whole(t) for name, t in (kept | (known.tensors if known else {})).items()}
        _check_shared(hooked, memory)
        with gathered(_inner((hooked, action) for action in hooked.actions)):
            made = _cut(hooked.made(now), kept)
        for holder, *names in (each[1:] for each in hooked.reads):
            renamed = dict(zip(names, made.values(), strict=False))
            folds[id(holder), names[0]] = Fold(hooked.path, holder, renamed, 1.0)
    return list(folds.values())


def _rounded(target: MergeTarget, hooked: HookedSite) -> Fold:
    """The weights in the dtype of the module, and how much of the change that keeps."""
    module, (weight, bias) = target.module, _weights(target, hooked)
    pairs = [(module.weight, weight), *([] if bias is None else [(module.bias, bias)])]
    new = [meant.to(was.dtype) for was, meant in pairs]
    lost, whole = 0.0, 0.0
    for (was, meant), got in zip(pairs, new, strict=True):
        if got.dtype != meant.dtype:
            lost += float((got.to(meant.dtype) - meant).square().sum())
            whole += float((meant - was.to(meant.dtype)).square().sum())
    kept = 1 - (lost / whole) ** 0.5 if lost else 1.0
    return Fold(hooked.path, module, dict(zip(("weight", "bias"), new, strict=False)), kept)


# whether it can be ------------------------------------------------------------------------------


def _target(hooked: HookedSite, here: set[int]) -> MergeTarget:
    """The map of the module of a hooked site, as its weights hold it. Raises OperationError."""
    module, kinds, call = hooked.entry, _kinds(hooked), f"merge(model) at {hooked.path}"
    if id(module) not in here:
        raise _gone(hooked, module)
    if hooked.exit is module and (fact_and_remedy := _hidden(module)):
        fact, remedy = fact_and_remedy
        raise OperationError(call, f"{kinds} stands at a {_kind(module)} {fact}", remedy)
    wrapped = forward_of(module) is not type(module).forward and not is_replaced(module)
    target = merge_target(module) if hooked.exit is module and not wrapped else None
    if target is None:
        kind = (
            "a span" if hooked.exit is not module else f"a {_kind(module)}{_why(module, wrapped)}"
        )
        raise OperationError(
            call,
            f"{kinds} stands at {kind}, and only what stands at an nn.Linear, a convolution or a "
            "norm with weights can be folded.",
            "Put such parts on these themselves, or leave the model unmerged.",
        )
    if target.module.weight.is_meta:
        raise OperationError(call, "it is on the meta device.", "Give it memory first.")
    return target._replace(map=_fine_map(target.map))


def _gone(hooked: HookedSite, module: nn.Module) -> OperationError:
    return OperationError(
        f"merge(model) at {hooked.path}",
        f"the {type(module).__name__} where {_kinds(hooked)} stands is no longer in the model: "
        "another module was put in its place since it was operated.",
        "Merge before modules are exchanged (quantised, converted); or put it back.",
    )


def _kind(module: nn.Module) -> str:
    """The name of its class; with the package where torch has another of that name."""
    kind = type(module)
    known = getattr(nn, kind.__name__, kind)
    return kind.__name__ if known is kind else f"{kind.__module__}.{kind.__name__}"


def _why(module: nn.Module, wrapped: bool) -> str:
    """What keeps a module with a weight from being a map, in words."""
    if wrapped:
        return " with a forward of its own"
    if isinstance(module, (nn.Linear, *CONVS)):
        return ", whose class has a forward of its own"
    if tensor_of(module, "weight") is not None:
        return ", which does more with its weight than multiply by it"
    return ""


def _hidden(module: nn.Module) -> tuple[str, str] | None:
    """Why a module has no weight that could be written, and what to do; None where it has."""
    weight = tensor_of(module, "weight")
    if weight is None:
        if not isinstance(getattr(module, "weight", None), Tensor):
            return None
        names = [n for n in {**module._parameters, **module._buffers} if n.startswith("weight_")]
        if nn.utils.parametrize.is_parametrized(module, "weight"):
            names = ["parametrizations.weight"]
        undo = [f" by torch.nn.utils.{undo}" for mark, undo in COMPUTED if mark in names]
        remedy = f"Make it plain first{''.join(undo[:1])}, or leave the model unmerged."
        return f"whose weight is computed from its {', '.join(names)} at each call.", remedy
    form = "" if is_distributed(weight) else own_form(weight)
    if kind := form or ("" if weight.is_floating_point() else str(weight.dtype)):
        fact = f"whose weight is a {kind}, which holds no numbers to add to."
        return fact, "Merge first; quantise or shard what comes out."
    return None


COMPUTED = (
    ("parametrizations.weight", "parametrize.remove_parametrizations"),
    ("weight_g", "remove_weight_norm"),
    ("weight_mask", "prune.remove"),
    ("weight_u", "remove_spectral_norm"),
)  # what torch.nn.utils leaves beside a weight, and what takes it off


def acting_between(hooked: HookedSite) -> bool:
    """Whether hooks of others meet what the module gives before the parts there do."""
    if isinstance(hooked, HookedWeight):
        return False
    owners = [owner_of(hook) for hook in hooked.entry._forward_hooks.values()]
    last = max((i for i, owner in enumerate(owners) if owner is hooked), default=0)
    return any(not isinstance(owner, HookedSite) for owner in owners[:last])


def _check_memory(hooked: HookedSite, tensor: Tensor, name: str, memory: Memory) -> None:
    """Raise OperationError where another parameter or buffer has the numbers of this one."""
    others, names = memory.others(tensor), memory.names.get(id(tensor), [])
    if others or len(names) > 1:
        raise _refused(hooked, name, f": {first_few([*names, *others])} are one memory")


def _check_shared(hooked: HookedWeight, memory: Memory) -> None:
    """Raise OperationError where a weight is another's too, and not changed there."""
    read = hooked.reads[0]
    names = memory.names.get(id(hooked.kept(read.name)), [])
    if memory.others(hooked.kept(read.name)) or len(names) > len(hooked.reads):
        raise _refused(hooked, read.name, f": {first_few(names)} are one memory")
    if read.bias and len(memory.names.get(id(hooked.kept(read.bias)), ())) > len(hooked.reads):
        raise _refused(hooked, read.bias, "")


def _refused(hooked: HookedSite, name: str, how: str) -> OperationError:
    return OperationError(
        f"merge(model) at {hooked.path}",
        f"its {name} is used elsewhere too{how}, so {_kinds(hooked)} cannot be folded into it.",
        "Leave the model unmerged.",
    )


def _with(target: MergeTarget, action: Action, hooked: HookedSite) -> Affine:
    """The map of a site with one more action, around what came before."""
    map, own, path = target.map, affine(action.part), hooked.path
    part = None if own is None else _fine_map(own)
    if part is None or action.hears or action.place not in LINEAR:
        fact = "hears another part" if action.hears else "is not linear"
        raise OperationError(
            f"merge(model) at {path}",
            f"{type(action.part).__name__} {fact}, so it cannot be folded into a weight.",
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
    return joined(map, part, action.place, action.scale, hooked.switch.strength)


def _kinds(hooked: HookedSite) -> str:
    """The parts there, in words."""
    return ", ".join(dict.fromkeys(type(action.part).__name__ for action in hooked.actions))


def _weights(target: MergeTarget, hooked: HookedSite) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight and the bias that the module is to have. Raises OperationError."""
    if tensor_of(target.module, "bias") is None and target.map.bias is not None:
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
