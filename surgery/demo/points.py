"""Adapt a Point-MAE from clean objects to cluttered and partial ones, in several ways.

Small, on the CPU, with procedural clouds: `surgery demo --points`. Full size, with published data
and checkpoints, on a GPU: `examples/point_mae.py`. Test clouds decide nothing: learning rates were
chosen on others, and the last epoch is the one that counts.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path

import torch
from rich.progress import Progress

from pointcloud.clouds import Clouds
from pointcloud.shapes import procedural

from ..engine.apply import parameters, revert
from ..engine.losses import routing
from ..engine.planning import plan
from ..engine.reports import draw_loads
from ..state.checkpoint import load, save
from .fit import Source, steps
from .pictures import Result, draw_targets, draw_tradeoff, table
from .recipe import (
    POINTS,
    PRETRAIN,
    RATES,
    Recipe,
    Step,
    digest,
    load_backbone,
    pretrained_backbone,
    score,
    small,
    tune,
)

METHODS = ["linear_probe", "full", "dapt", "daptx", "adapterx_ffn"]
HARD = ["OBJ_BG", "PB_T50_RS"]
TRAIN, TEST = 900, 1500  # clouds
Split = Callable[[int], tuple[Clouds, Clouds]]  # of a seed: to train on, to test on


def drawn(difficulty: str, seed: int) -> tuple[Clouds, Clouds]:
    """Procedural clouds to train on, 60 of a class; and to test on, the same for every seed."""
    train = procedural(difficulty, TRAIN, POINTS, seed=100 + seed)
    return train, procedural(difficulty, TEST, POINTS, train=False)


def compare(
    recipe: Recipe,
    targets: Mapping[str, Split],
    backbone: Path,
    *,
    methods: list[str],
    seeds: int,
    out: Path,
) -> list[Result]:
    """Every method on every target with every seed; runs that are done already are read back.

    out  a folder: a line for every run in results.jsonl, its adapter in a file of its own
    """
    known, base, results = _known(out / "results.jsonl"), digest(backbone), list[Result]()
    with Progress() as progress:
        bars = {(t, m): progress.add_task(f"{t} {m:<13}") for t in targets for m in methods}
        for name, split in targets.items():
            for seed in range(seeds):
                train, test = split(seed)
                data = digest(train), digest(test)
                for method in methods:
                    bar, length = bars[name, method], recipe.epochs * steps(train, recipe.batch)
                    progress.update(bar, total=seeds * length)
                    blank = Result(
                        name, method, seed, 0, 0, 0.0, 0.0, recipe.mark(method, base, *data)
                    )
                    result = known.get(blank.stem)
                    if result is None:
                        step = partial(progress.advance, bar)
                        result = _tuned(blank, recipe, train, test, backbone, step, out)
                    progress.update(bar, completed=(seed + 1) * length)
                    results.append(result)
    return sorted(results, key=lambda r: ([*targets].index(r.target), methods.index(r.method)))


def _known(file: Path) -> dict[str, Result]:
    """The runs that a file has a line of, by their stems."""
    known: dict[str, Result] = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            result = Result(*json.loads(line))
        except (ValueError, TypeError):  # half a line of a run that was stopped
            continue
        known[result.stem] = result
    return known


def _tuned(
    blank: Result, recipe: Recipe, train: Clouds, test: Clouds, backbone: Path, step: Step,
    out: Path,
) -> Result:  # fmt: skip
    """A run that was not done before; its line is written, and its adapter."""
    start = time.perf_counter()
    model = tune(
        blank.method, recipe, train, backbone, seed=blank.seed, step=step,
        keep=out / f"{blank.stem}.resume",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    result = blank._replace(
        trained=sum(p.numel() for p in parameters(model)),
        whole=sum(p.numel() for p in recipe.model(len(train.names)).parameters()),
        accuracy=score(model, test, recipe),
        seconds=seconds,
    )
    save(model, out / f"{result.stem}.safetensors")
    with (out / "results.jsonl").open("a") as lines:
        lines.write(f"\n{json.dumps(result)}\n")
    return result


def run_short(
    *,
    methods: list[str] | None = None,
    seeds: int = 3,
    epochs: int | None = None,
    pretrain: bool = False,
    out: Path = Path("out"),
) -> None:
    """The demo in its short form: small, on PB_T50_RS alone; `pretrain`: the backbone anew."""
    run(recipe=small(epochs), methods=methods, seeds=seeds, anew=pretrain, out=out)


def run(
    *,
    recipe: Recipe | None = None,
    first: Recipe | None = None,
    targets: Mapping[str, Split] | None = None,
    methods: list[str] | None = None,
    seeds: int = 3,
    backbone: Path | None = None,
    source: Source | None = None,
    masked: bool = False,
    anew: bool = False,
    out: Path = Path("out"),
) -> None:
    """The whole demo: a backbone from clean objects, hard targets, a table and pictures.

    recipe    None: the small one; first: that of the backbone
    targets   by name, from a seed to the clouds to train and to test on; None: PB_T50_RS
    backbone  a published checkpoint; None: one is trained on `source`, with labels or `masked`
    source    None: procedural clouds, OBJ_ONLY
    """
    recipe = recipe or small()
    chosen = list(dict.fromkeys(methods or METHODS))
    splits = {HARD[-1]: partial(drawn, HARD[-1])} if targets is None else targets
    splits = {name: lru_cache(maxsize=1)(split) for name, split in splits.items()}
    for method in chosen:
        plan(recipe.model(15, method), recipe.rules(method))  # wrong names, before any work
    for name, split in splits.items():
        if (fewest := min(c.points.shape[1] for c in split(0))) < recipe.points:
            raise ValueError(
                f"{name} has clouds of {fewest} points, {recipe.points} are asked for."
            )
    out.mkdir(parents=True, exist_ok=True)
    if backbone is None:
        first = first or recipe._replace(epochs=PRETRAIN)
        backbone = pretrained_backbone(first, out, source, masked=masked, anew=anew)
    print(f"backbone {backbone}\n{load_backbone(recipe.model(15), backbone)}")
    results = compare(recipe, splits, backbone, methods=chosen, seeds=seeds, out=out)
    print(table(results, f"Point-MAE to harder clouds, {recipe.epochs} epochs"))
    tests = {name: split(0)[1] for name, split in splits.items()}
    print(f"drew    {draw_targets(tests, out / 'clouds.png')}")
    print(f"drew    {draw_tradeoff(results, out / 'tradeoff.png')}")
    prove(recipe, backbone, tests, results, out)


def prove(
    recipe: Recipe, backbone: Path, tests: Mapping[str, Clouds], results: list[Result], out: Path
) -> None:
    """A saved adapter on a fresh backbone: its accuracy again, its routers, and back."""
    of_target = [r for r in results if r.seed == 0 and r.target == results[-1].target]
    result = next((r for r in of_target if r.method == "daptx"), of_target[-1])
    file, test = out / f"{result.stem}.safetensors", tests[result.target]
    model = recipe.model(len(test.names), result.method)
    load_backbone(model, backbone)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    load(model, file).eval()
    size, again = file.stat().st_size / 1024, score(model, test, recipe)
    print(
        f"loaded  {file} ({size:.0f} KiB) into a fresh model: "
        f"{100 * again:.1f} %, as when it was trained: {again == result.accuracy}"
    )
    if loads := routing(model):
        title = f"{result.method}: load of each expert"
        print(f"drew    {draw_loads(loads, out / 'loads.png', title)}")
    back = revert(model).state_dict()
    equal = all(torch.equal(back[key], value) for key, value in base.items())
    print(f"reverted: every tensor of the backbone equal to the last bit: {equal}")


def choose_rates(difficulties: list[str] = HARD, seeds: int = 3, out: Path = Path("out")) -> None:
    """Print the validation accuracy of every method at every rate, mean of the seeds."""
    recipe = small()
    backbone = pretrained_backbone(recipe._replace(epochs=PRETRAIN), out)
    for name in difficulties:
        validation = procedural(name, 600, POINTS, seed=7)
        for method in METHODS:
            for rate in RATES:
                scores = []
                for seed in range(seeds):
                    train = drawn(name, 50 + seed)[0]
                    model = tune(method, recipe, train, backbone, seed=seed, rate=rate)
                    scores.append(score(model, validation, recipe))
                mean = 100 * statistics.mean(scores)
                print(f"{name} {method:<13} {rate:.0e} {mean:.1f}", flush=True)


if __name__ == "__main__":
    run_short()
