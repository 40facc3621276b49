"""Random numbers may be drawn here without anyone outside noticing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def state() -> dict[str, Any]:
    """What torch, numpy and Python would draw next: plain values, which any checkpoint takes."""
    name, keys, *rest = np.random.get_state()
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if on_gpu else [],
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
    }


def restore(state: dict[str, Any]) -> None:
    """Have them draw that next."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.cuda.set_rng_state_all(state["cuda"])


def remember() -> Callable[[], None]:
    """The state of torch's, numpy's and Python's random numbers, as a way back to it."""
    now = state()
    return lambda: restore(now)
