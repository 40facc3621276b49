"""Parts that mix tokens: what a model knows of its tokens is not guessed otherwise.

Where tokens are words, or no map, such parts are refused. Where a 2-D convolution makes patches,
each forward shows how many, in rows and columns, and the parts are told. Where a mask hides tokens
from others, the forward is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._text import first_few
from ..errors import GraftError, RuleError
from ..rules.layout import Layout, map_readers, mixes_tokens
from ..structure.anatomy import roles_of
from ..structure.embedding import embedded
from ..structure.module_tree import Site, Tree, holders
from .hooks import Switch, _declared
from .journal import Journal
from .placement import Placement
from .tokens import _is_recomputing

GUESSED = "no 2-D convolution tells how tokens lie: they are taken as a square map, row by row"
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
        if told.kind == "words" or (told.kind in NOT_A_MAP and reads):
            raise RuleError(
                p.rule.short,
                f"{type(part).__name__} at {p.site.path or 'the model'} lets tokens hear others, "
                f"and those are {NOT_A_MAP[told.kind].format(told.makers[0].path)}.",
                "Use parts that take each token alone (adapter, lora); or leave the place out "
                "with & ~inside(...).",
            )
        if reads and not told.kind and getattr(part, "note", None) is None:
            part.note = GUESSED  # type: ignore[assignment]


class Seen(NamedTuple):
    """A map of patches that a convolution gave: samples, rows, columns, channels."""

    samples: int
    rows: int
    columns: int
    channels: int


class PatchMap:
    """What the convolutions before some blocks gave last, in each thread; for parts at `path`.

    trained  those since the last recomputation, which a checkpoint may have to be told of again
    """

    def __init__(self, path: str, width: int, axis: int) -> None:
        self.path, self.width, self.axis = path, width, axis
        self.begin()

    def begin(self) -> None:
        self.last: dict[int, Seen] = {}  # by thread; 0: in any, for compiled code
        self.trained: set[Seen] = set()
        self.recomputed = False

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "width": self.width, "axis": self.axis}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def note(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a convolution."""
        if not isinstance(output, Tensor) or output.dim() != 4:
            return
        samples, channels, rows, columns = output.shape
        seen = self.last[0] = Seen(samples, rows, columns, channels)
        if torch.compiler.is_compiling():
            return
        self.last[threading.get_ident()] = seen
        if _is_recomputing() or self.recomputed:
            self.trained, self.recomputed = set(), False
        if torch.is_grad_enabled():
            self.trained.add(seen)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model: what comes to its blocks alone is another matter."""
        if not torch.compiler.is_compiling():
            self.last.pop(threading.get_ident(), None)

    def tell(self, module: nn.Module, args: Any) -> Any:
        """Forward pre-hook of a part that reads a map: it is told how its tokens lie."""
        x = args[0]
        return (x, self.layout(x, self._seen(x))) if x.dim() == 3 and len(args) == 1 else None

    def _seen(self, x: Tensor) -> Seen | None:
        if torch.compiler.is_compiling():
            return self.last.get(0)
        if not _is_recomputing():
            return self.last.get(threading.get_ident())
        self.recomputed = True
        fitting = [seen for seen in self.trained if len({*x.shape[:2], seen.samples}) < 3]
        fitting = [seen for seen in fitting if seen.rows * seen.columns <= max(x.shape[:2])]
        if len({(seen.rows, seen.columns) for seen in fitting}) > 1:
            maps = " and ".join(f"{seen.rows} x {seen.columns}" for seen in fitting)
            raise self._error(
                f"forwards with patches of {maps} were made before this backward: a checkpoint, "
                "which runs again, cannot tell of which it is.",
                "Call backward after each forward, or use no checkpoints.",
            )
        return next(iter(fitting), None)

    def layout(self, x: Tensor, seen: Seen | None) -> Layout:
        """How tokens x lie, where a convolution gave `seen`. Raises GraftError where some went."""
        if seen is None:
            return Layout(None, self.axis)
        axis, (a, b) = self.axis, x.shape[:2]
        if seen.samples not in (a, b):
            return Layout(self._window(a, b, seen), self.axis)
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
        for k in (2, 4, 8, 16, 32):  # pyramids merge patches k by k, the last ones padded
            if n == -(-rows // k) * -(-columns // k):
                return -(-rows // k), -(-columns // k)
        return None

    def _window(self, samples: int, n: int, seen: Seen) -> tuple[int, int] | None:
        """Several rows a sample are windows, which are square as far as anything tells (Swin)."""
        if samples % seen.samples:
            raise self._error(
                f"it was given ({samples}, {n}, ...), where the model made {seen.rows} x "
                f"{seen.columns} patches of each of {seen.samples} samples.",
                "Use parts that take each token alone.",
            )
        return None

    def _error(self, fact: str, remedy: str) -> GraftError:
        return GraftError(f"the graft at {self.path}", fact, remedy)


class MaskCheck:
    """Hooks on blocks and attentions around parts that mix tokens: a mask is refused."""

    def __init__(
        self, switch: Switch, path: str, names: tuple[str, ...], patches: PatchMap
    ) -> None:
        self.switch, self.path, self.names, self.patches = switch, path, names, patches

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """Forward pre-hook. Raises GraftError where some tokens are hidden from others."""
        if not self.switch.enabled or self.switch.merged:
            return
        given = [*zip(self.names, args, strict=False), *(kwargs or {}).items()]
        x = next((value for _, value in given if isinstance(value, Tensor)), None)
        for name, value in given:
            if value is not x and _hides(name, value) and not self._is_window(x):
                raise GraftError(
                    f"the graft at {self.path}",
                    f"it lets tokens hear their neighbours, and {name} hides some from others.",
                    "Use parts that take each token alone (adapter, lora), or give the model "
                    "inputs without padding and without a causal mask.",
                )

    def _is_window(self, x: Tensor | None) -> bool:
        """Whether a mask is of windows that were cut from a shifted map (Swin)."""
        seen = self.patches.last.get(_thread())
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
) -> None:
    """Let parts that mix tokens be told how these lie, and be refused where a mask hides some."""
    by_key: dict[str, list[Placement]] = {}
    for p in placements:
        if p.edit.place != "instead" and mixes_tokens(parts[p.key]):
            by_key.setdefault(p.key, []).append(p)
    checked: set[int] = set()
    for key, places in by_key.items():
        patches = _watched(model, journal, places, tree)
        for module in map_readers(parts[key]):
            journal.hook(module, patches.tell, before=True)
        around = {id(module): module for p in places for module in _around(p.place, tree)}
        for module in (around[i] for i in around.keys() - checked):
            names = _declared(getattr(type(module), "forward", None))[1:]
            check = MaskCheck(switch, patches.path, names, patches)
            journal.hook(module, check.enter, before=True, with_kwargs=True)
        checked |= around.keys()


def _watched(model: nn.Module, journal: Journal, places: list[Placement], tree: Tree) -> PatchMap:
    """What the convolutions that make the tokens at some places give."""
    paths = list(dict.fromkeys(p.site.path or "the model" for p in places))
    patches = PatchMap(first_few(paths), places[0].site.shape.width, _axis(places[0].place))
    told = [embedded(p.place, tree) for p in places]
    convs = {id(s.module): s.module for each in told if each.kind == "map" for s in each.makers}
    for conv in convs.values():
        journal.hook(conv, patches.note)
    if convs:
        journal.hook(model, patches.end)
    return patches


def _around(site: Site, tree: Tree) -> list[nn.Module]:
    """The block around a site, and the attentions in it: what masks are given to."""
    block = _block(site)
    attns = [s for s in roles_of(tree)["attn"] if block.order <= s.order and s.end <= block.end]
    return [s.module for s in dict.fromkeys((block, site.entry, *(s.entry for s in attns)))]


def _block(site: Site) -> Site:
    own = [site.entry] if site.entry.is_element else []
    return next((s for s in (*own, *holders(site)) if s.is_element), site.entry)


def _axis(site: Site) -> int:
    """The axis of tokens: torch's attention takes the sequence first where it is not told else."""
    block = _block(site)
    attentions = [s.module for s in (block, *block.below())]
    first = [m for m in attentions if isinstance(m, nn.MultiheadAttention) and not m.batch_first]
    return 0 if first else 1
