"""Parts that were made on the meta device have no start: nothing runs until they are given one.

Memory that comes later holds anything, and torch reads what is still on meta as if it were memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._text import first_few
from ..errors import GraftError, SurgeryError
from .journal import Journal, Value
from .switch import Switch

REMEDY = (
    "Give them values: surgery.materialise(model), once the base has its own, those of apply; "
    "model.load_state_dict(state) with all its surgery.* keys, others."
)


class MissingStart:
    """The tensors of an operation's parts that were made on meta and have no value yet, by name.

    plan  what they were made by, which knows their seed
    """

    def __init__(self, operation: Switch, journal: Journal) -> None:
        self.operation, self.journal = operation, journal
        self.names = {name for name, tensor in tensors_of(operation) if tensor.is_meta}
        self.plan: Any = None
        self.waits = True  # for values of the base that were kept
        self.writes = 0  # that a tensor has seen though nobody gave it a value

    def given(self, names: Collection[str]) -> None:
        """These have values now."""
        self.names.difference_update(names)

    def loaded(self, state: Collection[str], prefix: str, assigned: bool) -> None:
        """torch loads a state: what it has is given, but copied to meta it would be lost."""
        for name, tensor in tensors_of(self.operation):
            if prefix + name in state and (assigned or not tensor.is_meta):
                self.given([name])

    def enter(self, module: nn.Module, args: Any) -> None:
        """The hook before the forward of a model; shapes alone may go through one all on meta."""
        if _is_bare(module):
            return
        if self.names and self.operation.is_on():
            self.check()
        if not torch.compiler.is_compiling():
            self.keep_filled()

    def keep_filled(self) -> None:
        """What was kept on meta of the base is, before anything is trained, what has filled it."""
        entries = self.journal.entries if self.waits else []
        for i, entry in enumerate(entries):
            if isinstance(entry, Value) and entry.value.is_meta:
                tensor = entry.tensor
                if tensor is not None and not tensor.is_meta:
                    entries[i] = entry._replace(value=tensor.detach().clone())
        self.waits = self.waits and self.kept_on_meta

    @property
    def kept_on_meta(self) -> bool:
        """Whether a value of the base that was kept has no memory."""
        return any(value.value.is_meta for value in self.journal.values)

    @property
    def is_watched(self) -> bool:
        """Whether there is anything to look after in a forward."""
        return bool(self.names) or self.kept_on_meta

    def check(self, kind: type[SurgeryError] = GraftError, call: str = "") -> None:
        """Raise an error where a tensor has no value still; one written by hand has."""
        if lost := self.lost():
            raise kind(
                call,
                f"{len(lost)} tensors of parts ({first_few(lost)}) were made on the meta device "
                "and were never given a value.",
                REMEDY,
            )

    def lost(self) -> list[str]:
        """Those that nobody has written to either."""
        for name, tensor in tensors_of(self.operation) if self.names else ():
            if not tensor.is_meta and (tensor.is_inference() or tensor._version > self.writes):
                self.given([name])
        return sorted(self.names)

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows, too, what was written by hand: its tensors are all new."""
        self.lost()
        return {**vars(self), "plan": None, "writes": 1}  # unpickling is one


def tensors_of(operation: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    yield from operation.named_parameters()
    yield from operation.named_buffers()


def _is_bare(model: nn.Module) -> bool:
    """Whether all of it is on meta."""
    return all(p.is_meta for p in model.parameters())
