"""Other values for an operation that is there, in the tensors that it has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.apply import named, operated
from ..engine.conditions import UNCUT, check_state
from ..engine.journal import Journal
from ..engine.operation import Operation
from ..engine.planning import Plan
from ..errors import FileError
from ..parts.room import can_have_room, room_of
from .checkpoint import fill, state_dict
from .reading import PARTS, Contents, plan_of, read

Model = TypeVar("Model", bound=nn.Module)


def swap(model: Model, name: str, path: str | os.PathLike[str]) -> Model:
    """Give an operation what another file of such rules holds; returns the model.

    The values are copied into the tensors that are there, so that compiled code goes on as it was,
    and between forwards: those of other threads end first, or wait (not where they are compiled).
    LoRA of any rank goes where there is room, `apply(..., room=8)`, and is then what a file that
    was loaded is: its rank and scale are those of the file, and `save` writes them. Without room a
    lower rank is filled up with zeros, and its scale told by B. All or nothing. Raises FileError
    where the file is of other rules, or of larger ranks than there is room for, and OperationError
    where there is no such operation.

    >>> from surgery import apply, at, lora, save
    >>> import tempfile, torch
    >>> small = apply(nn.Sequential(nn.Linear(8, 8)), at("0", lora(rank=2)))
    >>> file = save(small, tempfile.mkdtemp() + "/small.safetensors")
    >>> large = apply(nn.Sequential(nn.Linear(8, 8)), at("0", lora(rank=4)), name="a", room=8)
    >>> swap(large, "a", file).surgery.a.get_submodule("0/parallel").A.shape
    torch.Size([1, 8, 8])
    """
    call = f'swap(model, "{name}", "{path}")'
    (operation,) = named(operated(model, call), [name], call)
    check_state(model, call, UNCUT)
    contents = read(path, name)
    plan = plan_of(contents, model, None, name=f"{name}_of_file", balance=None, example=None)
    sketches: dict[str, Any] = _own(plan.parts)
    here: dict[str, Any] = dict(operation.named_children())
    if sketches.keys() != here.keys() or _joins_of(plan) != _joins(operation):
        raise _other(contents, call)
    now, tensors = state_dict(model, name=name), contents.tensors()
    for key, there in sketches.items():
        if _told(there) != _told(here[key]):
            raise _other(contents, call)
        if can_have_room(there):
            _check_ranks(there, here[key], call)
            for tensor in there.ranks if room_of(here[key]) is None else ():
                at, last = f"{PARTS}{key}.{tensor}", [*there.ranks][-1]
                scale = there.scale / here[key].scale if tensor == last else 1.0
                tensors[at] = _filled_up(scale * tensors[at], now[at])
    with operation.streams.paused():
        _put(model, operation, tensors, sketches, plan)
    return model


def _put(
    model: nn.Module,
    operation: Operation,
    tensors: Mapping[str, Tensor],
    sketches: Mapping[str, Any],
    plan: Plan,
) -> None:
    """Fill an operation; parts with room use the ranks and the scales of a file, which tells them
    from then on."""
    journal = Journal()
    roomy: dict[str, Any] = {k: p for k, p in operation.named_children() if room_of(p) is not None}
    try:
        for key, part in roomy.items():
            rank, scale = sketches[key].rank, sketches[key].scale
            for name in (*part.ranks, "scale"):
                journal.overwrite(getattr(part, name), torch.zeros_like(getattr(part, name)))
            journal.overwrite(part.scale[:rank], part.scale.new_tensor(scale))
            journal.set(part, "rank", rank)
        if roomy:
            told = {key: plan.record[key] for key in ("rows", "seed", "data")}
            journal.set(operation, "record", {**operation.record, **told})
        fill(model, tensors, operation.name)
    except BaseException:
        journal.undo()
        raise


def _own(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The parts by the key under which an operation holds each: its first."""
    firsts: dict[int, str] = {}
    for key, part in parts.items():
        firsts.setdefault(id(part), key)
    return {key: parts[key] for key in firsts.values()}


def _joins_of(plan: Plan) -> list[tuple[Any, ...]]:
    """Where and how parts are joined, whichever they are."""
    return sorted((p.site.path, p.edit.place, p.edit.scale or 0.0) for p in plan.placements)


def _joins(operation: Operation) -> list[tuple[Any, ...]]:
    return sorted(
        (hooked.path, action.place, action.scale or 0.0)
        for hooked in operation.hooked_sites
        for action in hooked.actions
    )


def _told(part: nn.Module) -> list[tuple[Any, ...]]:
    """What a part is, but for its ranks and the scale of these: its kinds, and their numbers."""
    but = {"training", *(("rank", "scale") if can_have_room(part) else ())}
    return [
        (type(m), sorted((k, repr(v)) for k, v in vars(m).items() if _is_number(k, v, but)))
        for m in part.modules()
    ]


def _is_number(name: str, value: Any, but: set[str]) -> bool:
    kinds = (int, float, str, tuple, list, type(None))
    return not name.startswith("_") and name not in but and isinstance(value, kinds)


def _check_ranks(there: Any, here: Any, call: str) -> None:
    """Raise FileError where a part of a file has more ranks than there is room for."""
    room = room_of(here) or here.rank
    if there.rank > room:
        fact = f"the file has {there.rank} ranks, and there is room for {room}."
        raise FileError(call, fact, f"Apply with more: apply(model, ..., room={there.rank}).")


def _filled_up(tensor: Tensor, room: Tensor) -> Tensor:
    """A tensor with zeros behind, as large as there is room."""
    over = [large - small for large, small in zip(room.shape, tensor.shape, strict=True)]
    return F.pad(tensor, [n for size in reversed(over) for n in (0, size)])


def _other(contents: Contents, call: str) -> FileError:
    rules = ", ".join(contents.about["text"])
    fact = f"the file is of other rules ({rules:.300}) than the operation that is there."
    return FileError(call, fact, "load(model, path, name=...) operates the model by them.")
