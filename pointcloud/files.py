"""Published files: pickles of arrays (no code of theirs runs), h5 and lists; what is wrong of them.

A reader opens a file within `parsing` and returns its arrays through `checked`: whatever is not as
it was published is a ValueError that names the file.
"""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .augment import normalize as unit_sphere
from .clouds import Clouds

# What numpy (1 and 2) and Python write for arrays, by module and name; all build data only.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.*.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy.*.multiarray", "scalar"): np.float32(0).__reduce__()[0],
    ("numpy.*.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],
    ("_codecs", "encode"): codecs.encode,
}
_REMEDY = "Get it from its authors again, or delete it where it can be made anew."


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
    with (
        parsing(path, "arrays alone in a pickle, of which nothing is executed"),
        path.open("rb") as f,
    ):
        return _Arrays(f).load()


@contextmanager
def parsing(path: Path, layout: str) -> Iterator[None]:
    """Whatever goes wrong with a file inside, by its path and the layout it should have."""
    try:
        yield
    except Exception as error:  # of pickle, zip, h5 and numpy: garbage raises nearly any
        kind = type(error).__name__
        fact = f"the layout is {layout}; this one was refused at {kind}: {error}"
        raise ValueError(f"{path}: {fact}. {_REMEDY}") from error


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
    with parsing(path, "HDF5 with the keys data and label"), h5py.File(path, "r") as file:
        arrays = {key: file[key][()] for key in ("data", "label", "mask") if key in file}
        if absent := {"data", "label"} - set(arrays):
            raise ValueError(f"it lacks {', '.join(sorted(absent))}")
    return arrays


def stacked(clouds: Sequence[Any]) -> Any:
    """x, y, z (n, p, 3) of arrays (p, 3 or more) of one size."""
    if len(sizes := {len(cloud) for cloud in clouds}) > 1:
        raise ValueError(f"clouds are of sizes {sorted(sizes)}")
    return np.stack([np.asarray(cloud[:, :3], np.float32) for cloud in clouds])


def checked(
    path: Path,
    x: Any,
    labels: Any,
    names: tuple[str, ...],
    parts: Any = None,
    *,
    points: int | None = None,
) -> Clouds:
    """Clouds of the arrays of a file: x (n, p, 3), labels (n,) or (n, 1), parts (n, p) or None.

    Raises ValueError on other shapes, a p other than `points`, labels that are no whole numbers
    of 0 to len(names) - 1, and points that are not finite.
    """
    with parsing(path, "arrays of numbers"):
        x, labels = np.asarray(x, np.float32), np.asarray(labels)
    if fault := next(_faults(x, labels, len(names), parts, points), None):
        raise ValueError(f"{path}: {fault}. {_REMEDY}")
    whole = (None if a is None else torch.from_numpy(a.astype(np.int64)) for a in (labels, parts))
    labels, parts = whole
    return Clouds(torch.from_numpy(x), labels.flatten(), names, parts)


def _faults(x: Any, labels: Any, classes: int, parts: Any, points: int | None) -> Iterator[str]:
    """What is wrong, in the order in which it can be asked."""
    n, p = (*x.shape, 0, 0)[:2]
    if x.shape != (n, points or p, 3) or not x.size:
        yield f"clouds are {x.shape}, not (n > 0, {points or 'p > 0'}, 3)"
    if labels.shape not in ((n,), (n, 1)) or labels.dtype.kind not in "iu":
        yield f"labels are {labels.dtype} {labels.shape}, no whole number for each of {n} clouds"
    if labels.min() < 0 or labels.max() >= classes:
        yield f"labels go from {labels.min()} to {labels.max()}, of {classes} classes"
    if parts is not None and (parts.shape != (n, p) or parts.dtype.kind not in "iub"):
        yield f"the mask is {parts.dtype} {parts.shape}, no whole numbers {(n, p)}"
    if not np.isfinite([x.min(), x.max()]).all():
        yield "a point is not finite"


def normalized(x: Tensor) -> Tensor:
    """`unit_sphere` in place and in pieces: the published ModelNet40 is a gigabyte."""
    for start in range(0, len(x), 256):
        x[start : start + 256] = unit_sphere(x[start : start + 256])
    return x
