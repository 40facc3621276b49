"""TracedFFN-forward networks by structure: d -> h, then h -> d, each token by itself.

One is the smallest module whose channel-linear leaves are just these (gated: two d -> h, or one
d -> 2h); where no module holds just these, the span between them; a mixture of experts is one.
What only looks like it is left out: squeeze-excite gates, and inverted bottlenecks (a convolution
over positions in between). An MLP over tokens (MLP-Mixer) is one, whose features are the tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from .layers import (
    CONVS,
    NARROWEST,
    Shape,
    expert_stacks,
    is_list,
    is_nonlinear,
    is_norm,
    linear_shape,
    shape_of,
)
from .module_tree import Site, Tree, element, holders, span


class Projections:
    """The channel-linear leaves of a tree, in the order of the walk."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.all = [s for s in tree.sites if _projects(s)]
        self.orders = [s.order for s in self.all]
        self.elements = {s: element(s) for s in self.all}
        self.growing: dict[tuple[Site, type], bool] = {}

    def below(self, site: Site) -> list[Site]:
        """Those of a site, itself included."""
        low, high = bisect_left(self.orders, site.order), bisect_left(self.orders, site.end)
        return self.all[low:high]


class FFNs(NamedTuple):
    """sites, and the leaves that belong to them; and what is no FFN though it holds the like.

    bottlenecks  inverted: a depthwise convolution between widening and narrowing
    fused        blocks with one projection for attention and FFN
    """

    sites: list[Site]
    taken: set[Site]
    bottlenecks: list[Site]
    fused: list[Site]


def find_ffns(leaves: Projections) -> FFNs:
    """Every feed-forward network of a tree, in the order of the walk."""
    found = FFNs([], set(), [], _fused(leaves))
    _find_whole(leaves, found)
    _find_split(leaves, found)
    for site in _doubtful(found.sites, leaves):
        found.sites.remove(site)
        found.taken.difference_update(leaves.below(site))
    sites = [s for s in _lifted(found.sites, leaves, found.taken) if _is_placed(s, leaves)]
    sites = [s for s in sites if not _grows(s, leaves)]
    return found._replace(sites=sorted(sites, key=lambda s: s.order))


def _fused(leaves: Projections) -> list[Site]:
    """Elements with one projection d -> 3 d + h, and what is narrowed again to d out of d + h."""
    found: list[Site] = []
    for up, holder in leaves.elements.items():
        first = linear_shape(up.module)
        if first and holder and first.out > 4 * first.width:
            later = [linear_shape(s.module) for s in leaves.below(holder) if s.order > up.order]
            back = sum(s.width for s in later if s and s.out == first.width)
            if back == first.out - 2 * first.width:
                found.append(holder)
    return found


# whole modules --------------------------------------------------------------------------------


def _find_whole(leaves: Projections, found: FFNs) -> None:
    for site in reversed(leaves.tree.sites):  # children before their parents
        if any(site.order <= f.order < site.end for f in found.sites[-1:]):
            continue
        own = [s for s in leaves.below(site) if s not in found.taken]
        if made := stacked_experts(site, own):
            found.sites.append(made)
        elif not site.children or not 1 <= len(own) <= 3 or _is_listed(own) or is_list(site.module):
            continue
        elif _is_gate(site, own):
            pass
        elif not _fits(own, _others(site, own)):
            continue
        elif _is_bottleneck(own, _others(site, own)):
            found.bottlenecks.append(site)
        elif all(_is_harmless(s.module) for s in _others(site, own)) and not _is_gated(site, own):
            found.sites.append(whole_or_span(site, own))
        else:
            continue
        found.taken.update(leaves.below(site))


def _is_listed(own: list[Site]) -> bool:
    """Whether the leaves lie in branches of a list, which nothing says run one after another."""
    holder = holders(span(own[0], own[-1]))[0] if len(own) > 1 else own[0]
    listed = isinstance(holder.module, (nn.ModuleList, nn.ModuleDict))
    return listed and any(leaf.parent is not holder for leaf in own)


def whole_or_span(site: Site, own: list[Site]) -> Site:
    """The module, or the span in it where something with weights comes before the first leaf."""
    early = [s for s in site.below() if s.order < own[0].order]
    if any(p is not None for s in early for p in s.module._parameters.values()):
        return _spanned(own[0], own[-1])
    site._shape = _joined(own[0].module, own[-1].module)
    return site


