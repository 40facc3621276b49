"""A step at a site, and the tokens that steps put in there: what is in, and what was heard."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import GraftError
from .tokens import Put, Tokens


class Step(NamedTuple):
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
    """The tokens that a graft puts in.

    hears  the number of a step, and where the part is that it hears, and that part
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.hears: dict[int, tuple[str, nn.Module]] = {}
        self.begin()
        self.answered: Any = WeakTensorKeyDictionary()  # what was heard for an input

    def begin(self) -> None:
        """A forward of the whole model begins."""
        self.heard: dict[int, Tensor] = {}
        self.put: dict[int, Put] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "hears": self.hears}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]
        self.hears = state["hears"]

    def insert(self, i: int, step: Step, x: Tensor, came: Tensor, others: list[Tensor]) -> Tensor:
        """The tokens x, with those of the part among them.

        came    what the site was given first, of which x may have been made; others come along
        """
        step.tokens.check(x, others, self.path)
        rows = step.tokens.rows(x)
        new = step.part(rows, self._hear(i, step, came)) if i in self.hears else step.part(rows)
        shape = new.shape if isinstance(new, Tensor) else ()
        if len(shape) != 3 or (shape[0], shape[2]) != (rows.shape[0], rows.shape[2]):
            raise GraftError(
                f"{type(step.part).__name__} at {self.path or 'the model'}",
                f"it returned {tuple(shape) or type(new).__name__} where new tokens are needed.",
                f"Return ({rows.shape[0]}, p, {rows.shape[2]}): p tokens for each sample.",
            )
        if i in self.put and self.put[i].open and not _is_recomputing():
            raise self._unmatched("its beginning ran again before its end")
        total = rows.shape[1] + shape[1]
        self.put[i] = Put(shape[1], total, shape[0], step.place == "among")
        return step.tokens.put_in(x, new)

    def take_out(self, i: int, tokens: Tokens, y: Tensor) -> Tensor:
        """What comes out, without the tokens that step i put in."""
        put = self.put.get(i)
        if put is None or not (put.open or _is_recomputing()):
            raise self._unmatched("its end ran without its beginning")
        self.put[i] = Put(put.new, put.total, put.batch, False)
        return tokens.take_out(y, put, self.path)

    @property
    def left_in(self) -> GraftError | None:
        """An error where tokens were put in and never taken out."""
        still = [put for put in self.put.values() if put.open]
        return self._unmatched("its end never ran after its beginning") if still else None

    def _unmatched(self, fact: str) -> GraftError:
        return GraftError(
            f"insert(...) at {self.path or 'the model'}",
            f"{fact}: blocks are shared, or skipped, and tokens would be lost or left in.",
            "Put it on blocks one by one: at(block, insert(...)).",
        )

    def _hear(self, i: int, step: Step, came: Tensor) -> Tensor:
        """What the part that step i listens to gave in this forward.

        A checkpoint that runs again gives the same input, and is answered as it was then.
        """
        compiling = torch.compiler.is_compiling()
        known = {} if compiling or not _is_recomputing() else self.answered.get(came, {})
        heard: Tensor | None = known.get(i, self.heard.get(i))
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
            self.answered[came] = {**self.answered.get(came, {}), i: heard}
        return step.tokens.rows(heard) if heard.dim() == 3 else heard


def _is_recomputing() -> bool:
    """Whether this forward is part of a backward: a checkpoint runs its segment again."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)
