"""Queries and values alone, of one linear that makes all three or of linears apart."""

from __future__ import annotations

from collections.abc import Callable

from ..rules.edits import Edit, freeze, unfreeze
from ..rules.part import Part
from ..rules.roles import fused, head, qkv
from ..rules.rule import Rule, at


def on_queries_and_values(
    make: Callable[[str | None], Edit | Part], rows: str = "q _k v"
) -> list[Rule]:
    """What is made for some rows, at the queries and values of every attention; and the head.

    make  what to do, given `rows` of a linear that makes queries, keys and values; None where they
          are made apart: the module tree does not tell which is which, and all have it
    """
    return [
        at(qkv, freeze),  # they are anyway: refuses a model that has none
        at(fused, make(rows), optional=True),
        at(qkv & ~fused, make(None), optional=True),
        at(head, unfreeze, optional=True),
    ]
