"""What is added to a model lives in one room at its root, and knows the way back.

All of it is `model.surgery`, one child an operation. An operation writes down what it is about to
change before it changes it; undoing it, after a fault or on request, is one and the same walk back.
Only this file and `graft` write to a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._preserve import same
from .._text import first_few
from ..errors import GraftError, OperationError
from ..structure.module_tree import ADDITIONS, Site
from .hooks import Balance, HookedSite, Switch, owners_of, routes, unhook
from .summary import Record
from .tokens import Action


class Additions(nn.Module):
    """What was added to a model, one child an operation. Calling it changes nothing."""

    _is_surgery_additions = True

    def forward(self, x: Any) -> Any:
        return x


class ForwardCheck:
    """Hooks on the root: after a whole forward, every graft must have run."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation

    def enter(self, module: nn.Module, args: Any) -> None:
        """What is left of an earlier forward, which checkpoints may need, is forgotten."""
        if self.operation.enabled:
            for hooked in self.operation.hooked_sites:
                hooked.tokens.begin()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        for hooked in self.operation.hooked_sites if self.operation.enabled else ():
            if error := hooked.tokens.left_in:
                raise error
        if self.operation.enabled and not self.operation.proved:
            self.operation._surgery_witness(torch.compiler.is_dynamo_compiling())


class FrozenStatistics:
    """Methods in place of a norm's own: it stays in eval mode, and keeps its statistics.

    Of a plain object, so that a copy of the model gets its own.
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def train(self, mode: bool = True) -> nn.Module:
        for child in self.norm.children():  # an activation, a dropout (timm's BatchNormAct2d)
            child.train(mode)
        self.norm.training = False  # whoever has set it
        return self.norm

    def reset_running_stats(self) -> None:
        """Nothing: torch's update_bn would reset what it then cannot count."""


FROZEN_METHODS = ("train", "reset_running_stats")  # the methods that it takes the place of


def is_frozen(norm: nn.Module) -> bool:
    """Whether an operation keeps it in eval mode."""
    return isinstance(getattr(vars(norm).get("train"), "__self__", None), FrozenStatistics)


def _unreached(idle: list[HookedSite]) -> tuple[str, str]:
    """Why grafts may not have run in a forward that no one looked into, and what to do."""
    return "", (
        "The model reads their weights without calling them, or skips them. Put the rule "
        "on a module that is called (its parent, say), and revert this one."
    )


