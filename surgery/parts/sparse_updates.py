"""A few numbers of a weight, trained: a sparse sum (SPT, He et al. 2023)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RuleError, is_integer
from ..rules.part import part, usually
from ..structure.module_tree import Site
from .arguments import positive


class Sparse(nn.Module):
    """D x, where D (out, width) is `values` at the flat positions `index`, and 0 elsewhere.

    `values` (entries,) start at zero; `index` (entries,) is never trained, and starts as positions
    drawn without replacement. `aim` sets it.

    >>> Sparse(768, 768, entries=100)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    starts_at_zero = True
    index: Tensor

    def __init__(self, width: int, out: int, entries: int) -> None:
        super().__init__()
        self.width, self.out = width, out
        self.values = nn.Parameter(torch.zeros(entries))
        self.register_buffer("index", torch.randperm(out * width)[:entries].clone())
        self.indices_below = {"index": out * width}

    def aim(self, index: Tensor) -> None:
        """Train the numbers at these flat positions (entries,) of the weight (out, width).

        Raises RuleError unless they are `entries` different positions of it, as integers.
        """
        self.check(index)
        self.index.copy_(index)

    def check(self, index: Tensor) -> None:
        """Raise RuleError unless these are positions that it can be aimed at."""
        n, size = len(self.index), self.out * self.width
        inside = bool(((index >= 0) & (index < size)).all())
        whole = not index.is_floating_point() and len(torch.unique(index)) == n
        if tuple(index.shape) != (n,) or not inside or not whole:
            raise RuleError(
                f"sparse(entries={n})",
                f"it was given {tuple(index.shape)} {index.dtype}, not {n} different positions of "
                f"a weight ({self.out}, {self.width}).",
                "Give flat integers, row * width + column, each once.",
            )

    def weight(self) -> Tensor:
        """D (out, width)."""
        empty = self.values.new_zeros(self.out * self.width)
        return empty.scatter(0, self.index, self.values).view(self.out, self.width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight())

    def affine(self) -> tuple[Tensor, None]:
        return self.weight(), None


@part
@usually("parallel")
def sparse(site: Site, entries: int | None = None, share: float = 0.01) -> nn.Module:
    """Trains a few numbers of a linear's weight, as a sum beside it; `surgery.training` says which.

    entries  how many; None: `share` of the weight, rounded up
    share    a fraction, above 0 and at most 1

    Starts by adding nothing, at positions drawn at random. Parameters: entries.
    Source: He et al. 2023 (SPT).

    >>> sparse(entries=100)
    sparse(entries=100)
    """
    size = site.width * site.out
    if not 0 < share <= 1:
        raise RuleError(
            f"sparse(share={share!r})", "it is no share of a weight.", "Give 0.01 for 1 %."
        )
    count = math.ceil(share * size) if entries is None else entries
    positive("sparse", entries=count)
    if count > size:
        raise RuleError(
            f"sparse(entries={count})",
            f"the weight at {site!r} has {size} numbers.",
            "Give that many at most.",
        )
    return Sparse(site.width, site.out, count)


class Rows(nn.Module):
    """D (out, width), which is `values` (n, width) at n rows, and 0 elsewhere.

    >>> Rows([1, 4], 8, 6)(torch.randn(3, 8)).shape
    torch.Size([3, 6])
    """

    starts_at_zero = True
    index: Tensor

    def __init__(self, ids: list[int], width: int, out: int) -> None:
        super().__init__()
        self.out = out
        self.values = nn.Parameter(torch.zeros(len(ids), width))
        self.register_buffer("index", torch.tensor(ids))
        self.indices_below = {"index": out}

    def maps(self) -> tuple[Tensor, Tensor]:
        """The rows (n, width), and where each of them goes (out, n)."""
        n = len(self.index)
        places = self.values.new_zeros(self.out, n)
        places[self.index, torch.arange(n, device=places.device)] = 1.0
        return self.values, places

    def forward(self, x: Tensor) -> Tensor:
        rows, places = self.maps()
        return F.linear(F.linear(x, rows), places)

    def affine(self) -> tuple[Tensor, None]:
        empty = self.values.new_zeros(self.out, self.values.shape[1])
        return empty.index_copy(0, self.index, self.values), None


@part
@usually("parallel")
def rows(site: Site, ids: list[int]) -> nn.Module:
    """Trains some rows of a weight as a sum beside it: at(weight("**.wte.weight"), rows(ids)).

    ids  which, each once: the tokens of a table of words, those that a resized one has got

    Starts by adding nothing. Parameters: len(ids) * width. Raises RuleError where there is no such
    row. Source: trainable tokens of PEFT (2025).

    >>> rows(ids=[0, 7])
    rows(ids=[0, 7])
    """
    listed: object = ids
    whole = isinstance(listed, (list, tuple)) and len(ids) > 0
    if not whole or not all(is_integer(i, least=0) and i < site.out for i in ids) or _repeats(ids):
        raise RuleError(
            f"rows(ids={ids!r})",
            f"the weight at {site!r} has rows 0 to {site.out - 1}, and each is trained once.",
            "Give a list of the numbers of tokens that the table has.",
        )
    return Rows([*ids], site.width, site.out)


def _repeats(ids: list[int]) -> bool:
    return len(set(ids)) < len(ids)
