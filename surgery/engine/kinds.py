"""Kinds of forwards: what may decide on the way that a model takes."""

from __future__ import annotations

from collections.abc import Hashable
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._inputs import tensors_in


def kind_of(module: nn.Module, args: Any, kwargs: Any) -> Hashable:
    """What may decide on the way that a forward takes: modes, and sizes by powers of two.

    Of what objects hold, too: caches, that let a model leave out what it has computed before.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    sizes = tuple(_size(tensor) for tensor in tensors if not tensor.is_nested)
    flags = tuple(leaf for leaf in leaves if leaf is None or isinstance(leaf, bool))
    device = tensors[0].device.type if tensors else "cpu"
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    names = tuple(sorted(kwargs or ()))
    return module.training, torch.is_grad_enabled(), autocast, names, sizes, _held(leaves), flags


def _held(leaves: list[Any]) -> Hashable:
    """The sizes of tensors that objects hold."""
    objects = [leaf for leaf in leaves if not isinstance(leaf, PLAIN)]
    tensors = tensors_in(objects) if objects else ()
    return frozenset(_size(tensor) for tensor in tensors if not tensor.is_nested)


PLAIN = (Tensor, int, float, str, NoneType)


def _size(tensor: Tensor) -> tuple[int, ...]:
    """That by powers of two."""
    return tuple((int(n) - 1).bit_length() for n in tensor.shape)
