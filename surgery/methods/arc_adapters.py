"""Adapters that re-scale one basis shared by all layers (Dong et al. 2023, ARC)."""

from __future__ import annotations

from torch import nn

from ..parts.arc_adapters import arc as rescaled
from ..parts.arc_adapters import projection
from ..rules.edits import prepend, unfreeze
from ..rules.part import shared
from ..rules.relations import holding
from ..rules.roles import attn, fc1, ffn, head, qkv
from ..rules.rule import Rule, at
from ..rules.selector import where

# what reads the input of an attention: one that does not call its projections does so itself
uncalled = qkv & where(nn.Parameter)
readers = (qkv & ~uncalled) | (attn & (nn.MultiheadAttention | holding(uncalled)))


def arc(rank: int = 50, dropout: float = 0.1) -> list[Rule]:
    """Re-scaled shared bases before the projections of attention and the first layer of the FFN.

    x + x U diag(c) U^T + b; each layer has its c and b, all layers of a width one U for attention
    and one for FFNs. Starts at the base but for the FFNs, whose c starts at random. Where q, k
    and v are apart they share c and b, but each has a dropout of its own.

    Source: Dong et al. 2023 (ARC)
    """
    basis = shared(projection(rank=rank), name="mlp")
    part = shared(rescaled(basis, zero=False, dropout=dropout), by=ffn)
    return [
        *arc_att(rank, dropout)[:-1],
        at(fc1, prepend(part, residual=True)),
        at(head, unfreeze, optional=True),
    ]


def arc_att(rank: int = 50, dropout: float = 0.1) -> list[Rule]:
    """A re-scaled shared basis before the projections of every attention.

    Source: Dong et al. 2023 (ARC)
    """
    basis = shared(projection(rank=rank), name="attn")
    part = shared(rescaled(basis, dropout=dropout), by=attn)
    return [at(readers, prepend(part, residual=True)), at(head, unfreeze, optional=True)]
