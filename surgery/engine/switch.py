"""What all sites of one operation obey, and what they let it know: that they run, and where."""

from __future__ import annotations

import sys
from types import FrameType
from typing import TypeAlias

import torch
import torch.fx
from torch import nn

from ..errors import GraftError
from ..rules import routing
from .features import OPERATE_ON_THE_GRAPH
from .passes import Passes
from .streams import Streams
from .tracing import CALL, Traced

Balance: TypeAlias = "routing.Coefficient | None"


class Switch(nn.Module):
    """What all sites of one operation obey: whether parts run, and who adds the balance loss.

    strength  how much of the change that it makes is made; 0: it is not active
    is_mixed  rows of a batch are several operations', for a while
    has_rows  some of them are its own
    merged    the parts are merged into the base, which answers for them
    passes    what forwards keep
    streams   the tokens that they put in, of all operations on the model
    seen      the marks of all that ever ran, but in compiled code
    undone    all is taken off: what others still hold of it does nothing
    """

    def __init__(self, name: str, balance: Balance) -> None:
        super().__init__()
        self.name, self.balance = name, balance
        self.enabled, self.merged, self.undone = True, False, False
        self.strength, self.is_mixed, self.has_rows = 1.0, False, False
        self.passes, self.streams = Passes(), Streams()
        self.seen: set[str] = set()

    def is_on(self) -> bool:
        """Whether parts run."""
        return self.enabled and bool(self.strength) and not self.merged and not self.undone

    def mark(self, mark: str, traced: Traced) -> None:
        """Something of that mark runs now."""
        if torch.compiler.is_dynamo_compiling():
            traced._surgery_traced()
            return
        kept = self.passes.mine()
        if not kept.whole and (not kept.ran or mark in kept.ran):  # a part of the model is run
            kept.ran.clear()
            self._check_graph(mark)
        kept.ran.add(mark)
        self.seen.add(mark)

    def _check_graph(self, mark: str) -> None:
        """Graphs of torch.fx run modules of a model, hooks and all, and do not hold its parts."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            graph = frame.f_locals["self"] if frame.f_code is CALL else None
            if isinstance(graph, torch.fx.GraphModule) and self not in set(graph.modules()):
                fact = (
                    "it runs in a graph of torch.fx that does not hold the parts: they would be in "
                    "nobody's parameters() and state_dict()."
                )
                raise GraftError(f"the graft at {mark}", fact, OPERATE_ON_THE_GRAPH)
            frame = frame.f_back
