"""Many adapters on one ViT, each for a row of a batch: beside the base, calls of one row, and PEFT.

Every row has an adapter of its own: a batch has as many rows as there are adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import peft
import timm
import torch
from torch import Tensor, nn

import surgery
from surgery import activate, at, lora, mixed, qkv
from surgery._table import Table
from surgery.rules.rule import Rules

from .timing import Action, Times, interleaved, steady, verdict

MODEL, COUNTS, RANK = "vit_small_patch16_224", (1, 4, 16, 64, 100), 8
BASE, THEIRS, CALLS = "base, one batch", "LoRA, PEFT's mixed batch", "calls of one row"
RULES: dict[str, Rules] = {"LoRA": at(qkv, lora(rank=RANK)), "adapterx_ffn": "adapterx_ffn"}
MOST = {"LoRA": 1.35, "adapterx_ffn": 1.6}  # of the base, with 64 adapters


def report(rounds: int = 1) -> Iterator[Table]:
    """A table for each number of adapters, as it is done; fewer of them in more rounds."""
    return (_table(n, rounds * max(1, 16 // n)) for n in COUNTS)


@torch.no_grad()
def _table(n: int, rounds: int) -> Table:
    torch.manual_seed(0)
    base = timm.create_model(MODEL, num_classes=10).eval()
    x, names = torch.randn(n, 3, 224, 224), [f"n{i}" for i in range(n)]
    operated = {title: _operated(base, rules, names) for title, rules in RULES.items()}
    theirs = _theirs(base, operated["LoRA"], names)
    actions: dict[str, Action] = {BASE: lambda: base(x)}
    for title, model in operated.items():
        actions[f"{title}, mixed"] = _mixed(model, names, x)
        actions[f"{title}, {CALLS}"] = _one_by_one(model, names, x)
    actions[THEIRS] = lambda: theirs(x, adapter_names=names)
    _check(actions)
    times = interleaved({name: steady(act) for name, act in actions.items()}, rounds, warm=0)
    return Table(
        f"Adapters on one {MODEL}: {n}, in a batch of {n}",
        ("", "ms", "to the base", "target", "to the calls"),
        [_row(times, name, n) for name in actions],
        [
            "CPU time, eval, no_grad; ratios of the fastest rounds, median (and range) of 3 runs;",
            f"LoRA of rank {RANK} at qkv; {CALLS}: activate(model, name), and a forward of its row",
        ],
    )


def _operated(base: nn.Module, rules: Rules, names: Sequence[str]) -> nn.Module:
    """A copy with all adapters on it, as if each had been trained."""
    model = copy.deepcopy(base)
    for seed, name in enumerate(names):
        surgery.apply(model, rules, name=name, seed=seed)
    parts: Any = model.surgery
    for p in parts.parameters():
        p.add_(torch.randn_like(p), alpha=0.02)
    return model


def _theirs(base: nn.Module, ours: nn.Module, names: Sequence[str]) -> nn.Module:
    """The same LoRAs by PEFT."""
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["qkv"])
    model: Any = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])  # type: ignore[arg-type]
    for name in names[1:]:
        model.add_adapter(name, config)
    for name in names:
        for i in range(len(model.blocks)):
            layer = model.blocks[i].attn.qkv
            part: Any = ours.get_submodule(f"surgery.{name}").get_submodule(
                f"blocks/{i}/attn/qkv/parallel"
            )
            layer.lora_A[name].weight.copy_(part.A[0])
            layer.lora_B[name].weight.copy_(part.B[0])
    return model.eval()


def _mixed(model: nn.Module, names: Sequence[str], x: Tensor) -> Action:
    def act() -> Any:
        with mixed(model, names):
            return model(x)

    return act


def _one_by_one(model: nn.Module, names: Sequence[str], x: Tensor) -> Action:
    def act() -> Any:
        return torch.cat([activate(model, name)(x[i : i + 1]) for i, name in enumerate(names)])

    return act


def _check(actions: Mapping[str, Action]) -> None:
    """What is compared must agree; it is warm then, too."""
    answers: dict[str, Any] = {name: act() for name, act in actions.items()}
    for title in RULES:
        torch.testing.assert_close(answers[f"{title}, mixed"], answers[f"{title}, {CALLS}"])
    torch.testing.assert_close(answers["LoRA, mixed"], answers[THEIRS])


def _row(times: Times, name: str, n: int) -> tuple[object, ...]:
    title, _, way = name.partition(", ")
    mid, low, high = times.ratios(name, BASE)
    calls = ""
    if way == "mixed":
        calls = f"{times.ratios(name, f'{title}, {CALLS}')[0]:.2f}"
    target = verdict(mid, MOST[title]) if way == "mixed" and n == 64 else ""
    spread = "" if name == BASE else f"{mid:.2f} ({low:.2f} to {high:.2f})"
    return name, f"{1e3 * times.best(name):.0f}", spread, target, calls
