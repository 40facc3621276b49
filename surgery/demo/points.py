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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

import surgery
from backbones.checkpoint import load_checkpoint
from backbones.point_mae import PointMAE, PointMAEPretrain
from pointcloud.augment import scale_translate
from pointcloud.clouds import Clouds
from pointcloud.draw import draw_clouds
from pointcloud.metrics import overall_accuracy
from pointcloud.shapes import procedural
from surgery.rule import Rule, Rules
from surgery.rulesets.adapterx import adapterx_ffn, daptx
from surgery.rulesets.points import dapt
from surgery.table import Table

from .fit import Augment, Source, answers, fit, steps

METHODS = ["linear_probe", "full", "dapt", "daptx", "adapterx_ffn"]
HARD = ["OBJ_BG", "PB_T50_RS"]
PROMPTED = {"dapt", "daptx", "idpt"}  # whose head reads the prompts
BALANCE = 0.01  # weight of the load-balance loss, as usual (Li et al. 2024, Eq. 7)
Step = Callable[[], None]
Split = Callable[[int], tuple[Clouds, Clouds]]  # of a seed: to train on, to test on
RANKED: dict[str, Callable[..., list[Rule]]] = {
    "dapt": dapt, "daptx": daptx, "adapterx_ffn": adapterx_ffn
}  # fmt: skip

# The small recipe: 0.5 M parameters, 60 clouds of a class; ranks a quarter of those at width 384,
# as the width is; learning rates the best of RATES on validation clouds, see `choose`.
SMALL: dict[str, Any] = {
    "num_groups": 32, "group_size": 16, "embed_dim": 96, "depth": 4, "num_heads": 4,
}  # fmt: skip
TRAIN, TEST, POINTS, EPOCHS, PRETRAIN = 900, 1500, 512, 8, 10
RANK = {"dapt": 16, "daptx": 8, "adapterx_ffn": 16}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
RATE = {"linear_probe": 3e-3, "full": 1e-3, "dapt": 3e-3, "daptx": 3e-3, "adapterx_ffn": 3e-3}


class Recipe(NamedTuple):
    """sizes of Point-MAE, the rules of a method, AdamW's rate for it; how long and on what."""

    sizes: dict[str, Any]
    rules: Callable[[str], Rules]
    rate: Callable[[str], float]
    epochs: int
    batch: int
    points: int
    augment: Augment = scale_translate
    decay: float = 0.05
    device: str = "cpu"

    @property
    def mark(self) -> str:
        """What runs must have in common to be of one table."""
        return repr((self.sizes, self.epochs, self.batch, self.points, self.decay))

    def model(self, classes: int, method: str = "") -> PointMAE:
        """A Point-MAE whose head reads what the method makes."""
        reads = ("cls", "prompt", "patch") if method in PROMPTED else ("cls", "patch")
        return PointMAE(classes, **self.sizes, reads=reads).to(self.device)


class Result(NamedTuple):
    """One run: trained parameters, the head's among them; accuracy 0..1; seconds."""

    target: str
    method: str
    seed: int
    trained: int
    accuracy: float
    seconds: float


def small(epochs: int | None = None) -> Recipe:
    """The recipe of `surgery demo --points`."""
    sizes = {**SMALL, "drop_path": 0.0, "head_dim": 32, "drop_rate": 0.1}
    return Recipe(
        sizes, narrow, lambda method: RATE.get(method, 3e-3), epochs or EPOCHS, 30, POINTS
    )


def narrow(method: str) -> Rules:
    """The rules of a method at width 96."""
    return RANKED[method](rank=RANK[method]) if method in RANKED else method


def drawn(difficulty: str, seed: int) -> tuple[Clouds, Clouds]:
    """Procedural clouds to train on, 60 of a class; and to test on, the same for every seed."""
    train = procedural(difficulty, TRAIN, POINTS, seed=100 + seed)
    return train, procedural(difficulty, TEST, POINTS, train=False)


