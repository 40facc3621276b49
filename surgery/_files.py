"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from .errors import FileError

FORGOTTEN = 24 * 3600.0  # seconds after which a half-written file of another machine is litter


def check_folder(path: Path, call: str) -> None:
    """Raise FileError where no file can lie at `path`: there is no folder for it, or no room.

    call  what the user called, for the error
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileError(call, f"there is no folder {target.parent}.", "Create it first.")
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "no plain file"
        raise FileError(call, f"{path} is {kind}.", "Give the path of a file.")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside `path`, and put it there at once; on an error, nothing.

    Where `path` is a link, the file that it leads to is written. A file that is replaced keeps its
    permissions; a new one has those that new files have. All is on the disk when it returns.
    """
    target = Path(os.path.realpath(path))
    _sweep(target)
    half = target.with_name(f".{_stem(target)}.{_own_mark()}{uuid.uuid4().hex[16:]}")
    try:
        mode = _made(half)  # as the umask has it
        write(half)
        half.chmod(target.stat().st_mode & 0o7777 if target.exists() else mode)
        _flush(half)
        os.replace(half, target)
    finally:
        half.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        _flush(target.parent)


def _stem(target: Path) -> str:
    """What half-written files begin with: names have 255 bytes at most."""
    return (
        target.name
        if len(target.name.encode()) < 200
        else hashlib.sha256(target.name.encode()).hexdigest()
    )


def _made(half: Path) -> int:
    """Make an empty file; its permissions."""
    half.touch(mode=0o666, exist_ok=False)
    return half.stat().st_mode & 0o7777


def _flush(path: Path) -> None:
    """Have what the system keeps of a file, or of a folder's list, written to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# what killed runs leave ------------------------------------------------------------------------


def _own_mark() -> str:
    """Where this process runs, and its number: 16 hexadecimal digits."""
    return f"{_machine()}{os.getpid():08x}"


def _machine() -> str:
    """Tells machines apart, and containers, in which numbers of processes begin again."""
    try:
        numbered = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbered = ""
    return hashlib.sha256(f"{platform.node()}|{numbered}".encode()).hexdigest()[:8]


def _sweep(target: Path) -> None:
    """Remove the half-written files of runs that are no more; what cannot be removed stays."""
    pattern = re.compile(re.escape(f".{_stem(target)}.") + "([0-9a-f]{32})")
    for file in target.parent.glob(".*"):
        if (name := pattern.fullmatch(file.name)) and _is_litter(file, name[1]):
            with contextlib.suppress(OSError):
                file.unlink()


def _is_litter(half: Path, mark: str) -> bool:
    """Its writer runs no more; of one elsewhere nothing but the age of the file is known."""
    if mark.startswith(_machine()) and not _runs(int(mark[8:16], 16)):
        return True
    try:
        return time.time() - half.stat().st_mtime > FORGOTTEN
    except OSError:
        return False


def _runs(process: int) -> bool:
    """Whether there is a process of that number on this machine."""
    if os.name != "posix":  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True
