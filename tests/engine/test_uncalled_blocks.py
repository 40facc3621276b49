"""Blocks that nobody calls: lists whose elements a loop calls and adds up, `x = attn(x) + x`.

What runs at them is compared with the same model written with blocks that are called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import surgery
from surgery.errors import GraftError
from tests.laws import checks as laws
from tests.laws.checks import raised

WIDTH = 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = q @ k.transpose(-1, -2) / 6
        scores = scores if mask is None else scores + mask
        return self.out(scores.softmax(-1) @ v)  # type: ignore[no-any-return]


def ffn() -> nn.Module:
    layers = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)
    return nn.Sequential(*layers)


def elements() -> list[nn.Module]:
    return [Attention(), ffn(), nn.LayerNorm(WIDTH), nn.Dropout(0.1)]


class Uncalled(nn.ModuleList):
    def __init__(self) -> None:
        super().__init__(elements())
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))


class Called(Uncalled):
    """The same block with a forward."""

    def forward(self, x: Tensor, step: Any) -> Tensor:
        return step(self, x)  # type: ignore[no-any-return]


def plain(e: Any, x: Tensor) -> Tensor:
    x = e[0](x) + x
    return e[1](x) + x  # type: ignore[no-any-return]


def in_place(e: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x += e[0](x)
    x += e[1](x)
    return x


def scaled(e: Any, x: Tensor) -> Tensor:
    x = x + e.scale * F.dropout(e[0](x), 0.1, e.training)
    return torch.addcmul(x, e.scale, e[1](x))


def dropped(e: Any, x: Tensor) -> Tensor:
    x = torch.add(x, e[3](e[0](x)))
    return (e[1](x) / 2).float().add(x)


def side_by_side(e: Any, x: Tensor) -> Tensor:
    return x + e[0](x) + e[1](x)  # type: ignore[no-any-return]


def summed_first(e: Any, x: Tensor) -> Tensor:
    return x + (e[0](x) + e[1](x))  # type: ignore[no-any-return]


def normed_after(e: Any, x: Tensor) -> Tensor:
    x = x + e[0](x)
    return e[2](x + e[1](x))  # type: ignore[no-any-return]


def normed_by_function(e: Any, x: Tensor) -> Tensor:
    x = x + e[0](F.layer_norm(x, (WIDTH,)))
    return x + e[1](x)  # type: ignore[no-any-return]


def without_residual(e: Any, x: Tensor) -> Tensor:
    return e[1](e[0](x))  # type: ignore[no-any-return]


def checkpointed(e: Any, x: Tensor) -> Tensor:
    x = checkpoint(e[0], x, use_reentrant=False) + x
    return checkpoint(e[1], x, use_reentrant=False) + x  # type: ignore[no-any-return]


STEPS = [
    plain, scaled, dropped, side_by_side, summed_first, normed_after,
    normed_by_function, without_residual, checkpointed,
]  # fmt: skip
Step = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    """Blocks and a head; `Kind` says whether blocks are called."""

    def __init__(self, kind: type[Uncalled], step: Step = plain, depth: int = 3) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(kind() for _ in range(depth))
        self.step = step

    def run(self, x: Tensor) -> Tensor:
        for each in self.layers:
            x = each(x, self.step) if isinstance(each, Called) else self.step(each, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.inp(x)))  # type: ignore[no-any-return]


class Pooled(Model):
    """As a ViT: class token and positions are raw sums, and so is what is read behind."""

    def __init__(self, kind: type[Uncalled], step: Step = plain, depth: int = 3) -> None:
        super().__init__(kind, step, depth)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos = nn.Parameter(torch.randn(1, 7, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.inp(x)], 1)
        x = self.run(x + self.pos)
        return self.head(x.mean(1) + x[:, 0])  # type: ignore[no-any-return]


class Inner(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Holding(nn.Module):
    """As vit-pytorch: a module of its own runs the blocks."""

    def __init__(self, kind: type[Uncalled], step: Step = plain) -> None:
        super().__init__()
        self.inner, self.drop = Inner(kind, step), nn.Dropout(0.1)
        self.inp, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.inp(x) * 2)
        return self.head(self.inner(x).mean(1))  # type: ignore[no-any-return]


Build = Callable[..., nn.Module]
BUILDS: list[Build] = [Model, Pooled, Holding]
RULES = ["vpt_deep", "vpt_shallow", "adapterx"]


def inputs(batch: int = 2) -> Tensor:
    return torch.randn(batch, 6, 8, generator=torch.Generator().manual_seed(0))


def twins(build: Build, rules: Any, step: Step = plain) -> tuple[nn.Module, nn.Module]:
    """The model with blocks that nobody calls, and with blocks that are called; stirred parts."""
    made = []
    for kind in (Uncalled, Called):
        torch.manual_seed(0)
        model = build(kind, step).eval()
        surgery.apply(model, rules, example=inputs())
        laws.stir_parts(model)
        made.append(model)
    return made[0], made[1]


def grads(model: nn.Module, run: Any = None) -> dict[str, Tensor]:
    torch.manual_seed(1)
    y = (run or model)(inputs())
    y.square().sum().backward()
    return {"y": y} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_every_way_to_add_up_answers_as_called_blocks(step: Step, rules: str) -> None:
    model, want = twins(Model, rules, step)
    assert_alike(grads(model), grads(want))
    assert_alike(grads(model.train()), grads(want.train()))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_wherever_the_first_value_comes_from_and_the_last_goes(build: Build, rules: str) -> None:
    model, want = twins(build, rules)
    assert_alike(grads(model), grads(want))
    assert_alike(grads(model.train()), grads(want.train()))
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs()), want.eval()(inputs()))


def fresh(build: Build = Model, step: Step = plain) -> nn.Module:
    torch.manual_seed(0)
    return build(Uncalled, step).eval()


def test_what_is_written_in_place_is_refused() -> None:
    model = fresh(step=in_place)
    before = laws.fingerprint(model)
    told = raised(GraftError, lambda: surgery.apply(model, "vpt_deep", example=inputs()))
    assert "writes into a tensor there, x.add_(...)" in str(told)
    laws.assert_same(before, laws.fingerprint(model), "a proof that failed")
