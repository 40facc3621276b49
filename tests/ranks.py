"""A test file run as two processes of a group, each of which leaves what came of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import surgery


def results_of(script: str, folder: Path, seconds: float) -> list[dict[str, Any]]:
    """What both ranks of `python script RANK PORT FOLDER` saved to FOLDER/rank-RANK.pt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(surgery.__file__).parents[1])
    command = [sys.executable, "-P", script]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(folder)], env={**os.environ, "PYTHONPATH": root}
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            process.wait(timeout=seconds)
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]
