"""What an operated ViT costs over its base: forward, and a training step without its optimiser."""

from __future__ import annotations

import timm
import torch
from torch import nn

import surgery
from surgery._table import Table

from .timing import Action, Times, interleaved, steady

MODEL, BATCH = "vit_small_patch16_224", 2
BASE, RULES = "base", ("adapterx_ffn", "adaptformer", "linear_probe")


def report(rounds: int = 6) -> list[Table]:
    """One table: a row for each rule set."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, 3, 224, 224)
    models = {BASE: _model()} | {rules: surgery.apply(_model(), rules) for rules in RULES}
    forward = {name: steady(_forward(model.eval(), x)) for name, model in models.items()}
    forward_times = interleaved(forward, rounds)
    both = {name: steady(_both(model.train(), x)) for name, model in models.items()}
    return [_table(forward_times, interleaved(both, rounds))]


def _model() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(MODEL, num_classes=100)
    return model


def _forward(model: nn.Module, x: torch.Tensor) -> Action:
    def act() -> None:
        model.eval()
        with torch.no_grad():
            model(x)

    return act


def _both(model: nn.Module, x: torch.Tensor) -> Action:
    def act() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(model(x).square().mean())

    return act


def _table(forward: Times, both: Times) -> Table:
    rows: list[tuple[object, ...]] = []
    for name in (BASE, *RULES):
        cells = [name]
        for times in (forward, both):
            mid, low, high = times.ratios(name, BASE)
            cells += [f"{1e3 * times.best(name):.0f}", f"{mid:.3f} ({low:.3f} to {high:.3f})"]
        rows.append(tuple(cells))
    columns = ("", "forward ms", "to the base", "forward + backward ms", "to the base")
    notes = [
        "CPU time; ratios of the fastest rounds, median (and range) of three runs",
        "forward: eval, no_grad; forward + backward: train mode, the base with all trained",
    ]
    return Table(f"Operated {MODEL}, batch {BATCH}", columns, rows, notes)
