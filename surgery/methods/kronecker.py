"""Kronecker products as weights: KronA (Edalati et al. 2022), Compacter, KAdaptation.

Compacter: Karimi Mahabadi et al. 2021. KAdaptation: He et al. 2023.
"""

from __future__ import annotations

from ..parts.kronecker import compacter as compact
from ..parts.kronecker import kadaptation as kadapted
from ..parts.kronecker import krona as kronecker
from ..parts.kronecker import phm_rule, slow_factors
from ..rules.edits import append, parallel, unfreeze
from ..rules.part import shared
from ..rules.roles import attn, ffn, head
from ..rules.rule import Rule, at
from .queries_and_values import on_queries_and_values


def krona(scale: float = 1.0) -> list[Rule]:
    """A Kronecker product A (x) B beside the projections of q and v, both factors near square.

    Where q, k and v are linears of their own, the module tree does not tell them apart, and all
    three get one.

    Source: Edalati et al. 2022 (KronA)
    """
    return on_queries_and_values(lambda rows: parallel(kronecker(rows=rows), scale=scale))


def compacter(rank: int = 24, n: int = 4) -> list[Rule]:
    """Serial adapters of Kronecker products after attention and FFN; their n x n matrices shared.

    LayerNorms stay frozen (the paper's T5 trains them too).

    Source: Karimi Mahabadi et al. 2021 (Compacter)
    """
    part = append(compact(rank=rank, rule=shared(phm_rule(n=n))), residual=True)
    return [at(attn, part), at(ffn, part), at(head, unfreeze, optional=True)]


def compacter_pp(rank: int = 24, n: int = 4) -> list[Rule]:
    """Serial adapters of Kronecker products after every FFN; their n x n matrices shared.

    Source: Karimi Mahabadi et al. 2021 (Compacter++)
    """
    part = append(compact(rank=rank, rule=shared(phm_rule(n=n))), residual=True)
    return [at(ffn, part), at(head, unfreeze, optional=True)]


def kadaptation(t: int = 32, scale: float = 160.0, dropout: float = 0.5) -> list[Rule]:
    """Sums of t rank-one Kronecker products beside q and v; one factor of each shared by layers.

    q and v have slow factors of their own, and one bias for both. Where q, k and v are linears of
    their own, the module tree does not tell them apart: all three get one, of the same slow
    factors, and each its bias.

    Source: He et al. 2023 (KAdaptation)
    """
    slow = shared(slow_factors(t=t))
    return on_queries_and_values(
        lambda rows: kadapted(slow, rows=rows, scale=scale, dropout=dropout)
    )
