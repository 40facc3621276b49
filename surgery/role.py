"""Roles: block, attn, ffn, qkv, norm, embed and head, found by structure, never by name.

A feed-forward network is the smallest module whose channel-linear leaves go d -> h, h -> d (or
gated: two d -> h, or one d -> 2h, then h -> d). Where no module holds just these two, it is the
span between them. Attention is what else projects features inside a block; a block is the
repeated module that holds them.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from torch import nn

from .leaf import CONVS, Shape, is_norm, linear, shape
from .pattern import Found, Pattern
from .tree import Site, Tree, span

NARROWEST = 8  # features; anything below is no model width
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, repr=False)
class Role(Pattern):
    """A place by its function in a transformer."""

    name: str

    @property
    def word(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return self.name

    def select(self, tree: Tree) -> Found:
        return {site: {} for site in anatomise(tree)[self.name]}

    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        return self.find(tree).get(site)

    def candidates(self, tree: Tree) -> list[Site]:
        return list(self.find(tree))


block, attn, ffn, qkv = Role("block"), Role("attn"), Role("ffn"), Role("qkv")
norm, embed, head = Role("norm"), Role("embed"), Role("head")
ROLES = (embed, block, norm, attn, qkv, ffn, head)


def anatomise(tree: Tree) -> dict[str, list[Site]]:
    """The sites of every role, in the order of the walk; worked out once for a tree."""
    if "roles" not in tree.memo:
        tree.memo["roles"] = _Anatomy(tree).roles
    roles: dict[str, list[Site]] = tree.memo["roles"]
    return roles


class _Anatomy:
    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.linears = [s for s in tree.sites if self._projects(s)]
        self.orders = [s.order for s in self.linears]
        ffns = self._whole_ffns()
        taken = {s for f in ffns for s in self.below(f)}
        self.rest = {s for s in self.linears if s not in taken}
        ffns += [s for b in self._elements() for s in self._split_ffns(b, taken)]
        ffns = [f for f in ffns if _element(f) is not None]
        self.rest -= {s for f in ffns if f.is_span for s in self.below(f)}
        met = {s for f in ffns for s in (*tree.sites[f.order : f.end], *f.entry.above())}
        blocks = _unique(self._block(f) for f in ffns)
        attns = _unique(a for b in blocks for a in self._attentions(b, met))
        self.roles: dict[str, list[Site]] = {
            "ffn": sorted(ffns, key=lambda s: s.order),
            "block": blocks,
            "attn": attns,
            "qkv": [s for a in attns for s in self.below(a)[:-1]],
            "norm": [s for s in tree.sites if is_norm(s.module)],
            "head": self._heads(blocks),
            "embed": self._embeddings(blocks),
        }

    def _projects(self, site: Site) -> bool:
        if isinstance(site.module, nn.MultiheadAttention):
            return True
        inside_attention = site.parent and isinstance(site.parent.module, nn.MultiheadAttention)
        return linear(site.module) is not None and not inside_attention

    def below(self, site: Site) -> list[Site]:
        """The channel-linear leaves of a site, itself included."""
        low, high = bisect_left(self.orders, site.order), bisect_left(self.orders, site.end)
        return self.linears[low:high]

    def _whole_ffns(self) -> list[Site]:
        found: list[Site] = []
        for site in reversed(self.tree.sites):  # children before their parents
            shapes = [linear(s.module) for s in self.below(site)] if site.children else []
            fits = 2 <= len(shapes) <= 3 and _is_ffn(shapes) and self._is_pointwise(site)
            if fits and not any(site.order < f.order < site.end for f in found[-1:]):
                found.append(site)
                first, last = self.below(site)[0].module, self.below(site)[-1].module
                site._shape = _joined(first, last)
        return found[::-1]

    def _is_pointwise(self, site: Site) -> bool:
        """Whether nothing beside the linear leaves mixes positions or carries other weights."""
        return all(_is_harmless(s.module) for s in site.below() if linear(s.module) is None)

    def _is_pointwise_between(self, site: Site) -> bool:
        between = self.tree.sites[site.entry.end : site.exit.order]
        return all(_is_harmless(s.module) for s in between if linear(s.module) is None)

    def _elements(self) -> list[Site]:
        """The elements of containers that hold two or more leaves not yet placed, inner first."""
        return [s for s in reversed(self.tree.sites) if _is_element(s) and len(self.below(s)) > 1]

    def _split_ffns(self, element: Site, taken: set[Site]) -> list[Site]:
        """Pairs d -> h, h -> d that lie side by side in `element`, in no module of their own."""
        leaves = [s for s in self.below(element) if s not in taken and _element(s) is element]
        found: list[Site] = []
        for i, down in enumerate(leaves):
            exit = linear(down.module)
            ups = 0
            while exit and i - ups > 0 and _goes(leaves[i - ups - 1], exit.out, exit.width):
                ups += 1
            if exit and ups in (1, 2) and exit.width > exit.out:
                site = span(leaves[i - ups], down)
                if not self._is_pointwise_between(site):
                    continue
                site._shape = _joined(leaves[i - ups].module, down.module)
                found.append(site)
                taken.update(leaves[i - ups : i + 1])
        return found

    def _block(self, ffn: Site) -> Site:
        """The nearest container element around an FFN that also projects; else the nearest."""
        around = [s for s in _holders(ffn) if _is_element(s)]
        for site in around:
            if any(s in self.rest and not _is_conv(s) for s in self.below(site)):
                return site
        return around[0]

    def _attentions(self, block: Site, met: set[Site]) -> list[Site]:
        """The smallest modules that hold what else projects in a block, branch by branch.

        met: the sites that have something in common with an FFN.
        """
        found: list[Site] = []

        def visit(site: Site) -> None:
            own = [s for s in self.below(site) if s in self.rest]
            if not own:
                return
            if site in met or site is block:
                for child in site.children:
                    visit(child)
            elif len(own) > 1 or isinstance(own[0].module, nn.MultiheadAttention):
                found.append(_smallest(site, own))

        visit(block)
        return found

    def _heads(self, blocks: list[Site]) -> list[Site]:
        """The outermost modules after the last block that project to another width than its own."""
        if not blocks:
            return []
        last = max(b.end for b in blocks)
        late = [s for s in self.linears if s.order >= last and linear(s.module)]
        tops = _unique(_outermost(s, blocks) for s in late)
        width = blocks[-1].out
        return [s for s in tops if self.below(s)[-1].out != width] or tops[-1:]

    def _embeddings(self, blocks: list[Site]) -> list[Site]:
        """The outermost modules before the first block that take the input in."""
        if not blocks:
            return []
        kinds = (*CONVS, nn.Linear, nn.Embedding)
        early = [s for s in self.tree.sites if s.order < blocks[0].order]
        return _unique(_outermost(s, blocks) for s in early if isinstance(s.module, kinds))


def _is_ffn(shapes: list[Shape | None]) -> bool:
    if any(s is None for s in shapes):
        return False
    (*ups, down) = [s for s in shapes if s is not None]
    d, h = down.out, down.width
    if d < NARROWEST or h < d or any(up.width != d or up.axis != down.axis for up in ups):
        return False
    outs = [up.out for up in ups]
    return outs in ([h], [2 * h]) or (outs == [h, h] and h != d)


def _is_harmless(module: nn.Module) -> bool:
    if module._modules or is_norm(module):
        return not isinstance(module, nn.MultiheadAttention)
    if isinstance(module, CONVS):
        return module.groups == module.in_channels == module.out_channels
    vectors = all(p is None or p.dim() <= 1 for p in module._parameters.values())
    return vectors and "pool" not in type(module).__name__.lower()


def _goes(site: Site, width: int, out: int) -> bool:
    found = linear(site.module)
    return found is not None and found[:2] == (width, out)


def _joined(first: nn.Module, last: nn.Module) -> Shape | None:
    a, b = shape(first), shape(last)
    return Shape(a.width, b.out, a.axis) if a and b else None


def _is_conv(site: Site) -> bool:
    return isinstance(site.module, CONVS)


def _is_element(site: Site) -> bool:
    return site.parent is not None and isinstance(site.parent.module, CONTAINERS)


def _holders(site: Site) -> list[Site]:
    """What a site lies in, nearest first; a span's smallest holder may be its own module."""
    if not site.is_span:
        return list(site.above())
    above = set(site.exit.above())
    return [s for s in site.entry.above() if s in above]


def _element(site: Site) -> Site | None:
    return next((s for s in _holders(site) if _is_element(s)), None)


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
