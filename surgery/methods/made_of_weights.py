"""Updates whose factors are made of the base weight."""

from __future__ import annotations

from ..parts.made_of_weights import deft as exchanged
from ..parts.made_of_weights import delora as bounded
from ..parts.made_of_weights import glora as generalised
from ..parts.made_of_weights import kasa as without_the_smallest
from ..parts.made_of_weights import mica as of_the_smallest
from ..parts.made_of_weights import peanut as of_a_network
from ..parts.made_of_weights import tiny_vector
from ..parts.made_of_weights import tinylora as few_numbers
from ..rules.edits import unfreeze
from ..rules.part import shared
from ..rules.roles import fc1, fc2, head, proj, qkv
from ..rules.rule import Rule, at

LINEAR = qkv | proj | fc1 | fc2
HEAD = at(head, unfreeze, optional=True)


def mica(rank: int = 8) -> list[Rule]:
    """LoRA of queries, keys and values whose B is of W's smallest singular vectors, frozen.

    Source: MiCA 2026 (arXiv 2604.01694)
    """
    return [at(qkv, of_the_smallest(rank=rank)), HEAD]


def delora(rank: int = 8, bound: float = 15.0) -> list[Rule]:
    """LoRA of queries, keys and values whose distance from W is one trained number.

    Source: Bini et al. 2025 (DeLoRA)
    """
    return [at(qkv, bounded(rank=rank, bound=bound)), HEAD]


def tinylora(size: int = 13, rank: int = 2) -> list[Rule]:
    """Thirteen numbers for all linears, which mix frozen maps between W's singular vectors.

    Source: TinyLoRA 2026 (arXiv 2602.04118)
    """
    return [at(LINEAR, few_numbers(vector=shared(tiny_vector(size=size)), rank=rank)), HEAD]


def kasa(rank: int = 8) -> list[Rule]:
    """LoRA of queries, keys and values with singular values, beside W without its smallest.

    It starts away from the base. Its parts have a `penalty`.

    Source: Wang et al. 2024 (KaSA)
    """
    return [at(qkv, without_the_smallest(rank=rank)), HEAD]


def glora(rank: int = 4) -> list[Rule]:
    """Low-rank scale and shift of every linear's weight, vectors for its bias.

    Source: Chavan et al. 2023 (GLoRA)
    """
    return [at(LINEAR, generalised(rank=rank)), HEAD]


def deft(rank: int = 8, orthogonal: bool = False) -> list[Rule]:
    """A subspace of queries, keys and values is taken out of W, and a trained one put in.

    Source: DEFT 2025 (NeurIPS)
    """
    return [at(qkv, exchanged(rank=rank, orthogonal=orthogonal)), HEAD]


def peanut(rank: int = 8, depth: int = 0) -> list[Rule]:
    """What a small network makes of W is added to it, of queries, keys and values.

    Source: Zhong et al. 2024 (PEANuT, arXiv 2410.01870)
    """
    return [at(qkv, of_a_network(rank=rank, depth=depth)), HEAD]
