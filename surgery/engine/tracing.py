"""What runs: calls of modules, and the piece of compiled code that asks, which keeps things.

Where blocks are compiled one by one, or a graph breaks, something else may have run between.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import nn
from torch._guards import TracingContext

from ..structure.module_tree import ADDITIONS

CALL = nn.Module._call_impl.__code__
COMPILED = os.path.join("_dynamo", "eval_frame.py")  # whose frames run what torch.compile gave
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 cannot tell
Method = TypeVar("Method", bound=Callable[..., Any])


def is_in_call(module: nn.Module, thread: int) -> bool:
    """Whether a thread is in a call of a module, which may end without a hook: interrupted."""
    return _call_in(sys._current_frames().get(thread), module) is not None


def call_of(module: nn.Module) -> FrameType | None:
    """The frame of the call of a module that this thread is in."""
    return _call_in(sys._getframe(1), module)


def _call_in(frame: FrameType | None, module: nn.Module) -> FrameType | None:
    while frame is not None:
        if frame.f_code is CALL and frame.f_locals.get("self") is module:
            return frame
        frame = frame.f_back
    return None


def while_traced(method: Method) -> Method:
    """A method that torch.compile calls once, while it traces; of a module, with constants.

    (As torch.compiler.assume_constant_result, which would import torch's whole compiler. torch
    keeps what the method returns as a global of its name in the module of the model.)
    """
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method


class Traced(nn.Module):
    """Whether a site, or its beginning, runs in compiled code, unseen but while it is traced.

    now     since a forward was last begun to be traced
    inside  in a forward of the model that is not compiled as a whole

    One for each, and keys without paths: or blocks that are alike would be compiled one by one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ran, self.now, self.inside = False, False, False

    @while_traced
    def _surgery_traced(self) -> bool:
        self.ran = self.now = True
        self.inside |= _is_inside()
        return True


def _is_inside() -> bool:
    """Whether torch.compile was given less than the operated model, which Python itself calls."""
    frame: FrameType | None = sys._getframe(1)
    compiled = False
    while frame is not None:
        compiled = compiled or frame.f_code.co_filename.endswith(COMPILED)
        module = frame.f_locals.get("self") if frame.f_code is CALL else None
        if isinstance(module, nn.Module) and ADDITIONS in {**module._modules, **vars(module)}:
            return compiled
        frame = frame.f_back
    return False


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

    def noted(self) -> bool:
        """Whether it was done in the trace that asks."""
        return self._surgery_noted()


def apart(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What it gives, uncompiled: torch.compile breaks its graph here.

    (As torch.compiler.disable, which would import torch's whole compiler.)
    """
    import torch._dynamo

    return torch._dynamo.disable(function)(*args, **kwargs)  # type: ignore[no-untyped-call]


apart._torchdynamo_disable = True  # type: ignore[attr-defined]
apart._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "surgery puts tokens in here, or hears a part, and what it goes on with was left outside of "
    "this compiled code, by other blocks: compile the model as a whole, or without fullgraph=True"
)


def _trace() -> Any:
    context = TracingContext.try_get()
    return True if context is None else weakref.ref(context)
