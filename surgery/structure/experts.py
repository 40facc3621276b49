"""Experts that a module holds as stacks of matrices [experts, ., .], one parameter for all."""

from __future__ import annotations

from .layers import NARROWEST, Shape, expert_stacks, is_nonlinear, is_norm, linear_shape, shape_of
from .module_tree import Site, holders

Stack = tuple[int, int, int]


def stacked_experts(site: Site, layers: list[Site]) -> Site | None:
    """The site, with its width, where it holds two or three stacks, and routers at most.

    layers  its projections
    """
    owners = [(s, stack) for s in (site, *site.below()) for stack in expert_stacks(s.module)]
    stacks = [stack for _, stack in owners]
    if not 2 <= len(stacks) <= 3 or not _have_same_experts(owners):
        return None
    if not _are_routers(layers, stacks[0][0]):
        return None
    widths = _expert_widths(stacks)
    if not any(is_nonlinear(s.module) for s in site.below()):
        widths = [d for d in widths if _is_gated(stacks, d)]
    if not widths:
        return None
    known = _norm_widths(site)
    width = next((d for d in widths if d in known), min(widths))
    site._shape = Shape(width, width, -1)
    return site


def _have_same_experts(owners: list[tuple[Site, Stack]]) -> bool:
    """Whether the stacks are of as many experts; of one module, some may be none (LongCat)."""
    return len({s for s, _ in owners}) == 1 or len({n for _, (n, _, _) in owners}) == 1


def _are_routers(layers: list[Site], experts: int) -> bool:
    """Whether each of these projections gives no more than one number for each expert."""
    shapes = [linear_shape(s.module) for s in layers]
    return all(shape is not None and shape.out <= experts for shape in shapes)


def _expert_widths(stacks: list[Stack]) -> list[int]:
    """The widths d for which the stacks are of d x h (or d x 2h) and h x d, whichever way round."""
    *ups, down = [stack[1:] for stack in stacks]
    ways = [(d, h) for d, h in (down, down[::-1]) if d >= NARROWEST]
    return [d for d, h in ways if all(set(up) in ({d, h}, {d, 2 * h}) for up in ups)]


def _is_gated(stacks: list[Stack], width: int) -> bool:
    """Whether the experts have a gate: without an activation, only it tells them from attention."""
    if len(stacks) == 3:
        return True
    (_, *up), (_, *down) = stacks
    return sum(up) - width == 2 * (sum(down) - width)


def _norm_widths(site: Site) -> set[int]:
    """The widths of the norms nearest around a site."""
    around = ([s for s in holder.children if is_norm(s.module)] for holder in holders(site))
    norms = next((norms for norms in around if norms), [])
    return {shape.width for shape in (shape_of(s.module) for s in norms) if shape}
