"""The survey as a page: what made it, counts, a row a model or family, each exception in words."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .._table import Table
from .look import ALONE, RULES, Row

STATUSES = ("operated", "planned", "refused", "failed")
MEANING = {
    "operated": "run for real: same output at the start, every part has a gradient, reverted",
    "planned": "has sites and a plan; not run",
    "refused": "Surgery says no, in words, and leaves the model untouched",
    "failed": "could not be built or run here, or is wrong",
}
HEADINGS = {
    "": "no feed-forward network",
    "refused": "refused though it has sites",
    "planned": "planned, not run",
    "failed": "failed",
    "operated": "operated, but the forward sees otherwise",
}
HOW = (
    "Each was read on the meta device; of each family the smallest with sites, and the smallest "
    "without, was built with random weights and run.",
    "Each is the default config of its type made small, built with random weights and run, where "
    "that can be done.",
)
LONGEST = 300  # characters of a reason


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


def write(rows: list[Row], path: Path, made: str = "") -> None:
    """Write the whole survey as Markdown. Raises OSError where that cannot be done."""
    path.write_text(markdown(rows, made))


def markdown(rows: list[Row], made: str = "") -> str:
    """What made the page, the counts, and a part for each source.

    made  the command, or commands, one a line
    """
    top = summary(rows)
    sources = list(dict.fromkeys(row.source for row in rows))
    text = [f"# {top.title}", "", *(f"    {line}" for line in made.splitlines()), ""]
    text += [f"With {', '.join(_versions(sources))}.", ""]
    text += [*_table(top.columns, top.rows), "", *(f"- {note}" for note in top.notes), ""]
    for source in sources:
        own = [row for row in rows if row.source == source]
        types = source == "transformers"
        text += [f"## {source}", "", *_facts(own), "", *(_types(own) if types else _families(own))]
        text += ["", *_exceptions(own)]
    return "\n".join(text).rstrip() + "\n"


def _versions(sources: list[str]) -> list[str]:
    found = []
    for name in ("torch", *sources):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


def _facts(rows: list[Row]) -> list[str]:
    """How much there is, and whether what ran agrees with what was read."""
    sites = [row.sites for row in rows if row.sites]
    ran = [row for row in rows if "forward agrees" in row.run or "forward sees" in row.run]
    agree = [row for row in ran if "forward agrees" in row.run]
    without = sum(not row.sites for row in ran)
    shown = sum(ALONE in row.run for row in rows)
    how = f"those of {shown} models by a forward alone, the rest" if shown else "all found"
    return [
        f"{len(rows):,} models, {len(sites):,} of them with feed-forward networks: "
        f"{sum(sites):,} sites, {how} by structure. {HOW[rows[0].source == 'transformers']}",
        "",
        f"A forward of {len(ran):,} of them ({without:,} without sites) was traced, which finds "
        f"feed-forward networks by what feeds what: it agrees on {len(agree):,}, and sees "
        f"otherwise on {len(ran) - len(agree):,}.",
    ]


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


# exceptions


def _exceptions(rows: list[Row]) -> list[str]:
    """Models with a reason, under a heading for each kind; those that share one stand together."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.reason:
            heading, reason = _filed(row)
            alone = row.source == "transformers" or row.sites or not row.family
            name = row.name if alone else row.family
            if name not in groups[heading][reason]:
                groups[heading][reason].append(name)
    source = rows[0].source
    text: list[str] = []
    for heading in HEADINGS.values():
        if found := groups.get(heading):
            count = sum(_filed(row)[0] == heading for row in rows if row.reason)
            text += [f"### {source}: {heading} ({count})", ""]
            most = None if heading == HEADINGS[""] else 6
            text += [f"- **{_few(tuple(n), most)}**: {_safe(why)}" for why, n in found.items()]
            text += [""]
    return text or [f"### {source}: exceptions", "", "None."]


def _filed(row: Row) -> tuple[str, str]:
    """The heading of an exception, and its reason in the words that others share."""
    if row.status == "refused" and not row.sites:
        made_of, _, more = row.reason.partition("; ")
        kind = re.fullmatch(r"it has \d+ (.+?) \(.*\)", made_of)
        return HEADINGS[""], _brief("; ".join(filter(None, [kind[1] if kind else made_of, more])))
    return HEADINGS[row.status], _brief(row.reason)


def _brief(reason: str) -> str:
    """A reason without what differs from model to model and what cannot be acted on here."""
    reason = re.sub(r" of \w+\. Roles found in it: .*? shows more\.", "", reason)
    if reason.startswith("ImportError"):
        reason = reason.partition(". ")[0]
    return reason if len(reason) <= LONGEST else f"{reason[:LONGEST].rsplit(' ', 1)[0]} ..."


# Markdown


def _shape(row: Row) -> tuple[str, str, str]:
    return _few(row.owners), ", ".join(map(str, row.widths)), row.layout


def _few(words: tuple[str, ...], most: int | None = 4) -> str:
    more = f" and {len(words) - most} more" if most and len(words) > most else ""
    return ", ".join(words[:most]) + more


def _table(columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> list[str]:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return ["| " + " | ".join(_safe(str(cell)) for cell in line) + " |" for line in lines]


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace("_", "\\_")
