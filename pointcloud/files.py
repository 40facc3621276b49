"""Published files: pickles of arrays (no code of theirs runs), h5 and lists; and their errors."""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .augment import normalize as unit_sphere

# What numpy (1 and 2) and Python write for arrays, by module and name; all build data only.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.*.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy.*.multiarray", "scalar"): np.float32(0).__reduce__()[0],
    ("numpy.*.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],
    ("_codecs", "encode"): codecs.encode,
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        general = module.replace("numpy._core.", "numpy.*.").replace("numpy.core.", "numpy.*.")
        if (general, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return _ALLOWED[general, name]


def read_arrays(path: Path) -> Any:
    """Lists, dicts, tuples, numbers and numpy arrays from a pickle; nothing in it is executed.

    Raises ValueError where the pickle asks for anything but numpy's own reconstructors, or is
    no pickle.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "clouds.pkl"
    ...     _ = file.write_bytes(pickle.dumps([np.zeros((2, 3))]))
    ...     read_arrays(file)[0].shape
    (2, 3)
    """
    try:
        with path.open("rb") as file:
            return _Arrays(file).load()
    except (pickle.UnpicklingError, EOFError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path}: a pickle of the published layout holds numpy arrays alone; this one was "
            f"refused at {error} and nothing of it was executed. Get the file from its authors "
            "again, or delete it where it can be made anew."
        ) from error


def missing(rule: str, path: Path, layout: str, ask: str) -> NoReturn:
    raise FileNotFoundError(
        f"{rule}: there is no {path}. The layout under `root` is {layout}. Give the folder that "
        f"holds it as root; there is no downloader: {ask}."
    )


def lines(rule: str, path: Path, layout: str, ask: str) -> list[str]:
    if not path.is_file():
        missing(rule, path, layout, ask)
    return path.read_text().split()


def h5(path: Path) -> dict[str, Any]:
    """The arrays of a file, by key; `data` and `label` are among them."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path}: h5py reads it and is missing. pip install h5py.") from error
    with h5py.File(path, "r") as file:
        arrays = {key: file[key][()] for key in ("data", "label", "mask") if key in file}
    if absent := {"data", "label"} - set(arrays):
        raise ValueError(
            f"{path}: the published layout has the keys data and label; it lacks "
            f"{', '.join(sorted(absent))}. Give the file as it was published."
        )
    return arrays


def stacked(path: Path, clouds: Sequence[Any], labels: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """x, y, z (n, p, 3) of arrays (p, 3 or more) and labels (n,) of numbers or (1,)."""
    sizes = {len(cloud) for cloud in clouds}
    if len(sizes) != 1 or len(clouds) != len(labels):
        raise ValueError(
            f"{path}: the published layout has clouds of one size, each with a label; here are "
            f"{len(clouds)} clouds of sizes {sorted(sizes)}, {len(labels)} labels. Delete it, to "
            "make it anew, or get it again."
        )
    x = torch.from_numpy(np.stack([np.asarray(cloud[:, :3], np.float32) for cloud in clouds]))
    return x, torch.tensor([int(np.asarray(label).item()) for label in labels])


def normalized(x: Tensor) -> Tensor:
    """`unit_sphere` in place and in pieces: the published ModelNet40 is a gigabyte."""
    for start in range(0, len(x), 256):
        x[start : start + 256] = unit_sphere(x[start : start + 256])
    return x
