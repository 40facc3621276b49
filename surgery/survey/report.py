"""The survey as a page: what made it, counts, a row a model or family, each exception in words."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .._table import Table
from .._text import first_few
from .builders import distribution
from .look import ALONE, RULES, Row, joined

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
ONE_BY_ONE = "Each is small, was built with random weights and run."
HOW = {
    "timm": "Each was read on the meta device; of each family the smallest with sites, and the "
    "smallest without, was built with random weights and run.",
    "transformers": "Each is the default config of its type made small, built with random weights "
    "and run, where that can be done.",
}
HOW["torchvision"] = HOW["timm"]
LONGEST = 300  # characters of a reason
OWNERS, MODELS = 4, 6  # named in a cell, and under a reason


def summary(rows: list[Row]) -> Table:
    """How many models of each source came out how."""
    counts: list[tuple[object, ...]] = []
    for source, of_source in _by_source(rows).items():
        by_status = Counter(row.status for row in of_source)
        with_sites = sum(bool(row.sites) for row in of_source)
        counts.append((source, len(of_source), with_sites, *(by_status[s] for s in STATUSES)))
    notes = [f"{status}: {MEANING[status]}" for status in STATUSES]
    return Table(f"Survey of {RULES}", ("source", "models", "with sites", *STATUSES), counts, notes)


def write(rows: list[Row], path: Path, command: str = "") -> None:
    """Write the whole survey as Markdown. Raises OSError where that cannot be done."""
    path.write_text(markdown(rows, command))


def markdown(rows: list[Row], command: str = "") -> str:
    """What made the page, the counts, and a part for each source.

    command  what was run, or commands, one a line
    """
    top, sources = summary(rows), _by_source(rows)
    text = [f"# {top.title}", "", *(f"    {line}" for line in command.splitlines()), ""]
    text += [f"With {', '.join(_versions([*sources]))}.", ""]
    text += [*_table(top.columns, top.rows), "", *(f"- {note}" for note in top.notes), ""]
    for source, of_source in sources.items():
        table = _families(of_source) if _by_families(source) else _types(of_source)
        text += [f"## {source}", "", *_facts(of_source), "", *table, "", *_exceptions(of_source)]
    return "\n".join(text).rstrip() + "\n"


def _by_source(rows: list[Row]) -> dict[str, list[Row]]:
    sources: dict[str, list[Row]] = {}
    for row in rows:
        sources.setdefault(row.source, []).append(row)
    return sources


def _by_families(source: str) -> bool:
    """Whether a source's models come in families, of which the smallest were run."""
    return source in ("timm", "torchvision")


def _versions(sources: list[str]) -> list[str]:
    versions = []
    for name in dict.fromkeys(("torch", *map(distribution, sources))):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return versions


def _facts(rows: list[Row]) -> list[str]:
    """How much there is, and whether what ran agrees with what was read."""
    sites = [row.sites for row in rows if row.sites]
    ran = [row for row in rows if "forward agrees" in row.run or "forward sees" in row.run]
    agree = [row for row in ran if "forward agrees" in row.run]
    without = sum(not row.sites for row in ran)
    alone = sum(ALONE in row.run for row in rows)
    how = f"those of {alone} models by a forward alone, the rest" if alone else "all found"
    return [
        f"{len(rows):,} models, {len(sites):,} of them with feed-forward networks: "
        f"{sum(sites):,} sites, {how} by structure. {HOW.get(rows[0].source, ONE_BY_ONE)}",
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
        owner = first_few(owners, OWNERS)
        groups[row.family, verdict, owner, row.layout, bool(row.attention)].append(row)
    columns = ("family", "verdict", "models", "owner", "axis", "attention", "run for real")
    cells: list[tuple[object, ...]] = []
    for (*key, attention), alike in groups.items():
        ran = "; ".join(f"{r.name}: {r.run}" for r in alike if r.run)
        cells.append((*key[:2], len(alike), *key[2:], "yes" if attention else "-", ran))
    return _table(columns, sorted(cells, key=lambda c: (str(c[0]), str(c[1]))))


# exceptions


def _exceptions(rows: list[Row]) -> list[str]:
    """Models with a reason, under a heading for each kind; those that share one stand together."""
    source = rows[0].source
    text: list[str] = []
    for heading, odd in _by_heading(rows).items():
        reasons: dict[str, list[str]] = {}
        for row in odd:
            reasons.setdefault(_filed(row)[1], []).append(_called(row))
        text += [f"### {source}: {heading} ({len(odd)})", ""]
        text += [f"- **{_names(heading, names)}**: {_safe(why)}" for why, names in reasons.items()]
        text += [""]
    return text or [f"### {source}: exceptions", "", "None.", ""]


def _by_heading(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows that have a reason, by its heading, in the order of HEADINGS."""
    odd: dict[str, list[Row]] = {heading: [] for heading in HEADINGS.values()}
    for row in rows:
        if row.reason:
            odd[_filed(row)[0]].append(row)
    return {heading: alike for heading, alike in odd.items() if alike}


def _called(row: Row) -> str:
    """The name that an exception goes by: of its family, where that has no site and is no type."""
    alone = not _by_families(row.source) or row.sites or not row.family
    return row.name if alone else row.family


def _names(heading: str, names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    return first_few(names, len(names) if heading == HEADINGS[""] else MODELS)


def _filed(row: Row) -> tuple[str, str]:
    """The heading of an exception, and its reason in the words that others share."""
    if row.status == "refused" and not row.sites:
        what, _, more = row.reason.partition("; ")
        layers = re.fullmatch(r"it has \d+ (.+?) \(.*\)", what)  # so many, without their number
        return HEADINGS[""], _brief(joined(layers[1] if layers else what, more))
    return HEADINGS[row.status], _brief(row.reason)


def _brief(reason: str) -> str:
    """A reason without what differs from model to model and what cannot be acted on here."""
    reason = re.sub(r" of \w+\. Roles found in it: .*? shows more\.", "", reason)
    if reason.startswith("ImportError"):
        reason = reason.partition(". ")[0]
    return reason if len(reason) <= LONGEST else f"{reason[:LONGEST].rsplit(' ', 1)[0]} ..."


# Markdown


def _shape(row: Row) -> tuple[str, str, str]:
    return first_few(row.owners, OWNERS), ", ".join(map(str, row.widths)), row.layout


def _table(columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> list[str]:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return ["| " + " | ".join(_safe(str(cell)) for cell in line) + " |" for line in lines]


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;").replace("_", "\\_")
