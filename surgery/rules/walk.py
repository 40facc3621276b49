"""What a rule speaks of: every selector in it, wherever it stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from .expression import Expression
from .selector import Selector


def selectors_in(value: Any) -> Iterator[Selector]:
    """The selectors in a rule, an edit, a part or a selector, itself first.

    >>> from surgery.rules.relations import inside
    >>> [repr(selector) for selector in selectors_in(inside("blocks.0"))]
    ['inside("blocks.0")', 'where("blocks.0")']
    """
    if isinstance(value, Selector):
        yield value
    if isinstance(value, Expression):
        value = [getattr(value, field.name) for field in fields(value)]
    for inner in value if isinstance(value, (list, tuple)) else ():
        yield from selectors_in(inner)
