"""Whose file it is, told by what is in it: PEFT's folder, adapters', a LoRA of an image model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import FileError
from .adapter_hub import is_adapter_hub, load_adapters
from .foreign import read_json
from .kohya import load_kohya
from .kohya_names import is_kohya
from .peft_reading import CONFIG, load_peft

Reader = Callable[..., Any]


def reader_of(path: Path, *, head: bool, **given: Any) -> Reader | None:
    """What reads a file, or folder, of another library; None for any other.

    Raises FileError where what is `given`, by names, is of our files alone.
    """
    reader = _reader(path)
    if reader is load_adapters:
        reader = partial(load_adapters, head=head)
    else:
        given["head"] = not head
    if reader and (odd := [name for name, value in given.items() if value]):
        fact = f"{odd[0]}= is of files that surgery.save wrote, and this is none."
        raise FileError(f'load("{path}")', fact, f"Leave {odd[0]}= out.")
    return reader


def _reader(path: Path) -> Reader | None:
    if path.is_dir():
        if not (path / CONFIG).is_file():
            return None
        hub = is_adapter_hub(read_json(path / CONFIG, f'load("{path}")'))
        return load_adapters if hub else load_peft
    try:
        with safe_open(path, framework="pt") as file:
            ours = "surgery" in (file.metadata() or {})
            return load_kohya if not ours and is_kohya(file.keys()) else None
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return None  # said by who reads it
