"""A survey of model zoos: what the rules find in every model, and whether it holds when run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RuleError
from . import report, run
from .look import Row
from .run import chosen, rows
from .zoo import SOURCES, names

__all__ = ["SOURCES", "Row", "chosen", "names", "rows", "survey"]


def survey(
    sources: list[str],
    *,
    only: str = "",
    real: bool = True,
    seconds: float = run.LIMIT,
    workers: int = 2,
    out: Path | None = None,
) -> list[Row]:
    """Survey sources under a progress bar; print the counts, write the table to `out`.

    only  comma-separated patterns of names

    Raises ModuleNotFoundError where a source is not installed, RuleError where `only` names none.
    """
    from rich.progress import Progress

    asked = {s: chosen(names(s), only) if only else names(s) for s in sources}
    if not any(asked.values()):
        raise RuleError(
            f"--only {only}",
            f"no model of {', '.join(sources)} has such a name.",
            "Try --only '*'.",
        )
    done: list[Row] = []
    with Progress(transient=True) as bar:
        for source, wanted in asked.items():
            task = bar.add_task(source, total=0)

            def told(news: Any, task: Any = task) -> None:
                total = (bar.tasks[task].total or 0) + news if isinstance(news, int) else None
                bar.update(task, total=total, advance=0 if isinstance(news, int) else 1)

            done += rows(source, wanted, real=real, seconds=seconds, workers=workers, told=told)
    print(report.summary(done))
    if out:
        words = ["--only", only] if only else []
        words += [] if real else ["--meta"]
        words += ["--seconds", f"{seconds:g}", "--workers", str(workers), "--out", str(out)]
        report.write(done, out, " ".join(["surgery survey", *sources, *words]))
    return done
