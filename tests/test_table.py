"""Tables: the same cells in plain text and in a terminal."""

from __future__ import annotations

import sys

import pytest

from surgery._table import Table

LOADS = Table(
    "Counts",
    ("where", "n", "share"),
    [("blocks.[-4:].mlp", 1234567, 0.5), ("x", 8, 0.25)],
    ["note: two rows", "[bold]not markup[/bold]"],
)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")


def test_plain_text_aligns_names_left_and_numbers_right():
    assert str(LOADS).splitlines() == [
        "Counts",
        "where                     n  share",
        "blocks.[-4:].mlp  1,234,567    0.5",
        "x                         8   0.25",
        "note: two rows",
        "[bold]not markup[/bold]",
    ]


def test_a_column_of_mixed_kinds_is_text():
    assert str(Table("t", ("a",), [(1,), ("long",)])).splitlines()[2:] == ["1", "long"]


def test_a_table_without_rows_is_its_title_and_columns():
    assert str(Table("None", ("a", "b"), [])) == "None\na  b"


@pytest.mark.usefixtures("terminal")
def test_a_terminal_shows_every_cell_and_note():
    text = str(LOADS)
    assert text != LOADS.plain()
    for cell in ("Counts", "where", "blocks.[-4:].mlp", "1,234,567", "0.25", *LOADS.notes):
        assert cell in text


@pytest.mark.usefixtures("terminal")
def test_a_narrow_terminal_folds_and_loses_no_letter(monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    name = "encoder.layers.abcdefghij.klmnopqrst.uvwxyz"
    text = str(Table("t", ("where", "n"), [(name, 12)]))
    shown = "".join(line.split()[0] for line in text.splitlines()[3:] if line.split())
    assert name in shown


def test_tables_are_values():
    assert Table("t", ("a",), [(1,)]) == Table("t", ("a",), [(1,)])
    with pytest.raises(AttributeError):
        LOADS.title = "other"
