"""What is read of a file that has more than tensors in it, and what is refused by its name."""

from __future__ import annotations

import argparse
import fractions
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.serialization import get_safe_globals, safe_globals

from backbones.opened import opened

KINDS = [*"?bBhHiIlLqQefdgFDGSU", "M8[s]", "m8[s]"]
BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older form"])


def written(tmp_path: Path, value: Any, zipped: bool = True) -> Path:
    file = tmp_path / "a.pth"
    held = {"x": torch.ones(2), "value": value}
    torch.save(held, file, _use_new_zipfile_serialization=zipped)
    return file


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_and_arrays_of_every_kind_are_read(tmp_path: Path, kind: str, zipped: bool) -> None:
    numbers = np.zeros(3, kind)
    file = written(tmp_path, {"one": numbers[0], "all": numbers, "kind": numbers.dtype}, zipped)
    value = opened("it", file)["value"]
    assert value["one"] == numbers[0]
    assert value["one"].dtype.kind == numbers.dtype.kind
    assert np.array_equal(value["all"], numbers)
    assert value["kind"] == numbers.dtype


@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
def test_the_names_of_both_numpys_are_known(tmp_path: Path, package: str) -> None:
    source = written(tmp_path, [np.float32(91.2), np.arange(3)])
    file = tmp_path / "other.pth"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"numpy._core", package.encode()))
    score, seen = opened("it", file)["value"]
    assert score == np.float32(91.2)
    assert seen.tolist() == [0, 1, 2]


def test_what_is_held_safe_elsewhere_stays_as_it_was(tmp_path: Path) -> None:
    before = list(get_safe_globals())
    opened("it", written(tmp_path, np.float64(1.0)))
    assert set(get_safe_globals()) == set(before)
    with safe_globals([np.dtype, np._core.multiarray.scalar]):
        mine = set(get_safe_globals())
        opened("it", written(tmp_path, np.float64(1.0)))
        assert set(get_safe_globals()) == mine


@BOTH
@pytest.mark.parametrize(
    ("value", "told"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        ([np.float64(1.0), argparse.Namespace(lr=1)], "values: argparse.Namespace"),
        (fractions.Fraction(1, 2), "fractions.Fraction"),
        (np.array([argparse.Namespace()]), "argparse.Namespace"),
        (np.array([None]), "NumPy's arrays of objects or records"),
        (np.zeros(2, [("a", "i4"), ("b", "f4")]), "NumPy's arrays of objects or records"),
    ],
    ids=["namespace", "beside a number", "fraction", "in an array", "objects", "records"],
)
def test_what_stands_in_the_way_is_named(
    tmp_path: Path, value: Any, told: str, zipped: bool
) -> None:
    if not zipped and isinstance(value, (list, np.ndarray)):
        told = "more than tensors and plain values"  # it says what it met first
    with pytest.raises(ValueError, match=told) as error:
        opened("it", written(tmp_path, value, zipped))
    assert "damaged" not in str(error.value)


@BOTH
@pytest.mark.parametrize("left", [0, 5, 100, 0.5, -1])
def test_a_damaged_file_is_called_damaged_and_is_not_to_be_trusted(
    tmp_path: Path, left: float, zipped: bool
) -> None:
    file = written(tmp_path, np.float64(1.0), zipped)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * left) if 0 < left < 1 else int(left)])
    with pytest.raises(ValueError, match="damaged") as error:
        opened("it", file)
    assert "weights_only" not in str(error.value)


def test_bytes_that_were_flipped_are_called_damaged(tmp_path: Path) -> None:
    file = written(tmp_path, 1.0)
    whole = bytearray(file.read_bytes())
    middle = whole.index(b"data.pkl") + 80
    whole[middle : middle + 40] = bytes(40)
    file.write_bytes(whole)
    with pytest.raises(ValueError, match="damaged"):
        opened("it", file)
