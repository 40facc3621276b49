"""The named rule sets, one paper family a file: functions that return a few rules."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from ..errors import RuleError, nearest_names
from ..rule import Rule
from ..table import Table
from .adapters import adapter, adaptformer, houlsby
from .adapterx import adapterx, adapterx_ffn, adapterx_serial
from .baselines import bitfit, full, linear_probe
from .prompts import vpt_deep, vpt_shallow

_SETS: dict[str, Callable[..., list[Rule]]] = {
    made.__name__: made
    for made in (
        adapterx, adapterx_serial, adapterx_ffn, adaptformer, adapter, houlsby,
        vpt_deep, vpt_shallow, bitfit, linear_probe, full,
    )
}  # fmt: skip

__all__ = [*_SETS]


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


def _doc(made: Callable[..., list[Rule]]) -> tuple[str, str]:
    text = inspect.getdoc(made) or ""
    source = next((line for line in text.splitlines() if line.startswith("Source: ")), "")
    return text.splitlines()[0], source.removeprefix("Source: ")
