"""Tensors that several processes hold a piece of each: made whole, cut again, asked of all.

All calls but `is_distributed` and `cut` are made by all processes alike, in the same order: they
wait for each other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import FileError, SurgeryError

Told = TypeVar("Told")


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked without importing what makes them.

    >>> is_distributed(torch.ones(2))
    False
    """
    if type(tensor) is Tensor:  # nothing else is looked at in code that is traced
        return False
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from those that hold it; itself where it is no DTensor.

    >>> whole(torch.ones(2))
    tensor([1., 1.])
    """
    with torch.no_grad():
        return met(tensor)


def cut(value: Tensor, like: Tensor) -> Tensor:
    """A value as another tensor lies: of what all have, each takes its piece, and none waits.

    >>> cut(torch.ones(2), torch.zeros(2))
    tensor([1., 1.])
    """
    mine: Any = value
    there: Any = like
    if not is_distributed(like):
        return whole(value)
    if is_distributed(value):
        if (mine.device_mesh, mine.placements) == (there.device_mesh, there.placements):
            return value
        mine = whole(value)
    return laid(mine.detach().to(there.device), like)


def laid(value: Tensor, like: Tensor) -> Tensor:
    """What all have alike, as another tensor lies; a gradient comes back to all.

    >>> laid(torch.ones(2), torch.zeros(2))
    tensor([1., 1.])
    """
    there: Any = like
    if not is_distributed(like) or is_distributed(value):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = there.device_mesh
    alike = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    piece: Tensor = alike.redistribute(mesh, there.placements)
    return piece


def summed(tensor: Tensor) -> Tensor:
    """Of terms that each process has one of the sum, in all; others are as they lie.

    >>> summed(torch.ones(2))
    tensor([1., 1.])
    """
    terms: Any = tensor
    if not is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    lies = [Replicate() if placed.is_partial() else placed for placed in terms.placements]
    total: Tensor = terms.redistribute(terms.device_mesh, lies)
    return total


def met(tensor: Tensor) -> Tensor:
    """As `whole`; a gradient comes back to all.

    >>> met(torch.ones(2))
    tensor([1., 1.])
    """
    made: Any = tensor
    if not is_distributed(tensor):
        return tensor
    full: Tensor = made.full_tensor()
    return full


def into_shards(model: nn.Module) -> None:
    """Let fully_shard take back what it has gathered for a forward: its tensors are pieces again.

    What is written to what was gathered is lost, and an optimiser does not write to it.
    """
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    for module in model.modules() if kind is not None else ():
        if isinstance(module, kind):
            module.reshard()


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts the parameters that these hold themselves are whole."""
    was: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in dict.fromkeys(modules):
            for name, tensor in module._parameters.items():
                if tensor is not None and is_distributed(tensor):
                    was.append((module, name, tensor))
                    module._parameters[name] = nn.Parameter(whole(tensor), tensor.requires_grad)
        yield
    finally:
        for module, name, tensor in was:
            module._parameters[name] = tensor


# asked of all ----------------------------------------------------------------------------------


def mesh_of(tensors: Iterable[Tensor]) -> Any:
    """The processes that hold pieces of some tensors, the most there are; None where all is whole.

    >>> mesh_of([torch.ones(2)]) is None
    True
    """
    held: list[Any] = [tensor for tensor in tensors if is_distributed(tensor)]
    return max((each.device_mesh for each in held), key=lambda mesh: mesh.size(), default=None)


def told_by_all(mesh: Any, own: Told) -> list[Told]:
    """What each process of a mesh says, in the same order for all; None: what this one says."""
    told = [own]
    for axis in range(mesh.ndim if mesh is not None else 0):
        group, heard = mesh.get_group(axis), [told] * mesh.size(axis)
        torch.distributed.all_gather_object(heard, told, group=group)
        told = [each for some in heard for each in some]
    return told


def together(mesh: Any, work: Callable[[], Told], call: str) -> Told:
    """What work with files gives; where it fails for one process, all raise an error.

    >>> together(None, lambda: 2, "work")
    2
    """
    made, error = list[Told](), None
    try:
        made.append(work())
    except (OSError, SurgeryError) as caught:
        error = caught
    failed = [text for text in told_by_all(mesh, error and str(error)) if text]
    if error is not None:
        raise error
    if failed:
        raise FileError(call, f"another process failed: {failed[0]}", "Mend that there.")
    return made[0]
