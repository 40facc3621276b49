"""Random numbers may be drawn here without anyone outside noticing."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch


def remember() -> Callable[[], None]:
    """The state of torch's, numpy's and Python's random numbers, as a way back to it."""
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if on_gpu else []

    def restore() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.cuda.set_rng_state_all(cuda)

    return restore