def pretrain(
    recipe: Recipe, source: Source, file: Path, *, masked: bool = False, step: Step = lambda: None
) -> Path:
    """Train a whole model on clouds, by their labels or by masking, and keep its backbone."""
    torch.manual_seed(0)
    sizes = {k: v for k, v in recipe.sizes.items() if k not in ("head_dim", "drop_rate")}
    hidden = {"decoder_depth": max(1, sizes["depth"] // 3), "decoder_heads": sizes["num_heads"]}
    model: nn.Module = (
        recipe.model(len(source.names))
        if isinstance(source, Clouds) and not masked
        else PointMAEPretrain(**sizes, **hidden)
    ).to(recipe.device)
    whole = isinstance(model, PointMAEPretrain)
    loss = (lambda x, y: model(x)) if whole else _supervised(model)
    fit(
        model, loss, source, points=recipe.points, epochs=recipe.epochs, batch=recipe.batch,
        rate=1e-3, decay=recipe.decay, augment=recipe.augment, step=step,
        keep=file.with_suffix(".resume"),
    )  # fmt: skip
    state = {k: v.cpu() for k, v in model.state_dict().items() if "cls_head" not in k}
    torch.save({"base_model": state, "epoch": recipe.epochs}, file)
    return file


def tune(
    method: str, recipe: Recipe, train: Clouds, backbone: Path, *, seed: int, step: Step,
    rate: float | None = None, keep: Path | None = None,
) -> nn.Module:  # fmt: skip
    """The backbone with a new head, operated by `method` and trained on `train`."""
    torch.manual_seed(seed)
    model = recipe.model(len(train.names), method)
    load_checkpoint(model, backbone)
    surgery.apply(model, recipe.rules(method), seed=seed)
    return fit(
        model, _supervised(model), train, points=recipe.points, epochs=recipe.epochs,
        batch=recipe.batch, rate=rate or recipe.rate(method), decay=recipe.decay, seed=seed,
        augment=recipe.augment, step=step, keep=keep,
    )  # fmt: skip


def _supervised(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        wrong = F.cross_entropy(model(x), y)
        done = hasattr(model, "surgery")
        return wrong + BALANCE * surgery.balance_loss(model) if done else wrong

    return loss


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

    targets  by name, from a seed to the clouds to train and to test on
    out      a folder: a line for every run in results.jsonl, and the first seed's adapters
    """
    file, mark = out / "results.jsonl", f"{recipe.mark} from {backbone.name}"
    lines = file.read_text().splitlines() if file.is_file() else []
    known = [json.loads(line) for line in lines]
    done = {tuple(r["run"][:3]): Result(*r["run"]) for r in known if r["recipe"] == mark}
    results: list[Result] = []
    with Progress() as progress:
        for name, clouds in targets.items():
            for method in methods:
                bar = progress.add_task(f"{name} {method:<13}", total=None)
                for seed in range(seeds):
                    result = done.get((name, method, seed))
                    if result is None:
                        train, test = clouds(seed)
                        total = seeds * recipe.epochs * steps(train, recipe.batch)
                        progress.update(bar, total=total)
                        step = partial(progress.advance, bar)
                        result = _one(name, method, recipe, train, test, backbone, seed, step, out)
                        with file.open("a") as lines_of:
                            lines_of.write(json.dumps({"recipe": mark, "run": result}) + "\n")
                    results.append(result)
                progress.update(bar, total=1, completed=1)
    return results


def _one(
    target: str, method: str, recipe: Recipe, train: Clouds, test: Clouds, backbone: Path,
    seed: int, step: Step, out: Path,
) -> Result:  # fmt: skip
    start = time.perf_counter()
    keep = out / f"{target}-{method}-{seed}.resume"
    model = tune(method, recipe, train, backbone, seed=seed, step=step, keep=keep)
    seconds = time.perf_counter() - start
    accuracy = overall_accuracy(answers(model, test, points=recipe.points), test.labels)
    if seed == 0:
        surgery.save(model, out / f"{target}-{method}.safetensors")
    trained = sum(p.numel() for p in surgery.parameters(model))
    return Result(target, method, seed, trained, accuracy, seconds)


def table(results: list[Result], title: str) -> Table:
    """One row for a target and a method; how daptx stands to full fine-tuning below."""
    runs: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        runs.setdefault((result.target, result.method), []).append(result)
    rows: list[tuple[object, ...]] = []
    notes: list[str] = []
    for (target, method), own in runs.items():
        whole = runs.get((target, "full"), own)
        scores, share = [100 * r.accuracy for r in own], own[0].trained / whole[0].trained
        spread = f"{statistics.stdev(scores):.1f}" if len(scores) > 1 else "-"
        seconds = statistics.mean(r.seconds for r in own)
        told = f"{100 * share:.2f}", f"{statistics.mean(scores):.1f}", spread, f"{seconds:.1f}"
        rows.append((target, method, own[0].trained, *told))
        if method == "daptx" and whole is not own:
            ahead = statistics.mean(scores) - statistics.mean(100 * r.accuracy for r in whole)
            word = "ahead of" if ahead > 0 else "behind"
            notes.append(
                f"{target}: daptx is {abs(ahead):.1f} points {word} full fine-tuning, "
                f"with {100 * share:.1f} % of what that trains."
            )
    seeds = max(map(len, runs.values()))
    notes.append(f"Mean and standard deviation of {seeds} seeds; every method trains a new head.")
    columns = ("target", "method", "trained", "% of full", "accuracy %", "+-", "seconds a run")
    return Table(title, columns, rows, notes)


def draw_tradeoff(results: list[Result], path: Path) -> Path:
    """Accuracy against what is trained, a panel for each target; bars are standard deviations."""
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(r.target for r in results))
    figure = Figure(figsize=(4.6 * len(targets), 3.6), layout="constrained")
    for axes, target in zip(_panels(figure, len(targets)), targets, strict=True):
        methods = dict.fromkeys(r.method for r in results if r.target == target)
        for method in methods:
            own = [r for r in results if (r.target, r.method) == (target, method)]
            scores = [100 * r.accuracy for r in own]
            mean, spread = statistics.mean(scores), statistics.pstdev(scores)
            axes.errorbar(own[0].trained, mean, spread, marker="o", capsize=3)
            axes.annotate(
                method, (own[0].trained, mean), (6, 4), textcoords="offset points", fontsize=9
            )
        axes.set(xscale="log", xlabel="parameters trained", ylabel="accuracy %", title=target)
        axes.margins(x=0.25, y=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path


def _panels(figure: Any, number: int) -> list[Any]:
    return list(figure.subplots(1, number, squeeze=False)[0])


def run_short(
    *,
    methods: list[str] | None = None,
    seeds: int = 3,
    epochs: int | None = None,
    pretrain: bool = False,
    out: Path = Path("out"),
) -> None:
    """The demo in its short form: small, on PB_T50_RS alone; `pretrain`: the backbone anew."""
    if pretrain:
        (out / "backbone-labels.pth").unlink(missing_ok=True)
    run(recipe=small(epochs), methods=methods, seeds=seeds, out=out)


def run(
    *,
    recipe: Recipe | None = None,
    targets: Mapping[str, Split] | None = None,
    methods: list[str] | None = None,
    seeds: int = 3,
    backbone: Path | None = None,
    source: Source | None = None,
    masked: bool = False,
    out: Path = Path("out"),
) -> None:
    """The whole demo: a backbone from clean objects, hard targets, a table and pictures.

    recipe    None: the small one
    targets   by name, from a seed to the clouds to train and to test on; None: PB_T50_RS
    backbone  a published checkpoint; None: one is trained on `source`, with labels or `masked`
    source    None: procedural clouds, OBJ_ONLY
    """
    recipe, chosen = recipe or small(), methods or METHODS
    targets = targets or {HARD[-1]: partial(drawn, HARD[-1])}
    for method in chosen:
        surgery.plan(recipe.model(15, method), recipe.rules(method))  # wrong names, before any work
    out.mkdir(parents=True, exist_ok=True)
    backbone = backbone or made(recipe, out, source, masked)
    results = compare(recipe, targets, backbone, methods=chosen, seeds=seeds, out=out)
    print(table(results, f"Point-MAE to harder clouds, {recipe.epochs} epochs"))
    print(f"drew    {show(targets, out)}")
    print(f"drew    {draw_tradeoff(results, out / 'tradeoff.png')}")
    name, split = list(targets.items())[-1]
    last = "daptx" if "daptx" in chosen else chosen[-1]
    prove(recipe, backbone, split(0)[1], last, out / f"{name}-{last}.safetensors", out)


def made(recipe: Recipe, out: Path, source: Source | None = None, masked: bool = False) -> Path:
    """The backbone, trained on clean objects; read back where it was made before."""
    file = out / f"backbone-{'masked' if masked else 'labels'}.pth"
    if not file.is_file():
        source = procedural("OBJ_ONLY", 1500, recipe.points) if source is None else source
        once = recipe._replace(epochs=PRETRAIN if recipe.epochs < 100 else recipe.epochs)
        with Progress() as progress:
            bar = progress.add_task("backbone", total=once.epochs * steps(source, once.batch))
            pretrain(once, source, file, masked=masked, step=partial(progress.advance, bar))
    return file


def show(targets: Mapping[str, Split], out: Path) -> Path:
    """A picture of five test clouds of each target, below five clean ones."""
    clean = procedural("OBJ_ONLY", 15, 1024, train=False)
    seen = {"OBJ_ONLY": clean, **{name: split(0)[1] for name, split in targets.items()}}
    fewest = min(clouds.points.shape[1] for clouds in seen.values())
    points = torch.cat([clouds.points[:5, :fewest] for clouds in seen.values()])
    titles = [f"{name}: {c.names[i]}" for name, c in seen.items() for i in c.labels[:5].tolist()]
    return draw_clouds(points, out / "clouds.png", titles=titles)


def prove(recipe: Recipe, backbone: Path, test: Clouds, method: str, file: Path, out: Path) -> None:
    """The saved adapter on a fresh backbone: its accuracy again, its routers, and back."""
    model = recipe.model(len(test.names), method)
    load_checkpoint(model, backbone)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    surgery.load(model, file).eval()
    accuracy = overall_accuracy(answers(model, test, points=recipe.points), test.labels)
    size = file.stat().st_size / 1024
    print(f"loaded  {file} ({size:.0f} KiB) into a fresh model: {100 * accuracy:.1f} % again")
    if loads := surgery.routing(model):
        picture = surgery.draw_loads(loads, out / "loads.png", f"{method}: load of each expert")
        print(f"drew    {picture}")
    back = surgery.revert(model).state_dict()
    equal = all(torch.equal(back[key], value) for key, value in base.items())
    print(f"reverted: every tensor of the backbone equal to the last bit: {equal}")


def choose(difficulties: list[str] = HARD, seeds: int = 3, out: Path = Path("out")) -> None:
    """Print the validation accuracy of every method at every rate, mean of the seeds."""
    recipe = small()
    backbone = made(recipe, out)
    for name in difficulties:
        held = procedural(name, 600, POINTS, seed=7)
        for method in METHODS:
            for rate in RATES:
                scores = []
                for seed in range(seeds):
                    model = tune(
                        method, recipe, drawn(name, 50 + seed)[0], backbone, seed=seed,
                        step=lambda: None, rate=rate,
                    )  # fmt: skip
                    told = answers(model, held, points=recipe.points)
                    scores.append(overall_accuracy(told, held.labels))
                print(
                    f"{name} {method:<13} {rate:.0e} {100 * statistics.mean(scores):.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    run()
