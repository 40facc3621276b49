"""Feed-forward networks by structure: d -> h, then h -> d, each token by itself.

One is the smallest module whose projections are just these (gated: two d -> h, or one d -> 2h);
where no module holds just these, the span between them; a mixture of experts is one.
What only looks like it is left out: squeeze-excite gates, and inverted bottlenecks (a convolution
over positions in between). An MLP over tokens (MLP-Mixer) is one, whose features are the tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from .experts import expert_layers, stacked_experts
from .layers import (
    NARROWEST,
    Shape,
    is_conv,
    is_list,
    is_nonlinear,
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
    """

    sites: list[Site]
    projections: set[Site]
    bottlenecks: list[Site]
    fused: list[Site]


def find_ffns(projections: Projections) -> FFNs:
    """Every feed-forward network of a tree, in the order of the walk."""
    ffns = FFNs([], set(), [], _fused_blocks(projections))
    _find_whole(projections, ffns)
    _find_split(projections, ffns)
    for site in _doubtful(ffns.sites, projections):
        ffns.sites.remove(site)
        ffns.projections.difference_update(projections.below(site))
    sites = expert_layers(ffns.sites, projections, ffns.projections)
    sites = [s for s in sites if _is_placed(s, projections) and not _grows(s, projections)]
    return ffns._replace(sites=sorted(sites, key=lambda s: s.order))


def widens(outs: list[int], hidden: int) -> bool:
    """Whether projections to such widths begin a network: d -> h, d -> 2h, or twice d -> h."""
    return outs in ([hidden], [2 * hidden], [hidden, hidden])


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
        if _take_whole(site, layers, projections.tree, ffns):
            ffns.projections.update(projections.below(site))


def _take_whole(site: Site, layers: list[Site], tree: Tree, ffns: FFNs) -> bool:
    """Take a module for a network, an inverted bottleneck or a gate; False where it is none."""
    if experts := stacked_experts(site, layers):
        ffns.sites.append(experts)
        return True
    few = site.children and 1 <= len(layers) <= 3
    # a list is never called: a span in it, then (BridgeTower's is an nn.ModuleDict)
    if not few or _are_branches(layers) or is_list(site.module):
        return False
    if _is_gate(site, layers):
        return True
    others = _others(site, layers, tree)
    if not _are_ffn_widths(layers, others):
        return False
    if _is_bottleneck(layers, others):
        ffns.bottlenecks.append(site)
    elif all(may_be_inside_ffn(s.module) for s in others) and not _ends_in_sigmoid(site, layers):
        ffns.sites.append(whole_or_span(site, layers[0], layers[-1]))
    else:
        return False
    return True


def _are_branches(layers: list[Site]) -> bool:
    """Whether they lie in branches of a list, which nothing says run one after another."""
    holder = holders(span(layers[0], layers[-1]))[0] if len(layers) > 1 else layers[0]
    listed = isinstance(holder.module, (nn.ModuleList, nn.ModuleDict))
    return listed and any(layer.parent is not holder for layer in layers)


def whole_or_span(site: Site, first: Site, last: Site) -> Site:
    """The module, or the span in it where something with weights comes before the first layer.

    (A norm in XLNet and TinyViT, a depthwise convolution and a norm in ConvNeXt V2.)
    """
    early = [s for s in site.below() if s.order < first.order]
    if any(own_parameters(s.module) for s in early):
        return _span(first, last)
    site._shape = _shape_between(first, last)
    return site


def _span(first: Site, last: Site) -> Site:
    site = span(first, last)
    site._shape = _shape_between(first, last)
    return site


def _shape_between(first: Site, last: Site) -> Shape | None:
    a, b = shape_of(first.module), shape_of(last.module)
    return Shape(a.width, b.out, a.axis) if a and b else None


def _are_ffn_widths(layers: list[Site], others: list[Site]) -> bool:
    """Whether they go d -> h, h -> d; or d -> 2h, h -> d; or twice d -> h, h -> d.

    Without a gate, h is no less than d (SwiftFormer's and Perceiver's is d). With one it may be:
    experts are narrow (DeepSeek, dots.llm1). Unless h is more than d, something must act in
    between, or it is an attention (Conditional DETR, ESM).
    """
    shapes = [linear_shape(s.module) for s in layers]
    if None in shapes or len(layers) < 2:
        return False
    (*ups, down) = [shape for shape in shapes if shape is not None]
    if len(ups) == 2 and _is_inner(ups[1], down):
        ups = ups[:1]
    if down.out < NARROWEST or not _begin(ups, down):
        return False
    if down.width > down.out:
        return True
    gated = len(ups) > 1 or ups[0].out > down.width
    return (gated or down.width == down.out) and _acts_among(layers, others)


def _acts_among(layers: list[Site], others: list[Site]) -> bool:
    """Whether an activation stands where one of the layers does, side by side."""
    near = {layer.parent for layer in layers}
    return _any_nonlinear(s for s in others if s.parent in near)


def _is_inner(shape: Shape, down: Shape) -> bool:
    """Whether it may be a matrix over tokens in between (gMLP), or a gate d -> d (RWKV)."""
    return shape.width == shape.out and shape.out not in (down.width, 2 * down.width)


def _begin(ups: list[Shape], down: Shape) -> bool:
    """Whether these lead from what the last projection gives to what it takes."""
    alike = all(up.width == down.out and up.axis == down.axis for up in ups)
    return alike and widens([up.out for up in ups], down.width)


def _any_nonlinear(sites: Iterable[Site]) -> bool:
    return any(is_nonlinear(s.module) for s in sites)


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
            pairs.append(group[i - ups : i + 1])
            last = i
    return pairs


def _goes(site: Site, width: int, out: int) -> bool:
    shape = linear_shape(site.module)
    return shape is not None and shape[:2] == (width, out)


def _take_split(layers: list[Site], projections: Projections, ffns: FFNs) -> bool:
    """Take the span of these layers for a network or a bottleneck; False where it is none."""
    site = _span(layers[0], layers[-1])
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
    return down.width == down.out and holder.is_element and _any_nonlinear(others)


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
    return attends or _any_nonlinear(holder.children)


# places ---------------------------------------------------------------------------------------


def _is_placed(site: Site, projections: Projections) -> bool:
    """Whether it is part of a block: an element of a container, or beside attention and a norm.

    (SigLIP's pooling and Perceiver have such a block in no list; GroupViT's projector is none.)
    """
    if site.is_element or element(site) is not None:
        return True
    around = holders(site)
    if not around:
        return False
    inside = set(projections.below(site))
    beside = [s for s in projections.below(around[0]) if s not in inside]
    attends = len(beside) > 1 or any(is_torch_attention(s.module) for s in beside)
    return attends and any(is_norm(s.module) for s in around[0].children)


def _doubtful(sites: list[Site], projections: Projections) -> list[Site]:
    """Two d -> h and h -> d, no activation, beside a network with one: an attention (Reformer)."""
    gated = [s for s in sites if len(projections.below(s)) == 3 and not _acts(s)]
    sure = {element(s) for s in sites if _acts(s)} - {None} if gated else set()
    return [s for s in gated if element(s) in sure]


def _acts(site: Site) -> bool:
    """Whether a network has an activation, as a module, between its ends or beside them."""
    holder = holders(site)[0] if site.is_span else site
    return _any_nonlinear(holder.below())


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
