"""The answers of a model: whether they are numbers, and two of them compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._inputs import tensors_in


def apart(answer: Any, base: Any) -> bool:
    """Whether two answers differ by more than rounding can."""
    a, b = ([t for t in tensors_in(value) if _comparable(t)] for value in (answer, base))
    return len(a) != len(b) or any(_differ(x, y) for x, y in zip(a, b, strict=True))


def _comparable(tensor: Tensor) -> bool:
    plain = not tensor.is_nested and tensor.layout == torch.strided
    return plain and tensor.is_floating_point() and not tensor.is_meta


def _differ(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return True
    size = y[y.isfinite()].abs().max().item() if y.isfinite().any() else 0.0
    most = size * torch.finfo(y.dtype).eps ** 0.5
    return not torch.allclose(x, y, rtol=0.0, atol=most, equal_nan=True)


def without_numbers(answer: Any) -> int:
    """How many of its numbers are none (nan)."""
    return sum(int(t.isnan().sum()) for t in tensors_in(answer) if _comparable(t))
