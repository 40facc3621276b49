"""What a model is, remembered: to give it back, or to see whether anything of it changed."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that surgery must leave, or bring back, bit for bit; equal dicts mean equal models.

    Holds the classes, the order of children, hooks, training flags, `requires_grad`, identity,
    place in memory and a digest of the bytes of every parameter and buffer, and the RNG state.

    >>> model = nn.Linear(2, 2)
    >>> before = fingerprint(model)
    >>> model.weight.data[0, 0] += 1
    >>> [mark for mark, value in fingerprint(model).items() if value != before[mark]]
    ['|weight']
    """
    marks: dict[str, Any] = {"rng": torch.get_rng_state().numpy().tobytes()}
    for path, module in model.named_modules(remove_duplicate=False):
        marks[f"{path}|module"] = (
            id(module),
            type(module),
            module.training,
            tuple(module._modules),
            *(tuple(map(id, hooks.values())) for hooks in _hook_tables(module)),
            *(name in module.__dict__ for name in ("forward", "train", "reset_running_stats")),
        )
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                marks[f"{path}|{name}"] = _tensor_marks(tensor)
    return marks


def _hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    return [
        v for k, v in sorted(vars(module).items()) if k.endswith("_hooks") and hasattr(v, "values")
    ]


def _tensor_marks(tensor: torch.Tensor) -> tuple[Any, ...]:
    digest = b""
    if not tensor.is_meta:
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.sha256(raw.tobytes()).digest()
    return (id(tensor), tensor.requires_grad, tensor.data_ptr(), tensor.dtype, tensor.shape, digest)
