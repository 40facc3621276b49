"""Feed-forward networks by structure: d -> h, then h -> d, each token by itself.

One is the smallest module whose projections are just these (gated: two d -> h, or one d -> 2h);
where no module holds just these, the span between them; a mixture of experts is one.
What only looks like it is left out: squeeze-excite gates, and inverted bottlenecks (a convolution
over positions in between). An MLP over tokens (MLP-Mixer) is one, whose features are the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .experts import expert_layers, stacked_experts
from .ffn_widths import any_nonlinear, are_ffn_widths, in_flow, is_narrow, takes_two
from .layers import (
    NARROWEST,
    Shape,
    is_conv,
    is_list,
    is_norm,
    is_sigmoid,
    is_spatial_conv,
    is_torch_attention,
    linear_shape,
    may_be_inside_ffn,
    own_parameters,
    shape_of,
)
from .module_tree import Projections, Site, Tree, element, holders, span


class FFNs(NamedTuple):
    """sites, and the projections that belong to them; and what is no FFN though it holds the like.

    bottlenecks  inverted: a depthwise convolution between widening and narrowing
    fused        blocks with one projection for attention and FFN
    gates        what narrows and widens again
    seen         the sites that a forward shows too
    """

    sites: list[Site]
    projections: set[Site]
    bottlenecks: list[Site]
    fused: list[Site]
    gates: list[Site]
    seen: frozenset[Site] = frozenset()


def find_ffns(projections: Projections) -> FFNs:
    """Every feed-forward network of a tree, in the order of the walk."""
    ffns = FFNs([], set(), [], _fused_blocks(projections), [])
    _find_whole(projections, ffns)
    _find_split(projections, ffns)
    for site in _doubtful(ffns.sites, projections):
        ffns.sites.remove(site)
        ffns.projections.difference_update(projections.below(site))
    ffns.sites.extend(s for s in ffns.gates if _is_narrow(s, projections, ffns.sites))
    sites = expert_layers(ffns.sites, projections, ffns.projections)
    sites = [s for s in sites if is_placed(s, projections) and not _grows(s, projections)]
    return ffns._replace(sites=sorted(sites, key=lambda s: s.order))


def _fused_blocks(projections: Projections) -> list[Site]:
    """Elements with one projection d -> 3 d + h, and what is narrowed again to d out of d + h.

    (timm's ParallelScalingBlock.)
    """
    blocks: list[Site] = []
    for up, holder in projections.elements.items():
        first = linear_shape(up.module)
        if first and holder and first.out > 4 * first.width:
            later = [s for s in projections.below(holder) if s.order > up.order]
            shapes = [shape for s in later if (shape := linear_shape(s.module))]
            narrowed = sum(shape.width for shape in shapes if shape.out == first.width)
            if narrowed == first.out - 2 * first.width:
                blocks.append(holder)
    return blocks


# whole modules --------------------------------------------------------------------------------


def _find_whole(projections: Projections, ffns: FFNs) -> None:
    for site in reversed(projections.tree.sites):  # children before their parents
        if any(site.order <= ffn.order < site.end for ffn in ffns.sites[-1:]):
            continue
        layers = [s for s in projections.below(site) if s not in ffns.projections]
        if _take_whole(site, layers, projections, ffns):
            ffns.projections.update(projections.below(site))


def _take_whole(site: Site, layers: list[Site], projections: Projections, ffns: FFNs) -> bool:
    """Take a module for a network, an inverted bottleneck or a gate; False where it is none."""
    if experts := stacked_experts(site, layers):
        ffns.sites.append(experts)
        return True
    few = site.children and 1 <= len(layers) <= 3
    if not few or _are_branches(layers) or _is_left(site, layers, projections):
        return False
    if _is_gate(site, layers):
        ffns.gates.append(site)
        return True
    layers, others = in_flow(site, layers), _others(site, layers, projections.tree)
    if not are_ffn_widths(layers, others) and not takes_two(site, layers, others):
        return False
    if _is_bottleneck(layers, others):
        ffns.bottlenecks.append(site)
    elif all(may_be_inside_ffn(s.module) for s in others) and not _ends_in_sigmoid(site, layers):
        ffns.sites.append(whole_or_span(site, layers))
    else:
        return False
    return True


def _are_branches(layers: list[Site]) -> bool:
    """Whether they lie in elements of a list that nothing says run one after another.

    Elements of one kind are branches (CrossViT's projections). Others run in a loop: diffusers
    lists a projection with its activation, a dropout and a linear layer.
    """
    holder = holders(span(layers[0], layers[-1]))[0] if len(layers) > 1 else layers[0]
    listed = isinstance(holder.module, (nn.ModuleList, nn.ModuleDict))
    if not listed or all(layer.parent is holder for layer in layers):
        return False
    ends = [s for s in holder.children if any(s.order <= layer.order < s.end for layer in layers)]
    return len({type(s.module) for s in ends}) < len(ends)


def _is_left(site: Site, layers: list[Site], projections: Projections) -> bool:
    """Whether it is a list, which is never called, and its network is found otherwise.

    As the module around that holds just these, or as a span of its elements (BridgeTower's is a
    dict); a span where one of them holds a layer (diffusers) is found here.
    """
    if not is_list(site.module):
        return False
    alone = site.parent and projections.below(site.parent) == projections.below(site)
    return bool(alone) or all(layer.parent is site for layer in layers)


def whole_or_span(site: Site, layers: list[Site]) -> Site:
    """The module, or the span in it where something with weights comes before the first layer.

    (A norm in XLNet and TinyViT, a depthwise convolution and a norm in ConvNeXt V2.)

    layers  its own, in the order in which features pass them
    """
    early = [s for s in site.below() if s.order < min(layer.order for layer in layers)]
    if is_list(site.module) or any(own_parameters(s.module) for s in early):
        return span_of(layers)
    site._shape = _shape_between(layers[0], layers[-1])
    return site


def span_of(layers: list[Site]) -> Site:
    """The span from the first of some layers to the last, which holds those registered later."""
    site = span(layers[0], layers[-1])
    site._shape = _shape_between(layers[0], layers[-1])
    site.order, site.end = min(s.order for s in layers), max(s.end for s in layers)
    return site


def _shape_between(first: Site, last: Site) -> Shape | None:
    a, b = shape_of(first.module), shape_of(last.module)
    return Shape(a.width, b.out, a.axis) if a and b else None


def _others(site: Site, layers: list[Site], tree: Tree) -> list[Site]:
    """What lies in a site, itself included, but for these layers and what is inside of them."""
    inside = {s for layer in layers for s in (layer, *layer.below())}
    return [s for s in tree.sites[site.order : site.end] if s not in inside]


def _is_bottleneck(layers: list[Site], others: list[Site]) -> bool:
    """Whether convolutions widen, mix positions channel by channel, and narrow again.

    (MobileNetV4, EfficientViT, the convolutions of a Conformer.)
    """
    if not is_conv(layers[0].module):  # between linear layers it is a network: PVTv2, SegFormer
        return False
    between = [s.module for s in others if layers[0].order < s.order < layers[-1].order]
    return any(is_conv(module) and max(module.kernel_size) > 1 for module in between)


def _is_gate(site: Site, layers: list[Site]) -> bool:
    """Whether this goes c -> c, or c -> r -> c, to gate something (squeeze-excite) or to narrow."""
    first, last = linear_shape(layers[0].module), linear_shape(layers[-1].module)
    if len(layers) > 2 or not first or not last or first[:2] != (last.out, last.width):
        return False
    return first.out < first.width or _ends_in_sigmoid(site, layers)


def _ends_in_sigmoid(site: Site, layers: list[Site]) -> bool:
    """Whether a sigmoid follows the last layer: then what it gives weighs something else."""
    return any(is_sigmoid(s.module) for s in site.below() if s.order > layers[-1].order)


# spans ----------------------------------------------------------------------------------------


def _find_split(projections: Projections, ffns: FFNs) -> None:
    groups: dict[Site | None, list[Site]] = {}
    for projection in projections.all:
        if projection not in ffns.projections:
            groups.setdefault(projections.elements[projection], []).append(projection)
    for group in groups.values():
        for layers in _pairs(group):
            if _take_split(layers, projections, ffns):
                ffns.projections.update(layers)


def _pairs(group: list[Site]) -> list[list[Site]]:
    """Projections d -> h (or two of them), h -> d that follow one another, each used once."""
    pairs: list[list[Site]] = []
    last = -1
    for i, site in enumerate(group):
        down = linear_shape(site.module)
        ups = 0
        while down and i - ups - 1 > last and _goes(group[i - ups - 1], down.out, down.width):
            ups += 1
        if down and ups in (1, 2) and down.out >= NARROWEST:
            pairs.append(_with_late(group[i - ups : i + 1], group[i + 1 : i + 3]))
            last = i + len(pairs[-1]) - ups - 1
    return pairs


def _with_late(pair: list[Site], after: list[Site]) -> list[Site]:
    """A pair, with the one of two that widen that is registered last (w1, w2, w3 in a block)."""
    (*ups, down), late = pair, after[0] if after else pair[0]
    shape = linear_shape(down.module)
    if not shape or len(ups) > 1 or shape.width <= shape.out or late.parent is not down.parent:
        return pair
    widens = late in after and _goes(late, shape.out, shape.width)
    begins_another = len(after) > 1 and _goes(after[1], shape.width, shape.out)
    return [*ups, late, down] if widens and not begins_another else pair


def _goes(site: Site, width: int, out: int) -> bool:
    shape = linear_shape(site.module)
    return shape is not None and shape[:2] == (width, out)


def _take_split(layers: list[Site], projections: Projections, ffns: FFNs) -> bool:
    """Take the span of these layers for a network or a bottleneck; False where it is none."""
    site = span_of(layers)
    holder = holders(site)[0]
    others = _others(site, layers, projections.tree)
    if any(s in projections.elements for s in others) or not _is_apart(holder, layers, projections):
        return False
    if _is_bottleneck(layers, others):
        ffns.bottlenecks.append(site)
    elif all(may_be_inside_ffn(s.module) for s in others) and _is_no_attention(
        holder, layers, others, projections, ffns.sites
    ):
        ffns.sites.append(site)
    else:
        return False
    return True


def _is_apart(holder: Site, layers: list[Site], projections: Projections) -> bool:
    """Whether nothing else projects, or convolves over positions, where the two ends lie.

    (Positions only where the ends are convolutions: Autoformer's and CSATv2's are linear.)
    """
    last = layers[-1]
    ends = [s for s in holder.children if any(s.order <= layer.order < s.end for layer in layers)]
    beside = [s for end in ends for s in projections.below(end) if s not in layers]
    if len(ends) > 1 and layers[-2].order < ends[-1].order < last.order:
        # more may follow where the last end lies, inside something of its own: X-MOD's adapters
        beside = [s for s in beside if s.order < last.order or s.parent is last.parent]
    if beside:
        return False
    convolves = any(is_spatial_conv(s.module) for s in holder.below())
    return not (convolves and is_conv(layers[0].module))


def _is_no_attention(
    holder: Site,
    layers: list[Site],
    others: list[Site],
    projections: Projections,
    ffns: list[Site],
) -> bool:
    """Whether layers held apart are a network, and no two projections of an attention."""
    down = layers[-1]
    beside = [s for s in projections.below(holder) if s not in layers]
    direct, inline = _held_by(holder, beside), _are_inline(layers, holder)
    if inline and len(direct) > 1 and not holder.is_element:
        return False  # query, key, value and output, of which two go d -> h, h -> d
    if down.width > down.out:
        return True
    if len(layers) > 2 or _holds_one(holder, ffns):  # Gemma 3n gates an embedding beside its FFN
        return False
    if inline and beside and not direct and _attends_or_acts(holder):
        return True  # no wider than d, beside an attention (Autoformer)
    return down.width == down.out and holder.is_element and any_nonlinear(others)


def _holds_one(holder: Site, ffns: list[Site]) -> bool:
    return any(holder.order < ffn.order < holder.end for ffn in ffns)


def _held_by(holder: Site, projections: list[Site]) -> list[Site]:
    """Those that a module holds itself, torch's attention aside."""
    return [s for s in projections if s.parent is holder and not is_torch_attention(s.module)]


def _are_inline(layers: list[Site], holder: Site) -> bool:
    """Whether a module holds these layers itself, and they are no convolutions."""
    return all(layer.parent is holder and not is_conv(layer.module) for layer in layers)


def _attends_or_acts(holder: Site) -> bool:
    """Whether attention, or an activation, stands directly in a module."""
    attends = any(is_torch_attention(s.module) for s in holder.children)
    return attends or any_nonlinear(holder.children)


# places ---------------------------------------------------------------------------------------


def is_placed(site: Site, projections: Projections) -> bool:
    """Whether it is part of a block: an element of a container, or beside attention and a norm.

    (SigLIP's pooling and Perceiver have such a block in no list; GroupViT's projector is none.)
    In wrappers of its own (Perceiver IO's PreNorm) what is beside it may be beside these.
    """
    if site.is_element or element(site) is not None:
        return True
    inside = set(projections.below(site))
    around = holders(site)
    for i, holder in enumerate(around):
        beside = [s for s in projections.below(holder) if s not in inside]
        if beside:
            normed = any(is_norm(s.module) for above in around[: i + 1] for s in above.children)
            one = i == 0 or _are_of_one(beside, holder, projections)
            return normed and one and _attend(beside)
    return False


def _attend(projections: list[Site]) -> bool:
    """Whether there are as many as an attention has."""
    return len(projections) > 1 or any(is_torch_attention(s.module) for s in projections)


def _are_of_one(beside: list[Site], holder: Site, projections: Projections) -> bool:
    """Whether one child of a module holds an attention, and nothing beside it is listed."""
    listed = any(projections.elements[s] is not None for s in beside)
    return not listed and any(_attend(projections.below(child)) for child in holder.children)


def _is_narrow(site: Site, projections: Projections, ffns: list[Site]) -> bool:
    """Whether d -> h -> d is a network though h is less than d: the only one of a block.

    Linear layers with an activation between, beside an attention and a norm; no gate.
    """
    layers, block = projections.below(site), element(site)
    others = _others(site, layers, projections.tree)
    if block is None or not is_narrow(layers, others) or _ends_in_sigmoid(site, layers):
        return False
    beside = [s for s in projections.below(block) if s not in layers and not is_conv(s.module)]
    normed = any(is_norm(s.module) for s in block.below())
    return normed and _attend(beside) and not _holds_one(block, ffns)


def _doubtful(sites: list[Site], projections: Projections) -> list[Site]:
    """Two d -> h and h -> d, no activation, beside a network with one: an attention (Reformer)."""
    gated = [s for s in sites if len(projections.below(s)) == 3 and not _acts(s)]
    sure = {element(s) for s in sites if _acts(s)} - {None} if gated else set()
    return [s for s in gated if element(s) in sure]


def _acts(site: Site) -> bool:
    """Whether a network has an activation, as a module, between its ends or beside them."""
    holder = holders(site)[0] if site.is_span else site
    return any_nonlinear(holder.below())


def _grows(site: Site, projections: Projections) -> bool:
    """Whether most of its like go d -> h -> e: nothing is added to d there, as in RDNet."""
    block = element(site)
    if block is None or block.parent is None or len(projections.below(block)) != 2:
        return False
    kind, memo = type(block.module), projections.tree.memo
    key = ("grows", block.parent, kind)
    if key not in memo:
        alike = [s for s in block.parent.children if type(s.module) is kind]
        pairs = [pair for s in alike if len(pair := projections.below(s)) == 2]
        memo[key] = sum(map(_is_open_ended, pairs)) > len(alike) / 2
    grows: bool = memo[key]
    return grows


def _is_open_ended(pair: list[Site]) -> bool:
    """Whether two projections go d -> h -> e, where e is not d."""
    first, last = (linear_shape(s.module) for s in pair)
    return bool(first and last and first.width != last.out and first.out == last.width)
