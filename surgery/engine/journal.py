"""Every change to a model, written down before it is made; undoing is walking back.

Entries are plain data: a copy or a pickle of an operated model takes its own way back along.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from .._preserve import same
from .._shards import cut, into_shards
from .obstacles import Obstacle, in_the_way, tensor_of

Kind = TypeVar("Kind")
Result = TypeVar("Result")


class Absent:
    """Stands for no value at all."""


class Anything:
    """Stands for a value that others may have put there."""


class Entry(Protocol):
    """One change: where, and what was there."""

    def undo(self) -> None:
        """Bring back what was there, also where the change was not made after all."""

    def obstacle(self) -> Obstacle | None:
        """Why it cannot be undone as things are now; None where it can."""


class Key(NamedTuple):
    """A key of a dict that a module keeps: `table` names it, "" is the module's own attributes."""

    module: Any  # or another object, one that has hooks
    table: str
    key: str
    was: Any
    new: Any

    def undo(self) -> None:
        entries = _table(self.module, self.table)
        if self.new is not Anything and entries.get(self.key, Absent) != self.new:
            return  # others have put something there since, or it was never changed
        if self.was is Absent:
            entries.pop(self.key, None)
        else:
            entries[self.key] = self.was

    def obstacle(self) -> None:
        return None


class Hook(NamedTuple):
    """Hooks on a module that are methods of `owner`."""

    module: nn.Module
    owner: object

    def undo(self) -> None:
        unhook(self.module, self.owner)

    def obstacle(self) -> None:
        return None


class Flag(NamedTuple):
    """Whether a parameter was trained; it is found by its name."""

    module: nn.Module
    name: str
    trained: bool

    def undo(self) -> None:
        parameter = self.module._parameters.get(self.name)
        if parameter is not None and (parameter.is_floating_point() or not self.trained):
            parameter.requires_grad_(self.trained)  # one of integers, quantised since, cannot be

    def obstacle(self) -> None:
        return None


class Gradient(NamedTuple):
    """The gradient of a parameter; it is found by its name."""

    module: nn.Module
    name: str
    grad: Tensor | None

    def undo(self) -> None:
        parameter = self.module._parameters.get(self.name)
        if parameter is not None:  # it may have been moved or cast since
            grad = self.grad
            parameter.grad = None if grad is None else cut(grad, parameter).to(parameter)

    def obstacle(self) -> None:
        return None


class Value(NamedTuple):
    """The value of a parameter, or of a buffer and which tensor that was; found by its name."""

    module: nn.Module
    name: str
    value: Tensor
    buffer: Tensor | None

    @property
    def tensor(self) -> Tensor | None:
        """The tensor that has its name now."""
        return tensor_of(self.module, self.name)

    def undo(self) -> None:
        if self.buffer is not None:
            self.module._buffers[self.name] = self._home(self.buffer)
        if self.tensor is not None:
            _write(self.tensor, self.value)

    def _home(self, was: Tensor) -> Tensor:
        """The buffer that its value goes to: what was there, unless it was moved or cast."""
        now = self.module._buffers.get(self.name)
        if now is None or _alike(now, was):
            return was
        return now if now.shape == self.value.shape else was.to(now)

    def obstacle(self) -> Obstacle | None:
        return None if self.buffer is not None else in_the_way(self.module, self.name, self.value)


class Numbers(NamedTuple):
    """The value of one tensor, wherever it is."""

    tensor: Tensor
    value: Tensor

    def undo(self) -> None:
        _write(self.tensor, self.value)

    def obstacle(self) -> None:
        return None


class InShards(NamedTuple):
    """What is sharded goes back to its pieces first: what came before was written to these."""

    model: nn.Module

    def undo(self) -> None:
        into_shards(self.model)

    def obstacle(self) -> None:
        return None


class Lent(NamedTuple):
    """A value that is another for a while: when it is back, autograd need know nothing of it.

    Graphs of before that time are right again then. Inside it a tensor that was written to has a
    count of its own, by which torch refuses to go back through such a graph.
    """

    entry: Value | Numbers
    tensor: Tensor
    version: Any

    def undo(self) -> None:
        self.entry.undo()
        if self.entry.tensor is self.tensor and not self.tensor.is_inference():
            self.version.__exit__()

    def obstacle(self) -> Obstacle | None:
        return self.entry.obstacle()


