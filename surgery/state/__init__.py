"""What is kept: one file an operation, states put together, packed files (`state.packed`)."""

from .averaging import accumulate, average, ensemble, fill, one_domain, swapped
from .checkpoint import load, load_state_dict, save, state_dict

__all__ = [
    "accumulate", "average", "ensemble", "fill", "load", "load_state_dict", "one_domain", "save",
    "state_dict", "swapped",
]  # fmt: skip
