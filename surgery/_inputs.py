"""The example: inputs of one forward, and how a model is called with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
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


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    try:
        return copy.deepcopy(leaf)
    except (TypeError, RuntimeError):  # it cannot be copied
        return leaf
