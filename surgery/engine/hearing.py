"""What a place hears: the last part before it on its own stream of tokens.

Towers are told apart by what lists their blocks, and by their widths; a forward on an example tells
whether what a part gave comes to the place at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TypeAlias

from .._text import first_few
from ..errors import RuleError
from ..rules.edits import Side
from ..rules.selector import Selector
from ..structure.dataflow import dataflow_of
from ..structure.module_tree import CONTAINERS, Site, Tree
from ..structure.trace import Op, Trace, Value, upstream
from .decided import Decided
from .placement import Placement
from .tokens import ASIDE, ON_OUTPUT

Sources: TypeAlias = dict[Placement, list[Placement]]


def sources_of(placements: list[Placement], tree: Tree, decided: Decided | None) -> Sources:
    """For each place that hears a part, those that it could be, of which the first is heard.

    None where there are none, and the rule is optional: at the first block of each tower. What
    runs aside hears what ran aside last, if anything.
    """
    sources = _all_sources(placements, tree)
    deaf = _deaf(sources)
    while any(other in deaf for those in sources.values() for other in those):
        sources = deaf | _all_sources([p for p in placements if p not in deaf], tree)
        deaf = _deaf(sources)
    if decided and decided.modules:
        for p in guessed(sources, tree)[:1]:
            raise RuleError(
                p.rule.short,
                f"a forward on an example told what {p.site.path} hears when the file was made, "
                "and the file does not.",
                "Give load(..., example=inputs).",
            )
    return sources


def _all_sources(placements: list[Placement], tree: Tree) -> Sources:
    asides = [p for p in placements if isinstance(p.edit, Side)]
    implied = {p: _last(p, asides, tree) for p in asides if not p.edit.hears}
    edits = [(p, p.edit.hears) for p in placements]
    sources = {p: _sources(p, heard, placements, tree) for p, heard in edits if heard}
    return sources | {p: those for p, those in implied.items() if those}


def _deaf(sources: Sources) -> Sources:
    """Those that hear nothing: they are not joined, and so heard by nothing."""
    return {p: those for p, those in sources.items() if not those}


def guessed(sources: Mapping[Placement, list[Placement]], tree: Tree) -> list[Placement]:
    """Those that could hear one of several places (two streams in a block), and no forward told."""
    if dataflow_of(tree):
        return []
    told = {p: those for p, those in sources.items() if p.edit.hears}  # asides hear the last
    return [p for p, those in told.items() if len({other.place for other in those}) > 1]


def unheard_asides(
    placements: list[Placement], heard_from: Mapping[Placement, Placement]
) -> list[str]:
    """A note of what runs aside, and nothing hears: it is not trained."""
    heard = {*heard_from.values()}
    lost = [p.site.path for p in placements if p.edit.place in ASIDE and p not in heard]
    told = f"nothing hears what runs aside at {first_few(lost)}: hears= brings it back"
    return [told] if lost else []


def _sources(
    p: Placement, heard: Selector, placements: list[Placement], tree: Tree
) -> list[Placement]:
    """What it may hear, the last first. Raises RuleError where that is nothing, and need be."""
    sites = heard.find(tree)
    joined = [o for o in placements if o.edit.can_be_heard and o.place in sites]
    tower = _tower(p.place, [other.place for other in joined])
    sources = [other for other in joined if _is_before(other, p, tower)]
    last = max((_beginning(other.place, tower) for other in sources), default=0)
    near = [other for other in sources if _beginning(other.place, tower) == last]
    coming = _coming(p, near, tree)
    if coming or p.rule.optional:
        numbered = enumerate(coming)  # of two at one place the later rule's
        ordered = sorted(numbered, key=lambda each: (each[1].place.exit.order, each[0]))
        return [each for _, each in reversed(ordered)]
    raise RuleError(
        p.rule.short,
        f"before {p.site.path} no rule joins a part at {heard!r} that it could hear.",
        "Join one there, or leave the first places out: block[1:], or optional=True for those of "
        "every tower.",
    )


def _last(p: Placement, asides: list[Placement], tree: Tree) -> list[Placement]:
    """What ran aside before, the last first: in its tower, or where no tower is (an embedding).

    Of those that are as wide, where one of them lies in its tower.
    """
    alike = [o for o in asides if o.site.shape.out == p.site.shape.out]
    tower = _outermost(p.place, [o.place for o in alike if o.place != p.place])
    before = [o for o in asides if _runs_before(o, p)]
    mine = [o for o in before if o in alike and (tower is None or _holds(tower, o.place))]
    those = mine or [o for o in before if not o.place.entry.is_element]
    return _coming(p, sorted(those, key=_when, reverse=True), tree)


def _outermost(place: Site, others: list[Site]) -> Site | None:
    """The outermost list around that holds another place (blocks may lie in modules of their own).

    Without one, the smallest module that does.
    """
    around = [h for h in place.entry.above() if any(_holds(h, s) for s in others)]
    lists = [h for h in around if isinstance(h.module, CONTAINERS)]
    return lists[-1] if lists else next(iter(around), None)


def _when(p: Placement) -> tuple[int, int]:
    """Where it is over, and of one place which rule's comes first."""
    return p.place.exit.end, p.number


