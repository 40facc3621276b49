"""What lets a proof see whether a model counts tokens among which others were put.

Tokens may say that they are as many as before, there may be more of them than there are, and what
comes of them may be what came of them before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

SHAPE: Any = Tensor.shape
ASKING = {SHAPE.__get__, Tensor.size}


class Counted(Tensor):
    """Tokens that say that they have another shape."""

    said: torch.Size

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKING and isinstance(args[0], Counted):
            said = args[0].said
            dim = args[1] if len(args) > 1 else (kwargs or {}).get("dim")
            return said if dim is None else said[dim]
        if any(not issubclass(Counted, kind) for kind in types):
            return NotImplemented  # what else it meets has notes to carry on
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def counted(whole: Tensor, before: Tensor) -> Tensor:
    """The whole, which says that it is as many as there were before."""
    if type(whole) is not Tensor or whole.shape == before.shape:
        return whole
    made = whole.as_subclass(Counted)
    made.said = before.shape
    return made


def recounted(values: Any) -> Any:
    """The same arguments, which say what they are."""
    leaves, spec = pytree.tree_flatten(values)
    if not any(isinstance(v, Counted) for v in leaves):
        return values
    plain = [v.as_subclass(Tensor) if isinstance(v, Counted) else v for v in leaves]
    return pytree.tree_unflatten(plain, spec)


class Replay:
    """What came out at the ends of stretches in one forward, and comes out again in the next."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.given: Iterator[Tensor] | None = None

    def repeat(self) -> None:
        """From now on give what was seen."""
        self.given = iter(self.values)

    def at_end(self, y: Tensor) -> Tensor:
        """What is to come out where y does."""
        if self.given is not None:
            return next(self.given)
        self.values.append(y.clone())
        return y
