"""Adapters of the stream behind attention and FFN, for images."""

from __future__ import annotations

from ..parts.visual_adapters import adapter_plus as scaled
from ..parts.visual_adapters import mona as of_three_sizes
from ..parts.visual_adapters import salient
from ..rules.edits import append, parallel, prepend, unfreeze
from ..rules.part import Part, shared
from ..rules.relations import span
from ..rules.roles import block, ffn, head, norm
from ..rules.rule import Rule, at

HEAD = at(head, unfreeze, optional=True)


def adapter_plus(rank: int = 8) -> list[Rule]:
    """A bottleneck with a scale for each feature behind every block.

    Its code draws whole adapters out in training (stochastic depth), which is left out.

    Source: Steitz and Roth 2024 (Adapter+)
    """
    return [at(block, append(scaled(rank=rank), residual=True)), HEAD]


def mona(hidden: int = 64, prefix: int | None = None, dropout: float = 0.1) -> list[Rule]:
    """A bottleneck with convolutions of three sizes over the patches, behind attention and FFN.

    For blocks whose norms come first.

    Source: Yin et al. 2025 (Mona)
    """
    part = of_three_sizes(hidden=hidden, prefix=prefix, dropout=dropout)
    return [behind_attention(part), at(block, append(part, residual=True)), HEAD]


def sct(channels: int = 96, scale: float = 1.0) -> list[Rule]:
    """A linear map among the salient channels behind every attention.

    For blocks whose norms come first. `surgery.training.aim_at_salient` chooses the channels by the
    features of a task.

    Source: Zhao et al. 2023 (SCT)
    """
    return [behind_attention(salient(channels=channels, scale=scale)), HEAD]


def behind_attention(part: Part) -> Rule:
    """x + part(x) of the stream x that attention leaves, as the FFN and its residual are given it.

    No module gives that sum, so the part runs twice: before the FFN's norm, and beside both. There
    it stands inside drop-path and layer scale, where a model has them.
    """
    once = shared(part, by=block)
    return at(span(norm, ffn), prepend(once, residual=True), parallel(once))
