"""Networks beside the model, which gradients go through instead of it."""

from __future__ import annotations

from ..parts.side_networks import back, climb, ladder, track
from ..rules.edits import append, side, unfreeze
from ..rules.roles import block, head
from ..rules.rule import Rule, at

HEAD = at(head, unfreeze, optional=True)


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