def _spanned(first: Site, last: Site) -> Site:
    made = span(first, last)
    made._shape = _joined(first.module, last.module)
    return made


def _joined(first: nn.Module, last: nn.Module) -> Shape | None:
    a, b = shape_of(first), shape_of(last)
    return Shape(a.width, b.out, a.axis) if a and b else None


def _fits(own: list[Site], others: list[Site]) -> bool:
    """d -> h, h -> d; or d -> 2h, h -> d; or twice d -> h, h -> d.

    gMLP has a matrix over tokens in between, RWKV a gate d -> d. Without a gate, h is no less than
    d, and where it is equal, or less, something must act in between.
    """
    shapes = [linear_shape(s.module) for s in own]
    if None in shapes or len(own) < 2:
        return False
    (*ups, down) = [s for s in shapes if s is not None]
    d, h = down.out, down.width
    if len(ups) == 2 and ups[1].width == ups[1].out and ups[1].out not in (h, 2 * h):
        ups = ups[:1]
    if d < NARROWEST or any(up.width != d or up.axis != down.axis for up in ups):
        return False
    outs = [up.out for up in ups]
    if outs not in ([h], [2 * h], [h, h]):
        return False
    near = [s for s in others if s.parent in {leaf.parent for leaf in own}]
    return h > d or (any(is_nonlinear(s.module) for s in near) and (h == d or outs != [h]))


def _others(site: Site, own: list[Site]) -> list[Site]:
    """A site and all below it, but for these leaves and what is inside of them."""
    inside = {s for leaf in own for s in (leaf, *leaf.below())}
    return [s for s in (site, *site.below()) if s not in inside]


def _is_harmless(module: nn.Module) -> bool:
    """Whether a module leaves positions apart and carries no matrix of its own."""
    kind = type(module).__name__.lower()
    if isinstance(module, nn.MultiheadAttention) or "pool" in kind or "softmax" in kind:
        return False
    if isinstance(module, CONVS):
        still = set(module.stride) == {1}
        return still and module.groups == module.in_channels == module.out_channels
    return linear_shape(module) is None and _has_vectors(module)


def _has_vectors(module: nn.Module) -> bool:
    own = [p for p in module._parameters.values() if p is not None]
    return all(p.dim() == 0 or p.numel() == max(p.shape) for p in own)


def _is_bottleneck(own: list[Site], others: Iterable[Site]) -> bool:
    """Whether convolutions widen, mix positions channel by channel, and narrow again."""
    if not isinstance(own[0].module, CONVS):
        return False
    between = [s.module for s in others if own[0].order < s.order < own[-1].order]
    return any(isinstance(m, CONVS) and max(m.kernel_size) > 1 for m in between)


def _is_gate(site: Site, own: list[Site]) -> bool:
    """Whether this goes c -> c, or c -> r -> c, to gate something (squeeze-excite) or to narrow."""
    first, last = linear_shape(own[0].module), linear_shape(own[-1].module)
    if len(own) > 2 or not (first and last) or first.width != last.out or first.out != last.width:
        return False
    return first.out < first.width or _is_gated(site, own)


def _is_gated(site: Site, own: list[Site]) -> bool:
    """Whether it ends in a sigmoid: then what it gives is no feature but a weight."""
    late = [s.module for s in site.below() if s.order > own[-1].order]
    return any("sigmoid" in type(module).__name__.lower() for module in late)


# experts --------------------------------------------------------------------------------------


def _lifted(sites: list[Site], leaves: Projections, taken: set[Site]) -> list[Site]:
    """The same, with the experts of one layer made one: the layer, with its router."""
    lifted: dict[Site, Shape] = {}
    for site in sites:
        lifted.setdefault(_layer_of(site, leaves, taken), site.shape)
    for site, seen in lifted.items():
        site._shape = seen
    layers = [s for s in lifted if not s.is_span and s not in sites]
    return [s for s in lifted if not any(t.order < s.order < t.end for t in layers)]


