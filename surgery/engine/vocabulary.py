"""The words that rules are written in: the only names that a file may call."""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any

from .. import parts, rules


@lru_cache(maxsize=1)
def vocabulary() -> dict[str, Any]:
    """Every public word of rules, by name."""
    signs = {"&": operator.and_, "|": operator.or_, "~": operator.invert, "[]": _chosen}
    listed = {name: getattr(rules, name) for name in rules.WORDS}
    return {**listed, **{name: getattr(parts, name) for name in parts.WORDS}, **signs}


def _chosen(some: rules.Selector, *bounds: Any) -> rules.Selector:
    return some[bounds[0] if len(bounds) == 1 else slice(*bounds)]
