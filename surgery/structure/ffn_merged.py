"""The feed-forward networks of a model, as its modules show them and as it ran: one list of both.

Where they differ the forward is right. It shows what modules do not: no activation among them,
experts in one matrix, another order than that of registration.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import cached_property
from typing import NamedTuple

from .experts import expert_layers, is_routed
from .ffn import FFNs, is_placed, span_of, whole_or_span
from .ffn_traced import TracedFFN, single_ffns
from .layers import Shape, expert_stacks, is_list, linear_shape
from .mixing_ops import mixes
from .module_tree import Projections, Site, element, holders
from .trace import Trace, Value


class _Seen(NamedTuple):
    """A network that ran: its site, its projections, and the features that it read.

    spreads  whether a depthwise convolution over positions lies in between
    normed   whether a norm feeds it, of what it is added to
    """

    site: Site
    layers: frozenset[Site]
    sources: set[Value]
    spreads: bool
    normed: bool


def find_traced_ffns(trace: Trace, projections: Projections, ffns: FFNs) -> FFNs:
    """The networks that modules show, and those that only a forward shows, each as it ran.

    Of these last what lies in a block: beside what mixes tokens, or another network. (Not D-FINE's
    convolutions, nor the scale of DAB-DETR's queries.) All of them where modules show none.

    ffns  what modules show
    """
    return _Merge(trace, projections, ffns).merged()


class _Merge:
    def __init__(self, trace: Trace, projections: Projections, told: FFNs) -> None:
        self.trace, self.projections, self.told = trace, projections, told
        self.by_path = {site.path: site for site in projections.tree.sites}
        self.known, self.orders = set(told.sites), [site.order for site in told.sites]
        self.owners = {layer: s for s in told.sites for layer in projections.below(s)}
        self.seen = self._seen()
        self.sources = {ran.site: ran.sources for ran in self.seen}

    def merged(self) -> FFNs:
        met = [(ran, self._met(ran)) for ran in self.seen]
        wrong = {s for ran, sites in met for s in sites if not self._is_within(ran, s)}
        kept = [s for s in self.told.sites if s not in wrong]
        added = self._added([(ran, sites) for ran, sites in met if wrong.issuperset(sites)], kept)
        gone = {layer for layer, s in self.owners.items() if s in wrong}
        taken = (self.told.projections - gone).union(*(ran.layers for ran in added))
        sites = sorted(self._with_experts(kept, added, taken), key=lambda s: s.order)
        seen = frozenset(filter(self._has_run, sites))
        return self.told._replace(sites=sites, projections=taken, seen=seen)

    def _added(self, apart: list[tuple[_Seen, set[Site]]], kept: list[Site]) -> list[_Seen]:
        """What is a network besides those that are kept: instead of some, or placed as one."""
        placed = [ran for ran, wrong in apart if wrong or self._is_placed(ran, kept)]
        return placed if kept or placed else [ran for ran, _ in apart]

    def _has_run(self, site: Site) -> bool:
        return any(self._is_within(ran, site) for ran in self.seen)

    # what ran, as sites

    def _seen(self) -> list[_Seen]:
        seen: dict[str, _Seen] = {}
        for ffn, sources in single_ffns(self.trace):
            site = self._site_of(ffn) if ffn.kind in ("ffn", "tokens") else None
            if site is not None and site.path not in seen:
                site._shape = Shape(ffn.width, ffn.out, ffn.axis)
                ran = {self.by_path[path] for path in ffn.layers}
                layers = frozenset(ran.intersection(self.projections.elements))
                seen[site.path] = _Seen(site, layers, sources, ffn.spreads, ffn.prenormed)
        return list(seen.values())

    def _site_of(self, ffn: TracedFFN) -> Site | None:
        """The module that holds its projections and nothing else, or the span; of experts all."""
        owner = self.by_path.get(ffn.owner)
        layers = list(dict.fromkeys(self.by_path.get(path) for path in ffn.layers))
        if owner is None or None in layers:
            return None
        if owner in layers:  # it holds matrices itself
            while owner.parent and not owner.is_element and self._is_routed(owner.parent):
                owner = owner.parent
            return owner
        known = [layer for layer in layers if layer is not None]
        if set(self.projections.below(owner)) != set(known):
            return span_of(known)
        while is_list(owner.module) and owner.parent and self._holds_just(owner.parent, known):
            owner = owner.parent
        return whole_or_span(owner, known)

    def _is_routed(self, layer: Site) -> bool:
        return is_routed(layer, self.projections, set())

    def _holds_just(self, site: Site, layers: list[Site]) -> bool:
        return set(self.projections.below(site)) == set(layers)

    # how both go together

    def _met(self, ran: _Seen) -> set[Site]:
        """The sites that a network which ran has a projection, or a place, in common with."""
        shared = {self.owners[layer] for layer in ran.layers if layer in self.owners}
        around = self.known.intersection((ran.site, *holders(ran.site)))
        if ran.layers:
            return shared | around
        low, high = (bisect_left(self.orders, end) for end in (ran.site.order, ran.site.end))
        return around.union(self.told.sites[low:high])  # it holds matrices itself

    def _is_within(self, ran: _Seen, site: Site) -> bool:
        """Whether a site holds all of it. (Of w1, w2, w3 the span from w1 to w2 does not.)"""
        return ran.layers.issubset(self.projections.below(site)) or _lies_in(ran.site, site)

    def _is_placed(self, ran: _Seen, kept: list[Site]) -> bool:
        """Whether a network lies in a block: an element that mixes tokens, or holds another one.

        Or in one of several that are alike, where another does (x-transformers lists attentions
        and networks in turn). What convolves over positions beside a network is none: a Conformer's
        convolutions, RecurrentGemma's recurrence. In no list x + ff(norm(x)) will do (ST-MoE).
        """
        site, others = ran.site, [other.order for other in kept]
        if not site.is_element and element(site) is None:
            return ran.normed or is_placed(site, self.projections)
        around = [s for holder in (site, *holders(site)) for s in _block_and_list(holder)]
        if any(_has(s, others) for s in around):
            return not ran.spreads
        return any(_has(s, self.mixing) for s in around)

    @cached_property
    def mixing(self) -> list[int]:
        """Where tokens are mixed by data, as numbers of the walk."""
        modules = {id(op.call.module) for op in self.trace.ops if op.call and mixes(op)}
        return [s.order for s in self.projections.tree.sites if id(s.module) in modules]

    # experts

    def _with_experts(self, kept: list[Site], added: list[_Seen], taken: set[Site]) -> list[Site]:
        """All sites, the experts that modules do not show made one for each of their layers."""
        experts = [ran.site for ran in added if self._is_expert(ran)]
        experts += [s for s in kept if _has_stacks(s)] if added else []
        twins = [twin for expert in experts for twin in self._twins(expert)]
        taken.update(layer for twin in twins for layer in self.projections.below(twin))
        layers = expert_layers(experts, self.projections, taken)
        others = [s for s in (*kept, *(ran.site for ran in added)) if s not in experts]
        return layers + _outside(others, layers)

    def _is_expert(self, ran: _Seen) -> bool:
        """Whether others like it read the same, or never ran; or it holds stacks of matrices."""
        twins = self._twins(ran.site)
        beside = any(ran.sources & self.sources.get(twin, set()) for twin in twins)
        idle = any(not self.trace.calls_of(twin.module) for twin in twins)
        return beside or idle or _has_stacks(ran.site)

    def _twins(self, site: Site) -> list[Site]:
        """The other elements of a list whose projections are of the same widths."""
        if site.is_span or not (site.is_element and site.parent):
            return []
        widths = self._widths(site)
        return [s for s in site.parent.children if s is not site and self._widths(s) == widths]

    def _widths(self, site: Site) -> list[Shape | None]:
        return [linear_shape(s.module) for s in self.projections.below(site)]


def _has(site: Site, orders: list[int]) -> bool:
    """Whether one of these numbers of the walk lies in a site."""
    return bisect_left(orders, site.order) < bisect_left(orders, site.end)


def _lies_in(site: Site, other: Site) -> bool:
    return other.order <= site.order and site.end <= other.end


def _outside(sites: list[Site], layers: list[Site]) -> list[Site]:
    return [s for s in sites if not any(_lies_in(s, layer) for layer in layers)]


def _has_stacks(site: Site) -> bool:
    return not site.is_span and any(expert_stacks(s.module) for s in (site, *site.below()))


def _block_and_list(holder: Site) -> list[Site]:
    """An element of a list, and the list where others are of its class."""
    if not (holder.is_element and holder.parent) or holder.is_span:
        return []
    alike = [s for s in holder.parent.children if type(s.module) is type(holder.module)]
    return [holder, holder.parent] if len(alike) > 1 else [holder]
