"""Whose file it is, told by what is in it: PEFT's folder, a LoRA of an image model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import FileError
from .kohya import load_kohya
from .kohya_names import is_kohya
from .peft_reading import CONFIG, load_peft

Reader = Callable[..., Any]


def reader_of(path: Path, **given: Any) -> Reader | None:
    """What reads a file, or folder, of another library; None for any other."""
    reader = _reader(path)
    if reader and (odd := [name for name, value in given.items() if value]):
        fact = f"{odd[0]}= is of files that surgery.save wrote, and this is none."
        raise FileError(f'load("{path}")', fact, f"Leave {odd[0]}= out.")
    return reader


def _reader(path: Path) -> Reader | None:
    if path.is_dir():
        return load_peft if (path / CONFIG).is_file() else None
    try:
        with safe_open(path, framework="pt") as file:
            ours = "surgery" in (file.metadata() or {})
            return load_kohya if not ours and is_kohya(file.keys()) else None
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return None  # said by who reads it
