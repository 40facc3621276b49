"""NOAH: prompts, LoRA and adapters at once, of sizes that a search chooses (Zhang et al. 2022)."""

from __future__ import annotations

from ..parts.elastic import elastic_adapter, elastic_lora, elastic_prompt
from ..rules.edits import append, unfreeze
from ..rules.roles import block, ffn, head, qkv
from ..rules.rule import Rule, at


def noah(tokens: int = 10, rank: int = 10, hidden: int = 10) -> list[Rule]:
    """NOAH's supernet: prompts, LoRA on q, k, v and an adapter after every FFN, of elastic sizes.

    `surgery.training` samples sizes for each step of training, and searches for the best ones.
    Prompts lie after the class token, where NOAH puts them last: the same to a class token. Where
    q, k and v are apart, each has a LoRA. LoRA and adapter start by adding nothing, as the paper
    writes; its code fills them again, with a normal of std 0.02.

    tokens, rank, hidden  the largest sizes of the three (10 in NOAH's VTAB space; 100 in another)

    Source: Zhang et al. 2022 (NOAH)
    """
    return [
        at(block, elastic_prompt(tokens=tokens, dropout=0.1)),
        at(qkv, elastic_lora(rank=rank, dropout=0.1)),
        at(ffn, append(elastic_adapter(rank=hidden, dropout=0.1), residual=True)),
        at(head, unfreeze, optional=True),
    ]
