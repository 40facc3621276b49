"""Kronecker products and tensors over all layers: what is added to a weight, factored."""

from __future__ import annotations

from ..parts.fact import fact_tk as tucker
from ..parts.fact import fact_tt as tensor_train
from ..parts.fact import tk_factors, tt_factors
from ..rules.edits import parallel, unfreeze
from ..rules.part import shared
from ..rules.roles import fc1, fc2, head, proj, qkv
from ..rules.rule import Rule, at


def fact_tt(rank: int = 16, scale: float = 1.0, dropout: float = 0.1) -> list[Rule]:
    """V core U on every slice of attention and FFN: U, V of the model, a core for each slice.

    scale  searched for every task among 0.01, 0.1, 1, 10 and 100 by the authors

    Source: Jie & Deng 2023 (FacT-TT)
    """
    part = tensor_train(shared(tt_factors(rank=rank)), dropout=dropout)
    rules = [at(each, parallel(part, scale=scale)) for each in (qkv, proj, fc1, fc2)]
    return [*rules, at(head, unfreeze, optional=True)]


def fact_tk(rank: int = 32, scale: float = 1.0, dropout: float = 0.1) -> list[Rule]:
    """V core U on every slice of attention and FFN: U, V, C of the model, cores mixed from C.

    scale  searched for every task among 0.01, 0.1, 1, 10 and 100 by the authors

    Source: Jie & Deng 2023 (FacT-TK)
    """
    part = tucker(shared(tk_factors(rank=rank)), dropout=dropout)
    rules = [at(each, parallel(part, scale=scale)) for each in (qkv, proj, fc1, fc2)]
    return [*rules, at(head, unfreeze, optional=True)]
