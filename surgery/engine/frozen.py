"""Whether what is frozen stays what it is: torch counts how often a tensor is written to."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.parameter import is_lazy

# times that all may have been written to: DistributedDataParallel does it once as it wraps, and
# loads that nobody sees (of a checkpoint, piece by piece)
WHOLE = 2


class Seen(NamedTuple):
    """A tensor as it was: how often it had been written to, and whether it had a gradient."""

    tensor: weakref.ref[Tensor]
    version: int
    had_gradient: bool


class Frozen:
    """The frozen parameters of a model, as they were when rules were applied.

    Copies know nothing: their tensors are others, with counts of their own.
    """

    def __init__(self) -> None:
        self.seen: dict[int, Seen] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"seen": {}}

    def remember(self, tensors: Iterable[Tensor | None]) -> None:
        """These are frozen now."""
        for tensor in tensors:
            if tensor is not None and not tensor.requires_grad and _counts(tensor):
                self.seen[id(tensor)] = _seen(tensor)

    def again(self, tensors: Collection[int]) -> None:
        """These, by id, are right as they are now."""
        for key, tensor in self._here():
            if key in tensors:
                self.seen[key] = _seen(tensor)

    def changed(self) -> set[int]:
        """Those that were written to, or trained (fused optimisers write uncounted), by id."""
        writes = {key: t._version - self.seen[key].version for key, t in self._here()}
        common = min(writes.values(), default=0)
        allowed = common if common <= WHOLE else 0
        trained = {
            key
            for key, tensor in self._here()
            if not (self.seen[key].had_gradient or tensor.requires_grad or tensor.grad is None)
        }
        return trained | {key for key, count in writes.items() if count > allowed}

    def kept(self) -> Kept:
        """What undoes the count of what is written from now on until then: it is ours."""
        writes = {key: t._version - self.seen[key].version for key, t in self._here()}
        return Kept(self, writes)

    def written(self, times: Mapping[int, int]) -> None:
        """Each of these, by id, was written to so often by others."""
        for key, tensor in self._here():
            if key in times:
                version = tensor._version - times[key]
                self.seen[key] = self.seen[key]._replace(version=version)

    def _here(self) -> Iterator[tuple[int, Tensor]]:
        """Those that live."""
        for key, seen in [*self.seen.items()]:
            if (tensor := seen.tensor()) is not None and _counts(tensor):
                yield key, tensor


class Kept(NamedTuple):
    """In a journal: how often each, by id, had been written to by others."""

    frozen: Frozen
    writes: dict[int, int]

    def undo(self) -> None:
        self.frozen.written(self.writes)

    def obstacle(self) -> None:
        return None


def _seen(tensor: Tensor) -> Seen:
    return Seen(weakref.ref(tensor), tensor._version, tensor.grad is not None)


def _counts(tensor: Tensor) -> bool:
    """Whether it has values, and counts."""
    return not (is_lazy(tensor) or tensor.is_meta or tensor.is_inference())
