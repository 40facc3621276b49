"""Whose file it is, told by what is in it: PEFT's folder, adapters', a LoRA of an image model."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import FileError
from .adapter_hub import is_adapter_hub, load_adapters
from .foreign import read_json
from .hub import LIST, address
from .kohya import load_kohya
from .kohya_names import is_kohya
from .peft_reading import CONFIG, load_peft
from .reading import opened

Reader = Callable[..., Any]


def reader_of(path: str | os.PathLike[str], *, head: bool, **given: Any) -> Reader | None:
    """What reads a file, or folder, of another library; None for any other.

    Raises FileError where what is `given`, by names, is of our files alone.
    """
    call = f'load("{path}")'
    reader = None if address(path, call) else _reader(Path(path), call)
    if reader is load_adapters:
        reader = partial(load_adapters, head=head)
    else:
        given["head"] = not head
    if reader and (odd := [name for name, value in given.items() if value]):
        fact = f"{odd[0]}= is of files that surgery.save wrote, and this is none."
        raise FileError(call, fact, f"Leave {odd[0]}= out.")
    return reader


def _reader(path: Path, call: str) -> Reader | None:
    if os.path.isdir(path):
        if os.path.lexists(path / LIST) or not os.path.isfile(path / CONFIG):
            return None
        return load_adapters if is_adapter_hub(read_json(path / CONFIG, call)) else load_peft
    try:
        with opened(path, call) as file:
            ours = "surgery" in (file.metadata() or {})
            return load_kohya if not ours and is_kohya(file.keys()) else None
    except FileError:
        return None  # said by who reads it
