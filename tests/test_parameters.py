"""The table of parameters: every integer of the literature list, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import points
from benchmarks.figures import Figure, matches, table
from benchmarks.parameters import first, fourth, second, third
from surgery import rulesets

FIGURES = [*first(), *second(), *third(), *fourth(), *points.figures()]


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: f"{figure.method} {figure.setting}")
def test_every_integer_is_ours(figure: Any) -> None:
    assert figure.counted == figure.integer


def test_what_does_not_match_has_a_reason() -> None:
    for figure in FIGURES:
        assert figure.verdict != "no: "
        assert bool(figure.printed) or figure.verdict == "none printed"
    missed = {f.method for f in FIGURES if f.verdict.startswith("no: ")}
    assert missed == {
        "vpt_deep", "adapter", "adaptformer", "noah", "arc_att", "repadapter", "Adapter-X",
        "dapt", "daptx",
    }  # fmt: skip


def test_every_rule_set_is_in_it() -> None:
    assert {f.method for f in FIGURES} - {"Adapter-X"} == {row[0] for row in rulesets().rows}


def test_the_table_says_so_where_it_is_wrong() -> None:
    right, wrong = Figure("full", "", "full", 85_798_656), Figure("full", "", "full", 1)
    assert table("", [right]).notes == []
    assert table("", [wrong]).notes == ["WRONG: full, : not 1"]
    assert matches(167_424, "0.17 M")
    assert not matches(156_768, "0.15 M")
    assert matches(24_576, "24.6 K")
