"""Networks beside the model, which gradients go through instead of it."""

from __future__ import annotations

from torch import nn

from ..parts.side_networks import back, bypass, climb, heard, ladder, mixer, track
from ..rules.edits import append, prepend, side, unfreeze
from ..rules.part import Part
from ..rules.relations import inside, nearest
from ..rules.roles import attn, block, head, norm
from ..rules.rule import Rule, at
from ..rules.selector import where

HEAD = at(head, unfreeze, optional=True)
FIRST = where("**.[0]")


def lst(reduction: int = 8) -> list[Rule]:
    """A ladder of narrow networks, which hear every block and are added behind the last.

    Source: Sung et al. 2022 (LST), section 3.2
    """
    return [
        at(block, side(ladder(reduction=reduction))),
        at(block & "**.[-1]", append(climb(reduction=reduction), residual=True, hears=block)),
        HEAD,
    ]


def dtl(rank: int = 2, fed: int = 6) -> list[Rule]:
    """A sum of low-rank maps of all blocks, added to the features of the last `fed`.

    Source: Fu et al. 2024 (DTL), Eqs. 4 and 5
    """
    return [
        at(block, side(track(rank=rank), detach=False)),
        at(block[-fed:], append(back(), residual=True, hears=block)),
        HEAD,
    ]


def losa(rank: int = 8, tokens: int | None = None, scale: float = 1.0) -> list[Rule]:
    """Low-rank mixers beside the blocks, whose sum takes the place of what the last block gives.

    Begins as `res_tuning` does.

    tokens  how many there are, to mix them too (197 in ViT-B/16); None: channels alone

    Source: Mercea et al. 2024 (LoSA)
    """
    return _beside(mixer(rank=rank, tokens=tokens, scale=scale))


def res_tuning(rank: int = 32) -> list[Rule]:
    """A network of tuners beside the blocks, which takes the place of what the last block gives.

    It begins with what the first block's first norm is given: what comes to the block, in models
    that norm before attention, as it wants them. Of stages each has a network, and gradients go
    through those that follow.

    This is Res-Tuning-Bypass. Res-Tuning itself, whose gradients go through the model, is
    at(attn | ffn, parallel(adapter(rank=32, activation=nn.GELU))).

    Source: Jiang et al. 2023 (Res-Tuning)
    """
    return _beside(bypass(rank=rank))


def _beside(part: Part) -> list[Rule]:
    """A part beside every block, which hears the one before it; the last is the model's answer."""
    first = block & FIRST
    begins = nearest(norm, before=attn & inside(first)) & inside(first)
    return [
        at(begins, prepend(nn.Identity)),
        at(first, side(part, hears=norm & inside(first))),
        at(block & ~FIRST, side(part), optional=True),
        at(block & "**.[-1]", append(heard(), hears=block)),
        HEAD,
    ]
