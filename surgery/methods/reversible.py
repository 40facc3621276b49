"""Blocks as two reversible streams, whose activations are not kept (Liao et al. 2023, MEFT)."""

from __future__ import annotations

from ..parts.reversible_streams import reversible, small_adapter
from ..rules.edits import parallel, replace, unfreeze
from ..rules.relations import holding
from ..rules.roles import attn, block, ffn, head
from ..rules.rule import Rule, at


def meft(variant: int = 1, rank: int = 8, keep: int | None = None) -> list[Rule]:
    """Two reversible streams through all blocks, with two small adapters (rank 8) in each.

    variant  1: F the block with an adapter beside its FFN, G an adapter; 2: the other way round;
             3: F the attention, G the FFN, each with an adapter beside it
    keep     a pair is kept before every so many blocks, which bounds the inverse's rounding:
             errors grow tenfold a block (a hundredfold in variant 3); None: 4 (2), 0: none, as in
             the paper

    Only where one nn.Sequential that is called whole holds the blocks (timm's ViT; of Swin each
    stage, as streams of its own, for variants 1 and 2): where a model goes through a ModuleList
    itself (Hugging Face), rules cannot put streams around its blocks, and raise RuleError. Starts
    near the base, not as the base: the streams are those of the last two depths, and averaged.

    Source: Liao et al. 2023 (MEFT)
    """
    around = holding(block) & ~holding(holding(block))
    beside = parallel(small_adapter(rank=rank))
    return [
        *([at(attn, beside)] if variant == 3 else []),
        at(ffn, beside),
        at(around, replace(reversible(variant=variant, rank=rank, keep=keep))),
        at(head, unfreeze, optional=True),
    ]
