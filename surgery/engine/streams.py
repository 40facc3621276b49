"""Tokens that were put in and are not out again, and blocks between which they are set aside.

Tokens that stay in for several blocks are taken out behind each of them, so that whoever reads what
lies between blocks finds the model's own tokens alone, and are put in again before the next.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from types import FrameType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import GraftError
from .features import first_tensor, input_of
from .passes import ByThread, thread_of_execution
from .tracing import Here, apart, is_exporting, is_in_call

Shape: TypeAlias = tuple[int, ...]
Place: TypeAlias = tuple[str, str, int]  # an operation, a site, the number of an action there
REENTRANT = {CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__}


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
        if x.is_nested:
            raise GraftError(
                f"insert(...) at {path or 'the model'}",
                "it was given a nested tensor, and tokens are put into tensors of one shape.",
                "Give padded tensors (nn.TransformerEncoder(..., enable_nested_tensor=False)).",
            )
        if misfit := self.misfit(x.shape, [other.shape for other in others]):
            raise GraftError(f"insert(...) at {path or 'the model'}", *misfit)

    def misfit(self, x: Shape, others: Iterable[Shape]) -> tuple[str, str] | None:
        """Why no tokens can be put among some of a shape, given others besides; what to do."""
        if len(x) != 3:
            return (
                f"it is given {tuple(x)}, which is no row of tokens (b, n, width).",
                "It stands behind the pooling of tokens: put it before (daptx(last=False) has none "
                "there)."
                if len(x) < 3
                else "Its attention fixes the number of tokens (windows, maps). Use a method that "
                "adds no tokens.",
            )
        b, n, width = x if self.axis else (x[1], x[0], x[2])
        for other in others:
            if _is_made_for({n, n - self.after}, other, b, width):
                return (
                    f"it is also given a tensor {tuple(other)} that is made for {n} tokens "
                    "(a mask, rotary positions), and more would not fit.",
                    "Use a method that adds no tokens.",
                )
        return None


class Inserted(NamedTuple):
    """What was put in: how many tokens, of how many then; samples; whether still in; where.

    open  whether they are still in, of those that are taken out
    kept  they are not taken out
    """

    new: int
    total: int
    batch: int
    open: bool
    tokens: Tokens
    kept: bool = False


def _is_made_for(numbers: set[int], other: Shape, batch: int, width: int) -> bool:
    """Whether a tensor has a row or a column for each token; features of samples have not."""
    if len(other) < 2:
        return False
    if prod(other[:-2]) == 1 and other[-2:] == (2 * max(numbers) - 1, width):
        return True  # relative positions, from the first token to the last and back (Conformer)
    if (other[0], other[-1]) == (batch, width):
        return False
    return bool(numbers & set(other[-2:]))


class Stream:
    """What was put into the tokens of one forward, the first first.

    aside    the tokens with all that is in them, between two blocks
    call     of the whole model, which goes on: that, and the thread
    again    that of checkpoints which run again in this thread, and may stop half way
    """

    def __init__(self) -> None:
        self.again: Stream | None = None
        self.call: tuple[nn.Module, int] | None = None
        self.begin()

    def begin(self) -> None:
        """A forward begins."""
        self.inserted: dict[Place, Inserted] = {}
        self.aside: Tensor | None = None

    def begin_anew(self) -> None:
        """The same, but that what is empty is not written to in an export, which warns of that."""
        # asked first: what compiled code has read, it is made again for
        if not is_exporting() or self.inserted or self.aside is not None:
            self.begin()

    def opened(self) -> dict[Place, Inserted]:
        """What is in, in the order in which it was put in."""
        return {place: each for place, each in self.inserted.items() if each.open}

    @property
    def runs(self) -> bool:
        """Whether a forward of the whole model goes on."""
        return self.call is not None and is_in_call(*self.call)

    @property
    def holds(self) -> bool:
        """Whether something is in."""
        return self.aside is not None or any(each.open for each in self.inserted.values())


class SetAside(NamedTuple):
    """Tokens with all that is in them, where others were given on; the version of those."""

    whole: Tensor
    version: int
    inserted: dict[Place, Inserted]


class Streams(ByThread[Stream]):
    """The streams of one model: all operations put tokens into the same.

    aside  what was set aside, by what was given on: checkpoints come back to it
    known  what is among tokens, where other than the model's own are
    here   whether compiled code that asks has put in itself what is in
    pause  held by who changes what forwards of others would meet
    mixes  whether rows are several operations' in a forward that gradients are asked of
    """

    def make(self) -> Stream:
        return Stream()

    def mine(self) -> Stream:
        stream = super().mine()
        if stream is not self.traced and self.traced.holds:
            self._take_over(stream)
        if not is_recomputing():
            return stream
        if stream.again is None:
            stream.again = Stream()
        return stream.again

    def begin(self, model: nn.Module) -> None:
        """A forward of the whole model begins."""
        if torch.compiler.is_compiling():
            self.here.note()
        else:
            self.traced.begin()
            self._go_on(model)
        self.mine().begin_anew()

    def _go_on(self, model: nn.Module) -> None:
        """A forward runs in this thread, once nobody else has paused them."""
        stream, me = super().mine(), thread_of_execution()
        with self.pause:
            self.pause.wait_for(lambda: self.paused_by in (None, me))
            stream.call = model, threading.get_ident()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While it lasts no other thread is in a forward of the model: those that run end first.

        (Compiled code, which runs no hooks, does not wait.)
        """
        stream, me = super().mine(), thread_of_execution()
        with self.pause:
            self.pause.wait_for(lambda: self.paused_by in (None, me))
            self.paused_by = me
        try:
            while any(other.runs for other in self.all() if other is not stream):
                time.sleep(0.001)
            yield
        finally:
            with self.pause:
                self.paused_by = None
                self.pause.notify_all()

    def beginning(self) -> Stream:
        """Mine, to put tokens in."""
        if torch.compiler.is_compiling():
            self.here.note()
        return self.mine()

    def refuse_checkpoints(self, path: str) -> None:
        """Raise GraftError where rows are mixed in a checkpoint: it runs again when nobody knows
        whose they are."""
        if self.mixes and (_in_reentrant_checkpoint() or _in_checkpoint()):
            raise GraftError(
                f"mixed(model, ...) at {path or 'the model'}",
                "it runs in a checkpoint (torch.utils.checkpoint), and again in backward, when it "
                "is not known any more whose rows are whose.",
                "Switch checkpointing off where rows are mixed (gradient_checkpointing_disable()).",
            )

    def check_alone(self, path: str) -> None:
        """Raise GraftError where it is not known whose forward compiled code has told of."""
        running = [stream for stream in self.all() if stream.runs]
        if len(running) > 1:
            raise GraftError(
                f"the graft at {path or 'the model'}",
                "blocks are compiled one by one, and several threads run them at once: whose "
                "tokens these are is not known.",
                "Compile the model as a whole, or run it in one thread.",
            )

    def _take_over(self, stream: Stream) -> None:
        """What compiled code has left, of some block."""
        inserted, aside = self.traced.inserted, self.traced.aside
        self.traced.begin()
        self.check_alone("")
        stream.inserted.update(inserted)
        stream.aside = stream.aside if aside is None else aside

    def forget(self) -> None:
        super().forget()
        self.pause, self.paused_by = threading.Condition(), None
        self.mixes = False
        self.here = Here()
        self.aside: Any = WeakTensorKeyDictionary()
        self.known: Any = WeakTensorKeyDictionary()

    def know(self, whole: Tensor, opened: dict[Place, Inserted]) -> None:
        """What is among these tokens. (Not the others themselves: they would keep each other.)"""
        if not torch.compiler.is_compiling():
            self.known[whole] = list(opened.values())

    def cleared(self, output: Any) -> Any:
        """What a model gives, without what was put in: some read features inside their blocks."""
        leaves, spec = pytree.tree_flatten(output)
        if not any(isinstance(value, Tensor) and value in self.known for value in leaves):
            return output
        return pytree.tree_unflatten([self._own(value) for value in leaves], spec)

    def _own(self, value: Any) -> Any:
        opened = self.known.get(value) if isinstance(value, Tensor) else None
        return _without(value, opened, "") if opened else value


