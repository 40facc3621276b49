"""The example: inputs of one forward, how a model is called with them, the tensors it gives."""

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


def tensors_in(value: Any, walked: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in inputs or outputs of any form: containers, dataclasses, objects.

    walked  ids of the containers that were walked already: each is walked once
    """
    walked = set() if walked is None else walked
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in walked and not isinstance(value, (type, nn.Module)):
        walked.add(id(value))
        for item in _items(value):
            yield from tensors_in(item, walked)


def _items(container: Any) -> Iterable[Any]:
    if isinstance(container, Mapping):
        return container.values()
    if isinstance(container, (list, tuple, set)):
        return container
    return getattr(container, "__dict__", {}).values()
