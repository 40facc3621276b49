"""The attentions of a model: by the module tree, and as a forward tells where there is an example.

A forward wins: what it shows to mix tokens by data is attention wherever it stands, and what the
tree takes for one and mixes nothing by data (a convolution module, an embedder of conditions) is
none. What did not run is as the tree says.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import nn

from .attention_traced import (
    KERNELS,
    RECURRENT,
    TORCH,
    Mixing,
    TracedAttention,
    torch_attentions,
)
from .layers import NARROWEST, is_conv, is_list, is_torch_attention, linear_shape
from .module_tree import Projections, Site, span
from .trace import Op, Trace, names

BY_DATA = KERNELS | RECURRENT | names("cumsum cumprod grid_sample") | {TORCH}
JOINED = names("stack cat")
MANY = 5  # pieces that are put together step by step: a recurrence


class Attention(NamedTuple):
    """One attention.

    site   where it is: a module, or the span from its first projection to its last; None where it
           is no place of its own
    qkv    the projections of what enters
    proj   those of what comes out
    words  which of query, key and value each of qkv makes, where a forward told
    other  what makes them too, and is no projection that is called: a convolution over positions
           or with strides, a module that multiplies with weights of its own
    """

    site: Site | None
    qkv: list[Site]
    proj: list[Site]
    words: dict[Site, set[str]]
    other: list[Site]


# by the tree -------------------------------------------------------------------------------------


def attentions_by_tree(
    projections: Projections, ffns: Sequence[Site], taken: set[Site], blocks: Iterable[Site]
) -> list[Attention]:
    """What else projects features in a block, branch by branch.

    taken  the projections of feed-forward networks
    """
    sites = projections.tree.sites
    shared = {s for ffn in ffns for s in (*sites[ffn.order : ffn.end], *ffn.entry.above())}
    rest = {s for s in projections.all if s not in taken}
    found = (attn for block in blocks for attn in _beside(block, shared, rest, projections))
    return [_by_tree(attn, projections, ffns) for attn in dict.fromkeys(found)]


def _beside(
    block: Site, shared: set[Site], rest: set[Site], projections: Projections
) -> Iterator[Site]:
    """The smallest modules that hold what else projects in a block; else its own projections.

    shared  the sites that have something in common with an FFN
    """
    todo = [block] if not block.is_span else _between(block)
    loose: list[Site] = []
    found = False
    while todo:
        site = todo.pop()
        layers = [s for s in projections.below(site) if s in rest]
        if not layers:
            continue
        if site in shared or site is block or is_list(site.module):
            todo += reversed(site.children)
        elif _is_whole(site, layers):
            yield site
            found = True
        elif len(layers) > 1 or is_torch_attention(layers[0].module):
            yield _smallest(site, layers)
            found = True
        elif site is layers[0] and not is_conv(site.module):
            loose.append(site)
    if not found and _are_attention(loose):  # all flat in the block
        yield span(loose[0], loose[-1])


def _between(block: Site) -> list[Site]:
    """The elements of a span of them, last first."""
    siblings = block.entry.parent.children if block.entry.parent else []
    return [s for s in siblings if block.order <= s.order < block.exit.end][::-1]


def _is_whole(site: Site, layers: list[Site]) -> bool:
    """Whether a module's one projection makes all of an attention, d -> 3 d (T2T-ViT)."""
    one = layers[0]
    return len(layers) == 1 and site is not one and one.out == 3 * one.width


def _are_attention(loose: list[Site]) -> bool:
    """Whether projections side by side may be d -> 3 d, then d -> d; or three and one more."""
    if len(loose) < 2 or loose[0].parent is not loose[-1].parent:
        return False
    return loose[0].out == 3 * loose[-1].out or len(loose) > 3


def _by_tree(attn: Site, projections: Projections, ffns: Sequence[Site]) -> Attention:
    of_coordinates = set(coordinates(attn, projections))
    layers = [s for s in projections.below(attn) if s not in of_coordinates]
    if attn.is_span:
        layers = [s for s in layers if s.parent is attn.entry.parent]
    if _is_whole(attn, layers):
        return Attention(attn, layers, [], {}, [])
    output = _output(attn, layers or projections.below(attn), ffns)
    proj = [] if is_torch_attention(output.module) else [output]
    other = [attn] if is_torch_attention(attn.module) else []
    return Attention(attn, [s for s in layers if s is not output], proj, {}, other)


