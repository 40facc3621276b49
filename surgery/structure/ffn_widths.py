"""Which projections go d -> h, h -> d: what a feed-forward network is by its widths.

Gated: two d -> h, or one d -> 2h.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .experts import norm_widths
from .layers import NARROWEST, Shape, is_nonlinear, linear_shape
from .module_tree import Site, holders, span


def widens(outs: list[int], hidden: int) -> bool:
    """Whether projections to such widths begin a network: d -> h, d -> 2h, or twice d -> h."""
    return outs in ([hidden], [2 * hidden], [hidden, hidden])


def in_flow(site: Site, layers: list[Site]) -> list[Site]:
    """Layers in the order in which features pass them: that which narrows is the last of three.

    It may be registered before others (LLaMA's w1, w2, w3, of which w1 and w3 widen). Where it is
    the first, only a norm of its width tells it from an attention of low rank (MLA).
    """
    shapes = [shape for s in layers if (shape := linear_shape(s.module))]
    if not len(layers) == len(shapes) == 3 or _run_in_order(layers):
        return layers
    known = norm_widths([site, *holders(site)])
    for place in (1, 0):
        down, ups = shapes[place], [s for i, s in enumerate(shapes) if i != place]
        reversed = all(up[:2] == (down.out, down.width) for up in ups)
        told = down.out in known - {down.width} if known else place == 1
        if reversed and told and down.width > down.out:
            return [s for i, s in enumerate(layers) if i != place] + [layers[place]]
    return layers


def _run_in_order(layers: list[Site]) -> bool:
    holder = holders(span(layers[0], layers[-1]))[0]
    return isinstance(holder.module, nn.Sequential)


def are_ffn_widths(layers: list[Site], others: list[Site]) -> bool:
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
    return (gated or down.width == down.out) and acts_among(layers, others)


def is_narrow(layers: list[Site], others: list[Site]) -> bool:
    """Whether two linear layers go d -> h, h -> d with h less than d, and something acts."""
    shapes = [shape for s in layers if (shape := linear_shape(s.module))]
    if not len(layers) == len(shapes) == 2:
        return False
    up, down = shapes
    narrows = up.axis == down.axis == -1 and up[:2] == (down.out, down.width) and up.out < up.width
    return narrows and down.width >= NARROWEST and acts_among(layers, others)


def takes_two(site: Site, layers: list[Site], others: list[Site]) -> bool:
    """Whether they go 2 d -> h, h -> d, where norms around are d wide, and something acts.

    What attention gives is joined to what it was given (LoFTR, LightGlue).
    """
    shapes = [shape for s in layers if (shape := linear_shape(s.module))]
    if not len(layers) == len(shapes) == 2:
        return False
    up, down = shapes
    joined = up.width == 2 * down.out and up.out == down.width >= down.out and up.axis == down.axis
    if not joined or down.out < NARROWEST:
        return False
    known = norm_widths(holders(site))
    return down.out in known and up.width not in known and acts_among(layers, others)


def acts_among(layers: list[Site], others: list[Site]) -> bool:
    """Whether an activation stands where one of the layers does, side by side."""
    near = {layer.parent for layer in layers}
    return any_nonlinear(s for s in others if s.parent in near)


def any_nonlinear(sites: Iterable[Site]) -> bool:
    """Whether one of them is an activation."""
    return any(is_nonlinear(s.module) for s in sites)


def _is_inner(shape: Shape, down: Shape) -> bool:
    """Whether it may be a matrix over tokens in between (gMLP), or a gate d -> d (RWKV)."""
    return shape.width == shape.out and shape.out not in (down.width, 2 * down.width)


def _begin(ups: list[Shape], down: Shape) -> bool:
    """Whether these lead from what the last projection gives to what it takes."""
    alike = all(up.width == down.out and up.axis == down.axis for up in ups)
    return alike and widens([up.out for up in ups], down.width)
