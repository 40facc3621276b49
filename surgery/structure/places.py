"""Places as they are written: a module by its path, a span by what holds it and its two ends."""

from __future__ import annotations

from collections.abc import Iterator

from .anatomy import roles_of
from .layers import linear_shape
from .module_tree import Site, Tree, stretch
from .path import match, split_span
from .weights import parameter_site


def site_at(tree: Tree, path: str) -> Site | None:
    """The place that has a path, spans too; None where there is none."""
    if "paths" not in tree.memo:
        tree.memo["paths"] = {site.path: site for site in tree.sites}
    paths: dict[str, Site] = tree.memo["paths"]
    ends = None if path in paths else split_span(path)
    if ends is None:
        return paths.get(path) or _parameter(tree, path, paths)
    first, last = (paths.get(f"{ends[0]}.{end}".strip(".")) for end in ends[1:])
    place = _between(tree, first, last) if first and last else None
    return place if place and place.path == path else None


def _parameter(tree: Tree, path: str, paths: dict[str, Site]) -> Site | None:
    """The place of a parameter, or of rows of it, that has a path: "attn.in_proj_weight[0:8]"."""
    whole, *rows = path.removesuffix("]").split("[")
    holder, _, name = whole.rpartition(".")
    site = paths.get(holder)
    if site is None or site.module._parameters.get(name) is None:
        return None
    ends = [int(n) for n in rows[0].split(":")] if rows else []
    uncalled = linear_shape(site.module) is not None  # else it would be a place itself
    return parameter_site(tree, site, name, slice(*ends) if ends else None, uncalled=uncalled)


def spans_at(
    tree: Tree, holder: Site, entry: str, exit: str
) -> Iterator[tuple[Site, dict[str, str]]]:
    """The spans in a site whose ends have these addresses from there on, and what they capture.

    Where there are several of each, an end goes with the last entry before it.
    """
    entries, exits = ([*_below(holder, address)] for address in (entry, exit))
    for last, captures in exits:
        earlier = [found for found in entries if found[0].order <= last.order] or entries
        if earlier:
            first, also = earlier[-1]
            yield _between(tree, first, last), {**also, **captures}


def _below(holder: Site, address: str) -> Iterator[tuple[Site, dict[str, str]]]:
    for site in holder.below():
        captures = match(address, site.steps[len(holder.steps) :])
        if captures is not None:
            yield site, captures


def _between(tree: Tree, first: Site, last: Site) -> Site:
    """The span from one site to another: that of a role where it is one."""
    spans = (s for sites in roles_of(tree).values() for s in sites if s.is_span)
    same = (s for s in spans if s.entry is first and s.exit is last)
    return next(same, None) or stretch(first, last)
