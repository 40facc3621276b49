"""Taking one of several operations off, whichever: what later ones stand on goes to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._preserve import same
from .._shards import cut
from .hooks import HookedSite
from .journal import Entry, Flag, Gradient, Hook, Journal, Key, Value, completed, owner_of
from .norm_statistics import METHODS, Statistics
from .operation import Operation
from .owned import composed, put_by, slots_of
from .streams import Between


def went_on(chosen: Operation, later: Sequence[Operation]) -> list[Value]:
    """The values of one operation that a later one began with."""
    mine = {_slot(value): value for value in chosen.journal.values}
    return [
        value
        for operation in later
        for value in operation.journal.values
        if (value.module, value.name) in operation.claims
        if (before := mine.get(_slot(value))) and not same(value.value, before.value)
    ]


def take_out(chosen: Operation, done: Sequence[Operation]) -> set[int]:
    """Undo one operation under others; the ids of the tensors that were written to."""
    others = [operation for operation in done if operation is not chosen]
    later = list(done[list(done).index(chosen) + 1 :])
    put_by(done)
    left = {operation: operation.strength for operation in others}
    claims = {(id(module), name) for module, name in [*chosen.claims, *chosen.adopted]}
    meant = [
        (slot, composed(slot, left))
        for slot in slots_of(done)
        if (id(slot.module), slot.name) in claims or slot.name in slot.module._buffers
    ]
    written, after = {id(slot.tensor) for slot, _ in meant}, After(later)

    def work() -> None:
        chosen.undone = True
        entries = chosen.journal.entries
        while entries:
            _take_back(entries[-1], chosen, after)
            entries.pop()
        after.take_over()
        for slot, value in meant:
            Journal().write(slot.module, slot.name, value)
        for module, name in chosen.claims:
            tensor = module._parameters.get(name)
            alone = all((module, name) not in operation.claims for operation in others)
            if alone and tensor is not None and tensor.requires_grad:
                others[0].journal.train(module, name, tensor, False)

    completed(work)
    return written


class After:
    """Later operations: their first change of each place, and what they are to undo, too."""

    def __init__(self, later: list[Operation]) -> None:
        self.later, self.moved = later, list[Entry]()
        self.first: dict[tuple[Any, ...], tuple[Operation, int]] = {}
        for operation in later:
            for i, entry in enumerate(operation.journal.entries):
                if isinstance(entry, (Value, Flag, Gradient, Key)):
                    self.first.setdefault(_slot(entry), (operation, i))

    def find(self, entry: Entry) -> tuple[Operation, int, Any] | None:
        """The next change of the same kind at the same place."""
        found = self.first.get(_slot(entry))
        return found and (*found, found[0].journal.entries[found[1]])

    def move(self, entry: Entry) -> None:
        """Let the next operation undo it; where there is none, undo it now."""
        if not self.later:
            entry.undo()
        elif all(moved is not entry for moved in self.moved[-1:]):
            self.moved.append(entry)

    def take_over(self) -> None:
        """Give the next operation what it is to undo, before its own."""
        if self.moved:
            self.later[0].journal.entries[:0] = reversed(self.moved)
            self.moved.clear()


def _take_back(entry: Entry, chosen: Operation, after: After) -> None:
    """Undo one change, or let a later operation undo it: the one that stands on it."""
    if isinstance(entry, (Value, Flag, Gradient)):
        _hand_on(entry, after)
    elif isinstance(entry, Key):
        _take_back_key(entry, chosen, after)
    elif isinstance(entry, Hook) and not isinstance(entry.owner, Between):
        entry.undo()
    else:
        after.move(entry)


def _hand_on(entry: Value | Flag | Gradient, after: After) -> None:
    """What a tensor was before this is what it was before the next that changed it."""
    if found := after.find(entry):
        operation, i, theirs = found
        if isinstance(entry, Value):
            _rebase(operation, theirs, entry.value)
        field = {Value: "value", Flag: "trained", Gradient: "grad"}[type(entry)]
        operation.journal.entries[i] = theirs._replace(**{field: getattr(entry, field)})
        return
    if isinstance(entry, Value):
        return
    claimed = any((entry.module, entry.name) in operation.claims for operation in after.later)
    if claimed or (isinstance(entry, Flag) and entry.trained):  # which others want frozen, too
        after.move(entry)
    else:
        entry.undo()


def _rebase(operation: Operation, theirs: Value, before: Tensor) -> None:
    """What an operation made of a tensor, as much away from what that was before another's."""
    own = operation.own.get((theirs.module, theirs.name))
    if own is not None and own.is_floating_point() and not same(theirs.value, before):
        moved = own - cut(theirs.value, own)
        operation.own[theirs.module, theirs.name] = cut(before, own) + moved


def _take_back_key(entry: Key, chosen: Operation, after: After) -> None:
    if entry.table == "_modules" and entry.new is chosen:
        entry.undo()
    elif isinstance(entry.module, Between) and entry.key == "switches":
        switches = tuple(on for on in entry.module.switches if owner_of(on) is not chosen)
        entry.module.switches = switches
    elif theirs := after.find(entry):
        operation, i, key = theirs
        operation.journal.entries[i] = key._replace(was=entry.was)
        replaced = owner_of(key.new)
        if entry.key == "forward" and isinstance(replaced, HookedSite):
            replaced.was_forward = None if isinstance(entry.was, type) else entry.was
    elif entry.key == "forward":
        entry.undo()
    else:
        methods = owner_of(entry.new)
        if entry.key in METHODS and isinstance(methods, Statistics) and after.later:
            methods.switch = after.later[0]
        after.move(entry)


def _slot(entry: Any) -> tuple[Any, ...]:
    if isinstance(entry, Key):
        return type(entry), id(entry.module), entry.table, entry.key
    return type(entry), id(entry.module), entry.name