def _tower(place: Site, sources: list[Site]) -> Site | None:
    """What lists the blocks of its tower.

    Of blocks that are no elements of a list (attributes, a norm behind all blocks), the smallest
    module around that holds a source besides the place's own.
    """
    if place.entry.is_element:
        return place.entry.parent
    others = [site for site in sources if not _holds(place.entry, site)]
    above = place.entry.above()
    return next((h for h in above if any(_holds(h, s) and s is not h for s in others)), None)


def _holds(holder: Site, site: Site) -> bool:
    return holder.order <= site.entry.order and site.exit.end <= holder.end


def _is_before(other: Placement, p: Placement, tower: Site | None) -> bool:
    """Whether it runs before a place in its tower, and gives features as wide (aside: of any)."""
    width, out = p.site.shape.width, other.site.shape.out
    aside = isinstance(other.edit, Side) or isinstance(p.edit, Side)
    if not _runs_before(other, p) or not (aside or 0 in (width, out, width - out)):
        return False
    return tower is None or _holds(tower, other.place)


def _runs_before(other: Placement, p: Placement) -> bool:
    """Whether all of it is over when a part hears it: at the end of its place, or the beginning."""
    if p.edit.place not in ON_OUTPUT:
        return other.place.exit.end <= p.place.entry.order
    if other.place == p.place:
        return other.edit.place in ON_OUTPUT and other.number < p.number
    return other.place.exit.end <= p.place.exit.end


def _beginning(place: Site, tower: Site | None) -> int:
    """Where the child of the tower begins in which a place lies: its block."""
    way = chain([place.entry], place.entry.above())
    return next((site.order for site in way if site.parent is tower), place.entry.order)


# by a forward ----------------------------------------------------------------------------------


def _coming(p: Placement, sources: list[Placement], tree: Tree) -> list[Placement]:
    """Those of the sources whose output comes to a place in the forward, where that tells."""
    dataflow = dataflow_of(tree)
    if dataflow is None or not sources:
        return sources
    given = list(_given(dataflow.trace, p))
    if not given:
        return sources
    behind = set(upstream(given, _any))
    return [each for each in sources if behind & set(_gives(dataflow.trace, each.place))]


def _given(trace: Trace, p: Placement) -> Iterator[Value]:
    """The tokens that come to a place, or it gives; none where it is not called."""
    if p.edit.place in ON_OUTPUT:
        yield from _gives(trace, p.place)
    for call in trace.calls_of(p.place.entry.module):
        yield from [value for value in call.inputs if value.is_feature][:1]


def _gives(trace: Trace, place: Site) -> Iterator[Value]:
    for call in trace.calls_of(place.exit.module):
        yield from call.outputs[:1]


def _any(op: Op) -> bool:
    return True