def _layer_of(site: Site, leaves: Projections, taken: set[Site]) -> Site:
    """The outermost module around an expert that is called and holds nothing else but routers."""
    listed = site.is_element and site.parent is not None and len(site.parent.children) > 1
    if site.is_span or not (listed or any(expert_stacks(s.module) for s in (site, *site.below()))):
        return site
    top = site
    for above in site.above():
        if above.parent is None or above.is_element or not is_routed(above, leaves, taken):
            break
        top = top if is_list(above.module) else above
    return top


def is_routed(layer: Site, leaves: Projections, taken: set[Site]) -> bool:
    """Whether beside feed-forward networks a layer holds routers only: each gives few features."""
    rest = [linear_shape(s.module) for s in leaves.below(layer) if s not in taken]
    return all(found is not None and found.out < found.width for found in rest)


# spans ----------------------------------------------------------------------------------------


def _find_split(leaves: Projections, found: FFNs) -> None:
    groups: dict[Site | None, list[Site]] = {}
    for leaf in leaves.all:
        if leaf not in found.taken:
            groups.setdefault(leaves.elements[leaf], []).append(leaf)
    for group in groups.values():
        for own in _pairs(group):
            between = leaves.tree.sites[own[0].order : own[-1].end]
            inside = {s for leaf in own for s in (leaf, *leaf.below())}
            others = [s for s in between if s not in inside]
            made = _spanned(own[0], own[-1])
            if any(s in leaves.elements for s in others) or not _is_apart(made, own, leaves):
                continue
            if _is_bottleneck(own, others):
                found.bottlenecks.append(made)
            elif all(_is_harmless(s.module) for s in others) and _acts(
                made, own, others, leaves, found.sites
            ):
                found.sites.append(made)
            else:
                continue
            found.taken.update(own)


def _is_apart(made: Site, own: list[Site], leaves: Projections) -> bool:
    """Whether nothing else projects, or convolves over positions, where the two ends lie."""
    holder = holders(made)[0]
    ends = [s for s in holder.children if any(s.order <= leaf.order < s.end for leaf in own)]
    beside = [leaf for end in ends for leaf in leaves.below(end) if leaf not in own]
    late = len(ends) > 1 and own[-2].order < ends[-1].order < own[-1].order  # as in X-MOD
    after = [s for s in beside if s.order > own[-1].order and s.parent is not own[-1].parent]
    if beside != (after if late else []):
        return False
    convs = [s.module for s in holder.below() if isinstance(s.module, CONVS)]
    return not isinstance(own[0].module, CONVS) or not any(map(is_spatial, convs))


def is_spatial(module: nn.Module) -> bool:
    """Whether it is a convolution that mixes positions and channels at once."""
    if not isinstance(module, CONVS):
        return False
    return max(module.kernel_size) > 1 and module.groups != module.in_channels


def _pairs(group: list[Site]) -> list[list[Site]]:
    """Projections d -> h (or two of them), h -> d that follow one another, each used once."""
    pairs: list[list[Site]] = []
    last = -1
    for i, down in enumerate(group):
        exit = linear_shape(down.module)
        ups = 0
        while exit and i - ups - 1 > last and _goes(group[i - ups - 1], exit.out, exit.width):
            ups += 1
        if exit and ups in (1, 2) and exit.out >= NARROWEST:
            pairs.append(group[i - ups : i + 1])
            last = i
    return pairs


def _goes(site: Site, width: int, out: int) -> bool:
    found = linear_shape(site.module)
    return found is not None and found[:2] == (width, out)


def _acts(
    made: Site, own: list[Site], others: list[Site], leaves: Projections, known: list[Site]
) -> bool:
    """Whether it is an FFN and no two projections: it widens, acts between, or is by attention."""
    down, holder = linear_shape(own[-1].module), holders(made)[0]
    rest = [s for s in leaves.below(holder) if s not in own]
    attention = [s for s in holder.children if isinstance(s.module, nn.MultiheadAttention)]
    alike = [s for s in rest if s.parent is holder and s not in attention]
    direct = all(leaf.parent is holder and not isinstance(leaf.module, CONVS) for leaf in own)
    if down is None or (direct and len(alike) > 1 and not holder.is_element):  # all of an attention
        return False
    if down.width > down.out:
        return True
    if any(holder.order < s.order < holder.end for s in known):
        return False
    beside = (
        rest
        and direct
        and not alike
        and (attention or any(is_nonlinear(s.module) for s in holder.children))
    )
    acting = (
        down.width == down.out and holder.is_element and any(is_nonlinear(s.module) for s in others)
    )
    return len(own) == 2 and bool(beside or acting)


