"""Room for more ranks than rules use: which parts can have it, and how they get it."""

from __future__ import annotations

from typing import Any

from ..errors import RuleError, is_integer
from ..parts.room import can_have_room, widened
from ..rules.expression import shown
from ..rules.part import Part
from .build import BuiltParts


def check_room(room: object, built: BuiltParts) -> None:
    """Raise RuleError where a part cannot have so many ranks; None: there is no room to be."""
    if room is None:
        return
    call = f"room={room!r}"
    if not is_integer(room):
        raise RuleError(call, "it is no number of ranks.", "Give the largest that is to come.")
    for key, maker in built.makers.items():
        part: Any = built.parts[key]
        if not can_have_room(part) and _says_rank(maker):
            fact = f"{shown(maker)} at {key} cannot have more ranks that are zero."
            raise RuleError(call, fact, "Give it an operation of its own, without room.")
        if can_have_room(part) and part.rank > room:
            fact = f"{shown(maker)} at {key} uses {part.rank} ranks."
            raise RuleError(call, fact, "Give as many at least.")
    if not any(map(can_have_room, built.parts.values())):
        raise RuleError(call, "no part here has ranks.", "Leave it out.")


def give_room(room: int | None, built: BuiltParts) -> None:
    """Widen what has ranks. Raises RuleError where a part cannot have so many, or no memory."""
    check_room(room, built)
    if room is None:
        return
    for part in filter(can_have_room, built.parts.values()):
        if any(tensor.is_meta for tensor in part.parameters()):
            fact = "the model is on the meta device, where nothing tells which ranks are used."
            raise RuleError(f"room={room}", fact, "Give it memory first, model.to_empty(device=).")
        widened(part, room)


def _says_rank(maker: object) -> bool:
    """Whether what makes a part is given a rank, itself or what it holds; a shared part, which is
    borrowed, speaks for itself."""
    told = maker.named if isinstance(maker, Part) else ()
    return any(name == "rank" or _says_rank(value) for name, value in told)
