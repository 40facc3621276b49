"""Parts that mix tokens: what a model knows of its tokens is not guessed otherwise.

Where tokens are words, or no map, such parts are refused. Where a 2-D convolution makes patches,
each forward shows how many, in rows and columns, and the parts are told. Where a mask hides tokens
from others, the forward is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._text import first_few
from ..errors import GraftError, RuleError
from ..parts.conv import MOST
from ..rules.layout import Layout, map_readers, mixes_tokens
from ..structure.anatomy import roles_of
from ..structure.embedding import embedded
from ..structure.module_tree import Site, Tree, holders
from .features import declared
from .hooks import Switch
from .journal import Journal
from .placement import Placement
from .streams import is_recomputing

GUESSED = "no 2-D convolution tells how tokens lie: they are taken as a square map, row by row"
LAST = "patches are taken to be the last tokens, row by row: example= shows whether they are"
NOT_A_MAP = {
    "words": "words (of {}): the next would reach those before it, and padding the others",
    "line": "pieces of a sequence or a cloud ({} is a 1-D convolution), no map of patches",
    "volume": "pieces of a volume ({} is a 3-D convolution), no map of patches",
}
HIDDEN = -100.0  # what an additive mask has at most where it hides (Swin's)


def check_mixing(
    placements: Iterable[Placement], parts: Mapping[str, nn.Module], tree: Tree
) -> None:
    """Raise RuleError where a part mixes tokens that are no map, or that hear only some others.

    A part in place of a module mixes as that does, and where it does. Where nothing tells how
    tokens lie, the part has a note that it is guessed.
    """
    for p in placements:
        part = parts[p.key]
        if p.edit.place == "instead" or not mixes_tokens(part):
            continue
        told, reads = embedded(p.place, tree), any(map_readers(part))
        joined = p.edit.place not in ("into", "among")  # tokens that are put in hear all by design
        if told.kind in NOT_A_MAP and (reads or (joined and told.kind == "words")):
            raise RuleError(
                p.rule.short,
                f"{type(part).__name__} at {p.site.path or 'the model'} lets tokens hear others, "
                f"and those are {NOT_A_MAP[told.kind].format(told.makers[0].path)}.",
                "Use parts that take each token alone (adapter, lora); or leave the place out "
                "with & ~inside(...).",
            )
        if reads and getattr(part, "note", None) is None:
            part.note = LAST if told.kind else GUESSED  # type: ignore[assignment]


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
        self.last: dict[int, dict[int, Seen]] = {}  # by thread (0: any, for compiled code), by
        # the number of the convolution, the last that ran first
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
        for thread in {0, _thread()}:
            others = {i: old for i, old in self.last.get(thread, {}).items() if i != conv}
            self.last[thread] = {conv: seen, **others}
        if torch.compiler.is_compiling():
            return None
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
        grids = [] if seen is None or seen.samples != len(x) else list(_merged(seen))
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
            seen = self._made(list(self.last.get(_thread(), {}).values()), shape)
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
        if seen.samples not in (a, b):
            return Layout(self._part_of(a, b, seen), self.axis)
        if a != b and seen.samples == (a, b)[axis]:
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


class MaskCheck:
    """Hooks on blocks and attentions around parts that mix tokens: a mask is refused."""

    def __init__(
        self, switch: Switch, patches: PatchMap, names: tuple[str, ...], block: bool
    ) -> None:
        self.switch, self.patches, self.names, self.block = switch, patches, names, block

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Forward pre-hook. Raises GraftError where some tokens are hidden from others."""
        given = [*zip(self.names, args, strict=False), *(kwargs or {}).items()]
        x = next((value for _, value in given if isinstance(value, Tensor)), None)
        probe = self.patches.probe if self.block else None
        if probe is not None and x is not None and x.dim() == 3:
            return self._probed(probe, x, args, kwargs)
        if not self.switch.enabled or self.switch.merged:
            return None
        for name, value in given:
            if value is not x and _hides(name, value) and not self._is_window(x):
                raise GraftError(
                    f"the graft at {self.patches.path}",
                    f"it lets tokens hear others, and {name} hides some from others.",
                    "Use parts that take each token alone (adapter, lora), or give the model "
                    "inputs without padding and without a causal mask.",
                )
        return None

    def _probed(self, probe: Probe, x: Tensor, args: Any, kwargs: Any) -> Any:
        """Show what came to a block, and put what comes of that in its place."""
        put = self._rows(x, probe.entered(self._rows(x, x)))
        named = {name: put if value is x else value for name, value in (kwargs or {}).items()}
        return tuple(put if value is x else value for value in args), named

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a block."""
        if (probe := self.patches.probe) is not None:
            y = next((t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)), None)
            if y is not None and y.dim() == 3:
                probe.left(self._rows(y, y))

    def _rows(self, x: Tensor, turned: Tensor) -> Tensor:
        """Tokens samples first, or back, by how x lies."""
        layout = self.patches.layout(x, self.patches.seen(x))
        return turned if layout.axis else turned.transpose(0, 1)

    def _is_window(self, x: Tensor | None) -> bool:
        """Whether a mask is of windows that were cut from a shifted map (Swin)."""
        seen = None if x is None else self.patches.seen(x)
        return seen is not None and x is not None and seen.samples not in x.shape[:2]


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _hides(name: str, value: Any) -> bool:
    """Whether an argument of a block or an attention hides some tokens from others."""
    if "causal" in name:
        return value is True
    if not isinstance(value, Tensor) or not (value.dtype == torch.bool or "mask" in name):
        return False
    if value.is_meta or not value.numel():
        return False
    if torch.compiler.is_compiling():
        return True  # what it hides cannot be looked at
    low, high = value.min().item(), value.max().item()
    if not value.is_floating_point():
        return bool(low != high)
    return bool(low <= HIDDEN < high or (low, high) == (0, 1))


def attach(
    model: nn.Module,
    switch: Switch,
    journal: Journal,
    placements: Iterable[Placement],
    parts: Mapping[str, nn.Module],
    tree: Tree,
) -> list[PatchMap]:
    """Let parts that mix tokens be told how these lie, and be refused where a mask hides some."""
    by_part: dict[str, list[Placement]] = {}
    for p in placements:
        if p.edit.place != "instead" and mixes_tokens(parts[p.key]):
            by_part.setdefault(p.key, []).append(p)
    towers: dict[Tower, list[str]] = {}
    for key, places in by_part.items():
        towers.setdefault(_tower(places, tree), []).append(key)
    maps = []
    for tower, keys in towers.items():
        places = [p for key in keys for p in by_part[key]]
        maps.append(_patch_map(tower, places, [parts[key] for key in keys]))
        _join(model, switch, journal, maps[-1], places, tower.convs, tree)
    return maps


class Tower(NamedTuple):
    """What parts have in common that mix the same tokens: convolutions, width, axis of tokens."""

    convs: tuple[Site, ...]
    width: int
    axis: int


def _tower(places: list[Placement], tree: Tree) -> Tower:
    told = [embedded(p.place, tree) for p in places]
    convs = dict.fromkeys(s for each in told if each.kind == "map" for s in each.makers)
    return Tower(tuple(convs), places[0].site.shape.width, _axis(places[0].place))


def _patch_map(tower: Tower, places: list[Placement], parts: list[nn.Module]) -> PatchMap:
    paths = list(dict.fromkeys(p.site.path or "the model" for p in places))
    windows = {n: grid for p in places for n, grid in _windows(p.place)}
    patches = PatchMap(first_few(paths), tower.width, tower.axis, windows)
    patches.parts = [part for part in parts if any(map_readers(part))]
    return patches


def _join(
    model: nn.Module,
    switch: Switch,
    journal: Journal,
    patches: PatchMap,
    places: list[Placement],
    convs: tuple[Site, ...],
    tree: Tree,
) -> None:
    """Hook it to the convolutions, the parts, and the blocks and attentions around them."""
    for i, site in enumerate(convs):
        journal.hook(site.module, ConvNote(patches, i).leave)
    if convs:
        journal.hook(model, patches.end)
    for module in dict.fromkeys(m for part in patches.parts for m in map_readers(part)):
        journal.hook(module, patches.tell, before=True)
    for site in dict.fromkeys(site for p in places for site in _around(p.place, tree)):
        names = declared(getattr(type(site.module), "forward", None))[1:]
        check = MaskCheck(switch, patches, names, site.is_element)
        journal.hook(site.module, check.enter, before=True, with_kwargs=True)
        if check.block:
            journal.hook(site.module, check.leave)


def _around(site: Site, tree: Tree) -> list[Site]:
    """The block around a site, and the attentions in it: what masks are given to."""
    block = _block(site)
    attns = [s for s in roles_of(tree)["attn"] if block.order <= s.order and s.end <= block.end]
    return list(dict.fromkeys((block, site.entry, *(s.entry for s in attns))))


def _windows(site: Site) -> Iterator[tuple[int, tuple[int, int]]]:
    """(tokens, (rows, columns)) of the windows of an attention that keeps a table of the relative
    positions in one: integers (n, n), which grow by one from token to token along a row (Swin)."""
    block = _block(site)
    for each in (block, *block.below()):
        for table in each.module._buffers.values():
            if table is None or table.is_floating_point() or table.is_meta or table.dim() != 2:
                continue
            n = len(table)
            if table.shape == (n, n) and n > 1:
                steps = (table[:, 0] - table[0, 0]).tolist()
                columns = next((k for k, step in enumerate(steps) if step != k), n)
                yield n, (n // columns, columns)


def _block(site: Site) -> Site:
    own = [site.entry] if site.entry.is_element else []
    return next((s for s in (*own, *holders(site)) if s.is_element), site.entry)


def _axis(site: Site) -> int:
    """The axis of tokens: torch's attention takes the sequence first where it is not told else."""
    block = _block(site)
    attentions = [s.module for s in (block, *block.below())]
    first = [m for m in attentions if isinstance(m, nn.MultiheadAttention) and not m.batch_first]
    return 0 if first else 1
