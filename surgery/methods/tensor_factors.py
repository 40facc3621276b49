"""All layers' weights as one tensor, what is added to it factored (Jie & Deng 2023, FacT)."""

from __future__ import annotations

from ..parts.fact import fact_tk as tucker
from ..parts.fact import fact_tt as tensor_train
from ..parts.fact import tk_factors, tt_factors
from ..rules.edits import parallel, unfreeze
from ..rules.part import Maker, shared
from ..rules.roles import fc1, fc2, head, proj, qkv
from ..rules.rule import Rule, at


def fact_tt(rank: int = 16, scale: float = 1.0, dropout: float = 0.1) -> list[Rule]:
    """V core U on every slice of attention and FFN: U, V of the model, a core for each slice.

    scale  searched for every task among 0.01, 0.1, 1, 10 and 100 by the authors

    Source: Jie & Deng 2023 (FacT-TT)
    """
    return _on_all_linears(tensor_train(shared(tt_factors(rank=rank)), dropout=dropout), scale)


def fact_tk(rank: int = 32, scale: float = 1.0, dropout: float = 0.1) -> list[Rule]:
    """V core U on every slice of attention and FFN: U, V, C of the model, cores mixed from C.

    scale  searched for every task among 0.01, 0.1, 1, 10 and 100 by the authors

    Source: Jie & Deng 2023 (FacT-TK)
    """
    return _on_all_linears(tucker(shared(tk_factors(rank=rank)), dropout=dropout), scale)


def _on_all_linears(part: Maker, scale: float) -> list[Rule]:
    """A part beside every linear of attention and FFN; and the head."""
    rules = [at(linear, parallel(part, scale=scale)) for linear in (qkv, proj, fc1, fc2)]
    return [*rules, at(head, unfreeze, optional=True)]
