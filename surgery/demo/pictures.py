"""What a run of the demo on point clouds came to; its table and its pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from pointcloud.clouds import Clouds
from pointcloud.draw import draw_clouds
from pointcloud.objects import NAMES
from pointcloud.shapes import procedural

from .._table import Table


class Result(NamedTuple):
    """One run: trained parameters, the head's too, of the whole; accuracy 0..1; seconds.

    mark  letters that change with all that it depends on
    """

    target: str
    method: str
    seed: int
    trained: int
    whole: int
    accuracy: float
    seconds: float
    mark: str

    @property
    def stem(self) -> str:
        """The name of its files."""
        return f"{self.target}-{self.method}-{self.seed}-{self.mark}"


def grouped(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """The runs of each target and method, in the order in which they come."""
    runs: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        runs.setdefault((result.target, result.method), []).append(result)
    return runs


def spread(runs: Sequence[Result]) -> tuple[float, float]:
    """Mean and standard deviation of accuracies, in per cent."""
    scores = [100 * r.accuracy for r in runs]
    return statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0


def table(results: Sequence[Result], title: str) -> Table:
    """One row for a target and a method; how daptx stands to full fine-tuning below."""
    runs = grouped(results)
    rows: list[tuple[object, ...]] = []
    notes: list[str] = []
    for (target, method), seeds in runs.items():
        mean, deviation = spread(seeds)
        share = 100 * seeds[0].trained / seeds[0].whole
        seconds = statistics.mean(run.seconds for run in seeds)
        figures = f"{share:.2f}", f"{mean:.1f}", f"{deviation:.1f}" if len(seeds) > 1 else "-"
        rows.append((target, method, seeds[0].trained, *figures, f"{seconds:.1f}"))
        if method == "daptx" and (target, "full") in runs:
            ahead = mean - spread(runs[target, "full"])[0]
            word = "ahead of" if ahead > 0 else "behind"
            notes.append(
                f"{target}: daptx is {abs(ahead):.1f} points {word} full fine-tuning, "
                f"with {share:.1f} % of what that trains."
            )
    most = max(map(len, runs.values()))
    notes.append(f"Mean and standard deviation of {most} seeds; every method trains a new head.")
    columns = ("target", "method", "trained", "% of all", "accuracy %", "+-", "seconds a run")
    return Table(title, columns, rows, notes)


def draw_tradeoff(results: Sequence[Result], path: Path) -> Path:
    """Accuracy against what is trained, a panel for each target; bars are standard deviations."""
    from matplotlib.figure import Figure

    runs = grouped(results)
    targets = list(dict.fromkeys(target for target, _ in runs))
    methods = list(dict.fromkeys(method for _, method in runs))
    figure = Figure(figsize=(1.6 + 3.6 * len(targets), 3.6), layout="constrained")
    panels = figure.subplots(1, len(targets), squeeze=False)[0]
    for axes, target in zip(panels, targets, strict=True):
        for i, method in enumerate(methods):
            if seeds := runs.get((target, method)):
                mean, deviation = spread(seeds)
                axes.errorbar(
                    seeds[0].trained, mean, deviation, marker="o", capsize=3, color=f"C{i}",
                    label=method if target == targets[0] else None,
                )  # fmt: skip
                if method == "full":
                    axes.axhline(mean, color=f"C{i}", linestyle="--", linewidth=0.8, zorder=0)
        axes.set(xscale="log", xlabel="parameters trained", title=target)
        axes.margins(x=0.15, y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy %")
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
    return path


def draw_targets(tests: Mapping[str, Clouds], path: Path) -> Path:
    """A row for each target, one cloud of each of five classes, below clean ones."""
    clean = {"clean": procedural("OBJ_ONLY", 60, 1024, train=False)}
    rows = [*(clean if _of_the_set(tests) else {}).items(), *tests.items()]
    fewest = min(clouds.points.shape[1] for _, clouds in rows)
    points, parts, titles = [], [], []
    for name, clouds in rows:
        for label in _five(clouds):
            i = int((clouds.labels == label).nonzero()[0])
            points.append(clouds.points[i, :fewest])
            parts.append(None if clouds.parts is None else clouds.parts[i, :fewest])
            titles.append(f"{clouds.names[label]}, {name}")
    labelled = [p for p in parts if p is not None]
    colors = torch.stack(labelled) if len(labelled) == len(parts) else None
    return draw_clouds(torch.stack(points), path, titles=titles, colors=colors)


def _of_the_set(tests: Mapping[str, Clouds]) -> bool:
    """Whether they are of the procedural set's classes, and tell their parts as it does."""
    return all(c.names == NAMES and c.parts is not None for c in tests.values())


def _five(clouds: Clouds) -> list[int]:
    """Five classes, spread over those that there are."""
    classes = sorted(set(clouds.labels.tolist()))
    return [classes[i * len(classes) // 5] for i in range(5)] if len(classes) > 5 else classes
