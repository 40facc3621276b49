"""Grouped linear adapters (Luo et al. 2023, RepAdapter), 3 x 3 convolutions (Jie and Deng 2022)."""

from __future__ import annotations

from ..parts.conv import convpass as bypass
from ..parts.rep_adapter import repadapter as linear
from ..rules.edits import parallel, prepend, unfreeze
from ..rules.part import shared
from ..rules.roles import attn, fc1, ffn, head
from ..rules.rule import Rule, at
from .arc_adapters import readers


def repadapter(
    rank: int = 8, groups: int = 2, scale: float = 1.0, bias: bool = True, dropout: float = 0.1
) -> list[Rule]:
    """A linear adapter before the projections of attention and the first layer of the FFN.

    Where q, k and v are apart they share it, but each has a dropout of its own.

    Source: Luo et al. 2023 (RepAdapter)
    """
    part = shared(linear(rank, groups, scale, bias, dropout), by=ffn)
    first = repadapter_att(rank, groups, scale, bias, dropout)[:-1]
    return [*first, at(fc1, prepend(part, residual=True)), at(head, unfreeze, optional=True)]


def repadapter_att(
    rank: int = 8, groups: int = 2, scale: float = 1.0, bias: bool = True, dropout: float = 0.1
) -> list[Rule]:
    """A linear adapter before the projections of every attention.

    Source: Luo et al. 2023 (RepAdapter)
    """
    part = shared(linear(rank, groups, scale, bias, dropout), by=attn)
    return [at(readers, prepend(part, residual=True)), at(head, unfreeze, optional=True)]


def convpass(
    hidden: int = 8,
    scale: float = 1.0,
    prefix: int | None = None,
    xavier: bool = False,
    dropout: float = 0.1,
) -> list[Rule]:
    """A bottleneck with a 3 x 3 convolution beside every attention and every FFN.

    It is fed what they are fed (normed, where norms come first), and adds where they end: inside
    drop-path and layer scale, where a model has them. In Swin's attention a map is a window.

    Source: Jie and Deng 2022 (Convpass)
    """
    part = parallel(bypass(hidden, prefix, xavier, dropout), scale=scale)
    return [at(attn, part), at(ffn, part), at(head, unfreeze, optional=True)]


def convpass_att(
    hidden: int = 8,
    scale: float = 1.0,
    prefix: int | None = None,
    xavier: bool = False,
    dropout: float = 0.1,
) -> list[Rule]:
    """A bottleneck with a 3 x 3 convolution beside every attention.

    Source: Jie and Deng 2022 (Convpass)
    """
    part = parallel(bypass(hidden, prefix, xavier, dropout), scale=scale)
    return [at(attn, part), at(head, unfreeze, optional=True)]
