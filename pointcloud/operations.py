"""What functions of clouds share: where padding is, precision, where to draw, a batch of a vmap."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor


def padding(points: Tensor, lengths: Tensor) -> Tensor:
    """Where (b, n) there is padding."""
    order = torch.arange(points.shape[1], device=points.device)
    return order >= rearrange(lengths.to(points.device), "b -> b 1")


def fine(points: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return points.float() if points.device.type == "mps" else points.double()


def random_device(points: Tensor, generator: torch.Generator | None) -> torch.device:
    """Where random numbers for points are drawn: with the generator, if there is one."""
    return points.device if generator is None else generator.device


def vmap_into_batch(info: Any, dims: Iterable[int | None], values: Iterable[Any]) -> list[Any]:
    """Arguments of a batched operation with the dimension of a vmap in their batch."""

    def flattened(value: Any, dim: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        wide = value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
        return wide.flatten(0, 1)

    return [flattened(value, dim) for value, dim in zip(values, dims, strict=True)]
