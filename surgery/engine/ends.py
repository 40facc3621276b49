"""The ends of a stretch that nobody calls: its values are met where they come to be.

What a module gives may become such a value by operations that no hook sees, `x = ff(x) + x`: then
it carries a note of what is to be done with the value, until the last of them has run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import GraftError
from ..structure.stretches import End, carries
from ..structure.trace import op_name
from .features import declared, first_tensor, input_of
from .journal import Journal, owner_of

Extent = tuple[int, int]


class EndHook:
    """Hooks of one end of a stretch: what a site makes of the value there is put in its place.

    entering  whether the stretch begins with the value
    extent    of the stretch, in the order of the walk
    act       makes of the value what is to be there instead
    """

    def __init__(
        self, path: str, end: End, extent: Extent, act: Callable[[Tensor], Tensor], entering: bool
    ) -> None:
        self.path, self.end, self.extent, self.act = path, end, extent, act
        self.entering = entering
        self.names = declared(getattr(type(end.module), "forward", None))

    @property
    def rank(self) -> tuple[bool, int]:
        """Stretches end before others begin; the inner ends first, and begins last."""
        length = self.extent[1] - self.extent[0]
        return self.entering, -length if self.entering else length

    def join(self, journal: Journal) -> None:
        """Hook into the module at which the value is met."""
        if self.end.before:
            journal.hook(self.end.module, self.enter, before=True, with_kwargs=True)
        else:
            journal.hook(self.end.module, self.leave, with_kwargs=True)

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Forward pre-hook of what takes the value."""
        x, put = input_of(args, kwargs or {}, self)
        given = put(self.act(x))
        return given[0] if kwargs is None else given

    def leave(self, module: nn.Module, args: Any, *given: Any) -> Any:
        """Forward hook of what gives the value, or gives of what it is made."""
        y, put = first_tensor(given[-1], self.path)
        return put(noted(y, self) if self.end.ops else self.act(y))


class Note(NamedTuple):
    """What is done with a value when the rest of some operations have run."""

    hook: EndHook
    ops: tuple[str, ...]


class Noted(Tensor):
    """What a module gives, with notes of what is done with what is made of it."""

    notes: tuple[Note, ...]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):
            return result
        name = op_name(func)
        notes = [
            Note(note.hook, note.ops[1:]) if note.ops[0] == name else note
            for value in pytree.tree_leaves((args, kwargs))
            if isinstance(value, Noted)
            for note in value.notes
            if note.ops[0] == name or carries(name)
        ]
        if due := [note.hook for note in notes if not note.ops]:
            return _done(result, func, due)
        return _with(result, notes)


def noted(y: Tensor, hook: EndHook) -> Tensor:
    """The same tensor, with a note more."""
    notes = y.notes if isinstance(y, Noted) else ()
    return _with(y, [*notes, Note(hook, hook.end.ops)])


def _with(y: Tensor, notes: list[Note]) -> Tensor:
    if not notes:
        return y
    whole = y.as_subclass(Noted)
    whole.notes = tuple(notes)
    return whole


def _done(value: Tensor, func: Any, due: list[EndHook]) -> Tensor:
    """The value, as the sites that end or begin there make it."""
    name = getattr(func, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        raise GraftError(
            f"the graft at {due[0].path}",
            f"the model writes into a tensor there, x.{name}(...), and nothing can be put in its "
            "place.",
            "Let the model make a new one there: x = x + y in place of x += y.",
        )
    for hook in in_order(due):
        value = hook.act(value)
    return value


def in_order(hooks: list[EndHook]) -> list[EndHook]:
    """Those that meet one value in the order in which they act; first joined, first told here."""
    ends = [hook for hook in hooks if not hook.entering]
    begins = [hook for hook in reversed(hooks) if hook.entering]
    return sorted([*ends, *begins], key=lambda hook: hook.rank)


def settle(hooks: Any, owns: Callable[[Any], bool], first: bool) -> None:
    """Order the hooks of one module that are ours: ends of stretches first, or else last."""
    owners = {key: owner_of(hook) for key, hook in hooks.items()}
    ours = [key for key, owner in owners.items() if owns(owner) or isinstance(owner, EndHook)]
    ends = [key for key in ours if isinstance(owners[key], EndHook)]
    if not ends:
        return
    key_of = {id(owners[key]): key for key in ends}
    sorted_ends = [key_of[id(hook)] for hook in in_order([owners[key] for key in ends])]
    others = [key for key in ours if key not in ends]
    order = iter([*sorted_ends, *others] if first else [*others, *sorted_ends])
    for key in [next(order) if key in ours else key for key in list(hooks)]:
        hooks[key] = hooks.pop(key)
