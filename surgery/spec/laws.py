"""What a law is: a function of a case that raises `Broken` where it does not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from hypothesis.strategies import DataObject, SearchStrategy

T = TypeVar("T")


class Broken(AssertionError):
    """A law does not hold: where, and with which values."""


class Absent(Exception):
    """A law says nothing about this case, and why."""


class Draw:
    """Chooses examples, and remembers what it chose; hypothesis then looks for the smallest."""

    def __init__(self, data: DataObject) -> None:
        self.data, self.chosen = data, list[tuple[str, object]]()

    def __call__(
        self, strategy: SearchStrategy[T], label: str, show: Callable[[T], object] = repr
    ) -> T:
        value: T = self.data.draw(strategy)
        self.chosen.append((label, show(value)))
        return value

    def __str__(self) -> str:
        return ", ".join(f"{label} {value}" for label, value in self.chosen)


def law(prop: Any) -> str:
    """The law in one line, as mathematics: the first line of its docstring.

    >>> def same(case, draw):
    ...     '''S(x) = m(x).'''
    >>> law(same)
    'S(x) = m(x).'
    """
    return (prop.__doc__ or "").strip().splitlines()[0]


def holds(fact: object, message: str) -> None:
    """Raise Broken with the message unless `fact`."""
    if not fact:
        raise Broken(message)


def applies(fact: object, reason: str) -> None:
    """Raise Absent with the reason unless `fact`: then the law says nothing here."""
    if not fact:
        raise Absent(reason)
