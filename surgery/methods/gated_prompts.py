"""Prompts that attention looks at through a gate (Zhang et al. 2023, LLaMA-Adapter)."""

from __future__ import annotations

from ..parts.gated import gated_prompt
from ..rules.edits import unfreeze
from ..rules.relations import inside
from ..rules.roles import attn, block, head
from ..rules.rule import Rule, at


def llama_adapter(tokens: int = 10, first: int = 2) -> list[Rule]:
    """Ten prompts with a zero-init gate per head in the attention of all blocks but the first 2.

    first   how many blocks, from the bottom, go without (the paper: 2 of 32)

    Where one linear makes q, k and v, and positions are not rotary: timm's ViT and Swin.

    Source: Zhang et al. 2023 (LLaMA-Adapter)
    """
    return [
        at(attn & inside(block[first:]), gated_prompt(tokens=tokens)),
        at(head, unfreeze, optional=True),
    ]
