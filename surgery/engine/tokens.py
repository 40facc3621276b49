"""One part at one site, and tokens: put among those of a model, heard of, and taken out again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import GraftError, RuleError
from ..structure.module_tree import Site, Tree
from .passes import Inserted, Pass


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

    def take_out(self, y: Tensor, inserted: Inserted, path: str) -> Tensor:
        """y without the tokens that were put in. Raises GraftError where others came out."""
        whole = self.rows(y) if y.dim() == 3 else None
        if whole is None or whole.shape[:2] != (inserted.batch, inserted.total):
            raise GraftError(
                f"insert(...) at {path or 'the model'}",
                f"{inserted.total} tokens a sample went in, {inserted.new} of them inserted, and "
                f"{tuple(y.shape)} came out: which of it are they?",
                "Put it where as many leave as enter: a narrower stretch, or block by block.",
            )
        first = min(self.after, inserted.total - inserted.new)
        return self.rows(torch.cat([whole[:, :first], whole[:, first + inserted.new :]], 1))

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


def _is_made_for(numbers: set[int], other: Tensor, batch: int, width: int) -> bool:
    """Whether a tensor has a row or a column for each token; features of samples have not."""
    if other.dim() < 2 or (other.shape[0], other.shape[-1]) == (batch, width):
        return False
    return bool(numbers & set(other.shape[-2:]))


def tokens_at(site: Site, tree: Tree, after: int, rule: str) -> Tokens:
    """How tokens are put in at a site. Raises RuleError where their number is fixed there."""
    within = [s.module for s in tree.sites[site.entry.order : site.exit.end]]
    table = next(filter(None, map(_table, within)), None)
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


class Action(NamedTuple):
    """One part at one site.

    place   "before" acts on the input, "after" on the output, "beside" on the input for the
            output, "instead" in place of the module; "into" puts tokens into the input, "among"
            takes them out of the output too
    scale   what is added is `scale` times what the part gives; None: it replaces what it was given
    """

    place: str
    part: nn.Module
    scale: float | None
    tokens: Tokens = Tokens(0)


ENTERING = ("before", "into", "among")  # what acts on the input


class Insertions:
    """The tokens that are put in at one site.

    hears  the number of an action, and where the part is that it hears, and that part
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.hears: dict[int, tuple[str, nn.Module]] = {}
        self.answered: Any = WeakTensorKeyDictionary()  # what was heard for an input

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "hears": self.hears}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]
        self.hears = state["hears"]

    def insert(
        self, kept: Pass, i: int, action: Action, x: Tensor, given: Tensor, others: list[Tensor]
    ) -> Tensor:
        """The tokens x, with those of the part among them.

        given   what came to the site first, of which x may have been made; others come along
        """
        action.tokens.check(x, others, self.path)
        rows = action.tokens.rows(x)
        heard = [self._hear(kept, i, action, given)] if i in self.hears else []
        new = action.part(rows, *heard)
        shape = new.shape if isinstance(new, Tensor) else ()
        if len(shape) != 3 or (shape[0], shape[2]) != (rows.shape[0], rows.shape[2]):
            raise GraftError(
                f"{type(action.part).__name__} at {self.path or 'the model'}",
                f"it returned {tuple(shape) or type(new).__name__} where new tokens are needed.",
                f"Return ({rows.shape[0]}, p, {rows.shape[2]}): p tokens for each sample.",
            )
        key = self.path, i
        if key in kept.inserted and kept.inserted[key].open and not is_recomputing():
            raise self._unmatched("its beginning ran again before its end")
        total = rows.shape[1] + shape[1]
        kept.inserted[key] = Inserted(shape[1], total, shape[0], action.place == "among")
        return action.tokens.put_in(x, new)

    def take_out(self, kept: Pass, i: int, tokens: Tokens, y: Tensor) -> Tensor:
        """What comes out, without the tokens that action i put in."""
        inserted = kept.inserted.get((self.path, i))
        if inserted is None or not (inserted.open or is_recomputing()):
            raise self._unmatched("its end ran without its beginning")
        kept.inserted[self.path, i] = Inserted(inserted.new, inserted.total, inserted.batch, False)
        return tokens.take_out(y, inserted, self.path)

    def left_in(self, kept: Pass) -> GraftError | None:
        """An error where tokens were put in and never taken out."""
        if any(of.open for (path, _), of in kept.inserted.items() if path == self.path):
            return self._unmatched("its end never ran after its beginning")
        return None

    def _unmatched(self, fact: str) -> GraftError:
        return GraftError(
            f"insert(...) at {self.path or 'the model'}",
            f"{fact}: blocks are shared, or skipped, and tokens would be lost or left in.",
            "Put it on blocks one by one: at(block, insert(...)).",
        )

    def _hear(self, kept: Pass, i: int, action: Action, given: Tensor) -> Tensor:
        """What the part that action i hears gave in this forward.

        A checkpoint that runs again gives the same input, and is answered as it was then.
        """
        compiling = torch.compiler.is_compiling()
        earlier = {} if compiling or not is_recomputing() else self.answered.get(given, {})
        heard: Tensor | None = earlier.get(i, kept.heard.get((self.path, i)))
        path, part = self.hears[i]
        if heard is None:
            raise GraftError(
                f"the graft at {self.path}",
                f"the part that it hears, at {path}, did not run before it in this forward.",
                "Write insert(..., hears=) with a place that runs before this one.",
            )
        trained = any(p.requires_grad for p in part.parameters())
        if torch.is_grad_enabled() and trained and not heard.requires_grad:
            raise GraftError(
                f"the graft at {self.path}",
                f"what it hears from {path} came without a gradient (reentrant checkpointing), "
                "which would silently be missing.",
                "Use checkpointing with use_reentrant=False.",
            )
        if not compiling:
            self.answered[given] = {**self.answered.get(given, {}), i: heard}
        return action.tokens.rows(heard) if heard.dim() == 3 else heard


def is_recomputing() -> bool:
    """Whether this forward is part of a backward: a checkpoint runs its segment again."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
