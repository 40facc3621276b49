"""Folders of Hugging Face's: the base as they write it, and beside it what was done to it."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..engine.activity import activate
from ..engine.apply import operated
from ..engine.conditions import DISABLED, READING, check_state
from ..engine.owned import base_values
from ..errors import FileError
from ..structure.module_tree import ADDITIONS
from .checkpoint import load, save

FILE = "surgery.{}.safetensors"  # of an operation, by its name


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a model's base by its own `save_pretrained`, and each operation to a file beside it.

    The base is what it was before, as the model would be reverted, so that others may use the
    folder without what was added. Raises what `save` raises, and FileError for a model that has no
    `save_pretrained`.

    >>> save_pretrained(nn.Linear(2, 2), "folder")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    surgery.errors.OperationError: save_pretrained(model, "folder"): this Linear was never ...
    """
    call, own = f'save_pretrained(model, "{folder}")', getattr(model, "save_pretrained", None)
    done = operated(model, call)
    check_state(model, call, READING, DISABLED)
    if own is None:
        fact = f"a {type(model).__name__} has no save_pretrained of its own."
        raise FileError(call, fact, "surgery.save(model, path) writes what was added and trained.")
    before = base_values(done)
    base: dict[str, Tensor] = {
        key: before.get(id(tensor), tensor).detach()
        for key, tensor in model.state_dict(keep_vars=True).items()
        if f"{ADDITIONS}." not in key
    }
    target = Path(folder)
    own(target, state_dict=base)
    for operation in done:
        save(model, target / FILE.format(operation.name), name=operation.name)
    order = {"operations": [[op.name, op.strength] for op in done]}
    (target / "surgery.json").write_text(json.dumps(order))
    return target


def from_pretrained(
    folder: str | os.PathLike[str], *, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """A model of a folder that `save_pretrained` here wrote: base, operations, which are active.

    options  to the `from_pretrained` of the class that the folder's config names (transformers):
             dtype, device_map

    Raises FileError where the folder is none of these, and what `load` raises.

    >>> from_pretrained("nowhere")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    surgery.errors.FileError: from_pretrained("nowhere"): there is no surgery.json...
    """
    call, source = f'from_pretrained("{folder}")', Path(folder)
    if not (source / "surgery.json").is_file():
        fact = "there is no surgery.json in it, so nothing of surgery's."
        raise FileError(call, fact, "Write it by surgery.save_pretrained(model, folder).")
    try:
        operations = dict(json.loads((source / "surgery.json").read_text())["operations"])
        kind = json.loads((source / "config.json").read_text())["architectures"][0]
        build = getattr(importlib.import_module("transformers"), kind)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        fact = f"its config names no class of transformers ({error!s:.200})."
        raise FileError(call, fact, "Build the model, and surgery.load each file.") from error
    model: nn.Module = build.from_pretrained(source, **(options or {}))
    for name in operations:
        load(model, source / FILE.format(name), name=name)
        activate(model, None)
    return activate(model, operations)
