"""Joins parts to sites, and parts them again: the only writer of modules.

All that is added lives in one room at the root, `model.surgery`, under the name of its operation.
Sites get hooks that are methods of plain objects, so that deep copies and pickles of the model
carry on with their own parts. An operation writes down what it is about to change before it
changes it; undoing it, after a fault or on request, is one and the same walk back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import ops
from .account import Record
from .errors import GraftError, OperationError
from .tree import ROOM, Site

Balance: TypeAlias = "ops.Coefficient | None"


class Step(NamedTuple):
    """One part at one site.

    place   "before" acts on the input, "after" on the output, "beside" on the input for the
            output, "instead" in place of the module
    scale   what is added is `scale` times what the part gives; None: it replaces what it was given
    """

    place: str
    part: nn.Module
    scale: float | None


class Room(nn.Module):
    """What was added to a model, one child an operation. Calling it changes nothing."""

    _is_surgery_room = True

    def forward(self, x: Any) -> Any:
        return x


class Graft:
    """The steps joined to one site, in rule order, and what they saw last."""

    def __init__(self, operation: Operation, site: Site, steps: list[Step]) -> None:
        self.operation, self.path, self.steps = operation, site.path, steps
        self.entry, self.exit = site.entry.module, site.exit.module
        self.axis_in, self.axis_out = site.entry.axis, site.exit.axis
        first = next((i for i, step in enumerate(steps) if step.place == "before"), len(steps))
        besides = [i for i, step in enumerate(steps) if step.place == "beside"]
        self.remembers = bool(besides) and (site.is_span or first < besides[-1])
        self.enters = first < len(steps)
        self.leaves = any(step.place in ("after", "beside") for step in steps)
        self.was_forward = self.entry.__dict__.get("forward")
        self.ran = False
        self.forget()

    def forget(self) -> None:
        """Drop what is kept of the last forward."""
        self.inputs: dict[int, Tensor] = {}
        self.gates: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "inputs": {}, "gates": None}

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook: what happens to the input, the last rule outermost."""
        if not ((self.enters or self.remembers) and self.active()):
            return None
        x, put = _input(args, kwargs, self.path)
        for i, step in reversed(list(enumerate(self.steps))):
            if step.place == "before":
                x = self._act(step, x, x, self.axis_in, self.axis_in)
            elif step.place == "beside" and self.remembers:
                self.inputs[i] = x
        return put(x)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook: what happens to the output, the first rule innermost."""
        self.mark()
        if not (self.leaves and self.active()):
            return None
        y, put = _first_tensor(output, self.path)
        for i, step in enumerate(self.steps):
            if step.place == "after":
                y = self._act(step, y, y, self.axis_out, self.axis_out)
            elif step.place == "beside":
                x = self._remembered(i) if self.remembers else _input(args, kwargs, self.path)[0]
                y = self._act(step, x, y, self.axis_in, self.axis_out)
        return put(y)

    def _remembered(self, i: int) -> Tensor:
        if i not in self.inputs:
            raise GraftError(
                f"the graft at {self.path}",
                "its end ran without its beginning, so there is no input to run beside.",
                "Put the rule on a module that is called whole, and revert this one.",
            )
        return self.inputs.pop(i)

    def instead(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of a replaced module."""
        step = next(step for step in self.steps if step.place == "instead")
        self.mark()
        return (step.part if self.active() else self._base)(*args, **kwargs)

    def _base(self, *args: Any, **kwargs: Any) -> Any:
        if self.was_forward is not None:
            return self.was_forward(*args, **kwargs)
        return type(self.entry).forward(self.entry, *args, **kwargs)

    def active(self) -> bool:
        """Whether the parts run. While disabled no gradient may be asked for: it would be wrong."""
        if not self.operation.enabled and torch.is_grad_enabled():
            raise GraftError(
                "disabled(model)",
                f"a gradient was asked for through {self.path or 'the model'}, by enable_grad or "
                "the backward of a checkpoint: it would not be that of the model being trained.",
                "Run forward and backward both outside of disabled(model).",
            )
        return self.operation.enabled

    def mark(self) -> None:
        if not torch.compiler.is_compiling():
            self.ran = True

    def _act(self, step: Step, x: Tensor, base: Tensor, axis: int, axis_out: int) -> Tensor:
        """`base` with the part's answer to `x`; parts see features on the last axis."""
        out = step.part(x if axis == -1 else x.movedim(axis, -1))
        if isinstance(out, ops.Routed):
            out = self._routed(out, x)
        if isinstance(out, Tensor) and axis_out != -1:
            out = out.movedim(-1, axis_out)
        out = self._fitting(step, out, base)
        return out if step.scale is None else torch.add(base, out, alpha=step.scale)

    def _routed(self, routed: ops.Routed, x: Tensor) -> Tensor:
        """Keep the gates for `balance_loss` and `routing`, or send their gradient back unseen."""
        balance = self.operation.balance
        if balance is None:
            self.gates = routed.gates
            return routed.output
        if not torch.compiler.is_compiling():
            self.gates = routed.gates.detach()
        if not callable(balance) and _in_half_autocast(x):
            raise GraftError(
                f"apply(..., balance={balance})",
                "under float16 autocast the loss is scaled, and this gradient would not be.",
                f"Write balance=lambda: {balance} * scaler.get_scale(), with your GradScaler.",
            )
        return ops.with_balance(routed.output, routed.gates, balance)

    def _fitting(self, step: Step, out: Any, base: Tensor) -> Tensor:
        if isinstance(out, Tensor) and out.shape == base.shape:
            if out.dtype == base.dtype:
                return out
            if torch.is_autocast_enabled(base.device.type):
                return out.to(base.dtype)
        want, got = _described(base), _described(out)
        raise GraftError(
            f"{type(step.part).__name__} at {self.path or 'the model'}",
            f"it returned {got} where {want} is needed.",
            "A part is given features on the last axis, site.width of them, and returns site.out.",
        )


