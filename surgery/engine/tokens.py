"""One part at one site, and tokens: put among those of a model, and taken out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import GraftError, RuleError
from ..structure.module_tree import Site, Tree
from ..structure.stretches import Stretch
from .counting import Counted, recounted
from .features import declared, input_of
from .passes import Passes
from .streams import Inserted, Place, Stream, Streams, Tokens, is_recomputing


def tokens_at(
    site: Site, tree: Tree, after: int, rule: str, stretch: Stretch | None = None
) -> Tokens:
    """How tokens are put in at a site. Raises RuleError where their number is fixed there.

    stretch  what it is in a forward, where nobody calls it
    """
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
    tokens = Tokens(after, 0 if any(not m.batch_first for m in attentions) else 1)
    if stretch and (misfit := tokens.misfit(stretch.shape, stretch.beside)):
        raise RuleError(rule, f"{site.path}: {misfit[0]}", misfit[1])
    return tokens


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
            output, "aside" and "along" on the output for others to hear, without and with its
            gradient, "instead" in place of the module, "attended" while it runs; "into" puts
            tokens into the input, "among" takes them out of the output too
    optional  its rule says that it need not be of use
    hears   whether its part is given, besides, what another gave
    scale   what is added is `scale` times what the part gives; None: it replaces what it was given
    """

    place: str
    part: nn.Module
    scale: float | None
    tokens: Tokens = Tokens(0)
    optional: bool = False
    hears: bool = False

    @property
    def starts_as_base(self) -> bool:
        """Whether the answer of the model is that of the base at the start, as the part says."""
        added = self.scale is not None and getattr(self.part, "starts_at_zero", False)
        return added or self.place in ASIDE


ENTERING = ("before", "into", "among")  # what acts on the input
ASIDE = ("aside", "along")  # what changes nothing, and is heard
WRAPPING = ("instead", "attended")  # what takes the place of the forward of a module
LINEAR = ("beside", "after", "before", "instead")  # what a weight can be made of
ON_OUTPUT = ("after", "beside", *ASIDE)  # what runs when the place has given its output


class Fits:
    """A hook on what is called in a stretch that nobody calls, of which no hook sees all."""

    def __init__(self, path: str, module: nn.Module, opened: Callable[[], list[Inserted]]) -> None:
        self.path, self.module, self.opened = path, module, opened
        self.names = declared(getattr(type(module), "forward", None))

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Forward pre-hook. Raises GraftError where it is given what fits the model's tokens."""
        self._check(args, kwargs)
        if any(isinstance(t, Counted) for t in pytree.tree_leaves((args, kwargs))):
            return recounted((args, kwargs)) if kwargs is not None else recounted(args)
        return None

    def _check(self, args: Any, kwargs: Any) -> None:
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        opened = self.opened() if len(tensors) > 1 else []
        if not opened:
            return
        x, _ = input_of(args, kwargs or {}, self)
        axis, shape = opened[0].tokens.axis, [*x.shape]
        if x.dim() == 3:
            shape[axis] -= sum(each.new for each in opened)
            others = [t.shape for t in tensors if t is not x]
            if misfit := opened[0].tokens.misfit(tuple(shape), others):
                raise GraftError(f"insert(...) at {self.path}", *misfit)


class Insertions:
    """The tokens that are put in at one site.

    doubles  in a proof, whether so many are put in that there are twice as many in all
    """

    doubles = False

    def __init__(self, path: str, operation: str) -> None:
        self.path, self.operation = path, operation

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "operation": self.operation}

    def is_here(self, streams: Streams, leaving: bool) -> bool:
        """Whether compiled code has all that it goes on with: what is in."""
        return (not leaving and not streams.traced.holds) or streams.here.noted()

    def insert(
        self,
        passes: Passes,
        streams: Streams,
        i: int,
        action: Action,
        x: Tensor,
        others: list[Tensor],
        heard: list[Tensor],
    ) -> Tensor:
        """The tokens x, with those of the part among them; others come along.

        heard   what the part hears, by samples
        """
        action.tokens.check(x, others, self.path)
        rows = action.tokens.rows(x)
        new = action.part(rows, *heard)
        shape = new.shape if isinstance(new, Tensor) else ()
        if len(shape) != 3 or (shape[0], shape[2]) != (rows.shape[0], rows.shape[2]):
            raise GraftError(
                f"{type(action.part).__name__} at {self.path or 'the model'}",
                f"it returned {tuple(shape) or type(new).__name__} where new tokens are needed.",
                f"Return ({rows.shape[0]}, p, {rows.shape[2]}): p tokens for each sample.",
            )
        if self.doubles:
            new = new.repeat(1, -(-2 * (rows.shape[1] + shape[1]) // shape[1]), 1)
            new = new[:, : rows.shape[1] + 2 * shape[1]]
            shape = new.shape
        place, stream = self._place(i), streams.beginning()
        if place in stream.opened() and not is_recomputing():
            if passes.mine().whole:
                raise self._unmatched("its beginning ran again before its end")
            stream.begin()  # the last one, of a part of the model alone, never came to its end
        stream.inserted.pop(place, None)
        total, among = rows.shape[1] + shape[1], action.place == "among"
        new_ones = Inserted(shape[1], total, shape[0], among, action.tokens, kept=not among)
        stream.inserted[place] = new_ones
        return action.tokens.put_in(x, new)

    def take_out(self, streams: Streams, i: int, tokens: Tokens, y: Tensor) -> Tensor:
        """What comes out, without the tokens that action i put in."""
        place, stream = self._place(i), streams.mine()
        inserted = stream.inserted.get(place)
        if inserted is None and is_recomputing():  # of a forward in another thread
            inserted = next((s.inserted[place] for s in streams.all() if place in s.inserted), None)
        if inserted is None or not (inserted.open or is_recomputing()):
            raise self._unmatched("its end ran without its beginning")
        streams.know(y, {**stream.opened(), place: inserted})
        stream.inserted[place] = inserted._replace(open=False)
        return tokens.take_out(y, inserted, self.path)

    def left_in(self, stream: Stream) -> GraftError | None:
        """An error where tokens were put in and never taken out."""
        mine = self.operation, self.path
        if any(place[:2] == mine for place in stream.opened()):
            return self._unmatched("its end never ran after its beginning")
        return None

    def _place(self, i: int) -> Place:
        return self.operation, self.path, i

    def _unmatched(self, fact: str) -> GraftError:
        return GraftError(
            f"insert(...) at {self.path or 'the model'}",
            f"{fact}: blocks are shared, or skipped, and tokens would be lost or left in.",
            "Put it on blocks one by one: at(block, insert(...)).",
        )
