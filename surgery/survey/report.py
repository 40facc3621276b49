"""The survey as a table: counts on top, a row a model or family, then each exception in words."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from ..table import Table
from .look import RULES, Row

STATUSES = ("operated", "planned", "refused", "failed")
MEANING = {
    "operated": "run for real: same output at the start, every part has a gradient, reverted",
    "planned": "has sites and a plan; not run",
    "refused": "Surgery says no, in words, and leaves the model untouched",
    "failed": "could not be built or run here, or is wrong",
}


def summary(rows: list[Row]) -> Table:
    """How many models of each source came out how."""
    counts: list[tuple[object, ...]] = []
    for source in dict.fromkeys(row.source for row in rows):
        own = [row for row in rows if row.source == source]
        by = Counter(row.status for row in own)
        with_sites = sum(bool(row.sites) for row in own)
        counts.append((source, len(own), with_sites, *(by[s] for s in STATUSES)))
    notes = [f"{status}: {MEANING[status]}" for status in STATUSES]
    return Table(f"Survey of {RULES}", ("source", "models", "with sites", *STATUSES), counts, notes)


def write(rows: list[Row], path: Path) -> None:
    """Write the whole survey as Markdown. Raises OSError where that cannot be done."""
    path.write_text(markdown(rows))


def markdown(rows: list[Row]) -> str:
    """The counts, one table a source, and the exceptions one by one."""
    top = summary(rows)
    text = [f"# {top.title}", "", "Written by `surgery survey`.", ""]
    text += [*_table(top.columns, top.rows), "", *(f"- {note}" for note in top.notes), ""]
    for source in dict.fromkeys(row.source for row in rows):
        own = [row for row in rows if row.source == source]
        text += [f"## {source}", "", *(_types(own) if source == "transformers" else _families(own))]
        text += ["", f"### {source}: exceptions", "", *_exceptions(own), ""]
    return "\n".join(text)


def _types(rows: list[Row]) -> list[str]:
    columns = ("type", "status", "sites", "owner", "widths", "axis", "attention", "run")
    cells: list[tuple[object, ...]] = [
        (r.name, r.status, r.sites, *_shape(r), r.attention or "-", r.run) for r in rows
    ]
    return _table(columns, cells)


def _families(rows: list[Row]) -> list[str]:
    """One row for all models of a family that came out alike."""
    groups: dict[tuple[object, ...], list[Row]] = defaultdict(list)
    for row in rows:
        owners = tuple(dict.fromkeys(owner.rpartition(" x")[0] for owner in row.owners))
        verdict = row.status if row.status in ("refused", "failed") else "sites"
        groups[row.family, verdict, _few(owners), row.layout, bool(row.attention)].append(row)
    columns = ("family", "verdict", "models", "owner", "axis", "attention", "run for real")
    cells: list[tuple[object, ...]] = []
    for (*key, attention), alike in groups.items():
        ran = "; ".join(f"{r.name}: {r.run}" for r in alike if r.run)
        cells.append((*key[:2], len(alike), *key[2:], "yes" if attention else "-", ran))
    return _table(columns, sorted(cells, key=lambda c: (str(c[0]), str(c[1]))))


def _exceptions(rows: list[Row]) -> list[str]:
    """Models with a reason, those of one family and reason together."""
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row.reason:
            key = row.family if row.source != "transformers" else row.name
            groups[row.status, key, row.reason].append(row.name)
    lines = []
    for (status, _, reason), names in sorted(groups.items(), key=lambda g: STATUSES.index(g[0][0])):
        lines.append(f"- **{_few(tuple(names))}** ({status}): {_safe(reason)}")
    return lines or ["None."]


def _shape(row: Row) -> tuple[str, str, str]:
    return _few(row.owners), ", ".join(map(str, row.widths)), row.layout


def _few(words: tuple[str, ...], most: int = 4) -> str:
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def _table(columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> list[str]:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return ["| " + " | ".join(_safe(str(cell)) for cell in line) + " |" for line in lines]


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace("_", "\\_")