class Witness:
    """Hook on the root: after a whole forward, every graft must have run."""

    def __init__(self, operation: Operation) -> None:
        self.operation, self.done = operation, False

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.done or torch.compiler.is_compiling() or not self.operation.enabled:
            return
        self.operation.prove()
        self.done = True


class Operation(nn.Module):
    """One application of rules to a model: its parts, its grafts, and the way back.

    `was_*` hold what the model was: (module, name, value) triples, written before each change.
    """

    def __init__(self, name: str, balance: Balance, record: Record) -> None:
        super().__init__()
        self.name, self.balance, self.record, self.enabled = name, balance, record, True
        self.grafts: list[Graft] = []
        self.was_training: list[tuple[nn.Module, bool]] = []
        self.was_trainable: list[tuple[nn.Module, str, bool]] = []
        self.was_value: list[tuple[nn.Module, str, Tensor]] = []
        self.was_buffer: list[tuple[nn.Module, str, Tensor]] = []
        self.was_grad: list[tuple[nn.Module, str, Tensor | None]] = []
        self.model: list[nn.Module] = []  # in a list, so that it is no child of ours

    def open(self, model: nn.Module) -> None:
        """Make room at the root, and remember the flags and buffers of its modules."""
        self.model.append(model)
        for module in model.modules():
            self.was_training.append((module, module.training))
            for name, tensor in module._buffers.items():
                if tensor is not None and (tensor.is_floating_point() or tensor.dim() == 0):
                    self.was_buffer.append((module, name, tensor))
                    self.was_value.append((module, name, tensor.detach().clone()))
        room = room_of(model)
        if room is None:
            room, host = Room(), _host(model)
            if host is not model:
                model.__dict__[ROOM] = room
            host._modules[ROOM] = room
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

    def join(self, site: Site, steps: list[Step]) -> None:
        """Graft `steps` on `site`."""
        graft = Graft(self, site, steps)
        self.grafts.append(graft)
        replaced = any(step.place == "instead" for step in steps)
        earlier = _grafts(graft.entry)
        inner = any(step.place == "before" for each in earlier.values() for step in each.steps)
        graft.remembers |= inner and any(step.place == "beside" for step in steps)
        if graft.enters or graft.remembers or replaced:  # the last rule meets the input first
            graft.entry.register_forward_pre_hook(graft.enter, with_kwargs=True)
            for key in earlier:
                graft.entry._forward_pre_hooks[key] = graft.entry._forward_pre_hooks.pop(key)
        if replaced:
            graft.entry.__dict__["forward"] = graft.instead
        if graft.leaves or not replaced:
            graft.exit.register_forward_hook(graft.leave, with_kwargs=True)

    def watch(self, model: nn.Module) -> None:
        model.register_forward_hook(Witness(self).leave)

    def prove(self) -> None:
        """Raise GraftError unless every graft has run."""
        idle = [graft.path for graft in self.grafts if not graft.ran]
        if idle:
            raise GraftError(
                ", ".join(row["rule"] for row in self.record["rows"] if row["keys"]),
                f"{len(idle)} of {len(self.grafts)} sites never ran in a whole forward: "
                + ", ".join(idle[:4])
                + (" and more." if len(idle) > 4 else "."),
                "The model reads their weights without calling them, or skips them. Put the rule "
                "on a module that is called (its parent, say), and revert this one.",
            )

    @property
    def routers(self) -> list[Graft]:
        """The grafts with a part that routes."""
        return [g for g in self.grafts if g.gates is not None or any(map(_routes, g.steps))]

    def undo(self) -> None:
        """Take everything off and bring everything back, however far the work had come."""
        for model in self.model:
            _unhook(model, self)
        for graft in self.grafts:
            _unhook(graft.entry, self)
            _unhook(graft.exit, self)
            if _owner(graft.entry.__dict__.get("forward")) is graft:
                del graft.entry.__dict__["forward"]
                if graft.was_forward is not None:
                    graft.entry.__dict__["forward"] = graft.was_forward
        for owner, name, flag in self.was_trainable:
            tensor = owner._parameters[name]
            if tensor is not None:
                tensor.requires_grad_(flag)
        for owner, name, grad in self.was_grad:
            tensor = owner._parameters[name]
            if tensor is not None:
                tensor.grad = grad
        self._restore_values()
        for module, training in self.was_training:
            module.training = training
        for model in self.model:
            self._leave_room(model)

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
        room = room_of(model)
        if room is None:
            return
        room._modules.pop(self.name, None)
        if not room._modules:
            _host(model)._modules.pop(ROOM, None)
            model.__dict__.pop(ROOM, None)


