"""Where, by what stands around: `inside`, `holding`, `nearest` and `span` relate selectors.

Which norm is `nearest` before a place is decided here by the order of modules (`_before`), and by
`structure/dataflow` where a forward tells.
"""

from __future__ import annotations

from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import RuleError
from ..structure.dataflow import dataflow_of
from ..structure.layers import is_norm, linear_shape
from ..structure.module_tree import Site, Tree, holders, stretch
from ..structure.weights import ParameterSite
from .expression import shown
from .selector import Address, Selected, Selection, Selector, Where, plain, where


@dataclass(frozen=True, repr=False)
class _Around(Selector):
    pattern: Selector

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (plain(self.pattern),), {}


class Inside(_Around):
    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        inner = tree.memo.get((self, "inner"))
        if inner is None:
            inner = tree.memo[self, "inner"] = {
                id(module)
                for outer in self.pattern.find(tree)
                for end in (outer.entry, outer.exit)
                for module in list(end.module.modules())[0 if outer.is_span else 1 :]
            }
        holder = site.parent if isinstance(site, ParameterSite) else None
        if holder in self.pattern.find(tree):  # a weight of the module itself
            return {}
        return {} if id(site.entry.module) in inner and id(site.exit.module) in inner else None


class Holding(_Around):
    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        if (self, "ends") not in tree.memo:
            tree.memo[self, "ends"] = [
                {id(inner.entry.module), id(inner.exit.module)} for inner in self.pattern.find(tree)
            ]
        below = {id(m) for m in list(site.module.modules())[1:]} if not site.is_span else set()
        return {} if any(ends <= below for ends in tree.memo[self, "ends"]) else None


@dataclass(frozen=True, repr=False)
class Nearest(Selection):
    pattern: Selector
    before: Selector | None = field(default=None, kw_only=True)
    after: Selector | None = field(default=None, kw_only=True)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sides = {"before": self.before, "after": self.after}
        return (plain(self.pattern),), {k: plain(v) for k, v in sides.items() if v is not None}

    def pairs(self, tree: Tree, whole: bool = False) -> list[tuple[Site, Site]]:
        """(nearest, anchor) for every anchor that has one; `whole`: one that a span begins at."""
        anchors = (self.before or self.after or self.pattern).find(tree)
        sites = sorted(self.pattern.find(tree), key=lambda site: site.order)
        named = isinstance(self.pattern, Address)
        sites = [site for site in sites if named or not site.completes_projection]
        pairs = ((self._partner(tree, anchor, sites, whole), anchor) for anchor in anchors)
        return [(near, anchor) for near, anchor in pairs if near is not None]

    def _partner(self, tree: Tree, anchor: Site, sites: list[Site], whole: bool) -> Site | None:
        if self.before is None:
            return _after(anchor, sites)
        if dataflow := dataflow_of(tree):
            with suppress(LookupError):
                return dataflow(anchor, sites, whole)
        return _before(anchor, sites, isinstance(self.pattern, Address))

    def told_by_forward(self, tree: Tree) -> bool:
        norms = self.before and any(is_norm(site.module) for site in self.pattern.find(tree))
        return bool(norms and self.before and self.before.find(tree))

    def select(self, tree: Tree) -> Selected:
        near = {site for site, _ in self.pairs(tree)}
        return {site: {} for site in sorted(near, key=lambda site: site.order)}


@dataclass(frozen=True, repr=False)
class Span(Selection):
    entry: Selector
    exit: Selector

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (plain(self.entry), plain(self.exit)), {}

    def told_by_forward(self, tree: Tree) -> bool:
        return Nearest(self.entry, before=self.exit).told_by_forward(tree)

    def select(self, tree: Tree) -> Selected:
        pairs = Nearest(self.entry, before=self.exit).pairs(tree, whole=True)
        named = isinstance(self.entry, Address)
        near = {b: a for a, b in pairs if named or _same_width(a, b) or not is_norm(a.module)}
        anchors = self.exit.find(tree)
        return {stretch(near[site], site) if site in near else site: {} for site in anchors}


