"""Hashes of tensors: of what a file holds, and of the base that it was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .._shards import whole
from ..engine.operation import operations
from ..engine.owned import base_values
from ..structure.layers import named_modules


def hash_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of tensors: their names, shapes, dtypes and bytes, in this order.

    >>> hash_of([("a", torch.zeros(2))])[:12]
    '0f69f2b1e897'
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        flat = whole(tensor.detach()).cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def hash_of_base(model: nn.Module) -> str:
    """That of the parameters of a model as they are without any operation."""
    before = base_values(operations(model))
    return hash_of(
        (f"{path}.{name}".lstrip("."), before.get(id(tensor), tensor))
        for path, module in named_modules(model)
        for name, tensor in module._parameters.items()
        if tensor is not None
    )
