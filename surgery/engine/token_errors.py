"""A model's own error, raised for the tokens that were put in: told as what it is, and where."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import GraftError
from ..structure.module_tree import ADDITIONS
from .operation import Operation
from .reading import Reading
from .streams import Inserted


def because_of_tokens(
    error: Exception, operation: Operation, run: Callable[[], Any]
) -> GraftError | None:
    """What to raise instead of an error in a forward; None where it comes without tokens too.

    (Tables of positions, relative or rotary; sizes that are kept as numbers; linears over tokens,
    as of Mixer and Linformer; windows.)
    """
    stream = operation.streams.mine()
    inserted = list((stream.opened() or stream.inserted).items())
    if (
        not inserted
        or isinstance(error, torch.OutOfMemoryError)
        or not _runs_without(operation, run)
    ):
        return None
    (_, path, _), last = inserted[-1]
    told = " ".join(str(error).split())
    return GraftError(
        f"insert(...) at {path or 'the model'}",
        f"{last.total} tokens a sample come, {_new(inserted)} of them inserted, and "
        f"{_raised_by(error, operation.model[0])} is made for another number: "
        f"{type(error).__name__}: {told:.200}",
        "Use a method that adds no tokens.",
    )


def _new(inserted: list[tuple[Any, Inserted]]) -> int:
    return sum(each.new for _, each in inserted)


def _runs_without(operation: Operation, run: Callable[[], Any]) -> bool:
    """Whether the model takes the example where parts are off."""
    operation.enabled = False
    try:
        with torch.no_grad(), Reading(()):  # which keeps torch from paths that take other inputs
            run()
    except Exception:
        return False
    finally:
        operation.enabled = True
    return True


def _raised_by(error: Exception, model: nn.Module) -> str:
    """The innermost module of the model that ran when an error was raised."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = model
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        module = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        path = paths.get(id(module), ADDITIONS) if isinstance(module, nn.Module) else ADDITIONS
        if isinstance(module, nn.Module) and path.split(".")[0] != ADDITIONS:
            found = module
    return f"{paths[id(found)] or 'the model'} ({type(found).__name__})"
