"""Tokens put among those of a model, and taken out again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .errors import GraftError, RuleError
from .tree import Site, Tree


class Tokens(NamedTuple):
    """Where tokens are put in: after how many, on which axis (0 where sequence comes first)."""

    after: int
    axis: int = 1

    def rows(self, x: Tensor) -> Tensor:
        """x as (b, n, width)."""
        return x if self.axis else x.transpose(0, 1)

    def put_in(self, x: Tensor, new: Tensor) -> Tensor:
        """x with new (b, p, width) in it: n + p tokens."""
        rows = self.rows(x)
        joined = torch.cat([rows[:, : self.after], new.to(x.dtype), rows[:, self.after :]], 1)
        return self.rows(joined)

    def take_out(self, y: Tensor, count: int) -> Tensor:
        """y without the `count` tokens that were put in."""
        rows = self.rows(y)
        first = min(self.after, rows.shape[1] - count)
        return self.rows(torch.cat([rows[:, :first], rows[:, first + count :]], 1))

    def check(self, x: Tensor, others: list[Tensor], path: str) -> None:
        """Raise GraftError where x are no tokens, or the site is given what fits their number."""
        if x.dim() != 3:
            raise GraftError(
                f"insert(...) at {path or 'the model'}",
                f"it is given {tuple(x.shape)}, which is no row of tokens (b, n, width).",
                "Its attention fixes the number of tokens (windows, maps). Use a method that adds "
                "no tokens.",
            )
        n = self.rows(x).shape[1]
        for other in others:
            if other.shape != x.shape and {n, n - self.after} & set(other.shape[-2:]):
                raise GraftError(
                    f"insert(...) at {path or 'the model'}",
                    f"it is also given a tensor {tuple(other.shape)} that is made for {n} tokens "
                    "(a mask, rotary positions), and more would not fit.",
                    "Use a method that adds no tokens.",
                )


def tokens_at(site: Site, tree: Tree, after: int, rule: str) -> Tokens:
    """How tokens are put in at a site. Raises RuleError where their number is fixed there."""
    within = [s.module for s in tree.sites[site.entry.order : site.exit.end]]
    table = next((found for found in map(_table, within) if found), None)
    if site.axis != -1 or table:
        fact = f"{table}, one row for each place" if table else "features lie on axis 1, as in maps"
        raise RuleError(
            rule,
            f"tokens cannot be inserted at {site.path or 'the model'}: its attention fixes their "
            f"number ({fact}).",
            "Use a method that adds no tokens.",
        )
    attentions = [m for m in within if isinstance(m, nn.MultiheadAttention)]
    return Tokens(after, 0 if any(not m.batch_first for m in attentions) else 1)


def _table(module: nn.Module) -> str | None:
    """A table of relative positions that a module keeps: integers (n, n)."""
    for name, buffer in module._buffers.items():
        if buffer is None or buffer.dtype not in (torch.int32, torch.int64):
            continue
        if buffer.dim() == 2 and buffer.shape[0] == buffer.shape[1] > 1:
            return f"{type(module).__name__}.{name} is {tuple(buffer.shape)}"
    return None
