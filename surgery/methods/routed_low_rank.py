"""Low-rank updates that are another for each token."""

from __future__ import annotations

from ..parts.routed_low_rank import lily as of_shared_ups
from ..parts.routed_low_rank import lily_ups
from ..parts.routed_low_rank import molora as mixture
from ..parts.routed_low_rank import toplora as scaled_ranks
from ..rules.edits import unfreeze
from ..rules.part import shared
from ..rules.roles import head, qkv
from ..rules.rule import Rule, at

HEAD = at(head, unfreeze, optional=True)


def toplora(rank: int = 8) -> list[Rule]:
    """LoRA of queries, keys and values whose ranks are scaled for each token.

    Source: Li et al. 2025 (TopLoRA, arXiv 2510.23123)
    """
    return [at(qkv, scaled_ranks(rank=rank)), HEAD]


def molora(experts: int = 4, rank: int = 8) -> list[Rule]:
    """A mixture of LoRAs of queries, keys and values, by gates of each token.

    Source: Zadouri et al. 2023 (MoLoRA)
    """
    return [at(qkv, mixture(experts=experts, rank=rank)), HEAD]


def hydralora(experts: int = 3, rank: int = 8) -> list[Rule]:
    """The same with one A for all experts.

    Source: Tian et al. 2024 (HydraLoRA)
    """
    return [at(qkv, mixture(experts=experts, rank=rank, one_A=True)), HEAD]


def lily(experts: int = 4, rank: int = 16) -> list[Rule]:
    """LoRA of queries, keys and values whose B each token mixes of those that all layers share.

    Source: Zhong et al. 2024 (Lily, arXiv 2407.09946)
    """
    return [at(qkv, of_shared_ups(ups=shared(lily_ups(experts=experts, rank=rank)))), HEAD]
