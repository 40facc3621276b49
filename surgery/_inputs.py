"""The example: inputs of one forward, and how a model is called with them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def call(model: nn.Module, example: Any) -> Any:
    """The model's answer to a tensor, a tuple of positional or a dict of keyword arguments."""
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def copied(example: Any) -> Any:
    """A copy that a forward may write to: an input changed in place, a cache that grows."""
    example = dict(example) if isinstance(example, Mapping) else example  # as tokenizers give
    return pytree.tree_map(_copied, example)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    try:
        return copy.deepcopy(value)
    except (TypeError, RuntimeError):  # it cannot be copied
        return value


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in an output of any form: containers, dataclasses, objects that hold tensors."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, (type, nn.Module)):
        seen.add(id(value))
        if isinstance(value, Mapping):
            items: Iterable[Any] = value.values()
        elif isinstance(value, (list, tuple, set)):
            items = value
        else:
            items = getattr(value, "__dict__", {}).values()
        for item in items:
            yield from tensors_in(item, seen)
