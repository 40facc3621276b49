"""Sparse experts in training, one adapter afterwards (Zhang et al. 2023, MoSA).

In `surgery.parts.mosa`, `symmetric_kl` is a term of the loss, and `deployed` merges the experts.
"""

from __future__ import annotations

from ..parts.mosa import sparse_experts
from ..rules.edits import parallel, unfreeze
from ..rules.relations import span
from ..rules.roles import ffn, head, norm
from ..rules.rule import Rule, at


def mosa(rank: int = 16, experts: int = 4, scale: float = 0.1) -> list[Rule]:
    """A parallel adapter (rank 16, GELU) beside every FFN, trained as 4 sparse experts.

    It has a norm of its own on the residual stream, and adds where the FFN ends. Training adds
    `symmetric_kl` of two forwards to the loss; `deployed` merges the experts for mosa(experts=1).

    Source: Zhang et al. 2023 (MoSA)
    """
    return [
        at(span(norm, ffn), parallel(sparse_experts(rank=rank, experts=experts), scale=scale)),
        at(head, unfreeze, optional=True),
    ]
