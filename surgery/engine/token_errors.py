"""A model's own error in the proof, which it does not raise otherwise: told as what it is.

It comes of tokens that were put in; or the model takes a path that cannot be looked into.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from ..errors import GraftError, SurgeryError
from .operation import Operation
from .raised import new_in, raised_by, told_of
from .reading import Reading

Run: TypeAlias = Callable[[], Any]


def ours(error: Exception, operation: Operation, run: Run) -> SurgeryError | None:
    """What to raise instead of an error in a forward; None where it comes without surgery too."""
    if isinstance(error, torch.OutOfMemoryError):
        return None
    if _runs_without_parts(operation, run):
        return _of_tokens(error, operation)
    try:
        with torch.no_grad():
            run()
    except SurgeryError as told:  # what the parts say, where the model comes to them
        return told
    except Exception:
        return None
    return GraftError(
        "apply(..., example=...)",
        f"{raised_by(error, operation.model[0])} takes a fused path with this example (nested "
        f"tensors), and none where it is looked into: {told_of(error)}",
        "Give an example without padding; or none, and the first forward tells what did not run.",
    )


def _of_tokens(error: Exception, operation: Operation) -> GraftError | None:
    """What fixes the number of tokens, where some were put in.

    (Tables of positions, relative or rotary; sizes that are kept as numbers; linears over tokens,
    as of Mixer and Linformer; windows.)
    """
    stream = operation.streams.mine()
    inserted = list(stream.opened().items()) or list(stream.inserted.items())[-1:]
    if not inserted:
        return None
    (_, path, _), last = inserted[-1]
    return GraftError(
        f"insert(...) at {path or 'the model'}",
        f"{last.total} tokens a sample come, {new_in(inserted)} of them inserted, and "
        f"{raised_by(error, operation.model[0])} is made for another number: "
        f"{told_of(error)}",
        "Use a method that adds no tokens.",
    )


def _runs_without_parts(operation: Operation, run: Run) -> bool:
    """Whether the model takes the example where parts are off."""
    operation.enabled = False
    try:
        # a mode keeps torch from paths that take other inputs
        with torch.no_grad(), Reading((), sys._getframe()):
            run()
    except Exception:
        return False
    finally:
        operation.enabled = True
    return True
