"""Bottleneck adapters after an operation, or beside it (Houlsby et al. 2019; AdaptFormer 2022)."""

from __future__ import annotations

from torch import nn

from ..parts import QuickGELU
from ..parts import adapter as bottleneck
from ..rules.edits import append, parallel, unfreeze
from ..rules.relations import span
from ..rules.roles import attn, ffn, head, norm
from ..rules.rule import Rule, at


def adapter(rank: int = 8) -> list[Rule]:
    """A serial bottleneck adapter (rank 8, QuickGELU) after every FFN, before the residual sum.

    It stands inside drop-path and layer scale, where a model has them (NOAH's after them).

    Source: Zhang et al. 2022 (NOAH), after Houlsby et al. 2019
    """
    return [
        at(ffn, append(bottleneck(rank=rank, activation=QuickGELU, dropout=0.1), residual=True)),
        at(head, unfreeze, optional=True),
    ]


def houlsby(rank: int = 8, norms: bool = True) -> list[Rule]:
    """Two serial bottleneck adapters a block, after attention and after the FFN; all norms.

    norms  whether they are trained too

    Source: Houlsby et al. 2019
    """
    small = bottleneck(rank=rank, activation=nn.GELU)
    return [
        at(attn | ffn, append(small, residual=True)),
        *([at(norm, unfreeze, optional=True)] if norms else []),
        at(head, unfreeze, optional=True),
    ]


def adaptformer(rank: int = 64, scale: float = 0.1) -> list[Rule]:
    """A parallel bottleneck adapter (rank 64, ReLU, scale 0.1) from each FFN's norm to its end.

    It reads what the norm reads, the residual stream, and adds where the FFN ends: inside
    drop-path and layer scale, where a model has them.

    Source: Chen et al. 2022 (AdaptFormer), Eq. 2 and 3
    """
    return [
        at(span(norm, ffn), parallel(bottleneck(rank=rank, dropout=0.1), scale=scale)),
        at(head, unfreeze, optional=True),
    ]
