"""Mixtures of experts: each in one site, the layer that holds the experts and their router.

Experts stand in a list, or as stacks of matrices [experts, ., .], one parameter for all of them.
"""

from __future__ import annotations

from .layers import (
    NARROWEST,
    Shape,
    expert_stacks,
    is_list,
    is_nonlinear,
    is_norm,
    linear_shape,
    shape_of,
)
from .module_tree import Projections, Site, holders

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
    known = norm_widths(holders(site))
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
    """Whether the experts have a gate: without an activation, only it tells them from attention.

    (gpt-oss packs it into one stack; Funnel's and JetMoE's attentions have stacks, and no gate.)
    """
    if len(stacks) == 3:
        return True
    (_, *up), (_, *down) = stacks
    return sum(up) - width == 2 * (sum(down) - width)


def norm_widths(holders: list[Site]) -> set[int]:
    """The widths of the norms that the nearest of some modules holds, of those that hold any."""
    around = ([s for s in holder.children if is_norm(s.module)] for holder in holders)
    norms = next((norms for norms in around if norms), [])
    return {shape.width for shape in (shape_of(s.module) for s in norms) if shape}


def expert_layers(sites: list[Site], projections: Projections, taken: set[Site]) -> list[Site]:
    """These networks, with the experts of one layer made one: the layer, with its router."""
    shapes: dict[Site, Shape] = {}
    for site in sites:
        shapes.setdefault(_expert_layer(site, projections, taken), site.shape)
    for site, shape in shapes.items():
        site._shape = shape
    layers = [s for s in shapes if not s.is_span and s not in sites]
    return [s for s in shapes if not any(layer.order < s.order < layer.end for layer in layers)]


def _expert_layer(site: Site, projections: Projections, taken: set[Site]) -> Site:
    """The outermost module around an expert that is called and holds nothing else but routers.

    Experts stand in a list (Switch Transformers, NLLB-MoE) or hold stacks (Mixtral). XLM lists one
    network of each block at the root: such a list is no layer.
    """
    listed = site.is_element and site.parent is not None and len(site.parent.children) > 1
    if site.is_span or not (listed or any(expert_stacks(s.module) for s in (site, *site.below()))):
        return site
    layer = site
    for above in site.above():
        if above.parent is None or above.is_element or not is_routed(above, projections, taken):
            break
        layer = layer if is_list(above.module) else above
    return layer


def is_routed(layer: Site, projections: Projections, taken: set[Site]) -> bool:
    """Whether beside feed-forward networks a layer holds routers only: each gives few features."""
    rest = [linear_shape(s.module) for s in projections.below(layer) if s not in taken]
    return all(shape is not None and shape.out < shape.width for shape in rest)
