"""Adapt a small vision transformer from printed glyphs to handwritten digits, in several ways.

The backbone has never seen a digit. The target is scikit-learn's set of 1,797 real digits (8x8):
20 of each class to train on, 300 images put aside once and for all to choose the backbone's
recipe and the learning rates by, and 897 to test on, which decide nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch import Tensor, nn

from .._table import Table
from ..engine.apply import apply, parameters, revert
from ..engine.losses import balance_loss, routing
from ..engine.planning import plan
from ..engine.reports import draw_loads
from ..state.checkpoint import load, save
from . import glyphs

METHODS = [
    "linear_probe", "full", "adapter", "adaptformer", "lora", "ssf", "arc", "vpt_deep",
    "adapterx_ffn", "adapterx",
]  # fmt: skip
PER_CLASS, BATCH, EPOCHS = 20, 50, 40
BALANCE = 0.01  # weight of the load-balance loss, as usual (Li et al. 2024, Eq. 7)
# The best of RATES on the validation images, mean of 3 seeds: `choose_rates()` prints them all.
RATES = (1e-3, 3e-3, 1e-2)
RATE = {
    "linear_probe": 1e-2,
    "full": 1e-3,
    "adapter": 1e-2,
    "adaptformer": 3e-3,
    "lora": 1e-2,
    "ssf": 1e-2,
    "arc": 3e-3,
    "vpt_deep": 1e-2,
    "adapterx_ffn": 3e-3,
    "adapterx": 1e-2,
}


class Images(NamedTuple):
    """x (n, 1, 16, 16), ink 0..1; y (n,), classes 0..9."""

    x: Tensor
    y: Tensor


class Split(NamedTuple):
    """What is trained on, chosen by, and judged by."""

    train: Images
    validation: Images
    test: Images


class Result(NamedTuple):
    """One run: the tuned model, trained parameters but the head's, accuracy 0..1, seconds."""

    model: nn.Module
    trained: int
    accuracy: float
    seconds: float


def digits(seed: int) -> Split:
    """Real digits, enlarged as the glyphs were: validation and test fixed, `seed` draws the rest.

    Of each class 30 are for validation, 60 a pool of which 20 are drawn to train on, and all
    others for the test.
    """
    bunch = load_digits()
    x = glyphs.enlarge(torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16)
    y = torch.tensor(bunch.target)
    fixed, drawn = torch.Generator().manual_seed(1234), torch.Generator().manual_seed(seed)
    rows: list[list[Tensor]] = [[], [], []]
    for digit in range(10):
        of_class = (y == digit).nonzero()[:, 0]
        of_class = of_class[torch.randperm(len(of_class), generator=fixed)]
        pool = of_class[30:90][torch.randperm(60, generator=drawn)]
        shares = (pool[:PER_CLASS], of_class[:30], of_class[90:])
        for part, share in zip(rows, shares, strict=True):
            part.append(share)
    return Split(*(Images(x[torch.cat(part)], y[torch.cat(part)]) for part in rows))


def tune(
    method: str, data: Images, *, seed: int, rate: float, epochs: int, step: Callable[[], None]
) -> nn.Module:
    """The pretrained backbone with a fresh head, operated by `method` and trained on `data`."""
    torch.manual_seed(seed)
    model: nn.Module = glyphs.pretrained(num_classes=10)
    apply(model, rules=method, seed=seed)
    optimizer = torch.optim.AdamW(parameters(model), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=epochs * len(data.y) // BATCH, pct_start=0.1
    )
    model.train()
    for x, y in _batches(data, epochs):
        loss = F.cross_entropy(model(x), y) + BALANCE * balance_loss(model)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, data: Images) -> float:
    """Fraction of `data` named rightly."""
    return float((model(data.x).argmax(1) == data.y).float().mean())


def run(
    *,
    methods: list[str] | None = None,
    seeds: int = 3,
    epochs: int | None = None,
    pretrain: bool = False,
    out: Path = Path("out"),
) -> None:
    """The whole demo: compare, then save, load and revert, and draw the load of the experts."""
    chosen = methods or METHODS
    for method in chosen:
        plan(glyphs.pretrained(10), method)  # a wrong name is told before any work
    out.mkdir(parents=True, exist_ok=True)
    if pretrain:
        glyphs.pretrain()
    print("Backbone: a ViT pretrained on printed letters and symbols. Target: real digits.")
    results = compare(chosen, seeds, epochs or EPOCHS)
    print(table(results, epochs or EPOCHS))
    routed = [m for m in chosen if routing(results[m][-1].model)]
    method = routed[-1] if routed else chosen[-1]
    prove(method, results[method][-1].model, digits(0).test, out)


