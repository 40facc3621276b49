"""The ends of a stretch that nobody calls: its values are met where they come to be.

What a module gives may become such a value by operations that no hook sees, `x = ff(x) + x`: then
it carries a note of what is to be done with the value, until the last of them has run.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import GraftError
from ..structure.stretches import End, carries
from ..structure.trace import MOVES, SCALES, SUMS, op_name
from .features import declared, first_tensor, input_of
from .journal import Journal

NAMES = {  # of what sums, scales and moves features: compiled code cannot work them out
    func: op_name(func)
    for space in (torch, Tensor, nn.functional)
    for name in sorted(SUMS | SCALES | MOVES)
    for spelt in (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__")
    if (func := getattr(space, spelt, None)) is not None
}
AUGMENTED = range(13, 26)  # what BINARY_OP does where it is written x += y (Python 3.11 and later)


class Site(Protocol):
    """What acts at the ends of a stretch: on the value that it takes, and that which it gives."""

    path: str
    extent: tuple[int, int]

    def begin(self, x: Tensor) -> Tensor: ...

    def end(self, y: Tensor) -> Tensor: ...

    def active(self) -> bool: ...


class EndHook:
    """Hooks of one end of a stretch: what a site makes of the value there is put in its place.

    entering  whether the stretch begins with the value
    """

    def __init__(self, site: Site, end: End, entering: bool) -> None:
        self.site, self.end, self.entering, self.path = site, end, entering, site.path
        self.names = declared(getattr(type(end.module), "forward", None))

    def act(self, value: Tensor) -> Tensor:
        """What is to be there instead."""
        return self.site.begin(value) if self.entering else self.site.end(value)

    @property
    def rank(self) -> tuple[bool, int]:
        """Stretches end before others begin; the inner ends first, and begins last."""
        length = self.site.extent[1] - self.site.extent[0]
        return self.entering, -length if self.entering else length

    def join(self, journal: Journal) -> None:
        """Hook into the module at which the value is met."""
        if self.end.before:
            journal.hook(self.end.module, self.enter, before=True, with_kwargs=True)
        else:
            journal.hook(self.end.module, self.leave, with_kwargs=True)

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Forward pre-hook of what takes the value."""
        if self.end.ops and not self.site.active():
            return None
        x, put = input_of(args, kwargs or {}, self)
        given = put(self._met(x))
        return given[0] if kwargs is None else given

    def leave(self, module: nn.Module, args: Any, *given: Any) -> Any:
        """Forward hook of what gives the value, or gives of what it is made."""
        if self.end.ops and not self.site.active():
            return None
        y, put = first_tensor(given[-1], self.path)
        return put(self._met(y))

    def _met(self, value: Tensor) -> Tensor:
        """What is given on: what is there instead, or a note of what it is to become."""
        return noted(value, self) if self.end.ops else self.act(value)


class Note(NamedTuple):
    """What is done with a value when the rest of some operations have run."""

    hook: EndHook
    ops: tuple[str, ...]


class Noted(Tensor):
    """What a module gives, with notes of what is done with what is made of it."""

    notes: tuple[Note, ...]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = _name(func), kwargs or {}
        given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Noted)]
        notes = [note for value in given for note in _after(name, value.notes)]
        due = [note.hook for note in notes if not note.ops]
        with torch._C.DisableTorchFunctionSubclass():
            versions = [_version(v) for v in given]
            result = _ran(func, args, kwargs, bool(due))
            if not isinstance(result, Tensor) or _is_untouched(result, given, versions):
                return result
        if due:
            result = _done(result, (*args, *kwargs.values()), due)
        return _with(result, [note for note in notes if note.ops])


def _ran(func: Any, args: Any, kwargs: Any, due: bool) -> Any:
    """What an operation gives; where a note is due, of its own even if written x += y."""
    run = _in_a_copy(func) if due and _is_augmented() else func
    return run(*args, **kwargs)


def _version(value: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or value.is_inference() else value._version


def _is_untouched(result: Tensor, given: list[Noted], versions: list[int]) -> bool:
    """Whether it is what was given, and nothing was done to it: `x.flatten(2)` of three axes."""
    was = zip(given, versions, strict=True)
    return any(result is value and _version(value) == version for value, version in was)


def _name(func: Any) -> str:
    return NAMES.get(func) or ("" if torch.compiler.is_compiling() else op_name(func))


def _after(name: str, notes: tuple[Note, ...]) -> list[Note]:
    """What is still to be done, when an operation of a name has run."""
    on = [Note(note.hook, note.ops[1:]) for note in notes if note.ops[0] == name]
    return on + [note for note in notes if note.ops[0] != name and carries(name)]


def noted(y: Tensor, hook: EndHook) -> Tensor:
    """The same tensor, with a note more."""
    notes = y.notes if isinstance(y, Noted) else ()
    return _with(y, [*notes, Note(hook, hook.end.ops)])


def _with(y: Tensor, notes: list[Note]) -> Tensor:
    if not (notes or isinstance(y, Noted)):
        return y
    if type(y) not in (Tensor, nn.Parameter, Noted):
        raise _unfollowed(y, notes[0].hook)
    whole = y if isinstance(y, Noted) else y.as_subclass(Noted)
    whole.notes = tuple(notes)
    return whole


def _unfollowed(y: Tensor, hook: EndHook) -> GraftError:
    return GraftError(
        f"the graft at {hook.path or 'the model'}",
        f"what becomes of the output of a {type(hook.end.module).__name__} there, in sums that no "
        f"module makes, cannot be followed in a {type(y).__name__}.",
        "Export with torch.export.export(..., strict=True), or run it on plain tensors.",
    )


def _is_augmented() -> bool:
    """Whether what runs was written x += y: what it gives takes the place of x, whatever it is.

    (torch says add_ for x.add_(y) too, where what it gives may be dropped.)
    """
    if torch.compiler.is_compiling():
        return False
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_name == "__torch_function__":  # of others, around it
        frame = frame.f_back
    code, at = frame.f_code.co_code, frame.f_lasti
    name = dis.opname[code[at]]
    return name.startswith("INPLACE_") or (name == "BINARY_OP" and code[at + 1] in AUGMENTED)


def _in_a_copy(func: Callable[..., Any]) -> Callable[..., Any]:
    """What writes into its first argument, written into a copy of it."""
    return lambda x, *others, **kwargs: func(x.clone(), *others, **kwargs)


def _done(value: Tensor, given: tuple[Any, ...], due: list[EndHook]) -> Tensor:
    """The value, as the sites that end or begin there make it, of what an operation was given."""
    if any(value is each for each in given):
        raise GraftError(
            f"the graft at {due[0].path or 'the model'}",
            "the model writes its sum into a tensor there (x.add_(y)), and nothing can be put in "
            "the place of that.",
            "Let the model make a new one there: x = x + y (x += y will do, if not compiled).",
        )
    for hook in sorted(due, key=lambda hook: hook.rank):
        value = hook.act(value)
    return value
