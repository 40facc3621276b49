"""Interventions on what blocks give."""

from __future__ import annotations

from ..parts.interventions import loreft as in_a_subspace
from ..rules.edits import append, unfreeze
from ..rules.roles import block, head
from ..rules.rule import Rule, at


def loreft(rank: int = 4, first: int | None = None, last: int | None = None) -> list[Rule]:
    """What each block gives is moved in a subspace of its features, of all tokens or of some.

    The paper moves the first and the last tokens of a prompt: loreft(first=7, last=7).

    Source: Wu et al. 2024 (LoReFT), Eq. 2
    """
    part = in_a_subspace(rank=rank, first=first, last=last)
    return [at(block, append(part, residual=True)), at(head, unfreeze, optional=True)]
