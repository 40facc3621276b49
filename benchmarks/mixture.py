"""The shared mixture of adapters beside Algorithm 1 of Adapter-X written out, at ViT-B sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery._table import Table
from surgery.parts import MixtureOfAdapters
from surgery.rules.routing import Routed, top1

from .timing import Action, Times, interleaved, peak, steady, verdict

BATCH, TOKENS, WIDTH, HEADS, RANK, EXPERTS = 4, 197, 768, 3, 64, 4
TARGETS = {  # forward + backward: (against Algorithm 1, against its own matrix products)
    "dense": (0.55, 1.15),
    "top-1": (0.28, 2.0),
}


class Written(nn.Module):
    """Algorithm 1 (Li et al. 2024), line by line: every expert runs on every sub-token."""

    def __init__(self) -> None:
        super().__init__()
        c = WIDTH // HEADS
        self.router = nn.Linear(c, RANK, bias=False)
        self.embeddings = nn.Parameter(torch.randn(EXPERTS, RANK))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(c, RANK), nn.ReLU(), nn.Linear(RANK, c)) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        u = x.reshape(-1, WIDTH // HEADS)
        gates = torch.softmax(self.router(u) @ F.normalize(self.embeddings, dim=-1).t(), dim=-1)
        outputs = torch.stack([expert(u) for expert in self.experts], dim=1)
        return (gates.unsqueeze(-1) * outputs).sum(dim=1).reshape(x.shape)


class Case(NamedTuple):
    """One kind of mixture and its matrix products alone: forward, and forward + backward."""

    steps: tuple[Action, Action]
    products: tuple[Action, Action]


def report(rounds: int = 40) -> list[Table]:
    """Time and memory, dense and top-1, forward and forward + backward."""
    torch.manual_seed(0)
    written = Written()
    x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
    loop = _steps(written, x)
    cases = {
        "dense": Case(_steps(_fused(written, None), x), _products(1)),
        "top-1": Case(_steps(_fused(written, 1), x), _products(EXPERTS)),
    }
    _check(written, x.detach())
    tables = []
    for i, title in enumerate(("forward", "forward + backward")):
        actions = {"Algorithm 1": steady(loop[i])}
        for name, case in cases.items():
            actions[name] = steady(case.steps[i])
            actions[f"{name}: products"] = steady(case.products[i])
        times = interleaved(actions, rounds, warm=3)
        memory = {name: peak(case.steps[i]) for name, case in cases.items()}
        tables.append(_table(title, times, memory, peak(loop[i])))
    tables[-1].notes.append(f"sub-tokens of each expert: {_loads(written, x.detach())}")
    return tables


def _table(title: str, times: Times, memory: dict[str, int], written: int) -> Table:
    both = title != "forward"
    alone = f"{1e3 * times.best('Algorithm 1'):.2f}"
    first = ("Algorithm 1", alone, "1", "", "", "", f"{written / 2**20:.1f}", "1")
    rows: list[tuple[object, ...]] = [first]
    for name, targets in TARGETS.items():
        cells = [name, f"{1e3 * times.best(name):.2f}"]
        for other, most in zip(("Algorithm 1", f"{name}: products"), targets, strict=True):
            mid, low, high = times.ratios(name, other)
            cells += [f"{mid:.2f} ({low:.2f} to {high:.2f})", verdict(mid, most) if both else ""]
        used = memory[name]
        rows.append((*cells, f"{used / 2**20:.1f}", f"{used / written:.2f}"))
    columns = ("", "ms", "to Algorithm 1", "target", "to its products", "target", "MiB", "to it")
    sizes = f"{BATCH} x {TOKENS} x {WIDTH}, {HEADS} heads, rank {RANK}, {EXPERTS} experts, ReLU"
    notes = [
        "CPU time; ratios of the fastest rounds, median (and range) of three runs; MiB: the most",
        "bytes of new tensors alive at once, outputs and gradients included, parameters not",
    ]
    return Table(f"Mixture of adapters, {title} ({sizes})", columns, rows, notes)


def _steps(module: nn.Module, x: Tensor) -> tuple[Action, Action]:
    """(forward without gradients, forward + backward to the input and all parameters)."""
    up = torch.randn_like(x)

    def run() -> Tensor:
        y = module(x)
        output: Tensor = y.output if isinstance(y, Routed) else y
        return output

    def forward() -> None:
        with torch.no_grad():
            run()

    def both() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        torch.autograd.backward(run(), up)

    return forward, both


def _products(parts: int) -> tuple[Action, Action]:
    """The matrix products alone (two forward, six in all), in `parts` groups of sub-tokens."""
    c, rows, hidden = WIDTH // HEADS, BATCH * TOKENS * HEADS // parts, EXPERTS * RANK // parts
    u, dy = torch.randn(rows, c), torch.randn(rows, c)
    h, dh = torch.randn(rows, hidden), torch.randn(rows, hidden)
    down, up = torch.randn(hidden, c), torch.randn(c, hidden)

    def forward() -> None:
        for _ in range(parts):
            _ = u @ down.t(), h @ up.t()

    def both() -> None:
        forward()
        for _ in range(parts):
            _ = dy @ up, dy.t() @ h, dh @ down, dh.t() @ u

    return forward, both


def _fused(written: Written, top_k: int | None) -> MixtureOfAdapters:
    """Surgery's mixture with the weights of Algorithm 1."""
    mixture = MixtureOfAdapters(WIDTH, RANK, EXPERTS, HEADS, top_k=top_k)
    experts = [list(expert.parameters()) for expert in written.experts]
    stacks = (mixture.down, mixture.down_bias, mixture.up, mixture.up_bias)
    with torch.no_grad():
        mixture.reduction.copy_(written.router.weight)
        mixture.embeddings.copy_(written.embeddings)
        for stacked, weights in zip(stacks, zip(*experts, strict=True), strict=True):
            stacked.copy_(torch.stack(weights))
    return mixture


def _check(written: Written, x: Tensor) -> None:
    """What is compared must agree."""
    with torch.no_grad():
        torch.testing.assert_close(_fused(written, None)(x).output, written(x))


def _loads(written: Written, x: Tensor) -> str:
    gates = _fused(written, 1)(x).gates
    return ", ".join(f"{int(n)}" for n in top1(gates).sum(dim=0))
