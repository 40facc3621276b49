"""Runs of an example that are killed (-9) at a random step, and gone on with: python killed.py"""

from __future__ import annotations

import functools
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery


def run(work: Callable[[], None], processes: int = 1) -> set[int]:
    """How processes of their own end that do some work: 0, or the signal that killed them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_child(work, rank, processes, port) for rank in range(processes)]
    return {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}


def _child(work: Callable[[], None], rank: int, processes: int, port: int) -> int:
    if child := os.fork():
        return child
    try:
        torch.set_num_threads(1)
        if processes > 1:
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ |= {key: str(value) for key, value in told.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(processes)}
        work()
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def dying(owner: Any, name: str, count: int) -> None:
    """Have the process killed as a function is called for the count-th time, half done or not."""
    own, calls = getattr(owner, name), iter(range(1, count))

    @functools.wraps(own)  # whose arguments a Trainer reads
    def counted(*args: Any, **named: Any) -> Any:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*args, **named)

    setattr(owner, name, counted)


def compare(
    train: Callable[[Path], nn.Module],
    folder: Path,
    places: list[tuple[Any, str, int]],
    processes: int = 1,
) -> None:
    """Assert that runs which were killed at some call end as one that was not, to the bit.

    places  functions, and how often one is called in a run at the most
    """

    def end(name: str) -> None:
        model, rank = train(folder / name), os.environ.get("RANK", "0")
        surgery.save(model, folder / f"{name}.{rank}")

    assert run(lambda: end("whole"), processes) == {0}
    whole = (folder / "whole.0").read_bytes()
    for owner, name, most in places:
        count = random.randint(1, most)
        where = f"{name}-{count}"
        print("killed at", where, flush=True)

        def killed(
            owner: Any = owner, name: str = name, count: int = count, to: str = where
        ) -> None:
            dying(owner, name, count)
            end(to)

        assert -signal.SIGKILL in run(killed, processes), where
        assert run(partial(end, where), processes) == {0}, where
        for rank in range(processes):
            assert (folder / f"{where}.{rank}").read_bytes() == whole, where
