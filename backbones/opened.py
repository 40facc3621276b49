"""What a file of PyTorch holds, read without running any code that it names."""

from __future__ import annotations

import re
from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch.serialization import get_safe_globals, get_unsafe_globals_in_checkpoint, safe_globals

NUMBERS = "?bBhHiIlLqQefdgFDGSU"  # NumPy's kinds of plain numbers and text: no objects, no records
SAID = (r"GLOBAL (\S+) was not an allowed global", r"allowlisted .*, but got <class '(\S+)'>")


def opened(rule: str, path: str | PathLike[str]) -> Any:
    """The contents of a file of torch.save or a .safetensors: tensors, plain values, and numbers
    and arrays of NumPy, which scripts write as their metrics. On the CPU.

    rule   who asks, for the message

    Raises OSError as opening does; ValueError where it is damaged, or names what would run as code.
    """
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(path)
        return _plain(path)
    except OSError:
        raise  # it names the path
    except Exception as error:  # what is no file of PyTorch, or half of one, raises nearly any
        raise ValueError(
            f"{rule}: refused at {type(error).__name__}, {_why(path, error)}"
        ) from error


def _plain(path: str | PathLike[str]) -> Any:
    """As torch.load reads it; where NumPy stands in the way, with NumPy's numbers allowed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if not any(name.startswith("numpy.") for name in _names(path, error)):
            raise
    known = {name for _, name in map(_named, get_safe_globals())}  # or they would be taken off
    with safe_globals([each for each in _numpy() if each[1] not in known]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _numpy() -> list[tuple[Callable[..., Any], str]]:
    """What NumPy's numbers and arrays are pickled as, by the names of NumPy 1 and 2.

    The kinds are classes of their own from NumPy 1.25 on; of objects and records there are none
    here, so that those stay refused.
    """
    core = np._core if hasattr(np, "_core") else np.core
    makers: list[tuple[Callable[..., Any], str]] = [(np.dtype, "numpy.dtype")]
    makers += [(np.ndarray, "numpy.ndarray"), (_empty, "builtins.bytes"), (_empty, "bytes")]
    for package in ("numpy._core", "numpy.core"):
        makers += [
            (core.multiarray.scalar, f"{package}.multiarray.scalar"),
            (core.multiarray._reconstruct, f"{package}.multiarray._reconstruct"),
            (core.numeric._frombuffer, f"{package}.numeric._frombuffer"),
        ]
    kinds = {type(np.dtype(code)) for code in [*NUMBERS, "M8[s]", "m8[s]"]}
    makers += [_named(kind) for kind in kinds if kind is not np.dtype]
    return makers


def _empty() -> bytes:
    """What an empty text is pickled as; bytes(n) itself would take memory as a file says."""
    return b""


def _named(value: Any) -> tuple[Callable[..., Any], str]:
    """Something that is held safe, with the name that files call it by."""
    if isinstance(value, tuple):
        return value
    return value, f"{value.__module__}.{value.__qualname__}"


def _names(path: str | PathLike[str], error: Exception) -> list[str]:
    """What a file names beyond tensors and plain values; nothing where it cannot be told."""
    said = [name for pattern in SAID for name in re.findall(pattern, str(error))]
    try:
        return sorted(get_unsafe_globals_in_checkpoint(str(path))) or said
    except Exception:  # a file of the older form, or a damaged one
        return said


def _why(path: str | PathLike[str], error: Exception) -> str:
    names = [] if str(path).endswith(".safetensors") else _names(path, error)
    foreign = [name for name in names if not name.startswith("numpy.")]
    if names:
        what = ", ".join(foreign) or "NumPy's arrays of objects or records"
        return (
            f"for it holds more than tensors and plain values: {what}. If you trust its source, "
            "load it once with weights_only=False and save its tensors anew."
        )
    return "for it is damaged (cut short, perhaps), or no file of PyTorch. Get it again."
