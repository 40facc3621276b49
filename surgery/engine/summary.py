"""What an operation does to a model, written down as plain data and shown as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypedDict

from torch import nn

from .._table import Table
from ..parts.room import room_of, spare
from ..structure.path import generalise


class RuleRecord(TypedDict):
    """One rule: its sites, its edits, the keys of its parts, what it unfreezes (parameters)."""

    rule: str
    paths: list[str]
    edits: list[str]
    keys: list[str]
    unfrozen: int


class Record(TypedDict):
    """A whole operation; `data` are the rules in the form a file carries, "" where it cannot.

    notes    what to know of how the sites were found
    modules  a text for the modules on which a forward decided what feeds what; "" where none did
    roles    those that the forward told otherwise than modules do: path, width, out, axis of each
    """

    rows: list[RuleRecord]
    seed: int
    data: str
    notes: list[str]
    modules: str
    roles: dict[str, list[tuple[str, int, int, int]]]


def count_parameters(parts: Iterable[nn.Module], trainable: bool = False) -> int:
    """Parameters of some modules, each tensor once; those that are room for ranks are not."""
    held = [*parts]
    modules = {id(m): m for part in held for m in part.modules()}
    tensors = {id(p): p for part in held for p in part.parameters()}
    numbers = sum(p.numel() for p in tensors.values() if p.requires_grad or not trainable)
    return numbers - sum(spare(module, trainable) for module in modules.values())


def summary(
    record: Record,
    parts: Mapping[str, nn.Module],
    base: int,
    title: str,
    unfrozen: int | None = None,
) -> Table:
    """A row for each rule, shared parts counted once, against `base` parameters of the model.

    unfrozen  how many of these are trained; None: what the rules unfreeze
    """
    rows: list[tuple[object, ...]] = []
    seen: set[str] = set()
    for row in record["rows"]:
        new = [parts[key] for key in row["keys"] if key in parts and key not in seen]
        seen.update(row["keys"])
        edits, names = "; ".join(row["edits"]), _names(row["keys"])
        rows.append((places(row["paths"]), edits, names, count_parameters(new), row["unfrozen"]))
    columns = ("sites", "edits", "parts", "added", "unfrozen")
    if unfrozen is None:
        unfrozen = sum(row["unfrozen"] for row in record["rows"])
    return Table(title, columns, rows, _notes(record, parts, base, unfrozen))


def places(paths: list[str]) -> str:
    """Paths in short: their addresses, and how many of each."""
    shapes = Counter(generalise(path) or "(the model)" for path in paths)
    listed = [f"{path} x{n}" if n > 1 else path for path, n in shapes.items()]
    if len(listed) > 4:  # stretches, each of another length
        listed = [*listed[:2], f"... {len(paths)} in all"]
    return ", ".join(listed) or "nothing (optional)"


def _names(keys: list[str]) -> str:
    return ", ".join(keys if len(keys) < 3 else [keys[0], f"... {len(keys)} in all"])


def _notes(record: Record, parts: Mapping[str, nn.Module], base: int, unfrozen: int) -> list[str]:
    of_parts = (getattr(part, "note", None) for part in parts.values())
    texts = [*record["notes"], *(note for note in of_parts if isinstance(note, str))]
    notes = [f"note: {note}" for note in dict.fromkeys(texts)]
    if most := max((room_of(part) or 0 for part in parts.values()), default=0):
        more = sum(map(spare, parts.values()))
        notes.append(f"note: room for {most} ranks: {more:,} more numbers, which nothing trains")
    added = count_parameters(parts.values())
    trained = count_parameters(parts.values(), trainable=True) + unfrozen
    notes.append(
        f"added {added:,}, unfrozen {unfrozen:,}: {trained:,} trainable, "
        f"{100 * trained / max(base, 1):.2f} % of the base's {base:,}"
    )
    return notes
