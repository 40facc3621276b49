"""A table is a value: rich in a terminal, plain text everywhere else."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Rows under column names, with a title above and notes below.

    >>> print(Table("Counts", ("what", "n"), [("blocks", 12)]))
    Counts
    what     n
    blocks  12
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[object, ...]]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self._rich() if sys.stdout.isatty() else self.plain()

    def _cells(self) -> list[list[str]]:
        return [[f"{c:,}" if isinstance(c, int) else str(c) for c in row] for row in self.rows]

    def _numeric(self, column: int) -> bool:
        return bool(self.rows) and all(isinstance(r[column], (int, float)) for r in self.rows)

    def plain(self) -> str:
        """As it is printed where there is no terminal."""
        lines = [list(self.columns), *self._cells()]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        right = [self._numeric(i) for i in range(len(widths))]

        def line(cells: list[str]) -> str:
            padded = (
                c.rjust(w) if r else c.ljust(w)
                for c, w, r in zip(cells, widths, right, strict=True)
            )
            return "  ".join(padded).rstrip()

        return "\n".join([self.title, *map(line, lines), *self.notes])

    def _rich(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(box=box.SIMPLE_HEAD, title=self.title, title_justify="left")
        for i, name in enumerate(self.columns):
            table.add_column(name, justify="right" if self._numeric(i) else "left", overflow="fold")
        for cells in self._cells():
            table.add_row(*cells)
        console = Console(markup=False, highlight=False)
        with console.capture() as capture:
            console.print(table)
        return "\n".join([capture.get().rstrip(), *self.notes])
