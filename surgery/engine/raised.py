"""An error of the model while others' tokens are among its own: where it comes from, in words."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import torch
from torch import nn

from ..errors import SurgeryError
from ..structure.module_tree import ADDITIONS
from .streams import Inserted, Stream


def note_tokens(stream: Stream, model: nn.Module) -> None:
    """Add to an error of the model, which goes on its way, that tokens are among its own.

    Without an example nothing tells before that a model fixes their number.
    """
    error = sys.exc_info()[1]
    inserted = [(place, each) for place, each in stream.inserted.items() if each.open or each.kept]
    ours = isinstance(error, (SurgeryError, torch.OutOfMemoryError))
    if not inserted or ours or not isinstance(error, Exception):
        return
    (_, path, _), last = inserted[-1]
    note = (
        f"insert(...) at {path or 'the model'}: {last.total} tokens a sample came, "
        f"{new_in(inserted)} of them inserted, when {raised_by(error, model)} raised this; it may "
        "be made for another number. Use a method that adds no tokens; apply(..., example=inputs) "
        "tells at once."
    )
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        error.args = (f"{error}\n{note}", *error.args[1:])


def new_in(inserted: list[tuple[Any, Inserted]]) -> int:
    """How many tokens were put in."""
    return sum(each.new for _, each in inserted)


def told_of(error: Exception) -> str:
    """An error in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.200}"


def raised_by(error: Exception, model: nn.Module) -> str:
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
