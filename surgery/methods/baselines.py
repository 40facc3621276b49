"""What every method is measured against: the head alone, everything, the biases (BitFit)."""

from __future__ import annotations

from ..rules.edits import unfreeze
from ..rules.roles import head
from ..rules.rule import Rule, at


def linear_probe() -> list[Rule]:
    """The head alone is trained.

    Source: -
    """
    return [at(head, unfreeze)]


def full() -> list[Rule]:
    """Everything is trained. Revert keeps a copy of every parameter: twice the memory.

    Source: -
    """
    return [at("", unfreeze)]


def bitfit() -> list[Rule]:
    """Every bias is trained, those of norms and of the patch embedding too.

    Source: Ben Zaken et al. 2022 (BitFit)
    """
    return [
        at("", unfreeze("**.bias")),
        at("", unfreeze("**.{in_proj_bias,q_bias,k_bias,v_bias}"), optional=True),
        at(head, unfreeze, optional=True),
    ]
