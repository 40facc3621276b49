"""A few numbers of every weight, trained (He et al. 2023, SPT, unstructured)."""

from __future__ import annotations

from ..parts.sparse_updates import sparse as few
from ..rules.edits import unfreeze
from ..rules.roles import fc1, fc2, head, proj, qkv
from ..rules.rule import Rule, at


def sparse(share: float = 0.01) -> list[Rule]:
    """One per cent of the numbers of every linear of attention and FFN, drawn at random.

    `surgery.training` chooses the numbers by what a task is sensitive to (SPT).

    share  of each weight, above 0 and at most 1

    Source: He et al. 2023 (SPT), unstructured
    """
    return [
        at(qkv | proj | fc1 | fc2, few(share=share)),
        at(head, unfreeze, optional=True),
    ]
