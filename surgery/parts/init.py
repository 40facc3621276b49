"""How the tensors of parts start, and whether they are trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def kaiming(*shape: int, fan_in: int | None = None, gain: float = 3**-0.5) -> Tensor:
    """Kaiming uniform, in +-gain * sqrt(3 / fan_in); the gain of a = sqrt 5, nn.Linear's own.

    fan_in  None: the last of the shape
    """
    bound = gain * math.sqrt(3 / max(shape[-1] if fan_in is None else fan_in, 1))
    return torch.empty(shape).uniform_(-bound, bound)


def xavier(*shape: int, fans: int | None = None, gain: float = 1.0) -> Tensor:
    """Xavier (Glorot) uniform, in +-gain * sqrt(6 / fans).

    fans  features in and out together; None: the sum of the shape
    """
    bound = gain * (6 / max(sum(shape) if fans is None else fans, 1)) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound)


def register(module: nn.Module, name: str, tensor: Tensor, *, trained: bool) -> None:
    """Give a module a tensor that is trained, a parameter, or only stored, a buffer."""
    if trained:
        module.register_parameter(name, nn.Parameter(tensor))
    else:
        module.register_buffer(name, tensor)