def _output(attn: Site, layers: list[Site], ffns: Sequence[Site]) -> Site:
    """The output projection: the last that gives as many features as the FFN beside it takes.

    (Phi-3 registers it first.)
    """
    near = ffns[min(bisect_left(ffns, attn.order, key=lambda f: f.order), len(ffns) - 1)]
    ends = [s for s in layers if s.out == near.width]
    return (ends or layers)[-1]


def coordinates(attn: Site, projections: Projections) -> list[Site]:
    """The projections of an attention that take coordinates, no features (Swin V2, ConViT)."""
    layers = projections.below(attn)
    narrow = {s for s in layers if (shape := linear_shape(s.module)) and shape.width < NARROWEST}
    small = {s.parent for s in narrow} - {attn}
    return [s for s in layers if s in narrow or s.parent in small]


def _smallest(site: Site, layers: list[Site]) -> Site:
    """The smallest module in a site that holds all of these."""
    for child in site.children:
        if child.order <= layers[0].order and layers[-1].order < child.end:
            return _smallest(child, layers)
    return site


# by a forward ------------------------------------------------------------------------------------


def attentions_by_forward(
    trace: Trace,
    mixing: Mixing,
    projections: Projections,
    ffns: Sequence[Site],
    sure: Collection[Site],
) -> list[Attention]:
    """What a forward shows to mix tokens by data, in the order of the walk.

    ffns, sure  the feed-forward networks, and those that the forward shows to be ones
    """
    found = _Found(projections, ffns, sure)
    for attention in mixing.attentions:
        found.add(attention)
    groups = found.grouped()
    attentions = [found.attention(group, groups) for group in groups]
    known = {a.site for a in attentions}
    called = (found.site(call.module) for call in torch_attentions(trace))
    own = [site for site in dict.fromkeys(called) if site and site not in known]
    attentions += [Attention(s, [], [], {}, [s]) for s in own if is_torch_attention(s.module)]
    return sorted(attentions, key=_order)


def _order(attention: Attention) -> int:
    sites = [attention.site] if attention.site else [*attention.qkv, *attention.proj]
    return min(site.order for site in sites if site)


class _Group(NamedTuple):
    """An attention as all of its runs show it: projections, and what holds weights of its own.

    calls  the modules in which it ran, innermost first
    """

    calls: list[Site]
    makers: dict[Site, set[str]]
    inner: dict[Site, None]
    proj: dict[Site, None]