class Operation(Switch):
    """One application of rules to a model: its parts, its grafts, and the way back.

    `was_*` hold what the model was: (module, name, value) triples, written before each change.
    """

    def __init__(self, name: str, balance: Balance, record: Record) -> None:
        super().__init__(balance)
        self.name, self.record, self.proved = name, record, False
        self.hooked_sites: list[HookedSite] = []
        self.was_training: list[tuple[nn.Module, bool]] = []
        self.was_trainable: list[tuple[nn.Module, str, bool]] = []
        self.was_value: list[tuple[nn.Module, str, Tensor]] = []
        self.was_buffer: list[tuple[nn.Module, str, Tensor]] = []
        self.was_grad: list[tuple[nn.Module, str, Tensor | None]] = []
        self.was_merged: list[tuple[nn.Module, str, Tensor]] = []
        self.was_frozen_norm: list[tuple[nn.Module, dict[str, Any]]] = []
        self.was_nested: list[nn.TransformerEncoder] = []
        self.encoders: list[nn.TransformerEncoder] = []
        self.model: list[nn.Module] = []  # in a list, so that it is no child of ours

    def open(self, model: nn.Module) -> None:
        """Make room at the root, and remember the flags and buffers of its modules."""
        self.model.append(model)
        for module in model.modules():
            self.was_training.append((module, module.training))
            if isinstance(module, nn.TransformerEncoder):
                self.encoders.append(module)
            for name, tensor in module._buffers.items():
                if tensor is not None and (tensor.is_floating_point() or tensor.dim() == 0):
                    self.was_buffer.append((module, name, tensor))
                    self.was_value.append((module, name, tensor.detach().clone()))
        room = additions_of(model)
        if room is None:
            room, host = Additions(), _host(model)
            if host is not model:
                model.__dict__[ADDITIONS] = room
            host._modules[ADDITIONS] = room
        room.add_module(self.name, self)

    def own(self, parts: dict[str, nn.Module]) -> None:
        """Give each part its place in the room, under the first of its keys."""
        placed: set[int] = set()
        for key, part in parts.items():
            if id(part) not in placed:
                self.add_module(key, part)
                placed.add(id(part))

    def train_only(self, modules: list[nn.Module], chosen: set[int]) -> None:
        """Let just these parameters (by id) of the base be trained, each with a copy kept."""
        for module in modules:
            for name, tensor in module._parameters.items():
                if tensor is None:
                    continue
                wanted = id(tensor) in chosen
                if wanted:
                    self.was_grad.append((module, name, tensor.grad))
                    self.was_value.append((module, name, tensor.detach().clone()))
                if tensor.requires_grad != wanted:
                    self.was_trainable.append((module, name, not wanted))
                    tensor.requires_grad_(wanted)

    def still(self, norms: Iterable[tuple[nn.Module, bool]]) -> None:
        """Keep norms with running statistics in eval mode, or let them go, whatever train() says.

        Frozen, their statistics would go on drifting, and what is saved would not reproduce.
        """
        for norm, frozen in norms:
            held = {name: vars(norm)[name] for name in FROZEN_METHODS if name in vars(norm)}
            if frozen is is_frozen(norm):
                continue
            self.was_frozen_norm.append((norm, held))
            for name in held:
                del vars(norm)[name]
            if frozen:
                still = FrozenStatistics(norm)
                vars(norm).update({name: getattr(still, name) for name in FROZEN_METHODS})
            norm.training = not frozen and any(model.training for model in self.model)

    def join(self, site: Site, actions: list[Action]) -> None:
        """HookedSite `actions` on `site`."""
        self.hooked_sites.append(HookedSite(self, site, actions))
        self.hooked_sites[-1].join()

    def watch(self, model: nn.Module) -> None:
        """Let the grafts be seen to run in a forward, and be given what they can take.

        nn.TransformerEncoder hands nested tensors to its layers where it is given a padding mask
        in eval mode without gradients. (Its fused layers look for hooks, and leave them be.)
        """
        ends = {id(end) for hooked in self.hooked_sites for end in (hooked.entry, hooked.exit)}
        for encoder in self.encoders:
            if vars(encoder).get("use_nested_tensor") and any(
                id(m) in ends for m in encoder.modules()
            ):
                self.was_nested.append(encoder)
                encoder.use_nested_tensor = False
        witness = ForwardCheck(self)
        model.register_forward_hook(witness.leave)
        if any(hooked.inserts for hooked in self.hooked_sites):
            model.register_forward_pre_hook(witness.enter)

    @property
    def idle(self) -> list[HookedSite]:
        """The grafts that have not run."""
        return [hooked for hooked in self.hooked_sites if not hooked.ran]

    def prove(self, why: Callable[[list[HookedSite]], tuple[str, str]] = _unreached) -> None:
        """Raise GraftError unless every graft has run; `why` adds to the fact, and has a remedy."""
        if idle := self.idle:
            paths, (fact, remedy) = {hooked.path for hooked in idle}, why(idle)
            rows = [row for row in self.record["rows"] if row["keys"]]
            rules = [row["rule"] for row in rows if paths.intersection(row["paths"])]
            told = f"{self._idle()} never ran in a whole forward{fact}."
            raise GraftError(", ".join(rules), told, remedy)
        self.proved = True

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _surgery_witness(self, compiling: bool) -> None:
        """Prove it after a forward, or say that compiled code, which runs unseen, may hide it."""
        if not compiling and not self._may_be_compiled():
            self.prove()
        elif idle := self._idle():
            self.proved = not compiling
            warnings.warn(
                f"{idle} were not seen to run, though compiled code may hide it: "
                "surgery.apply(model, rules, example=x) proves that they do.",
                stacklevel=2,
            )

    def _idle(self) -> str:
        """The sites that have not run, in words."""
        idle = [hooked.path for hooked in self.idle]
        return f"{len(idle)} of {len(self.hooked_sites)} sites ({first_few(idle)})" if idle else ""

    def _may_be_compiled(self) -> bool:
        seen = [hooked.mark.compiled for hooked in self.hooked_sites]
        for module in [module for model in self.model for module in model.modules()]:
            seen.append(module._compiled_call_impl is not None)
            seen.append(hasattr(module.forward, "_torchdynamo_orig_callable"))
        return True in seen

    @property
    def routers(self) -> list[HookedSite]:
        """The grafts with a part that routes."""
        return [g for g in self.hooked_sites if g.gates or any(map(routes, g.actions))]

    def undo(self) -> None:
        """Take everything off and bring everything back, however far the work had come."""
        self.unfold()
        for model in self.model:
            for witness in owners_of(model._forward_hooks, ForwardCheck).values():
                if witness.operation is self:
                    unhook(model, witness)
        for hooked in self.hooked_sites:
            hooked.part()
        for encoder in self.was_nested:
            encoder.use_nested_tensor = True
        for owner, name, flag in self.was_trainable:
            tensor = owner._parameters[name]
            if tensor is not None:
                tensor.requires_grad_(flag)
        for owner, name, grad in self.was_grad:
            tensor = owner._parameters[name]
            if tensor is not None:
                tensor.grad = grad
        self._restore_values()
        for norm, held in reversed(self.was_frozen_norm):
            for name in FROZEN_METHODS:
                vars(norm).pop(name, None)
            vars(norm).update(held)
        for module, training in self.was_training:
            module.training = training
        for model in self.model:
            self._leave_room(model)

    def fold(self, maps: list[tuple[nn.Module, Tensor, Tensor | None]]) -> None:
        """Write other weights and biases to modules, the former kept."""
        values = [
            (module, name, value)
            for module, weight, bias in maps
            for name, value in (("weight", weight), ("bias", bias))
        ]
        tensors = [(m, n, m._parameters.get(n), v) for m, n, v in values if v is not None]
        chosen = [(m, n, t, v) for m, n, t, v in tensors if t is not None]
        self.was_merged += [(m, n, t.detach().clone()) for m, n, t, _ in chosen]
        with torch.no_grad():
            for _, _, tensor, value in chosen:
                tensor.copy_(value)

    def unfold(self) -> None:
        """Bring back what was folded over."""
        with torch.no_grad():
            for module, name, value in self.was_merged:
                getattr(module, name).copy_(value)
        self.was_merged.clear()
        self.merged = False

    def _restore_values(self) -> None:
        for module, name, buffer in self.was_buffer:
            now = module._buffers.get(name)  # another tensor, unless it was moved or cast
            if now is None or (now.device, now.dtype) == (buffer.device, buffer.dtype):
                module._buffers[name] = buffer
        for module, name, value in self.was_value:
            tensor = tensor_of(module, name)
            if tensor is not None and not (tensor.is_meta or value.is_meta or same(tensor, value)):
                with torch.no_grad():
                    tensor.copy_(value)

    def _leave_room(self, model: nn.Module) -> None:
        room = additions_of(model)
        if room is None:
            return
        room._modules.pop(self.name, None)
        if not room._modules:
            _host(model)._modules.pop(ADDITIONS, None)
            model.__dict__.pop(ADDITIONS, None)


def additions_of(model: nn.Module) -> Additions | None:
    """The room of an operated model; None where nothing was added."""
    room = model._modules.get(ADDITIONS) or model.__dict__.get(ADDITIONS)
    return room if isinstance(room, Additions) else None


def operations(model: nn.Module) -> list[Operation]:
    """All operations on a model, oldest first."""
    room = additions_of(model)
    return [op for op in room.children() if isinstance(op, Operation)] if room else []


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of that name."""
    parameter = module._parameters.get(name)
    return parameter if parameter is not None else module._buffers.get(name)


def _host(model: nn.Module) -> nn.Module:
    """The module whose child the room is: the root, unless it calls or lists its children."""
    for module in model.modules():
        if not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, Additions)):
            return module
    raise OperationError(
        type(model).__name__, "it holds no module that does anything.", "Give a model."
    )
