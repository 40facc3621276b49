"""The words that rules are written in: the only names that a file may call."""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any

from . import edit, part, parts, pattern, relation, role, rule


@lru_cache(maxsize=1)
def words() -> dict[str, Any]:
    """Every public word of rules, by name."""
    listed = {
        edit: ("parallel", "append", "prepend", "replace", "insert", "freeze", "unfreeze", "token"),
        part: ("shared",),
        parts: parts.WORDS,
        pattern: ("where",),
        relation: ("inside", "holding", "nearest", "span", "until"),
        role: tuple(each.name for each in (*role.ROLES, *role.MADE, *role.LAYERS)),
        rule: ("at",),
    }
    signs = {"&": operator.and_, "|": operator.or_, "~": operator.invert, "[]": _chosen}
    named = {name: getattr(module, name) for module, names in listed.items() for name in names}
    return {**named, **signs}


def _chosen(some: pattern.Pattern, *bounds: Any) -> pattern.Pattern:
    return some[bounds[0] if len(bounds) == 1 else slice(*bounds)]
