"""The map of patches that a model makes in each forward, for parts that read tokens as a map.

No library's names: the convolutions before the blocks say it, as they run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..errors import GraftError
from ..parts.conv import MOST
from ..rules.layout import Layout
from .streams import is_recomputing
from .tracing import Here


class Seen(NamedTuple):
    """A map of patches that a convolution gave: samples, rows, columns, channels."""

    samples: int
    rows: int
    columns: int
    channels: int


def _merged(seen: Seen) -> Iterator[tuple[int, int]]:
    """The maps of a pyramid: patches merged k by k, the last ones padded."""
    for k in (1, 2, 4, 8, 16, 32):
        yield -(-seen.rows // k), -(-seen.columns // k)


class Probe(Protocol):
    """Looks into a forward of the proof by example."""

    def embedded(self, patches: Tensor) -> Tensor | None:
        """A convolution gave patches (b, c, h, w)."""

    def entered(self, rows: Tensor) -> Tensor:
        """Tokens (b, n, width) came to a block: what it is to be given."""

    def left(self, rows: Tensor) -> None:
        """Tokens (b, n, width) left a block."""


class PatchMap:
    """What the convolutions before some blocks gave last, in each thread; for parts at `path`.

    parts    those that read tokens as a map (not carried along by copies)
    windows  (rows, columns) of windows, by how many tokens they have
    trained  those with gradients since the last recomputation, which a checkpoint may have to be
             told of again
    """

    def __init__(
        self, path: str, width: int, axis: int, windows: dict[int, tuple[int, int]]
    ) -> None:
        self.path, self.width, self.axis, self.windows = path, width, axis, windows
        self.parts: list[nn.Module] = []
        self.probe: Probe | None = None
        self.begin()

    def begin(self) -> None:
        """As if no forward had been."""
        # by thread; by the number of the convolution, the last that ran first
        self.last: dict[int, dict[int, Seen]] = {}
        self.compiled: dict[int, Seen] = {}  # of any thread, for compiled code
        self.here = Here()
        self.trained: set[Seen] = set()
        self.told: dict[tuple[int, ...], set[Seen]] = {}  # by the shape of what came
        self.recomputed = False

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("path", "width", "axis", "windows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def note(self, conv: int, output: Tensor) -> Tensor | None:
        """A convolution gave (b, c, h, w), that of this number."""
        samples, channels, rows, columns = output.shape
        seen = Seen(samples, rows, columns, channels)
        if torch.compiler.is_compiling():
            # not what an earlier forward left: compiled code would be made again where it differs
            self.compiled = _first(conv, seen, self.compiled if self.here.noted() else {})
            self.here.note()
            return None
        thread = threading.get_ident()
        self.last[thread] = _first(conv, seen, self.last.get(thread, {}))
        self.compiled = _first(conv, seen, self.compiled)
        if is_recomputing() or self.recomputed:
            self.trained, self.told, self.recomputed = set(), {}, False
        if torch.is_grad_enabled():
            self.trained.add(seen)
        return self.probe.embedded(output) if self.probe else None

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model: what comes to its blocks alone is another matter."""
        if not torch.compiler.is_compiling():
            self.last.pop(threading.get_ident(), None)

    def tell(self, module: nn.Module, args: Any) -> Any:
        """Forward pre-hook of a part that reads a map: it is told how its tokens lie."""
        x = args[0]
        if x.dim() == 4:
            self._check_map(x, self.seen(x))
        return (x, self.layout(x, self.seen(x))) if x.dim() == 3 and len(args) == 1 else None

    def _check_map(self, x: Tensor, seen: Seen | None) -> None:
        """Raise GraftError where x are as many as the patches, and no map of them (NesT's rows)."""
        size = tuple(x.shape[1:3])
        grids = [] if seen is None or seen.samples != x.shape[0] else list(_merged(seen))
        if size not in grids and size[0] * size[1] in {rows * columns for rows, columns in grids}:
            raise self._error(
                f"it was given {tuple(x.shape)}, and maps of the patches would be "
                f"{' x '.join(map(str, grids[0]))}: how they lie in it is not known.",
                "Use parts that take each token alone.",
            )

    def seen(self, x: Tensor) -> Seen | None:
        """What the convolution gave that made tokens x."""
        shape = tuple(x.shape[:2])
        if not is_recomputing():
            seen = self._made(self._given(), shape)
            if seen is not None and not torch.compiler.is_compiling():
                self.told.setdefault(shape, set()).add(seen)
            return seen
        self.recomputed = True
        fitting = self.trained & self.told.get(shape, self.trained)
        maps = {f"{seen.rows} x {seen.columns}" for seen in fitting}
        if len(maps) > 1:
            raise self._error(
                f"forwards with patches of {' and '.join(sorted(maps))} were made before this "
                "backward: a checkpoint, which runs again, cannot tell of which it is.",
                "Call backward after each forward, or use no checkpoints.",
            )
        return next(iter(fitting), None)

    def _given(self) -> list[Seen]:
        """What convolutions gave in this forward, the last first."""
        if torch.compiler.is_compiling():
            return list(self.compiled.values())
        return list(self.last.get(threading.get_ident(), {}).values())

    def _made(self, given: list[Seen], shape: tuple[int, ...]) -> Seen | None:
        """Of what convolutions gave, the last that fits: others make positions (XCiT), or the
        tokens of another branch (CrossViT)."""

        def before(seen: Seen) -> int:
            n = shape[1] if seen.samples == shape[0] else shape[0]
            return n - seen.rows * seen.columns

        of_batch = [seen for seen in given if seen.samples in shape]
        fitting = [seen for seen in of_batch if 0 <= before(seen) <= MOST]
        for some in (fitting, of_batch, given):
            if some:
                return next((seen for seen in some if seen.channels == self.width), some[0])
        return None

    def layout(self, x: Tensor, seen: Seen | None) -> Layout:
        """How tokens x lie, where a convolution gave `seen`. Raises GraftError where some went."""
        if seen is None:
            return Layout(None, self.axis)
        axis, (a, b) = self.axis, x.shape[:2]
        samples = (b, a)[axis]  # compared first: an exported batch of any size is compared no more
        if seen.samples != samples:
            if seen.samples != (a, b)[axis]:
                return Layout(self._part_of(a, b, seen), self.axis)
            axis = 1 - axis
        n = (a, b)[axis]
        return Layout(self._grid(n, seen), axis)

    def _grid(self, n: int, seen: Seen) -> tuple[int, int] | None:
        rows, columns = seen.rows, seen.columns
        if rows * columns <= n:
            return rows, columns
        if seen.channels == self.width:
            raise self._error(
                f"it was given {n} tokens, where the model made {rows} x {columns} patches: some "
                "were dropped, and which are neighbours is not known.",
                "Train without dropping or masking patches (timm: patch_drop_rate=0), or use "
                "parts that take each token alone.",
            )
        return next((grid for grid in _merged(seen) if n == grid[0] * grid[1]), None)

    def _part_of(self, a: int, b: int, seen: Seen) -> tuple[int, int] | None:
        """Several rows a sample are windows, where a table of positions tells how they lie.

        Fewer are of another map, where there are too few for all patches (TNT has one in each).
        """
        if b in self.windows and a % seen.samples == 0:
            return self.windows[b]
        if a * b < seen.samples * seen.rows * seen.columns and seen.samples % a == 0:
            return None
        raise self._error(
            f"it was given ({a}, {b}, ...), where the model made {seen.rows} x {seen.columns} "
            f"patches of each of {seen.samples} samples: how they lie in it is not known.",
            "Use parts that take each token alone.",
        )

    def _error(self, fact: str, remedy: str) -> GraftError:
        return GraftError(f"the graft at {self.path}", fact, remedy)


class ConvNote:
    """A hook on one of the convolutions that make patches."""

    def __init__(self, patches: PatchMap, number: int) -> None:
        self.patches, self.number = patches, number

    def leave(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        """Forward hook."""
        is_map = isinstance(output, Tensor) and output.dim() == 4
        return self.patches.note(self.number, output) if is_map else None


def _first(conv: int, seen: Seen, others: dict[int, Seen]) -> dict[int, Seen]:
    """What one convolution gave, before what the others gave."""
    return {conv: seen, **{i: old for i, old in others.items() if i != conv}}
