"""A model card: what was done to a model, told by its report, for the page that has its files."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

from torch import nn

from ..engine.operation import Operation
from ..engine.reports import report
from ..engine.vocabulary import vocabulary
from ..methods import rules_named, rulesets
from ..rules.expression import encode
from .hub import CARD, file_name, library
from .reading import read_header

BEGIN, END = "<!-- surgery: what follows is written anew -->", "<!-- surgery: end -->"
REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def write_card(
    model: nn.Module, done: list[Operation], folder: Path, source: str, call: str, whole: bool
) -> None:
    """Write the card of a folder; what a card that is there says besides, and its data, stays.

    source  the address that it will have on the Hub; "": it stays here
    whole   whether `from_pretrained` brings the base back, too
    """
    path, hub, data = folder / CARD, library(call), _data(model, done)
    source = source or folder.name
    body = f"\n# {source.partition('@')[0].rpartition('/')[2]}\n"
    if path.is_file() and (known := path.read_text(encoding="utf-8")):
        card = hub.ModelCard(known, ignore_metadata_errors=True)
        body, there = card.text, card.data.to_dict()
        tags = [*(there.get("tags") or []), *data["tags"]]
        data = {**data, **there, "library_name": data["library_name"], "tags": tags}
    head = hub.ModelCardData(**data).to_yaml()
    text = _replaced(body, f"{BEGIN}\n{_text(model, done, folder, source, whole)}\n{END}")
    path.write_text(f"---\n{head}\n---\n{text}", encoding="utf-8")


def _replaced(body: str, text: str) -> str:
    """A card with our part of it anew; it is the last where there was none."""
    before, begin, rest = body.partition(BEGIN)
    _, end, after = rest.partition(END)
    return f"{before}{text}{after}" if begin and end else f"{body.rstrip()}\n\n{text}\n"


def _data(model: nn.Module, done: list[Operation]) -> dict[str, Any]:
    """What the Hub finds it by."""
    sets = [name for operation in done if (name := _set_of(operation))]
    kinds = [type(part).__name__.lower() for operation in done for part in _parts(operation)]
    data: dict[str, Any] = {"library_name": "surgery", "tags": ["surgery", *sets, *kinds]}
    if base := _base_name(model):
        data |= {"base_model": base, "base_model_relation": "adapter"}
    return data


def _base_name(model: nn.Module) -> str:
    """The repository that the base came from (transformers writes it down); "" where unknown."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or ""
    is_known = isinstance(name, str) and REPOSITORY.fullmatch(name) and not os.path.exists(name)
    return name if is_known else ""


def _set_of(operation: Operation) -> str:
    """The rule set whose rules an operation's are; "" where they are others."""
    for name, *_ in rulesets().rows if operation.record["data"] else ():
        if json.loads(operation.record["data"]) == encode(rules_named(str(name)), vocabulary()):
            return str(name)
    return ""


def _parts(operation: Operation) -> list[nn.Module]:
    """Its parts, one of each kind."""
    return [*{type(part): part for part in reversed([*operation.children()])}.values()][::-1]


def _text(model: nn.Module, done: list[Operation], folder: Path, source: str, whole: bool) -> str:
    kind = type(model).__name__
    pieces = [f"A `{kind}` that was operated by Surgery. To load it:"]
    pieces.append(_code("python", *_loading(kind, done, source, whole)))
    for operation in done:
        name = _set_of(operation)
        pieces.append(f"## `{operation.name}`" + (f": {name}" if name else ""))
        pieces += [f"{what} {paper}" for set, what, paper in rulesets().rows if set == name]
        rules = [f"    {row['rule']}," for row in operation.record["rows"]]
        pieces.append(_code("python", "[", *rules, "]"))
        if formulae := [line for part in _parts(operation) if (line := _formula(part))]:
            pieces.append(_code("", *formulae))
    pieces += ["## What it changes", _code("", report(model).plain())]
    return "\n\n".join([*pieces, _hashes(done, folder)])


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _loading(kind: str, done: list[Operation], source: str, whole: bool) -> list[str]:
    """Three lines of code."""
    if whole:
        return ["import surgery", "", f'model = surgery.from_pretrained("{source}")']
    names = [f', name="{operation.name}"' if len(done) > 1 else "" for operation in done]
    loads = [f'surgery.load(model, "{source}"{name})' for name in names]
    return ["import surgery", "", f"model = ...  # a {kind}, as it was before", *loads]


def _formula(part: nn.Module) -> str:
    """What a part computes, as the first line of its class says."""
    line = (inspect.getdoc(type(part)) or "").partition("\n")[0]
    return f"{type(part).__name__}: {line}" if line else ""


def _hashes(done: list[Operation], folder: Path) -> str:
    """Those that `load` looks at: of tensors in each file, and of the base (verify=True)."""
    rows = []
    for operation in done:
        file = file_name(operation.name)
        about, _ = read_header(folder / file)
        rows.append(f"| `{file}` | `{about['hash']}` | `{about['base']}` |")
    head = "## Hashes (SHA-256)\n\n| file | of its tensors | of the base |\n|---|---|---|\n"
    return head + "\n".join(rows)
