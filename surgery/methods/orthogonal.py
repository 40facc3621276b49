"""Rotations of what linear layers are given, of what they give, and within the principal of W."""

from __future__ import annotations

from ..parts.rotations import boft as butterfly
from ..parts.rotations import goft as givens
from ..parts.rotations import psoft as principal
from ..parts.rotations import road as pairs
from ..rules.edits import unfreeze
from ..rules.roles import fc1, fc2, head, proj, qkv
from ..rules.rule import Rule, at

HEAD = at(head, unfreeze, optional=True)


def boft(size: int = 8, factors: int = 2) -> list[Rule]:
    """A butterfly of rotations of blocks before queries, keys and values.

    Source: Liu et al. 2023 (BOFT)
    """
    return [at(qkv, butterfly(size=size, factors=factors)), HEAD]


def goft(lengths: bool = False) -> list[Rule]:
    """Givens rotations in a tree before queries, keys and values.

    With `lengths` the columns of their weights are scaled, too.

    Source: Ma et al. 2024 (GOFT)
    """
    return [at(qkv, givens(lengths=lengths)), HEAD]


def psoft(rank: int = 32) -> list[Rule]:
    """A rotation and scales within the principal subspace of the weight of every linear.

    Source: Wu et al. 2025 (PSOFT)
    """
    return [at(qkv | proj | fc1 | fc2, principal(rank=rank)), HEAD]


def road(kinds: int = 1) -> list[Rule]:
    """A rotation and a scale of every pair of what every linear gives.

    Source: Liao & Monz 2024 (RoAd), Eq. 4
    """
    return [at(qkv | proj | fc1 | fc2, pairs(kinds=kinds)), HEAD]
