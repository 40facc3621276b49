"""Files that appear whole or not at all: permissions, links, litter, a full disk."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch import nn

import surgery
from surgery import _files, at, unfreeze
from surgery._files import write_whole
from surgery.parts.binary import binary_adapter
from surgery.state import packed


def saved(path: Path) -> Path:
    return surgery.save(surgery.apply(nn.Sequential(nn.Linear(4, 4)), at("0", unfreeze)), path)


def saved_packed(path: Path) -> Path:
    rule = at("0", surgery.parallel(binary_adapter(rank=4)))
    return packed.save(surgery.apply(nn.Sequential(nn.Linear(8, 8)), rule), path)


def written(path: Path) -> Path:
    write_whole(path, lambda half: half.write_text("new"))
    return path


WRITERS = pytest.mark.parametrize("write", [saved, saved_packed, written])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def umask(bits: int) -> Iterator[None]:
    was = os.umask(bits)
    try:
        yield
    finally:
        os.umask(was)


@WRITERS
@pytest.mark.parametrize("bits", [0o022, 0o002, 0o077, 0])
def test_a_new_file_has_the_permissions_of_new_files(write, bits, tmp_path):
    with umask(bits):
        assert mode(write(tmp_path / "x")) == 0o666 & ~bits


@WRITERS
def test_a_file_that_is_replaced_keeps_its_permissions(write, tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o640)
    with umask(0o077):
        assert mode(write(path)) == 0o640
    assert path.read_bytes() != b"old"


@WRITERS
def test_the_file_that_a_link_leads_to_is_written(write, tmp_path):
    (tmp_path / "far").mkdir()
    real, link = tmp_path / "far" / "real", tmp_path / "link"
    for before in ("old", None):  # None: it leads to nothing yet
        real.unlink(missing_ok=True)
        if before:
            real.write_text(before)
        link.unlink(missing_ok=True)
        link.symlink_to("far/real")
        write(link)
        assert link.is_symlink()
        assert real.read_bytes() not in (b"", b"old")
        assert os.listdir(real.parent) == ["real"]


def test_data_and_folder_are_on_the_disk_before_it_returns(tmp_path, monkeypatch):
    done: list[str] = []
    flush, replace = os.fsync, os.replace
    at_handle = lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}"))  # noqa: E731
    monkeypatch.setattr(
        os, "fsync", lambda h: (done.append("dir" if at_handle(h).is_dir() else "file"), flush(h))
    )
    monkeypatch.setattr(os, "replace", lambda *a: (done.append("replace"), replace(*a)))
    written(tmp_path / "x")
    assert done == ["file", "replace", "dir"]


# litter -----------------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from surgery._files import write_whole
def write(half):
    half.write_text("half")
    os.kill(os.getpid(), 9)
write_whole(Path(sys.argv[1]), write)
"""


def test_what_a_killed_run_left_is_swept(tmp_path):
    path = tmp_path / "x.safetensors"
    environment = {**os.environ, "PYTHONPATH": str(Path(surgery.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", KILLED, str(path)], env=environment, check=False)
    assert len(os.listdir(tmp_path)) == 1
    saved(path)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_what_is_not_known_to_be_litter_stays(tmp_path):
    path, old = tmp_path / "x", time.time() - 2 * _files.FORGOTTEN
    mine = f".x.{_files._machine()}{os.getpid():08x}{'0' * 16}"  # this process writes it now
    fresh, forgotten = f".x.{'a' * 32}", f".x.{'b' * 32}"  # of another machine
    others = [".x.safetensors.tmp", ".y." + "c" * 32, ".x." + "c" * 31, "x." + "c" * 32]
    for name in (mine, fresh, forgotten, *others):
        (tmp_path / name).write_text("half")
    for name in (forgotten, *others):
        os.utime(tmp_path / name, (old, old))
    written(path)
    assert {*os.listdir(tmp_path)} == {"x", mine, fresh, *others}


# what cannot be written -------------------------------------------------------------------------


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may have more than ten bytes."""
    size, was = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, size[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
        signal.signal(signal.SIGXFSZ, was)


@pytest.mark.parametrize("write", [saved, saved_packed])
def test_a_full_disk_leaves_the_old_file(write, tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with full_disk():
        try:
            write(path)
            told = None
        except (surgery.FileError, OSError) as error:
            told = str(error)
    assert told is not None
    assert "large" in told
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


@WRITERS
def test_a_folder_and_a_pipe_are_no_files(write, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    if write is written:
        pytest.skip("it is asked to before")
    for name, fact in (("pipe", "no plain file"), ("folder", "a folder")):
        with pytest.raises(surgery.FileError, match=fact):
            write(tmp_path / name)
    assert {*os.listdir(tmp_path)} == {"pipe", "folder"}