class _Found:
    """Puts what was traced into the tree."""

    def __init__(
        self, projections: Projections, ffns: Sequence[Site], sure: Collection[Site]
    ) -> None:
        self.projections, self.ffns, self.sure = projections, ffns, sure
        self.by_module = {id(s.module): s for s in projections.tree.sites}
        self.projects = set(projections.all)
        self.groups: list[_Group] = []

    def site(self, module: nn.Module | None) -> Site | None:
        return self.by_module.get(id(module))

    def add(self, attention: TracedAttention) -> None:
        makers = self._makers(attention)
        found = (self.site(call.module) for call in attention.op.stack())
        calls = [s for s in found if s and _holds_any(s, makers)]
        if not makers or not self._is_one(attention, makers, calls):
            return
        inner = (self.site(m.owner) for each in attention.inner.values() for m in each)
        proj = (self.site(linear.owner) for linear in attention.proj)
        self.groups.append(
            _Group(
                calls,
                makers,
                dict.fromkeys(s for s in inner if s),
                dict.fromkeys(s for s in proj if s and not _lies_in_any(s, self.sure)),
            )
        )

    def _makers(self, attention: TracedAttention) -> dict[Site, set[str]]:
        """What made what entered; nothing where it is experts, weighed by their router."""
        makers: dict[Site, set[str]] = {}
        for word in ("query", "key", "value"):
            for site in map(self.site, (maker.owner for maker in getattr(attention, word))):
                if site and not attention.scored and _lies_in_any(site, self.ffns):
                    return {}
                if site and not _lies_in_any(site, self.sure):
                    makers.setdefault(site, set()).add(word)
        stream = {self.site(maker.owner) for maker in attention.stream}
        own = {s: words for s, words in makers.items() if s not in stream}
        return own or makers  # what came unprojected is of the stream, and no query (RvT)

    def _is_one(
        self, attention: TracedAttention, makers: dict[Site, set[str]], calls: list[Site]
    ) -> bool:
        """Whether it is an attention, and no other product of features.

        Weights that one projection makes weigh what a projection in the same module makes (VOLO);
        a context of positions does not (GCNet). Without a softmax all stand in one module.
        """
        if attention.scored and attention.soft:
            return True
        whole = [s for s in calls if all(_lies_in(maker, s) for maker in makers)]
        beside = attention.scored and len({maker.parent for maker in makers}) == 1  # LoFTR's
        if not whole or not (beside or not _holds_any(whole[0], self.ffns)):
            return False
        inside = attention.op.call is not None and whole[0] is self.site(attention.op.call.module)
        return attention.scored or (inside and any("value" in words for words in makers.values()))

    def grouped(self) -> list[_Group]:
        """What several runs, or several products in one module, show of one attention."""
        grouped: list[_Group] = []
        for group in self.groups:
            for other in grouped:
                if other.calls[:1] == group.calls[:1] and set(other.makers) & set(group.makers):
                    for site, words in group.makers.items():
                        other.makers.setdefault(site, set()).update(words)
                    other.inner.update(group.inner)
                    other.proj.update(group.proj)
                    break
            else:
                grouped.append(group)
        return grouped

    def attention(self, group: _Group, groups: list[_Group]) -> Attention:
        others = {s for other in groups if other is not group for s in other.makers}
        others -= set(group.makers)
        qkv = [s for s in group.makers if s in self.projects]
        other = [s for s in group.makers if s not in self.projects]
        site = self._place(group, others)
        if site is not None and not site.is_span:  # low-rank queries: what they are made of
            qkv += [s for s in group.inner if s in self.projects and _lies_in(s, site)]
        qkv = sorted(dict.fromkeys(qkv), key=_first)
        proj = sorted((s for s in group.proj if s in self.projects), key=_first)
        words = {s: group.makers[s] for s in qkv if s in group.makers}
        return Attention(site, qkv, [s for s in proj if s not in qkv], words, other)

    def _place(self, group: _Group, others: set[Site]) -> Site | None:
        """The module of its own that holds most of it; else the span of its projections."""
        makers = list(group.makers)
        free = [s for s in group.calls if self._is_free(s, others)]
        if free:
            holder = max(free, key=lambda s: sum(_lies_in(m, s) for m in makers))
            outside = [s for s in group.proj if not _lies_in(s, holder)]
            wider = next((s for s in holder.above() if all(_lies_in(p, s) for p in outside)), None)
            if outside and wider is not None and self._is_free(wider, others):
                return wider  # BERT's output stands beside it
            return holder
        near = [s for s in makers if group.calls and _lies_in(s, group.calls[0])]
        ends = sorted([*near, *group.proj], key=_first)
        projects = bool(ends) and ends[-1] in group.proj and ends[-1] in self.projects
        return span(ends[0], ends[-1]) if projects and len(ends) > 1 else None

    def _is_free(self, site: Site, others: set[Site]) -> bool:
        """Whether it holds neither a feed-forward network nor what makes another attention."""
        return not _holds_any(site, self.sure) and not _holds_any(site, others)


def _first(site: Site) -> int:
    return site.order


def _lies_in(site: Site, around: Site) -> bool:
    return around.order <= site.order < around.end


def _holds_any(site: Site, places: Iterable[Site]) -> bool:
    return any(_lies_in(place, site) for place in places)


def _lies_in_any(site: Site, places: Iterable[Site]) -> bool:
    return any(_lies_in(site, place) for place in places)


# both --------------------------------------------------------------------------------------------


def corrected(
    by_tree: list[Attention],
    by_forward: list[Attention],
    trace: Trace,
    projections: Projections,
) -> list[Attention]:
    """The attentions of the tree, as a forward corrects them."""
    seen = {s for a in by_forward for s in (*a.qkv, *a.proj)} | {a.site for a in by_forward}
    ran = _ran(trace)
    kept = []
    for attention in by_tree:
        site = attention.site
        if site is None or site in seen or seen & set(projections.below(site)):
            continue
        if id(site.module) not in ran or _mixes_by_data(ran[id(site.module)]):
            kept.append(attention)
    return sorted([*by_forward, *kept], key=_order)


def _ran(trace: Trace) -> dict[int, list[Op]]:
    """The operations that ran in each module, by its id."""
    ran: dict[int, list[Op]] = {id(call.module): [] for call in trace.calls}
    for op in trace.ops:
        for call in op.stack():
            ran[id(call.module)].append(op)
    return ran


def _mixes_by_data(ops: list[Op]) -> bool:
    """Whether these may mix tokens by data in a way that `attention_traced` does not read.

    Step by step (RWKV's loop, scans), where others are sampled (Deformable DETR), in a kernel.
    """
    if any(op.name in BY_DATA or (op.name in JOINED and len(op.features) >= MANY) for op in ops):
        return True
    if any(op.name == "_opaque" and len(op.features) > 1 for op in ops):
        return True
    return sum(op.name == "setitem" for op in ops) >= MANY
