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

    def take_out(self, y: Tensor, put: Put, path: str) -> Tensor:
        """y without the tokens that were put in. Raises GraftError where others came out."""
        whole = self.rows(y) if y.dim() == 3 else None
        if whole is None or whole.shape[:2] != (put.batch, put.total):
            raise GraftError(
                f"insert(...) at {path or 'the model'}",
                f"{put.total} tokens a sample went in, {put.new} of them inserted, and "
                f"{tuple(y.shape)} came out: which of it are they?",
                "Put it where as many leave as enter: a narrower stretch, or block by block.",
            )
        first = min(self.after, put.total - put.new)
        return self.rows(torch.cat([whole[:, :first], whole[:, first + put.new :]], 1))

    def check(self, x: Tensor, others: list[Tensor], path: str) -> None:
        """Raise GraftError where x are no tokens, or the site is given what fits their number."""
        if x.dim() != 3:
            raise GraftError(
                f"insert(...) at {path or 'the model'}",
                f"it is given {tuple(x.shape)}, which is no row of tokens (b, n, width).",
                "It stands behind the pooling of tokens: put it before (daptx(last=False) has none "
                "there)."
                if x.dim() < 3
                else "Its attention fixes the number of tokens (windows, maps). Use a method that "
                "adds no tokens.",
            )
        b, n, width = self.rows(x).shape
        for other in others:
            if _is_made_for({n, n - self.after}, other, b, width):
                raise GraftError(
                    f"insert(...) at {path or 'the model'}",
                    f"it is also given a tensor {tuple(other.shape)} that is made for {n} tokens "
                    "(a mask, rotary positions), and more would not fit.",
                    "Use a method that adds no tokens.",
                )


class Put(NamedTuple):
    """What was put in last: how many tokens, of how many then; samples; whether it is still in."""

    new: int
    total: int
    batch: int
    open: bool


def _is_made_for(numbers: set[int], other: Tensor, batch: int, width: int) -> bool:
    """Whether a tensor has a row or a column for each token; features of samples have not."""
    if other.dim() < 2 or (other.shape[0], other.shape[-1]) == (batch, width):
        return False
    return bool(numbers & set(other.shape[-2:]))


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