@dataclass(frozen=True, repr=False)
class Until(Selection):
    entry: Selector
    exit: Selector

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (plain(self.entry), plain(self.exit)), {}

    def select(self, tree: Tree) -> Selected:
        ends = list(self.exit.find(tree))
        entries = self.entry.find(tree).items()
        pairs = [(site, _last_end(site, ends), captures) for site, captures in entries]
        return {a if a is b else stretch(a, b): captures for a, b, captures in pairs if b}


def _last_end(site: Site, ends: list[Site]) -> Site | None:
    """The last end from the site on, in the smallest module around it that holds one."""
    later = [end for end in ends if end.exit.order >= site.exit.order]
    listed = site.entry.is_element  # a block, or one made of several elements of a list
    for holder in (*([] if listed else [site]), *holders(site)):
        near = [end for end in later if holder.order <= end.order and end.exit.end <= holder.end]
        if near:
            return near[-1]
    return later[-1] if later else None


def inside(pattern: Where) -> Selector:
    """Every module strictly inside a site that `pattern` selects.

    >>> inside("blocks.[0]")
    inside("blocks.[0]")
    """
    return Inside(where(pattern))


def holding(pattern: Where) -> Selector:
    """Every module that holds, at any depth, a site that `pattern` selects.

    >>> holding("**.attn")
    holding("**.attn")
    """
    return Holding(where(pattern))


def nearest(pattern: Where, *, before: Where | None = None, after: Where | None = None) -> Selector:
    """For each site of `before` (or `after`), the one site of `pattern` that comes nearest it.

    Order is that of execution as far as the module tree shows it: where a module has as many
    direct children that match as it has branches with weights (ViT, CLIP, Llama: two norms;
    attention and FFN), or branches that hold no match themselves (ESM), the first belongs to the
    first, and so on, however they are registered. Otherwise the last match registered before the
    anchor is taken; of norms only one of the anchor's block and width. With apply(..., example=x)
    a forward decides which norm it is: the one whose output comes to the anchor's input without
    a residual sum between, if there is one.

    A batch norm that is one step with the convolution before it counts where an address names it.

    Raises RuleError unless exactly one of `before` and `after` is given.

    >>> nearest("**.norm2", before="**.mlp")
    nearest("**.norm2", before="**.mlp")
    """
    if (before is None) == (after is None):
        raise RuleError(
            f"nearest({shown(plain(where(pattern)))}, ...)",
            "it needs an anchor on one side, and one only.",
            "Write nearest(norm, before=ffn) or nearest(norm, after=attn).",
        )
    if before is not None:
        return Nearest(where(pattern), before=where(before))
    return Nearest(where(pattern), after=where(after if after is not None else pattern))


def span(entry: Where, exit: Where) -> Selector:
    """The stretch from the input of the nearest `entry` before each `exit`, to that one's output.

    A part joined in parallel to `span(norm, ffn)` reads what the norm reads and adds where the
    FFN ends: the place of AdaptFormer (Chen et al. 2022, Eq. 3). An `exit` that has no such
    `entry` is taken alone (a block that norms after its FFN).

    >>> span("**.norm2", "**.mlp")
    span("**.norm2", "**.mlp")
    """
    return Span(where(entry), where(exit))


def until(entry: Where, exit: Where) -> Selector:
    """From the input of each `entry` to the output of the last `exit`.

    `until(block[0], block)` is the whole stretch of blocks; `until(block, block)` a stretch from
    each of them on. Where blocks are in several lists (two towers), each ends with its own list.

    >>> until("blocks.[0]", "blocks.*")
    until("blocks.[0]", "blocks.*")
    """
    return Until(where(entry), where(exit))


def _before(anchor: Site, sites: list[Site], named: bool) -> Site | None:
    """By registration. A norm of another block feeds this one by way of a residual sum only (BERT).

    named  by an address: whoever names a norm means it
    """
    left_block = False
    for holder in anchor.entry.above():
        around = _around(anchor, holder, sites)
        if not named:
            around = [s for s in around if _may_feed(s, anchor, holder, left_block)]
        if (near := _before_in(holder, anchor, around)) is not None:
            return near
        left_block = left_block or holder.is_element
    return None


