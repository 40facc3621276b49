"""Lists in sentences."""

from __future__ import annotations

from collections.abc import Iterable


def first_few(names: Iterable[object], most: int = 3) -> str:
    """The first few of some names, and how many more there are.

    >>> first_few(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if texts[most:] else "")