def compare(methods: list[str], seeds: int, epochs: int) -> dict[str, list[Result]]:
    """Every method with every seed, each run from the same backbone and on the same images."""
    results: dict[str, list[Result]] = {}
    splits = [digits(seed) for seed in range(seeds)]
    steps = epochs * PER_CLASS * 10 // BATCH
    with Progress() as progress:
        for method in methods:
            bar = progress.add_task(f"{method:<13}", total=seeds * steps)
            step = partial(progress.advance, bar)
            results[method] = [
                _tuned(method, split, seed, epochs, step) for seed, split in enumerate(splits)
            ]
    return results


def _tuned(method: str, split: Split, seed: int, epochs: int, step: Callable[[], None]) -> Result:
    start = time.perf_counter()
    rate = RATE.get(method, 3e-3)
    model = tune(method, split.train, seed=seed, rate=rate, epochs=epochs, step=step)
    seconds = time.perf_counter() - start
    trained = _numel(parameters(model)) - _numel(_head(model))
    return Result(model, trained, accuracy(model, split.test), seconds)


def table(results: dict[str, list[Result]], epochs: int) -> Table:
    """One row a method; the spread is the standard deviation over seeds."""
    backbone = _numel(glyphs.build(0).parameters())
    head = _numel(_head(glyphs.build(10)))
    rows: list[tuple[object, ...]] = []
    for method, runs in results.items():
        scores = [100 * r.accuracy for r in runs]
        spread = f"{statistics.stdev(scores):.1f}" if len(scores) > 1 else "-"
        mean, seconds = statistics.mean(scores), statistics.mean(r.seconds for r in runs)
        share = f"{100 * runs[0].trained / backbone:.2f}"
        rows.append((method, runs[0].trained, share, f"{mean:.1f}", spread, f"{seconds:.1f}"))
    seeds = len(next(iter(results.values())))
    notes = [
        f"{PER_CLASS} digits a class, {epochs} epochs; backbone {backbone:,}; all train the head "
        f"too ({head}).",
        f"Mean and standard deviation of {seeds} seeds: what differs by less is not told apart.",
    ]
    columns = ("method", "trained", "% of backbone", "accuracy %", "+-", "seconds a run")
    return Table("Printed glyphs to handwritten digits", columns, rows, notes)


def prove(method: str, model: nn.Module, test: Images, out: Path) -> None:
    """Save, load into a fresh model, revert; draw the load of the experts where there are any."""
    with torch.inference_mode():
        answers = model(test.x)
    file = save(model, out / f"{method}.safetensors")
    again = load(glyphs.pretrained(10), file).eval()
    with torch.inference_mode():
        same = torch.equal(again(test.x), answers)
    print(f"saved   {file} ({file.stat().st_size / 1024:.0f} KiB)")
    print(f"loaded  into a fresh model: outputs equal to the last bit: {same}")
    if loads := routing(model):
        picture = draw_loads(loads, out / "loads.png", f"{method}: load of each expert")
        print(f"drew    {picture}")
    revert(model)
    base = dict(glyphs.pretrained(10).state_dict())
    back = {k: v for k, v in model.state_dict().items() if k not in glyphs.HEAD}
    equal = all(torch.equal(base[key], value) for key, value in back.items())
    print(f"reverted: every tensor of the backbone equal to the last bit: {equal}")


def choose_rates() -> None:
    """Print the validation accuracy of every method at every rate, mean of 3 seeds."""
    for method in METHODS:
        for rate in RATES:
            scores = []
            for seed in range(3):
                data = digits(seed)
                model = tune(
                    method, data.train, seed=seed, rate=rate, epochs=EPOCHS, step=lambda: None
                )
                scores.append(accuracy(model, data.validation))
            print(f"{method:<13} {rate:.0e} {100 * statistics.mean(scores):.1f}", flush=True)


def _head(model: nn.Module) -> Iterator[nn.Parameter]:
    return model.get_submodule("head").parameters()


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _batches(data: Images, epochs: int) -> Iterator[Images]:
    for _ in range(epochs):
        shuffled = torch.randperm(len(data.y))
        for start in range(0, len(shuffled), BATCH):
            rows = shuffled[start : start + BATCH]
            yield Images(data.x[rows], data.y[rows])


if __name__ == "__main__":
    run()
