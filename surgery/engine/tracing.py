"""What compiled code keeps: whether it was left by the same piece of compiled code that asks.

Where blocks are compiled one by one, or a graph breaks, something else may have run between.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch._guards import TracingContext

from ..errors import GraftError

Method = TypeVar("Method", bound=Callable[..., Any])


def while_traced(method: Method) -> Method:
    """A method that torch.compile calls once, while it traces; of a module, with constants.

    (As torch.compiler.assume_constant_result, which would import torch's whole compiler. torch
    keeps what the method returns as a global of its name in the module of the model.)
    """
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


class Traced(nn.Module):
    """Whether a site, or its beginning, runs in compiled code, unseen but while it is traced.

    One for each, and keys without paths: or blocks that are alike would be compiled one by one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ran = False

    @while_traced
    def _surgery_traced(self) -> bool:
        self.ran = True
        return True


class Here(nn.Module):
    """Something that compiled code does, and whether it did it in the trace that asks."""

    def __init__(self) -> None:
        super().__init__()
        self.trace: Any = None

    def __reduce__(self) -> Any:
        return type(self), ()

    @while_traced
    def _surgery_note(self) -> bool:
        self.trace = _trace()
        return True

    @while_traced
    def _surgery_noted(self) -> bool:
        return self.trace is not None and self.trace == _trace()

    def note(self) -> None:
        """It is done now."""
        self._surgery_note()

    def check(self, path: str) -> None:
        """Raise GraftError where it was not done in this trace: torch then runs this uncompiled.

        (With fullgraph=True it cannot.)
        """
        if not self._surgery_noted():
            raise elsewhere(path)


def elsewhere(path: str) -> GraftError:
    """That compiled code would need what was left outside of it."""
    return GraftError(
        f"the graft at {path or 'the model'}",
        "it is compiled apart from blocks before it, whose tokens it needs.",
        "Compile the model as a whole, or without fullgraph=True.",
    )


def _trace() -> Any:
    context = TracingContext.try_get()
    return True if context is None else weakref.ref(context)
