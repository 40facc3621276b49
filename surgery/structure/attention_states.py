"""What is known of a value while a trace is read for attention: what made it, and what it is of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .linear_ops import LinearOp
from .trace import Op

OPERANDS = ("query", "key", "value")
Bits = int  # a set of operations: the n-th bit for the n-th that makes features of its own


class Maker(NamedTuple):
    """An operation that makes features of its own, and the module that holds its weights.

    linear  what it multiplies with; None for a convolution over positions, a table, a sum
    """

    op: Op
    owner: nn.Module | None
    linear: LinearOp | None


class Scores(NamedTuple):
    """What scores are made of, and whether they have been through a softmax.

    over_features  whether the product sums over features, and not over tokens; None: unknown
    heads          sizes that may be the number of heads
    """

    query: Bits
    key: Bits
    soft: bool = False
    over_features: bool | None = None
    heads: frozenset[int] = frozenset()

    def join(self, other: Scores) -> Scores:
        return self._replace(
            query=self.query | other.query,
            key=self.key | other.key,
            soft=self.soft or other.soft,
            heads=self.heads | other.heads,
        )


@dataclass(frozen=True)
class State:
    """What is known of a value.

    near, behind  what made it, nearest upstream, and all upstream
    cores         the attentions whose result it is, not projected yet
    scores        where it is scores or weights, of what
    pair          where it is an elementwise product, of what
    gate          whether it is squeezed between two numbers, to multiply something
    """

    near: Bits
    behind: Bits
    cores: frozenset[int] = frozenset()
    scores: Scores | None = None
    pair: tuple[Bits, Bits] | None = None
    gate: bool = False


class Core(NamedTuple):
    """An attention while the trace is read: what entered it, as bits; what projects its result."""

    op: Op
    query: Bits
    key: Bits
    value: Bits
    soft: bool
    proj: list[LinearOp]

    @property
    def operands(self) -> Bits:
        return self.query | self.key | self.value
