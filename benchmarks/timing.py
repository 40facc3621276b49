"""Interleaved timing and live-tensor memory: what every benchmark here measures with."""

from __future__ import annotations

import gc
import platform
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Action = Callable[[], object]
Prepare = Callable[[], Action]  # makes, untimed, what one round times


@dataclass(frozen=True)
class Times:
    """CPU seconds of this process for each action: `runs[name]` holds the rounds of every run."""

    runs: Mapping[str, list[list[float]]]

    def best(self, name: str) -> float:
        """The fastest round of all, in seconds."""
        return min(map(min, self.runs[name]))

    def ratios(self, name: str, other: str) -> tuple[float, float, float]:
        """(median, lowest, highest) over the runs of fastest round to fastest round."""
        pairs = zip(self.runs[name], self.runs[other], strict=True)
        ratios = [min(a) / min(b) for a, b in pairs]
        return median(ratios), min(ratios), max(ratios)


def interleaved(actions: Mapping[str, Prepare], rounds: int, runs: int = 3, warm: int = 1) -> Times:
    """Time the actions in turn, round after round, so that noise meets all of them alike."""
    times: dict[str, list[list[float]]] = {name: [] for name in actions}
    for _ in range(warm):
        for prepare in actions.values():
            prepare()()
    for _ in range(runs):
        for name in actions:
            times[name].append([])
        for _ in range(rounds):
            for name, prepare in actions.items():
                times[name][-1].append(_seconds(prepare()))
    return Times(times)


def _seconds(action: Action) -> float:
    start = time.process_time()  # not the clock on the wall: other processes may be running
    output = action()
    stop = time.process_time()
    del output
    return stop - start


def fresh(make: Callable[[], Any], act: Callable[[Any], object]) -> Prepare:
    """A round that times `act` on what `make` makes anew, after a garbage collection."""

    def prepare() -> Action:
        subject = make()
        gc.collect()
        return lambda: act(subject)

    return prepare


def steady(action: Action) -> Prepare:
    """A round that times the same thing over again."""
    return lambda: action


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make, as long as each storage lives.

    `peak` is the most that lived at once. What was there before does not count, nor does what an
    operation allocates and frees inside of itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(outputs):
            storage = tensor.untyped_storage()
            if storage._cdata not in inputs and storage._cdata not in self._known:
                self._count(storage)
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: object) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


def peak(action: Action) -> int:
    """The most bytes of new tensors that lived at once while `action` ran."""
    live = Live()
    with live:
        action()
    return live.peak


def machine() -> str:
    """CPU, torch and threads, in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    cores = len(names) or "?"
    return (
        f"{cpu} ({cores} cores seen), {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread"
    )


def verdict(value: float, most: float) -> str:
    """Whether `value` is at most its target."""
    return f"<= {most:g}: {'met' if value <= most else 'MISSED'}"
