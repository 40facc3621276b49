"""The named rule sets, one paper family a file: functions that return a few rules."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from ..errors import RuleError, nearest_names
from ..rule import Rule
from ..table import Table
from .adapters import adapter, adaptformer
from .adapterx import adapterx_ffn
from .baselines import full, linear_probe

__all__ = ["adapter", "adapterx_ffn", "adaptformer", "full", "linear_probe"]

_SETS: dict[str, Callable[[], list[Rule]]] = {
    made.__name__: made for made in (adapterx_ffn, adapter, adaptformer, linear_probe, full)
}


def rulesets() -> Table:
    """The named rule sets: what each does, in a line, and its source.

    >>> print(rulesets())  # doctest: +ELLIPSIS
    Rule sets
    name          what it does ...
    """
    rows: list[tuple[object, ...]] = [(name, *_doc(made)) for name, made in _SETS.items()]
    return Table("Rule sets", ("name", "what it does", "source"), rows)


def named(name: str) -> list[Rule]:
    """The rules of the named set. Raises RuleError, with the nearest names, where there is none."""
    if name not in _SETS:
        near = nearest_names(name, _SETS)
        raise RuleError(
            f'rules="{name}"',
            "no rule set has this name.",
            (f"Nearest: {near}. " if near else "") + f"All: {', '.join(_SETS)}.",
        )
    return _SETS[name]()


def _doc(made: Callable[[], list[Rule]]) -> tuple[str, str]:
    text = inspect.getdoc(made) or ""
    source = next((line for line in text.splitlines() if line.startswith("Source: ")), "")
    return text.splitlines()[0], source.removeprefix("Source: ")
