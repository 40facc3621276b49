"""Time of `apply` against the size of a model, beside PEFT and a loop written by hand."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

import surgery
from surgery import adapter, at, inside, parallel
from surgery._table import Table
from surgery.rules.rule import Rules

from .timing import Times, fresh, interleaved

WIDTH, RANK, PER_BLOCK = 64, 8, 11
SIZES = (100, 900, 3000, 10000)  # modules, about
NAMES = ("surgery", "by hand", "peft")
FASTER = 15  # times PEFT, at about 900 modules
LINEARS, ALL = inside("blocks.*") & nn.Linear, ["q", "k", "v", "o", "fc1", "fc2"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """A transformer's block as a tree of modules; nobody runs it here."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = Mlp()


class Stack(nn.Module):
    def __init__(self, modules: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(max(modules // PER_BLOCK, 1)))


class LowRank(nn.Module):
    """The two matrices of LoRA: the very parameters that PEFT adds."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.down = nn.Parameter(torch.empty(RANK, width).uniform_(-bound, bound))
        self.up = nn.Parameter(torch.zeros(out, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.down.t() @ self.up.t()


def low_rank(site: surgery.Site) -> nn.Module:
    return LowRank(site.width, site.out)


class Beside(nn.Module):
    """What one writes by hand: a Linear and LoRA's two matrices in its place, nothing checked."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.part = base, LowRank(base.in_features, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.base(x) + self.part(x)
        return out


def by_hand(model: nn.Module, names: list[str]) -> None:
    """Freeze the model, and put a `Beside` in the place of every Linear of these names."""
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in names and isinstance(child, nn.Linear):
                setattr(parent, name, Beside(child))


class Job(NamedTuple):
    """What both do: a small part beside each of the same Linears."""

    title: str
    rules: Rules
    targets: list[str] | None  # None: PEFT has nothing of the kind
    hand: bool = True


JOBS = (
    Job("LoRA's two matrices beside every Linear", at(LINEARS, parallel(low_rank)), ALL),
    Job("LoRA's two matrices beside q and v", at("**.{q,v}", parallel(low_rank)), ["q", "v"]),
    Job(
        "adapter(rank=8) beside every Linear",
        at(LINEARS, parallel(adapter(rank=RANK))),
        ALL,
        hand=False,
    ),
    Job("adapterx_ffn, one shared mixture", "adapterx_ffn", None),
)


def report(rounds: int = 1) -> list[Table]:
    """A table for each kind of work, a row for each size."""
    return [_table(job, rounds) for job in JOBS]


def _table(job: Job, rounds: int) -> Table:
    rows: list[tuple[object, ...]] = []
    pace: list[float] = []  # us a module
    for size in SIZES:
        modules, sites = len(list(Stack(size).modules())), _sites(Stack(size), job)
        times = _times(size, job, rounds * max(1, 3000 // size))
        best = times.best("surgery")
        pace.append(1e6 * best / modules)
        cells = (modules, sites, f"{1e3 * best:.1f}", f"{pace[-1]:.1f}")
        us = [f"{1e6 * times.best(n) / sites:.0f}" if n in times.runs else "" for n in NAMES]
        rows.append((*cells, *us, *_beside(times, size)))
    columns = ("modules", "sites", "ms", "us a module", "us a site", "by hand", "PEFT")
    notes = [
        "CPU time; ratios of the fastest rounds, median (and range) of three runs, new models",
        f"us a module from the smallest to the largest model: x{pace[-1] / pace[0]:.2f}",
    ]
    title = f"apply: {job.title} (Linears of width {WIDTH} and {2 * WIDTH})"
    return Table(title, (*columns, "PEFT / surgery", "target"), rows, notes)


def _beside(times: Times, size: int) -> tuple[str, str]:
    if "peft" not in times.runs:
        return ("", "")
    mid, low, high = times.ratios("peft", "surgery")
    target = f">= {FASTER}: {'met' if mid >= FASTER else 'MISSED'}" if size == 900 else ""
    return f"{mid:.1f} ({low:.1f} to {high:.1f})", target


def _times(size: int, job: Job, rounds: int) -> Times:
    actions = {"surgery": fresh(lambda: Stack(size), lambda model: surgery.apply(model, job.rules))}
    if targets := job.targets:
        actions["peft"] = fresh(lambda: Stack(size), lambda model: _peft(model, targets))
        if job.hand:
            actions["by hand"] = fresh(lambda: Stack(size), lambda model: by_hand(model, targets))
    return interleaved(actions, rounds, warm=size < 1000)


def _peft(model: nn.Module, targets: list[str]) -> nn.Module:
    config = peft.LoraConfig(r=RANK, target_modules=list(targets))
    wrapped: nn.Module = peft.get_peft_model(model, config)
    return wrapped


def _sites(model: nn.Module, job: Job) -> int:
    """How many sites the job has; both must see the same."""
    sites = len(surgery.plan(model, job.rules).sites)
    if job.targets:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = _peft(model, job.targets)
        seen = sum(isinstance(module, LoraLayer) for module in wrapped.modules())
        if seen != sites:
            raise RuntimeError(f"surgery sees {sites} sites, PEFT {seen}: nothing to compare")
    return sites
