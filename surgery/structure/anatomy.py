"""Roles: block, attn, ffn, qkv, proj, norm, embed and head, found by structure, never by name;
fused, the one projection that makes query, key and value at once, a third each; fc1 and fc2, the
layers of a feed-forward network; query, key and value, which a forward on an
example tells apart.

Attention is what projects features inside a block and is no feed-forward network; a block is the
repeated module that holds them.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import Any

from torch import nn

from .dataflow import Dataflow, dataflow_of
from .ffn import Projections, find_ffns, is_spatial
from .ffn_traced import find_traced_ffns
from .layers import CONVS, NARROWEST, is_list, is_norm, keeps_statistics, linear_shape
from .module_tree import Site, Tree, holders
from .path import generalise


def roles_of(tree: Tree) -> dict[str, list[Site]]:
    """The sites of every role, in the order of the walk; worked out once for a tree."""
    return _anatomy(tree).roles


def operands(tree: Tree, fed: Dataflow) -> dict[Site, set[str]]:
    """What each projection of an attention makes, as a forward tells: query, key, value, or all."""
    roles = roles_of(tree)
    if "operands" not in tree.memo:
        tree.memo["operands"] = fed.operands(roles["attn"], roles["qkv"])
    made: dict[Site, set[str]] = tree.memo["operands"]
    return {site: made[site] for site in roles["qkv"] if site in made}


def instead_of_ffns(tree: Tree) -> str:
    """Why a model has no feed-forward network: what it is made of, in words."""
    known = _anatomy(tree)
    for sites, what in (
        (known.found.fused, "blocks whose attention and feed-forward network share one projection"),
        (known.found.bottlenecks, "inverted bottlenecks, which mix positions as they widen"),
        ([s for s in tree.sites if is_spatial(s.module)], "convolutions over positions"),
        (known.leaves.all, "projections, none of them a pair d -> h, h -> d in a block"),
    ):
        if sites:
            return f"it has {len(sites)} {what} ({generalise(sites[0].path) or 'the model'})"
    return "it has no projection at all"


def stages(tree: Tree) -> list[int]:
    """For every block, in order, the stage it is in: a new one where width or container changes."""
    blocks = _anatomy(tree).roles["block"]
    marks = [(b.out, b.parent) for b in blocks]
    new = [i > 0 and marks[i] != marks[i - 1] for i in range(len(marks))]
    return list(accumulate(map(int, new)))


def _anatomy(tree: Tree) -> _Anatomy:
    if "anatomy" not in tree.memo:
        tree.memo["anatomy"] = _Anatomy(tree)
    known: _Anatomy = tree.memo["anatomy"]
    return known


class _Anatomy:
    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.leaves = Projections(tree)
        self.found = find_ffns(self.leaves)
        fed = dataflow_of(tree)
        if fed and not self.found.sites:
            self.found = find_traced_ffns(fed.trace, self.leaves, self.found)
        ffns = self.found.sites
        self.rest = {s for s in self.leaves.all if s not in self.found.taken}
        met = {s for f in ffns for s in (*tree.sites[f.order : f.end], *f.entry.above())}
        blocks = _unique(self._block(f) for f in ffns)
        attns = _unique(a for b in blocks for a in self._attentions(b, met))
        aside = {s for a in attns for s in self._aside(a)}
        inside = {leaf for f in ffns for leaf in self.leaves.below(f)}
        for site in (*blocks, *attns):
            site.read_shape(but=aside | inside)
            if not site.shape.out:
                site.read_shape(but=aside)
        projections = [[s for s in self.leaves.below(a) if s not in aside] for a in attns]
        last = {self._last(a, made): a for a, made in zip(attns, projections, strict=True)}
        rest = [[s for s in made if s not in last] for made in projections]
        self.roles: dict[str, list[Site]] = {
            "ffn": ffns,
            "block": blocks,
            "attn": attns,
            "qkv": [s for made in rest for s in made],
            "proj": [s for s in last if not isinstance(s.module, nn.MultiheadAttention)],
            "norm": [s for s in tree.sites if is_norm(s.module)],
            "fused": [
                own[0]
                for own, made in zip(rest, projections, strict=True)
                if len(own) == 1 and own[0].out == 3 * (set(made) - set(own)).pop().width
            ],
            "fc1": [s for f in ffns for s in self._layers(f)[0]],
            "fc2": [s for f in ffns for s in self._layers(f)[1]],
            "head": self._heads(blocks),
            "embed": self._embeddings(blocks),
        }

    def _layers(self, ffn: Site) -> tuple[list[Site], list[Site]]:
        """The linear layers of a feed-forward network: what widens (and gates), what narrows."""
        own = [s for s in self.leaves.below(ffn) if linear_shape(s.module)]
        fc2 = [s for i, s in enumerate(own) if i and s.out == ffn.out]
        hidden = {s.width for s in fc2}
        fits = [s for s in own if s not in fc2 and s.width == ffn.width]
        return [s for s in fits if s.out in hidden or s.out // 2 in hidden], fc2

    def _block(self, ffn: Site) -> Site:
        """The nearest container element around an FFN that also projects; else the nearest."""
        around = [s for s in holders(ffn) if s.is_element]
        for site in around:
            if any(s in self.rest and not _is_conv(s) for s in self.leaves.below(site)):
                return site
        called = [s for s in holders(ffn) if not is_list(s.module)]
        return [*around, *called, ffn][0]

    def _attentions(self, block: Site, met: set[Site]) -> list[Site]:
        """The smallest modules that hold what else projects in a block, branch by branch.

        met: the sites that have something in common with an FFN.
        """
        found: list[Site] = []

        def visit(site: Site) -> None:
            own = [s for s in self.leaves.below(site) if s in self.rest]
            if not own:
                return
            if site in met or site is block or is_list(site.module):
                for child in site.children:
                    visit(child)
            elif len(own) > 1 or isinstance(own[0].module, nn.MultiheadAttention):
                found.append(_smallest(site, own))

        visit(block)
        return found

    def _last(self, attn: Site, projections: list[Site]) -> Site:
        """The output projection: the last that gives as many features as the FFN beside it takes.

        (Phi-3 registers it first.)
        """
        ffns = self.found.sites
        near = ffns[min(bisect_left(ffns, attn.order, key=lambda f: f.order), len(ffns) - 1)]
        ends = [s for s in projections if s.out == near.width]
        return (ends or projections or self.leaves.below(attn))[-1]

    def _aside(self, attn: Site) -> list[Site]:
        """The projections of an attention that take coordinates, no features (Swin V2, ConViT)."""
        leaves = self.leaves.below(attn)
        narrow = {
            s for s in leaves if (found := linear_shape(s.module)) and found.width < NARROWEST
        }
        small = {s.parent for s in narrow} - {attn}
        return [s for s in leaves if s in narrow or s.parent in small]

    def _heads(self, blocks: list[Site]) -> list[Site]:
        """The outermost modules after the last block that project to another width than its own.

        And what stands among them and keeps running statistics, which nothing else would train.
        """
        if not blocks:
            return []
        last = max(b.end for b in blocks)
        late = [s for s in self.leaves.all if s.order >= last and linear_shape(s.module)]
        tops = _unique(_outermost(s, blocks) for s in late)
        width = blocks[-1].out
        heads = [s for s in tops if self.leaves.below(s)[-1].out != width] or tops[-1:]
        counting = [s for s in self.tree.sites if keeps_statistics(s.module)]
        among = [s for s in counting if heads and heads[0].order < s.order]
        return _unique([*heads, *(_outermost(s, blocks) for s in among)])

    def _embeddings(self, blocks: list[Site]) -> list[Site]:
        """The outermost modules before the first block that take the input in."""
        if not blocks:
            return []
        kinds = (*CONVS, nn.Linear, nn.Embedding)
        early = [s for s in self.tree.sites if s.order < blocks[0].order]
        return _unique(_outermost(s, blocks) for s in early if isinstance(s.module, kinds))


def _is_conv(site: Site) -> bool:
    return isinstance(site.module, CONVS)


def _smallest(site: Site, leaves: list[Site]) -> Site:
    for child in site.children:
        if child.order <= leaves[0].order and leaves[-1].order < child.end:
            return _smallest(child, leaves)
    return site


def _outermost(site: Site, blocks: list[Site]) -> Site:
    top = site
    for above in site.above():
        if above.parent is None or any(above.order <= b.order < above.end for b in blocks):
            break
        top = above
    return top


def _unique(sites: Any) -> list[Site]:
    return sorted(dict.fromkeys(sites), key=lambda s: s.order)