class Between:
    """One of several blocks in which tokens stay: they are put in before it, set aside behind it.

    inner     whether tokens come to it at all; to the first of them none do
    switches  of each operation whose tokens come, whether it is on
    """

    def __init__(self, streams: Streams, path: str, names: tuple[str, ...]) -> None:
        self.streams, self.path, self.names = streams, path, names
        self.switches: tuple[Callable[[], bool], ...] = ()
        self.inner = False
        self.here = Here()

    def on(self) -> bool:
        """Whether an operation is whose tokens come here."""
        return any(is_on() for is_on in self.switches)

    def leave(self, module: nn.Module, args: Any, *given: Any) -> Any:
        """Forward hook: what comes out are the model's own tokens."""
        if torch.compiler.is_compiling() and self.on() and not self.here.noted():
            return apart(self.leave, module, args, *given)
        stream = self.streams.mine()
        opened = stream.opened()
        if not opened or not self.on() or _in_reentrant_checkpoint():
            return None
        y, put = first_tensor(given[-1], self.path)
        own = _without(y, list(opened.values()), self.path)
        stream.aside = y
        self.streams.know(y, opened)
        if not torch.compiler.is_compiling():
            self.streams.aside[own] = SetAside(y, _version(own), opened)
        return put(own)

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Forward pre-hook: what was set aside is put in again."""
        if torch.compiler.is_compiling() and self.on() and not self._goes_on():
            return apart(self.enter, module, args, kwargs)
        stream, again = self.streams.mine(), is_recomputing()
        if not self.on() or not (again or (self.inner and stream.aside is not None)):
            return None
        x, put = input_of(args, kwargs or {}, self)
        found = None if torch.compiler.is_compiling() else self.streams.aside.get(x)
        if found is not None and found.version == _version(x):
            stream.inserted, stream.aside, whole = dict(found.inserted), None, found.whole
        elif again:
            return self._begun_anew(stream)
        else:
            whole = _rejoined(x, stream, self.path)
            if whole is not x:
                self.streams.know(whole, stream.opened())
        given = put(whole)
        return given[0] if kwargs is None else given

    def _goes_on(self) -> bool:
        """Whether compiled code goes on with what it left itself, which it then does from here."""
        if self.inner and not self.streams.here.noted():
            return False
        self.here.note()
        return True

    def _begun_anew(self, stream: Stream) -> None:
        """A checkpoint runs again from here, on what nobody was given between blocks."""
        if _in_reentrant_checkpoint():
            return
        stream.begin()
        if self.inner:
            raise GraftError(
                f"the tokens inserted before {self.path}",
                "a checkpoint runs again from here, on another tensor than the block before gave: "
                "which tokens were among it is not known any more.",
                "Checkpoint the block itself, checkpoint(block, x), or all of the blocks at once.",
            )


def _without(y: Tensor, opened: list[Inserted], path: str) -> Tensor:
    """The model's own tokens: what was put in last comes out first."""
    first, last = opened[0], opened[-1]
    alike = len({each.tokens for each in opened}) == 1
    if alike and first.total - first.new >= first.tokens.after:  # then they lie side by side
        together = last._replace(new=sum(each.new for each in opened))
        return first.tokens.take_out(y, together, path)
    for each in reversed(opened):
        y = each.tokens.take_out(y, each, path)
    return y


