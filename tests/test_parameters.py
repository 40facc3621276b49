"""The table of parameters: every integer of the literature list, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import points
from benchmarks.parameters import Row, first, matches, second, table
from surgery import rulesets

ROWS = [*first(), *second(), *points.rows()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.method} {row.setting}")
def test_every_integer_is_ours(row: Any) -> None:
    assert row.counted == row.integer


def test_what_does_not_match_has_a_reason() -> None:
    for row in ROWS:
        assert row.verdict != "no: "
        assert bool(row.printed) or row.verdict == "none printed"
    missed = {r.method for r in ROWS if r.verdict.startswith("no: ")}
    assert missed == {
        "vpt_deep", "adapter", "adaptformer", "noah", "arc_att", "repadapter", "Adapter-X",
        "dapt", "daptx",
    }  # fmt: skip


def test_every_rule_set_is_in_it() -> None:
    assert {row.method for row in ROWS} - {"Adapter-X"} == {row[0] for row in rulesets().rows}


def test_the_table_says_so_where_it_is_wrong() -> None:
    right, wrong = Row("full", "", "full", 85_798_656), Row("full", "", "full", 1)
    assert table("", [right]).notes == []
    assert table("", [wrong]).notes == ["WRONG: full, : not 1"]
    assert matches(167_424, "0.17 M")
    assert not matches(156_768, "0.15 M")
    assert matches(24_576, "24.6 K")
