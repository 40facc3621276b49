"""Adapters of one bit a weight (Jie et al. 2023); `surgery.state.packed` writes their files."""

from __future__ import annotations

from ..parts.binary import binary_adapter, binary_lora
from ..rules.edits import parallel, unfreeze
from ..rules.relations import span
from ..rules.roles import ffn, head, norm
from ..rules.rule import Rule, at
from .queries_and_values import on_queries_and_values


def bi_adaptformer(rank: int = 32, scale: float = 1.0, bits: int = 1) -> list[Rule]:
    """A parallel adapter of one-bit weights (rank 32, ReLU) from each FFN's norm to its end.

    It adds where the FFN ends: inside drop-path and layer scale, where a model has them.

    scale  of what is added: 0.01, 0.1, 1 or 10, by the task, in the paper
    bits   of each weight: 1, or 2

    Source: Jie et al. 2023 (Bi-AdaptFormer)
    """
    return [
        at(span(norm, ffn), parallel(binary_adapter(rank=rank, bits=bits), scale=scale)),
        at(head, unfreeze, optional=True),
    ]


def bi_lora(rank: int = 32, scale: float = 1.0, bits: int = 1) -> list[Rule]:
    """Updates of low rank (32) and one-bit weights on queries and values; they merge.

    Where q, k and v are layers of their own, the module tree does not tell them apart, and each
    has one.

    scale  of what is added: 0.01, 0.1, 1 or 10, by the task, in the paper
    bits   of each weight: 1, or 2

    Source: Jie et al. 2023 (Bi-LoRA)
    """
    return on_queries_and_values(
        lambda rows: parallel(binary_lora(rank=rank, bits=bits, rows=rows), scale=scale)
    )
