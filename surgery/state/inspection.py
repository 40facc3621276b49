"""What a file holds, told without a model and without its tensors."""

from __future__ import annotations

import os
from pathlib import Path

from .._table import Table
from ..engine.summary import places
from .reading import BASE, PARTS, read_header


def inspect(path: str | os.PathLike[str]) -> Table:
    """What is in a file of `save`: its rules and where they stood, its tensors; none is loaded.

    Raises FileError where it is no such file.

    >>> from surgery import apply, at, lora, save
    >>> from torch import nn
    >>> import tempfile
    >>> model = apply(nn.Sequential(nn.Linear(8, 8)), at("0", lora(rank=2)))
    >>> print(inspect(save(model, tempfile.mkdtemp() + "/a.safetensors")).notes[0])
    parts 32 numbers in 2 tensors, of the base 0 in 0; float32
    """
    about, shapes = read_header(path)
    rows: list[tuple[object, ...]] = list(
        zip(about["text"], map(places, about["sites"]), strict=True)
    )
    count = {
        word: [s.numbers for key, s in shapes.items() if key.startswith(word)]
        for word in (PARTS, BASE)
    }
    kinds = ", ".join(
        sorted({str(s.dtype or "unknown").removeprefix("torch.") for s in shapes.values()})
    )
    notes = [
        f"parts {sum(count[PARTS]):,} numbers in {len(count[PARTS])} tensors, of the base "
        f"{sum(count[BASE]):,} in {len(count[BASE])}; {kinds}",
        f"seed {about['seed']}; format {about['format']}",
    ]
    if keys := about.get("beyond_rules"):
        notes.append(f"trained without a rule: {', '.join(keys)}")
    return Table(f"{Path(path).name}", ("rule", "where it stood"), rows, notes)
