"""Room for more ranks than a part uses: zeros in its tensors, which its scale leaves out.

A kind that can have room says in `ranks` on which axis of its tensors these lie, has a `rank`, and
multiplies the last of them by `scale` along their last axis. With room, `scale` is a tensor with a
number for each rank, zero for those that are not used: whatever these hold, they add nothing, and
get no gradient. Another rank and another scale are then other numbers in tensors that are there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .init import register

Kind = TypeVar("Kind", bound=nn.Module)


def can_have_room(part: nn.Module) -> bool:
    """Whether a part says on which axes its ranks lie."""
    ranks = getattr(type(part), "ranks", None)
    return isinstance(ranks, Mapping) and bool(ranks)


def room_of(part: nn.Module) -> int | None:
    """For how many ranks a part has room; None where it has just those that it uses.

    >>> from surgery.parts.low_rank import LoRA
    >>> room_of(LoRA(8, 8, rank=2)), room_of(widened(LoRA(8, 8, rank=2), 4))
    (None, 4)
    """
    scale = part._buffers.get("scale") if can_have_room(part) else None
    return None if scale is None else len(scale)


def widened(part: Kind, room: int) -> Kind:
    """The part itself, with zeros behind its ranks.

    >>> from surgery.parts.low_rank import LoRA
    >>> widened(LoRA(8, 6, rank=2), 4).A.shape
    torch.Size([1, 4, 8])
    """
    own: Any = part
    for name, axis in own.ranks.items():
        narrow = getattr(own, name)
        shape = [*narrow.shape]
        shape[axis] = room
        wide = narrow.new_zeros(shape)
        wide.detach().narrow(axis, 0, own.rank).copy_(narrow.detach())
        delattr(own, name)
        register(own, name, wide, trained=isinstance(narrow, nn.Parameter))
        getattr(own, name).requires_grad_(narrow.requires_grad)
    scale = own.scale
    del own.scale
    own.register_buffer("scale", wide.new_zeros(room))
    own.scale[: own.rank] = scale
    return part


def used(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors with ranks, each without those that are room: views, by name."""
    own: Any = part
    for name, axis in own.ranks.items():
        yield name, getattr(own, name).narrow(axis, 0, own.rank)


def spare(part: nn.Module, trainable: bool = False) -> int:
    """How many numbers of the parameters of a part are room; `trainable`: of those that train.

    >>> from surgery.parts.low_rank import LoRA
    >>> spare(widened(LoRA(8, 6, rank=2), 4))
    28
    """
    if room_of(part) is None:
        return 0
    pairs = ((part._parameters.get(name), tensor) for name, tensor in used(part))
    return sum(
        p.numel() - tensor.numel()
        for p, tensor in pairs
        if p is not None and (p.requires_grad or not trainable)
    )


def is_used_alike(part: nn.Module, scale: Tensor) -> bool:
    """Whether a scale is of as many ranks as a part uses, and is its own but for rounding."""
    own = part._buffers.get("scale")
    if own is None or own.shape != scale.shape:
        return False
    near = torch.allclose(scale.to(own), own, rtol=torch.finfo(torch.bfloat16).eps)
    return near and bool(((scale != 0) == (own != 0).to(scale.device)).all())


def without_room(part: Kind) -> Kind:
    """The part as it would be without room, of the same tensors; itself where it has none.

    >>> from surgery.parts.low_rank import LoRA
    >>> without_room(widened(LoRA(8, 6, rank=2, scale=0.5), 4)).scale
    0.5
    """
    if room_of(part) is None:
        return part
    lean = copy.copy(part)
    lean._parameters, lean._buffers = {**part._parameters}, {**part._buffers}
    for name, tensor in used(part):
        del (lean._parameters if name in lean._parameters else lean._buffers)[name]
        vars(lean)[name] = tensor
    scale: Any = lean._buffers.pop("scale")
    vars(lean)["scale"] = float(scale[0])
    return lean
