"""Which tensors of a model lie over one memory: a write to one of them changes the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .._shards import is_distributed
from .layers import named_modules


def own_form(tensor: Tensor) -> str:
    """The class of a tensor that keeps its numbers in a form of its own (quantised, sharded).

    "" for a plain tensor, whose numbers are what its memory holds.

    >>> own_form(nn.Linear(2, 2).weight)
    ''
    """
    kind = type(tensor.detach() if type(tensor) is nn.Parameter else tensor)
    packs = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    return kind.__name__ if packs else ""


class Memory:
    """The tensors of a model by the memory that they lie in, without what surgery added to it.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model[1].weight.data = model[0].weight.data
    >>> Memory(model).others(model[0].weight)
    ['1.weight']
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[int, list[str]] = {}  # by the id of a tensor: all its names
        self.near: dict[int, dict[int, Tensor]] = {}  # by the start of a storage: those in it
        for path, module in named_modules(model):
            for name, tensor in _own(module):
                if _has_memory(tensor) or is_distributed(tensor):
                    self.names.setdefault(id(tensor), []).append(f"{path}.{name}".strip("."))
                if _has_memory(tensor):
                    storage = tensor.untyped_storage().data_ptr()
                    self.near.setdefault(storage, {})[id(tensor)] = tensor

    def others(self, tensor: Tensor) -> list[str]:
        """The names of the other tensors that hold a number where this one holds one."""
        if not _has_memory(tensor):
            return []
        near = self.near.get(tensor.untyped_storage().data_ptr(), {}).values()
        return [
            name
            for other in near
            if other is not tensor and _overlap(tensor, other)
            for name in self.names[id(other)]
        ]


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of a module, and tensors that are attributes of it."""
    for name, tensor in {**module._parameters, **module._buffers, **vars(module)}.items():
        if isinstance(tensor, Tensor):
            yield name, tensor


def _has_memory(tensor: Tensor) -> bool:
    """Whether it lies in one storage that can be asked for."""
    plain = tensor.layout == torch.strided and not own_form(tensor)
    return plain and not tensor.is_meta and tensor.numel() > 0


def _overlap(a: Tensor, b: Tensor) -> bool:
    (first, last), (start, stop) = _range(a), _range(b)
    if last <= start or stop <= first:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    return bool((_used(a) & _used(b)).any())  # columns of one matrix lie in turn


def _range(tensor: Tensor) -> tuple[int, int]:
    """The first byte of the storage that it uses, and one past the last."""
    first = int(tensor.storage_offset())
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = first + sum((int(size) - 1) * int(stride) for size, stride in steps)
    return first * tensor.element_size(), (last + 1) * tensor.element_size()


def _used(tensor: Tensor) -> Tensor:
    """For each byte of the storage whether it is used."""
    used = torch.zeros(tensor.untyped_storage().nbytes(), dtype=torch.bool)
    size = tensor.element_size()
    for byte in range(size):
        strides = [stride * size for stride in tensor.stride()]
        offset = tensor.storage_offset() * size + byte
        used.as_strided(tensor.shape, strides, offset).fill_(True)
    return used