def _may_feed(site: Site, anchor: Site, holder: Site, left_block: bool) -> bool:
    """Whether a norm may: of the anchor's block, and not one per head in attention (Gemma 3)."""
    if not is_norm(site.module):
        return True
    return not left_block and (site.parent is holder or _same_width(site, anchor))


def _before_in(holder: Site, anchor: Site, around: list[Site]) -> Site | None:
    """The one of `around`, all of them in `holder`, that comes before the anchor's branch."""
    direct = [site for site in around if site.parent is holder]
    branches = _branches(anchor, holder, around) if direct else []
    without = [branch for branch in branches if not branch.holds_match]  # norms inside (ESM)
    for likely in (branches, without):
        if len(direct) == len(likely) and (near := _of_branch(direct, likely)) is not None:
            return near
    earlier = [site for site in around if site.order < anchor.order]
    if earlier:
        return _of_same_number(earlier, anchor) or earlier[-1]
    if len(direct) == 1:  # of all branches, which run side by side (Cohere, Falcon, Phi)
        return direct[0]
    if len(direct) == len(branches) + 1:  # the last norms the block's output (Conformer)
        return _of_branch(direct, branches)
    return None


def _of_branch(direct: list[Site], branches: list[_Branch]) -> Site | None:
    """The one that has the number of the anchor's branch."""
    numbered = zip(direct, branches, strict=False)
    return next((site for site, branch in numbered if branch.holds_anchor), None)


def _same_width(norm: Site, anchor: Site) -> bool:
    """Whether both are of one width, as far as both are known."""
    return norm.width == anchor.width or 0 in (norm.width, anchor.width)


def _of_same_number(earlier: list[Site], anchor: Site) -> Site | None:
    """Of a list as long as that of the anchor, the one of its number (XLM lists norms and FFNs)."""
    last = earlier[-1]
    if anchor.is_span or not (last.is_element and anchor.is_element):
        return None
    ours, theirs = (site.parent.children for site in (anchor, last) if site.parent)
    if ours is theirs or len(ours) != len(theirs):
        return None
    return next((site for site in earlier if site is theirs[ours.index(anchor)]), None)


def _after(anchor: Site, sites: list[Site]) -> Site | None:
    for holder in anchor.exit.above():
        later = [site for site in _around(anchor, holder, sites) if site.order >= anchor.end]
        if later:
            return later[0]
    return None


def _around(anchor: Site, holder: Site, sites: list[Site]) -> list[Site]:
    """Those of `sites` below `holder` that neither hold the anchor nor lie inside it."""
    low = bisect_left(sites, holder.order + 1, key=lambda site: site.order)
    high = bisect_left(sites, holder.end, key=lambda site: site.order)
    return [site for site in sites[low:high] if not _overlaps(site, anchor)]


def _overlaps(site: Site, anchor: Site) -> bool:
    return any(site.order < end.end and end.order < site.end for end in (anchor.entry, anchor.exit))


class _Branch(NamedTuple):
    """Children of a module that hold weight matrices, and run as one.

    holds_anchor  whether the anchor lies there
    holds_match   whether it has what we look for inside
    """

    holds_anchor: bool
    holds_match: bool


def _branches(anchor: Site, holder: Site, around: list[Site]) -> list[_Branch]:
    """The branches of `holder`: all of the anchor is one, projections in a row are one (OPT)."""
    branches: list[_Branch] = []
    in_a_row = False
    for child in holder.children:
        holds_anchor, projects = _overlaps(child, anchor), linear_shape(child.module) is not None
        if child in around:
            in_a_row = False
        elif holds_anchor or _has_matrix(child):
            holds_match = any(child.order < site.order < child.end for site in around)
            branch = _Branch(holds_anchor, holds_match)
            same_anchor = holds_anchor and branches and branches[-1].holds_anchor
            if branches and (same_anchor or (projects and in_a_row)):
                branch = _Branch(*map(max, branches.pop(), branch))
            branches.append(branch)
            in_a_row = projects
    return branches


def _has_matrix(site: Site) -> bool:
    return any(p.dim() > 1 for p in site.module.parameters())
