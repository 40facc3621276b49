"""Prompts: tokens that are trained, put among those of the model (Jia et al. 2022)."""

from __future__ import annotations

from ..parts import prefix, prefix_features, prompt
from ..rules.edits import unfreeze
from ..rules.part import shared
from ..rules.relations import until
from ..rules.roles import attn, block, head
from ..rules.rule import Rule, at


def vpt_shallow(tokens: int = 10) -> list[Rule]:
    """Prompts after the class token, before the first block; taken out after the last.

    Of two towers (encoder and decoder, image and text) the first alone is given them, and the plan
    says which is not; vpt_deep prompts all.
    The start is VPT's for patches of as many numbers as the width (ViT-B/16): prompt(fan_in=) says
    others. VPT trains with the backbone in eval mode; dropout of prompts is 0.1.

    Source: Jia et al. 2022 (VPT), section 3.2
    """
    return [
        at(until(block[0], block), prompt(tokens=tokens, dropout=0.1)),
        at(head, unfreeze, optional=True),
    ]


def vpt_deep(tokens: int = 10) -> list[Rule]:
    """Prompts of its own for every block, after the class token; taken out behind it.

    Source: Jia et al. 2022 (VPT), section 3.2
    """
    return [
        at(block, prompt(tokens=tokens, dropout=0.1)),
        at(head, unfreeze, optional=True),
    ]


def prefix_tuning(tokens: int = 10, inner: int = 0) -> list[Rule]:
    """Trained keys and values before those of every attention.

    inner  features of a network that makes them for all layers of one table, of which Li & Liang
           keep what it gives alone after training (512 and 800 there); 0: they are trained

    Source: Li & Liang 2021 (prefix tuning), sections 4.2 and 4.3
    """
    of = shared(prefix_features(tokens=tokens, inner=inner)) if inner else None
    made = prefix(features=of) if of else prefix(tokens=tokens)
    return [at(attn, made), at(head, unfreeze, optional=True)]