# places ---------------------------------------------------------------------------------------


def _is_placed(site: Site, leaves: Projections) -> bool:
    """Whether it is part of a block: an element of a container, or beside attention and a norm."""
    if site.is_element or element(site) is not None:
        return True
    around = holders(site)
    if not around:
        return False
    own = set(leaves.below(site))
    beside = [s for s in leaves.below(around[0]) if s not in own]
    attends = len(beside) > 1 or any(isinstance(s.module, nn.MultiheadAttention) for s in beside)
    return attends and any(is_norm(s.module) for s in around[0].children)


def _doubtful(sites: list[Site], leaves: Projections) -> list[Site]:
    """Two d -> h and h -> d, no activation, beside a network with one: an attention (Reformer)."""
    three = [s for s in sites if len(leaves.below(s)) == 3 and not _acts_inside(s)]
    sure = {element(s) for s in sites if _acts_inside(s)} - {None} if three else set()
    return [s for s in three if element(s) in sure]


def _acts_inside(site: Site) -> bool:
    around = holders(site)[0] if site.is_span else site
    return any(is_nonlinear(s.module) for s in around.below())


def _grows(site: Site, leaves: Projections) -> bool:
    """Whether most of its like go d -> h -> e: nothing is added to d there, as in dense blocks."""
    holder = element(site)
    if holder is None or holder.parent is None or len(leaves.below(holder)) != 2:
        return False
    known = holder.parent, type(holder.module)
    if known not in leaves.growing:
        alike = [s for s in holder.parent.children if type(s.module) is known[1]]
        pairs = [own for s in alike if len(own := leaves.below(s)) == 2]
        ends = [(linear_shape(first.module), linear_shape(last.module)) for first, last in pairs]
        open_ended = [a and b and a.width != b.out and a.out == b.width for a, b in ends]
        leaves.growing[known] = sum(map(bool, open_ended)) > len(alike) / 2
    return leaves.growing[known]


def _projects(site: Site) -> bool:
    if isinstance(site.module, nn.MultiheadAttention):
        return True
    inside_attention = site.parent and isinstance(site.parent.module, nn.MultiheadAttention)
    return linear_shape(site.module) is not None and not inside_attention


def stacked_experts(site: Site, own: list[Site]) -> Site | None:
    """A module with two or three stacks of matrices [experts, ., .], and routers at most."""
    stacks = [(s, found) for s in (site, *site.below()) for found in expert_stacks(s.module)]
    shapes = [found for _, found in stacks]
    together = len({s for s, _ in stacks}) == 1  # then some experts may be none (LongCat)
    if not 2 <= len(shapes) <= 3 or (len({n for n, _, _ in shapes}) > 1 and not together):
        return None
    routers = [linear_shape(s.module) for s in own]
    widths = _expert_widths(shapes)
    if not any(
        is_nonlinear(s.module) for s in site.below()
    ):  # only a gate tells them from projections
        widths = [d for d in widths if len(shapes) == 3 or _is_packed(shapes, d)]
    if not widths or any(found is None or found.out > shapes[0][0] for found in routers):
        return None
    around = ([s for s in holder.children if is_norm(s.module)] for holder in holders(site))
    norms = next((norms for norms in around if norms), [])
    known = {found.width for found in (shape_of(s.module) for s in norms) if found}
    width = next((w for w in widths if w in known), min(widths))
    site._shape = Shape(width, width, -1)
    return site


def _expert_widths(shapes: list[tuple[int, int, int]]) -> list[int]:
    """The widths d for which the stacks are of d x h (or d x 2h) and h x d, whichever way round."""
    *ups, down = [found[1:] for found in shapes]
    ways = [(d, h) for d, h in (down, down[::-1]) if d >= NARROWEST]
    return [d for d, h in ways if all(set(up) in ({d, h}, {d, 2 * h}) for up in ups)]


def _is_packed(shapes: list[tuple[int, int, int]], width: int) -> bool:
    (_, *up), (_, *down) = shapes
    return sum(up) - width == 2 * (sum(down) - width)
