"""What parts are given: numbers to check, divisors of widths, other parts to borrow or hold."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from torch import nn

from ..errors import RuleError, is_integer
from ..rules.expression import shown
from ..rules.part import Maker, maker
from ..structure.module_tree import Site

Core = TypeVar("Core", bound=nn.Module)


def positive(rule: str, **values: object) -> None:
    """Raise RuleError unless every value is an integer from 1 up.

    >>> positive("adapter", rank=8)
    """
    for name, value in values.items():
        if not is_integer(value):
            raise RuleError(
                f"{rule}({name}={value!r})", "it must be an integer from 1 up.", "Give one."
            )


def borrowed(word: str, name: str, make: Maker, site: Site, kind: type[Core]) -> Core:
    """What a part borrows at a site. Raises RuleError where it is of another kind."""
    core = maker(make, word)(site)
    if isinstance(core, kind):
        return core
    raise RuleError(
        f"{word}({name}={shown(make)})",
        f"this makes a {type(core).__name__}, and no {kind.__name__}.",
        f"Leave out {name}, or see help({word}) for what makes one.",
    )


def declare_as(part: nn.Module, inner: Collection[nn.Module]) -> None:
    """Let a part declare what the ones inside it do: all start at zero, or one mixes tokens."""
    vars(part).update(
        starts_at_zero=all(getattr(module, "starts_at_zero", False) for module in inner),
        mixes_tokens=any(getattr(module, "mixes_tokens", False) for module in inner),
    )


def divisors(size: int) -> list[int]:
    """All divisors of a number of features, from 1 up.

    >>> divisors(6)
    [1, 2, 3, 6]
    """
    return [n for n in range(1, size + 1) if size % n == 0] or [1]


def fitted(size: int, n: int) -> int:
    """The divisor of a number of features nearest to n; of two equally near, the larger.

    >>> fitted(768, 5)
    6
    """
    return min(divisors(size), key=lambda d: (abs(d - n), -d))


def near_divisors(size: int, n: int) -> str:
    """The three divisors nearest to a number, in words.

    >>> near_divisors(768, 5)
    '3, 4, 6'
    """
    return ", ".join(map(str, sorted(sorted(divisors(size), key=lambda d: (abs(d - n), d))[:3])))
