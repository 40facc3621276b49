"""Farthest points and nearest neighbours beside torch_cluster's, and the data path of a step."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pointcloud import augment, batches
from pointcloud.clouds import Clouds as Labelled
from pointcloud.group import group_points, nearest_points
from pointcloud.sample import farthest_points, gather
from surgery._table import Table
from surgery.demo.fit import drawn

from .timing import Action, Times, interleaved, steady, verdict

SIZES = ((32, 1024, 64, 32), (32, 2048, 128, 32), (8, 8192, 512, 32))  # clouds, points, m, k
STEPS = ((8, 1024, 64, 32), (32, 2048, 128, 32))
HAS = 2048  # points of a cloud that is loaded
FPS, KNN, SHARE = 0.2, 0.9, 0.05  # of torch_cluster's time, and of a step's, at most
THEIRS = "torch_cluster"


class Clouds(NamedTuple):
    """What all methods get: points (b, n, 3), their farthest ones (b, m, 3), m and k."""

    points: Tensor
    centers: Tensor
    m: int
    k: int


def report(rounds: int = 5) -> list[Table]:
    """One table of the methods, one of the data path, and on a GPU one of the methods there."""
    tables = [_methods(rounds), _path(rounds)]
    return [*tables, _on_gpu(rounds)] if torch.cuda.is_available() else tables


def clouds(b: int, n: int, m: int, k: int, device: str = "cpu") -> Clouds:
    """Normally distributed points, the same each time."""
    points = torch.randn(b, n, 3, generator=torch.Generator().manual_seed(0)).to(device)
    return Clouds(points, gather(points, farthest_points(points, m)), m, k)


def searches(given: Clouds) -> dict[str, dict[str, Action]]:
    """Of each search the methods that are installed, torch_cluster's first."""
    points, centers, m, k = given
    fps: dict[str, Action] = {
        "auto": lambda: farthest_points(points, m),
        "torch": lambda: farthest_points(points, m, backend="torch"),
    }
    knn: dict[str, Action] = {
        "auto": lambda: torch.ops.pointcloud.nearest(centers, points, k, None, "auto"),
        "auto, with squares": lambda: nearest_points(centers, points, k),
        "torch": lambda: torch.ops.pointcloud.nearest(centers, points, k, None, "torch"),
    }
    if importlib.util.find_spec(THEIRS):
        cluster: Any = importlib.import_module(THEIRS)
        (flat, of), (queries, of_queries) = _flat(points), _flat(centers)
        ratio = (m - 0.5) / points.shape[1]
        fps = {THEIRS: lambda: cluster.fps(flat, of, ratio, random_start=False)} | fps
        knn = {THEIRS: lambda: cluster.knn(flat, queries, k, of, of_queries)} | knn
    return {"farthest points": fps, "nearest points": knn}


def data_path(b: int, n: int, groups: int, size: int) -> Callable[[], object]:
    """What a training step of Point-MAE does with its data: load, sample, augment, group.

    Of b clouds of 2048 points, as published: the 1200 farthest where n is 1024 (all where n is
    2048, which sampling would only permute), n of them drawn, moved and scaled, cut into groups.
    """
    loaded = Labelled(torch.randn(4 * b, HAS, 3), torch.arange(4 * b) % 15, ())
    generator = torch.Generator().manual_seed(0)

    def act() -> object:
        x, _ = next(batches(loaded, b, generator=generator))
        x = augment.scale_translate(drawn(x, n, generator), generator=generator)
        return group_points(x, groups, size)

    return act


def training_step(b: int, n: int, groups: int, size: int) -> Callable[[], object]:
    """One step of full fine-tuning at full size, with what it does with its data."""
    from backbones.point_mae import PointMAE  # needs timm, which the searches do without

    model = PointMAE(15, num_groups=groups, group_size=size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    loaded = Labelled(torch.randn(4 * b, HAS, 3), torch.arange(4 * b) % 15, ())
    generator = torch.Generator().manual_seed(0)

    def act() -> object:
        x, y = next(batches(loaded, b, generator=generator))
        x = augment.scale_translate(drawn(x, n, generator), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        return optimizer.step()

    return act


def _flat(points: Tensor) -> tuple[Tensor, Tensor]:
    b, n, _ = points.shape
    return points.flatten(0, 1), torch.arange(b, device=points.device).repeat_interleave(n)


def _methods(rounds: int) -> Table:
    rows: list[tuple[object, ...]] = []
    notes = ["CPU time; ratios of the fastest rounds, median (and range) of three runs"]
    for size in SIZES:
        for search, actions in searches(clouds(*size)).items():
            times = interleaved({name: steady(act) for name, act in actions.items()}, rounds)
            rows += [(_title(search, size), *_cells(times, name)) for name in actions]
            if THEIRS in actions:
                most = FPS if search == "farthest points" else KNN
                ratio = times.ratios("auto", THEIRS)[0]
                notes.append(f"{_title(search, size)}: {ratio:.3f} {verdict(ratio, most)}")
    if not importlib.util.find_spec(THEIRS):
        notes.append("torch_cluster is not installed: no ratios to it")
    return Table("Searches", ("", "by", "ms", f"to {THEIRS}"), rows, notes)


def _title(search: str, size: tuple[int, int, int, int]) -> str:
    b, n, m, k = size
    of = f" (k = {k})" if search == "nearest points" else ""
    return f"{search}, {b} x {n} to {m}{of}"


def _cells(times: Times, name: str) -> tuple[str, str, str]:
    best = f"{1e3 * times.best(name):.2f}"
    if THEIRS not in times.runs:
        return name, best, "-"
    mid, low, high = times.ratios(name, THEIRS)
    return name, best, f"{mid:.3f} ({low:.3f} to {high:.3f})"


def _path(rounds: int) -> Table:
    actions: dict[str, Action] = {}
    for b, n, groups, size in STEPS:
        given = torch.randn(b, n, 3, generator=torch.Generator().manual_seed(0))
        shape = f"{b} x {n}, {groups} groups of {size}"
        actions[f"load, sample, augment, group: {shape}"] = data_path(b, n, groups, size)
        actions[f"group alone: {shape}"] = _group(given, groups, size)
    first, whole = next(iter(actions)), "a whole training step of Point-MAE: 8 x 1024"
    actions[whole] = training_step(*STEPS[0])
    times = interleaved({name: steady(act) for name, act in actions.items()}, rounds)
    rows: list[tuple[object, ...]] = [(name, f"{1e3 * times.best(name):.2f}") for name in actions]
    share = times.ratios(first, whole)[0]
    notes = [
        "CPU time, the fastest round",
        f"data path of 8 x 1024, of that step: {share:.3f} {verdict(share, SHARE)}",
    ]
    return Table("Data path of a training step", ("", "ms"), rows, notes)


def _group(points: Tensor, groups: int, size: int) -> Action:
    return lambda: group_points(points, groups, size)


def _on_gpu(rounds: int) -> Table:
    rows: list[tuple[object, ...]] = []
    for size in SIZES:
        for search, actions in searches(clouds(*size, device="cuda")).items():
            rows += [
                (_title(search, size), name, f"{1e3 * _elapsed(act, 3 * rounds):.3f}")
                for name, act in actions.items()
            ]
    notes = ["median of the wall clock, synchronised before and after"]
    return Table(f"Searches on {torch.cuda.get_device_name()}", ("", "by", "ms"), rows, notes)


def _elapsed(act: Action, rounds: int) -> float:
    act()
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        act()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)
