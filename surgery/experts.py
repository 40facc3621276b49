"""Experts that lie in stacks of matrices [experts, ., .], as one feed-forward network."""

from __future__ import annotations

from .leaf import NARROWEST, Shape, bends, experts, is_norm, linear, shape
from .tree import Site, holders


def stacked(site: Site, own: list[Site]) -> Site | None:
    """A module with two or three stacks of matrices [experts, ., .], and routers at most."""
    stacks = [(s, found) for s in (site, *site.below()) for found in experts(s.module)]
    shapes = [found for _, found in stacks]
    together = len({s for s, _ in stacks}) == 1  # then some experts may be none (LongCat)
    if not 2 <= len(shapes) <= 3 or (len({n for n, _, _ in shapes}) > 1 and not together):
        return None
    routers = [linear(s.module) for s in own]
    widths = _expert_widths(shapes)
    if not any(bends(s.module) for s in site.below()):  # only a gate tells them from projections
        widths = [d for d in widths if len(shapes) == 3 or _is_packed(shapes, d)]
    if not widths or any(found is None or found.out > shapes[0][0] for found in routers):
        return None
    around = ([s for s in holder.children if is_norm(s.module)] for holder in holders(site))
    norms = next((norms for norms in around if norms), [])
    known = {found.width for found in (shape(s.module) for s in norms) if found}
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
