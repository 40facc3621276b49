"""What was done to a model, in a folder, and brought back into another, or the one that goes on.

A file for each operation, and `surgery.json`, which lists them: what `surgery.load` reads, too.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from .._files import write_whole
from ..engine.activity import activate
from ..engine.apply import operated
from ..engine.operation import operations
from .checkpoint import fill, load, save
from .hub import LIST, file_name, listed
from .reading import read


def write(model: nn.Module, folder: Path, *, has_base: bool = False, verify: bool = False) -> None:
    """Write each operation to a file of a folder; of the base, what they trained.

    has_base  whether the base is there, too; verify: as `save` takes it
    """
    done = operated(model, f'write(model, "{folder}")')
    folder.mkdir(parents=True, exist_ok=True)
    for operation in done:
        save(model, folder / file_name(operation.name), name=operation.name, verify=verify)
    order = json.dumps({"operations": [[op.name, op.strength] for op in done], "base": has_base})
    write_whole(folder / LIST, lambda half: half.write_text(order))


def bring_back(model: nn.Module, folder: Path, call: str = "") -> None:
    """Fill the operations of a model that a folder has; those that are not there are made.

    Parameters stay the objects that they are, and so does what an optimiser knows of them. Raises
    FileError where the model was operated otherwise.
    """
    strengths = listed(folder / LIST, call or f'bring_back(model, "{folder}")')
    present = {operation.name for operation in operations(model)}
    for i, name in enumerate(strengths):
        path = folder / file_name(name)
        if name in present:
            fill(model, read(path, name), name)
        else:
            if i:  # it was made on top of these, or at rest, as its file knows
                activate(model, [*strengths][:i])
            load(model, path, name=name)
    activate(model, strengths)


def is_here(folder: Path) -> bool:
    """Whether a folder is of `write`."""
    return (folder / LIST).is_file()