def room_of(model: nn.Module) -> Room | None:
    """The room of an operated model; None where nothing was added."""
    room = model._modules.get(ROOM) or model.__dict__.get(ROOM)
    return room if isinstance(room, Room) else None


def is_replaced(module: nn.Module) -> bool:
    """Whether a part of some operation runs instead of the module."""
    return isinstance(_owner(module.__dict__.get("forward")), Graft)


def operations(model: nn.Module) -> list[Operation]:
    """All operations on a model, oldest first."""
    room = room_of(model)
    return [op for op in room.children() if isinstance(op, Operation)] if room else []


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of that name."""
    parameter = module._parameters.get(name)
    return parameter if parameter is not None else module._buffers.get(name)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, in dtype and in place."""
    if a.dtype != b.dtype or a.device != b.device or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _host(model: nn.Module) -> nn.Module:
    """The module whose child the room is: the root, unless it calls or lists its children."""
    for module in model.modules():
        if not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, Room)):
            return module
    raise OperationError(
        type(model).__name__, "it holds no module that does anything.", "Give a model."
    )


def _owner(method: Any) -> Any:
    """The object that a hook is a method of."""
    return getattr(method, "__self__", None)


def _grafts(module: nn.Module) -> dict[int, Graft]:
    """The grafts that meet a module's input, by the key of their hook."""
    owners = {key: _owner(hook) for key, hook in module._forward_pre_hooks.items()}
    return {key: owner for key, owner in owners.items() if isinstance(owner, Graft)}


def _unhook(module: nn.Module, operation: Operation) -> None:
    tables = (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    )
    for hooks, with_kwargs in tables:
        for key, hook in list(hooks.items()):
            owner = _owner(hook)
            if isinstance(owner, (Graft, Witness)) and owner.operation is operation:
                del hooks[key]
                with_kwargs.pop(key, None)


def _routes(step: Step) -> bool:
    return bool(getattr(step.part, "routes", False))


def _input(args: Any, kwargs: Any, path: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    if args and isinstance(args[0], Tensor):
        return args[0], lambda tensor: ((tensor, *args[1:]), kwargs)
    return _first_tensor((args, kwargs), path)


def _first_tensor(values: Any, path: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The first tensor in any nest of tuples, lists and dicts, and a way to put another there."""
    if isinstance(values, Tensor):
        return values, lambda tensor: tensor
    leaves, spec = pytree.tree_flatten(values)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):

            def put(tensor: Tensor, i: int = i) -> Any:
                return pytree.tree_unflatten([*leaves[:i], tensor, *leaves[i + 1 :]], spec)

            return leaf, put
    raise GraftError(
        f"the graft at {path or 'the model'}",
        "it met no tensor in what the module takes or gives.",
        "Put the rule on a module that takes and gives tensors.",
    )


def _in_half_autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