class Journal:
    """Changes in the order in which they were made.

    >>> model, journal = nn.Linear(2, 2), Journal()
    >>> journal.set(model, "training", False)
    >>> journal.undo()  # what stood in the way
    []
    >>> model.training
    True
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    # remembered: others may change it until then ------------------------------------------------

    def keep(self, module: nn.Module, key: str) -> None:
        """An attribute."""
        self.entries.append(Key(module, "", key, vars(module).get(key, Absent), Anything))

    def keep_value(self, module: nn.Module, name: str, lent: bool = False) -> None:
        """The value of a parameter or buffer, if there is one of that name; `lent`: for a while."""
        tensor, buffer = tensor_of(module, name), module._buffers.get(name)
        if tensor is not None:
            self._keep(Value(module, name, tensor.detach().clone(), buffer), tensor, lent)

    def keep_gradient(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """The gradient of a parameter, which is that of the module of that name."""
        self.entries.append(Gradient(module, name, parameter.grad))

    def keep_flag(self, module: nn.Module, name: str, trained: bool) -> None:
        """Whether a parameter is to be trained, once this is undone."""
        self.entries.append(Flag(module, name, trained))

    def keep_numbers(self, tensor: Tensor, lent: bool = False) -> None:
        """The value of a tensor; `lent`: for a while."""
        self._keep(Numbers(tensor, tensor.detach().clone()), tensor, lent)

    def _keep(self, entry: Value | Numbers, tensor: Tensor, lent: bool) -> None:
        if lent and not tensor.is_inference():
            version = torch.autograd.grad_mode._unsafe_preserve_version_counter(tensor)
            self.entries.append(Lent(entry, tensor, version))
        else:
            self.entries.append(entry)

    def keep_again(self, tensors: Collection[int]) -> None:
        """The values of these, by id, as they are now: the base is another."""
        for i, entry in enumerate(self.entries):
            if isinstance(entry, Value) and id(entry.tensor) in tensors:
                tensor: Any = entry.tensor
                self.entries[i] = entry._replace(value=tensor.detach().clone())

    # changed -------------------------------------------------------------------------------------

    def set(self, module: Any, key: str, new: Any, table: str = "") -> None:
        """Another value for an attribute, or for a key of the dict that `table` names."""
        entries = _table(module, table)
        self.entries.append(Key(module, table, key, entries.get(key, Absent), new))
        entries[key] = new

    def remove(self, module: nn.Module, key: str) -> None:
        """No such attribute."""
        self.entries.append(Key(module, "", key, vars(module).get(key, Absent), Absent))
        vars(module).pop(key, None)

    def hook(self, module: nn.Module, method: Any, before: bool = False, **named: Any) -> None:
        """A hook, which is a method of an object: before the module's forward, or after it."""
        self.entries.append(Hook(module, owner_of(method) or method))
        register = module.register_forward_pre_hook if before else module.register_forward_hook
        register(method, **named)

    def train(self, module: nn.Module, name: str, parameter: nn.Parameter, flag: bool) -> None:
        """A parameter, the module's of that name, is trained from now on, or not."""
        self.entries.append(Flag(module, name, parameter.requires_grad))
        parameter.requires_grad_(flag)

    def write(self, module: nn.Module, name: str, value: Tensor, lent: bool = False) -> None:
        """Another value of a parameter or buffer; `lent`: for a while.

        Another buffer, where a forward has made one of another shape (tables of rotary positions).
        """
        self.keep_value(module, name, lent)
        tensor = tensor_of(module, name)
        if name in module._buffers and tensor is not None and tensor.shape != value.shape:
            module._buffers[name] = value.to(tensor, copy=True)
        elif tensor is not None:
            _copy(tensor, value)

    def overwrite(self, tensor: Tensor, value: Tensor) -> None:
        """Another value of a tensor."""
        self.keep_numbers(tensor)
        _copy(tensor, value)

    # looked at, and undone -----------------------------------------------------------------------

    @property
    def values(self) -> Iterator[Value]:
        """The values that were kept."""
        return (entry for entry in self.entries if isinstance(entry, Value))

    @property
    def buffers(self) -> Iterator[Value]:
        """Those of them that are of buffers, which a forward in training may change."""
        return (value for value in self.values if value.buffer is not None)

    @property
    def obstacles(self) -> list[Obstacle]:
        """Why it cannot be undone as things are now, place by place; nothing is changed."""
        return [it for it in (entry.obstacle() for entry in self.entries) if it is not None]

    def undo(self) -> list[Obstacle]:
        """Bring everything back, last change first, however far the work had come.

        Returns what stood in the way of the rest. An interrupt in it leaves nothing half done.
        """
        return completed(self._undo)

    def _undo(self) -> list[Obstacle]:
        obstacles = []
        for entry in reversed(self.entries):
            if (obstacle := entry.obstacle()) is not None:
                obstacles.append(obstacle)
            else:
                entry.undo()
        self.entries.clear()
        return obstacles


def completed(work: Callable[[], Result]) -> Result:
    """What work gives that may be done twice; an interrupt in it comes when it is done whole."""
    try:
        return work()
    except BaseException:
        work()
        raise


def owners_of(hooks: Mapping[int, Any], kind: type[Kind]) -> dict[int, Kind]:
    """The objects of a kind that hooks are methods of, by the key of the hook."""
    owners = {key: owner_of(hook) for key, hook in hooks.items()}
    return {key: owner for key, owner in owners.items() if isinstance(owner, kind)}


def owner_of(method: Any) -> Any:
    """The object that a method is of."""
    return getattr(method, "__self__", None)


def unhook(module: nn.Module, owner: object) -> None:
    """Take off the hooks that are methods of `owner`, however many they are."""
    tables = (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    )
    for hooks, with_kwargs in tables:
        for key, other in owners_of(hooks, type(owner)).items():
            if other is owner:
                with_kwargs.pop(key, None)  # first: an interrupt must leave the hook to be found
                module._forward_hooks_always_called.pop(key, None)
                del hooks[key]


def _table(module: object, name: str) -> dict[str, Any]:
    entries: dict[str, Any] = vars(module)[name] if name else vars(module)
    return entries


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.device, a.dtype) == (b.device, b.dtype)


def _write(tensor: Tensor, value: Tensor) -> None:
    """Bring a value back, unless it is there to the bit."""
    if not (tensor.is_meta or value.is_meta or same(tensor, value)):
        _copy(tensor, value)


def _copy(tensor: Tensor, value: Tensor) -> None:
    """Write numbers; autocast, which keeps what it has cast of a parameter, casts it anew."""
    with torch.no_grad():
        tensor.copy_(cut(value, tensor))
    torch.clear_autocast_cache()