def _rejoined(x: Tensor, stream: Stream, path: str) -> Tensor:
    """What came, other than what was given on, with the tokens that were set aside."""
    y, stream.aside = stream.aside, None
    opened = stream.opened()
    pieces: list[Tensor] = []
    if y is None or x.dim() != y.dim():
        return x
    for each in reversed(list(opened.values())):
        first = min(each.tokens.after, each.total - each.new)
        pieces.append(each.tokens.rows(y)[:, first : first + each.new])
        y = each.tokens.take_out(y, each, path)
    for (place, each), piece in zip(opened.items(), reversed(pieces), strict=True):
        x = each.tokens.put_in(x, piece)
        stream.inserted[place] = each._replace(total=each.tokens.rows(x).shape[1])
    return x


def _version(x: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def is_recomputing() -> bool:
    """Whether this forward is part of a backward: a checkpoint runs its segment again."""
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def _in_checkpoint() -> bool:
    """Whether what is kept for backward is thrown away, and made again then."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "checkpoint" in str(getattr(hooks[0], "__qualname__", ""))


def _in_reentrant_checkpoint() -> bool:
    """Whether a reentrant checkpoint runs this, or runs it again.

    Only what it is given and gives has a gradient then: tokens are left among those.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and not is_recomputing()):
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in REENTRANT:
            return True
        frame = frame.f_back
    return False
