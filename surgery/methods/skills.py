"""An inventory of skills, mixed by task (Ponti et al. 2023, Poly; Caccia et al. 2023, MHR).

In `surgery.parts.skills`, `choose` says the task, and `inherit` brings skills that were trained.
"""

from __future__ import annotations

from ..parts.skills import skill_lora
from ..rules.rule import Rule
from .queries_and_values import on_queries_and_values


def poly(skills: int = 8, rank: int = 1, tasks: int = 19) -> list[Rule]:
    """Low-rank updates of queries and values, mixed for each of 19 tasks of 8 skills.

    `choose(model, task)` says the task. Where queries, keys and values are made apart, all three
    have it.

    Source: Ponti et al. 2023 (Poly)
    """
    return mhr(skills=skills, rank=rank, tasks=tasks, heads=1)


def mhr(skills: int = 8, rank: int = 1, tasks: int = 19, heads: int = 8) -> list[Rule]:
    """Poly whose skills are split into 8 heads, each mixed for itself.

    `choose(model, task)` says the task. Where queries, keys and values are made apart, all three
    have it.

    Source: Caccia et al. 2023 (MHR)
    """
    return on_queries_and_values(
        lambda rows: skill_lora(skills=skills, rank=rank, tasks=tasks, heads=heads, rows=rows)
    )


def mhr_z(skills: int = 8, rank: int = 1, heads: int = 8) -> list[Rule]:
    """Of MHR's skills, trained before, only how one new task mixes them is trained.

    The skills come from a trained model of `mhr`, or of `poly` with heads=1, by `inherit`; without
    them it changes nothing, and nothing can be learned.

    Source: Caccia et al. 2023 (MHR-z)
    """
    return on_queries_and_values(
        lambda rows: skill_lora(skills=skills, rank=rank, heads=heads, rows=rows, frozen=True)
    )


def mhr_mu(rank: int = 1) -> list[Rule]:
    """One low-rank update, for a new task, that starts as the average of MHR's skills.

    They come from a trained model of `mhr`, or `poly`, by `inherit`.

    Source: Caccia et al. 2023 (MHR-mu)
    """
    return on_queries_and_values(lambda rows: skill_lora(skills=1, rank=rank, tasks=0, rows=rows))
