"""Adapter-X: A Novel General Parameter-Efficient Fine-Tuning Framework (Li et al. 2024)."""

from __future__ import annotations

from ..edit import parallel, unfreeze
from ..part import shared
from ..parts import moa
from ..relation import nearest
from ..role import ffn, head, norm
from ..rule import Rule, at


def adapterx_ffn() -> list[Rule]:
    """One mixture of adapters shared by all blocks, beside every FFN; each block's own norm.

    The mixture is fed with the FFN's own input (after the norm, as Fig. 2 taps it); experts are
    ReLU adapters with dropout 0.1 and scale 0.1, as AdaptFormer's.

    Source: Li et al. 2024 (Adapter-X), Fig. 2, without its prompts
    """
    experts = moa(experts=4, rank=64, heads=3, dropout=0.1, fit=True)
    return [
        at(ffn, parallel(shared(experts), scale=0.1)),
        at(nearest(norm, before=ffn), unfreeze, optional=True),  # LeViT, Swin V2 have none
        at(head, unfreeze, optional=True),
    ]
