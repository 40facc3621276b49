"""What is kept as integers or in eight bits: it computes, and takes no gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .layers import children

TRAINABLE = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
COUNTS = {torch.int64, torch.bool}  # indices and masks, which no one takes for weights


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is kept in a form that takes no gradient, whatever dtype it shows.

    >>> is_quantised(torch.zeros(2, dtype=torch.uint8)), is_quantised(torch.zeros(2))
    (True, False)
    """
    return any(
        not (t.dtype in TRAINABLE or t.dtype in COUNTS or t.is_complex()) for t in _stored(weight)
    )


def _stored(weight: Tensor) -> Iterator[Tensor]:
    """What a tensor keeps: itself, or what is inside where a subclass (torchao's) wraps others."""
    if type(weight) in (Tensor, nn.Parameter):
        yield weight
        return
    flatten = getattr(weight, "__tensor_flatten__", None)
    inner = [getattr(weight, name) for name in flatten()[0]] if flatten else vars(weight).values()
    tensors = [value for value in inner if isinstance(value, Tensor) and value is not weight]
    for tensor in tensors:
        yield from _stored(tensor)
    if not (flatten and tensors):
        yield weight


def is_packed(module: nn.Module) -> bool:
    """Whether it keeps weights that are no parameters: torch's packed ones, buffers of integers.

    (torch.ao.nn.quantized; GPTQ's and AWQ's linears.)
    """
    if any(isinstance(value, torch.ScriptObject) for value in vars(module).values()):
        return True
    if module._parameters or children(module):
        return False
    matrices = [b for b in module._buffers.values() if b is not None and b.dim() > 1]
    return any(is_quantised(buffer) for buffer in matrices)
