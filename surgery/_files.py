"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

from .errors import FileError


def check_folder(path: Path, call: str) -> None:
    """Raise FileError where the folder that a file is to lie in does not exist.

    call  what the user called, for the error
    """
    if not path.parent.is_dir():
        raise FileError(call, f"there is no folder {path.parent}.", "Create it first.")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside `path`, and put it there at once; on an error, nothing."""
    half = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(half)
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
