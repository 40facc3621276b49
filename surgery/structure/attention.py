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

from .attention_states import OPERANDS
from .attention_traced import Mixing, TracedAttention, torch_attentions
from .layers import NARROWEST, is_conv, is_list, is_torch_attention, linear_shape
from .mixing_ops import may_mix_unread
from .module_tree import Projections, Site, elements_of, span
from .trace import Op, Trace


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
    todo = elements_of(block)[::-1] if block.is_span else [block]
    loose: list[Site] = []
    found = False
    while todo:
        site = todo.pop()
        layers = [s for s in projections.below(site) if s in rest]
        if not layers:
            continue
        if site in shared or site is block or is_list(site.module):
            todo += reversed(site.children)
        elif attn := _attention_in(site, layers):
            yield attn
            found = True
        elif site is layers[0] and not is_conv(site.module):
            loose.append(site)
    if not found and _are_attention(loose):  # all flat in the block
        yield span(loose[0], loose[-1])


def _attention_in(site: Site, layers: list[Site]) -> Site | None:
    """The smallest module in a site that may be an attention of these projections."""
    if _is_whole(site, layers):
        return site
    several = len(layers) > 1 or is_torch_attention(layers[0].module)
    return _smallest(site, layers) if several else None


def _is_whole(site: Site, layers: list[Site]) -> bool:
    """Whether a module's one projection makes all of an attention, d -> 3 d (T2T-ViT)."""
    return len(layers) == 1 and site is not layers[0] and layers[0].out == 3 * layers[0].width


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


def _overlap(a: _Group, b: _Group) -> bool:
    return bool(a.makers.keys() & b.makers.keys() or a.proj.keys() & b.proj.keys())


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
        for word in OPERANDS:
            for site in map(self.site, (maker.owner for maker in getattr(attention, word))):
                if site and not attention.scored and _lies_in_any(site, self.ffns):
                    return {}
                if site and not _lies_in_any(site, self.sure):
                    makers.setdefault(site, set()).add(word)
        stream = self._stream(attention)
        own = {s: words for s, words in makers.items() if s not in stream}
        return own or makers  # what came unprojected is of the stream, and no query (RvT)

    def _stream(self, attention: TracedAttention) -> set[Site]:
        """What made the stream; not in the module where it ran (Retinexformer's)."""
        stream = (self.site(maker.owner) for maker in attention.stream)
        here = self.site(attention.call.module) if attention.call else None
        return {s for s in stream if s and not (here and _lies_in(s, here))}

    def _is_one(
        self, attention: TracedAttention, makers: dict[Site, set[str]], calls: list[Site]
    ) -> bool:
        """Whether it is an attention, and no other product of features.

        Weights that one projection makes weigh what a projection in the same module makes (VOLO);
        a context of positions does not (GCNet). Without a softmax all stand in one module.
        """
        if attention.scored and attention.soft:
            return True
        if attention.scored and len(set().union(*makers.values())) < len(OPERANDS):
            return False  # of three, one is no projection (Gemma 3n's AltUp)
        whole = [s for s in calls if all(_lies_in(maker, s) for maker in makers)]
        beside = attention.scored and len({maker.parent for maker in makers}) == 1  # LoFTR's
        if not whole or not (beside or not _holds_any(whole[0], self.ffns)):
            return False
        return attention.scored or self._weighs_value(attention, makers, whole[0])

    def _weighs_value(
        self, attention: TracedAttention, makers: dict[Site, set[str]], site: Site
    ) -> bool:
        """Whether what it weighs is projected, and it ran in a module itself."""
        inside = attention.op.call is not None and site is self.site(attention.op.call.module)
        return inside and any("value" in words for words in makers.values())

    def grouped(self) -> list[_Group]:
        """What several runs, or several products in one module, show of one attention."""
        grouped: list[_Group] = []
        for group in self.groups:
            for other in grouped:
                if other.calls[:1] == group.calls[:1] and _overlap(other, group):
                    for site, words in group.makers.items():
                        other.makers.setdefault(site, set()).update(words)
                    other.inner.update(group.inner)
                    other.proj.update(group.proj)
                    break
            else:
                grouped.append(group)
        for group in grouped:  # what enters another is no output (ATD's dictionary of tokens)
            for other in grouped:
                for site in other.makers if other is not group else ():
                    group.proj.pop(site, None)
        return grouped

    def attention(self, group: _Group, groups: list[_Group]) -> Attention:
        others = [other for other in groups if other is not group]
        other = [s for s in group.makers if s not in self.projects]
        site = self._place(group, others)
        made_of = set(group.makers)
        if site is not None and not site.is_span:  # low-rank queries: what they are made of
            made_of.update(s for s in group.inner if _lies_in(s, site))
        qkv = sorted(self.projects & made_of, key=_first)
        proj = sorted(self.projects.intersection(group.proj).difference(qkv), key=_first)
        words = {s: group.makers[s] for s in qkv if s in group.makers}
        return Attention(site, qkv, proj, words, other)

    def _place(self, group: _Group, others: list[_Group]) -> Site | None:
        """The module of its own that holds most of it; else the span of its projections."""
        free = [s for s in group.calls if self._is_free(s, group, others)]
        if free:
            holder = max(free, key=lambda s: len(_words_in(s, group)))
            wider = _with_output(holder, group)
            return wider if self._is_free(wider, group, others) else holder
        near = [s for s in group.makers if group.calls and _lies_in(s, group.calls[0])]
        ends = sorted([*near, *group.proj], key=_first)
        projects = bool(ends) and ends[-1] in group.proj and ends[-1] in self.projects
        return span(ends[0], ends[-1]) if projects and len(ends) > 1 else None

    def _is_free(self, site: Site, group: _Group, others: list[_Group]) -> bool:
        """Whether it holds neither a feed-forward network nor what makes another attention.

        But for one that lies in a module of its own there (DeepSeek's compressor).
        """
        if _holds_any(site, self.sure):
            return False
        return not any(
            _holds_any(site, other.makers.keys() - group.makers.keys())
            and not _is_nested(other, site, group)
            for other in others
        )


def _words_in(site: Site, group: _Group) -> set[str]:
    """Which of query, key and value something in a site makes."""
    return set().union(*(words for maker, words in group.makers.items() if _lies_in(maker, site)))


def _is_nested(other: _Group, site: Site, group: _Group) -> bool:
    """Whether an attention stands in a module inside a site that has nothing of this one."""
    inner = other.calls[0] if other.calls else site
    ours = (*group.makers, *group.proj)
    return inner is not site and _lies_in(inner, site) and not _holds_any(inner, ours)


def _with_output(holder: Site, group: _Group) -> Site:
    """The module around another that holds the output projections too (BERT's stand beside it)."""
    outside = [s for s in group.proj if not _lies_in(s, holder)]
    around = (s for s in holder.above() if all(_lies_in(p, s) for p in outside))
    return next(around, holder) if outside else holder


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
        if id(site.module) not in ran or may_mix_unread(ran[id(site.module)]):
            kept.append(attention)
    return sorted([*by_forward, *kept], key=_order)


def _ran(trace: Trace) -> dict[int, list[Op]]:
    """The operations that ran in each module, by its id."""
    ran: dict[int, list[Op]] = {id(call.module): [] for call in trace.calls}
    for op in trace.ops:
        for call in op.stack():
            ran[id(call.module)].append(op)
    return ran
