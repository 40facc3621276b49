"""Parts that mix tokens: what a model knows of its tokens is not guessed otherwise.

Where tokens are words, or no map, such parts are refused. Where a 2-D convolution makes patches,
each forward shows how many, in rows and columns, and the parts are told. Where a mask hides tokens
from others, the forward is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from .._text import first_few
from ..errors import RuleError
from ..rules.layout import map_readers, mixes_tokens
from ..structure.anatomy import roles_of
from ..structure.embedding import embedded
from ..structure.module_tree import Site, Tree, holders
from .features import declared
from .journal import Journal
from .maps import ConvNote, PatchMap
from .masks import MaskCheck
from .placement import Placement
from .switch import Switch

GUESSED = "no 2-D convolution tells how tokens lie: they are taken as a square map, row by row"
LAST = "patches are taken to be the last tokens, row by row: example= shows whether they are"
UNMASKED = (
    "its tokens are made of all others: where attention is causal (is_causal=True), later ones "
    "would reach those before them; example= shows whether they do"
)
NOT_A_MAP = {
    "words": "words (of {}): the next would reach those before it, and padding the others",
    "line": "pieces of a sequence or a cloud ({} is a 1-D convolution), no map of patches",
    "volume": "pieces of a volume ({} is a 3-D convolution), no map of patches",
}


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
        elif not (joined or told.kind) and getattr(part, "note", None) is None:
            part.note = UNMASKED  # type: ignore[assignment]


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
        reads = any(map_readers(parts[key]))
        towers.setdefault(_tower(places, tree, reads), []).append(key)
    maps = []
    for tower, keys in towers.items():
        places = [p for key in keys for p in by_part[key]]
        maps.append(_patch_map(tower, places, [parts[key] for key in keys]))
        _join(model, switch, journal, maps[-1], places, tower.convs, tree)
    return maps


class Tower(NamedTuple):
    """What parts have in common that mix the same tokens: convolutions, width, axis of tokens.

    holder  what lists the blocks: a decoder hides tokens, its encoder does not (Whisper, BART);
            None for parts that read a map, which one convolution makes for all
    """

    convs: tuple[Site, ...]
    width: int
    axis: int
    holder: Site | None


def _tower(places: list[Placement], tree: Tree, reads: bool) -> Tower:
    told = [embedded(p.place, tree) for p in places]
    convs = dict.fromkeys(s for each in told if each.kind == "map" for s in each.makers)
    holder = None if reads else _block(places[0].place).parent
    return Tower(tuple(convs), places[0].site.shape.width, _axis(places[0].place), holder)


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
            if table is None or table.is_meta or table.dim() != 2:
                continue
            if table.is_floating_point() or table.dtype is torch.bool:  # a mask (GPT-NeoX)
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
