"""Scale and shift after every operation (Lian et al. 2022, SSF)."""

from __future__ import annotations

from torch import nn

from ..parts.scale import scale_shift
from ..rules.edits import unfreeze
from ..rules.relations import inside
from ..rules.roles import fc1, fc2, head, norm, proj, qkv
from ..rules.rule import Rule, at

operation = (
    norm | nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.MultiheadAttention
    | qkv | proj | fc1 | fc2
)  # fmt: skip


def ssf(mergeable: bool = False) -> list[Rule]:
    """Scale and shift, gamma * y + beta, of what every operation gives, the head's left out.

    Operations are linear modules, convolutions and norms; nn.MultiheadAttention is one. Starts
    at random near the base, gamma ~ N(1, 0.02) and beta ~ N(0, 0.02).

    mergeable  no beta where a module has no bias to merge it into (Swin's patch merging)

    Source: Lian et al. 2022 (SSF)
    """
    left_out = head | inside(head) | inside(nn.MultiheadAttention)
    return [
        at(operation & ~left_out, scale_shift(shift=None if mergeable else True)),
        at(head, unfreeze, optional=True),
    ]
