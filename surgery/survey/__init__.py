"""A survey of model zoos: what the rules find in every model, and whether it holds when run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RuleError
from . import report, run
from .builders import is_package
from .look import Row
from .run import chosen, rows
from .zoo import SOURCES, names

__all__ = ["SOURCES", "Row", "chosen", "is_package", "names", "rows", "survey"]


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

    sources  timm, torchvision, transformers; package:NAME of a package or of a module of builders
    only     comma-separated patterns of names

    Raises ModuleNotFoundError where a source is not installed, RuleError where `only` names none,
    or a package is missing or builds nothing.
    """
    from rich.progress import Progress

    wanted = {s: chosen(names(s), only) if only else names(s) for s in sources}
    if not any(wanted.values()):
        raise RuleError(
            f"--only {only}",
            f"no model of {', '.join(sources)} has such a name.",
            "Try --only '*'.",
        )
    done: list[Row] = []
    with Progress(transient=True) as bar:
        for source, of_source in wanted.items():
            progress = _advance(bar, bar.add_task(source, total=0))
            done += rows(
                source, of_source, real=real, seconds=seconds, workers=workers, progress=progress
            )
    print(report.summary(done))
    if out:
        options = ["--only", only] if only else []
        options += [] if real else ["--meta"]
        options += ["--seconds", f"{seconds:g}", "--workers", str(workers), "--out", str(out)]
        report.write(done, out, " ".join(["surgery survey", *sources, *options]))
    return done


def _advance(bar: Any, task: Any) -> Callable[[Any], None]:
    """Moves a bar on by one model, or lengthens it by a number of them."""

    def progress(news: Any) -> None:
        more = news if isinstance(news, int) else None
        total = None if more is None else (bar.tasks[task].total or 0) + more
        bar.update(task, total=total, advance=1 if more is None else 0)

    return progress
