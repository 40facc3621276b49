"""TopLoRA, MoLoRA, HydraLoRA and Lily against their formulae, token by token, and against peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import OperationError
from surgery.methods import routed_low_rank as sets
from surgery.parts import routed_low_rank as family
from tests.methods.reference import (
    BOTH,
    agrees,
    blocks,
    close,
    parts,
    starts_as_the_base,
    stirred,
    swin,
    trains_and_comes_off,
    vit_b,
)
from tests.methods.test_weight_updates import adapted, layer, taken


def top(p: Any, x: Tensor) -> Tensor:
    z = p.T @ x
    z = z / (z.square().mean() + torch.finfo(z.dtype).eps).sqrt() * p.norm.weight
    return p.B @ (z.exp() * (p.A @ x))


def softmax(z: Tensor) -> Tensor:
    e = (z - z.max()).exp()
    return e / e.sum()


def mixture(p: Any, x: Tensor) -> Tensor:
    gates, A = softmax(p.router @ x), p.A if len(p.A) > 1 else [p.A[0]] * len(p.B)
    return sum(g * (B @ (down @ x)) for g, B, down in zip(gates, p.B, A, strict=True))  # type: ignore[return-value]


def lily(p: Any, x: Tensor) -> Tensor:
    h = p.A @ x
    return sum(g * (B @ h) for g, B in zip(softmax(p.router @ h), p.ups.B, strict=True))  # type: ignore[return-value]


CASES: dict[str, tuple[list[Any], Any]] = {
    "toplora": (sets.toplora(rank=3), top),
    "molora": (sets.molora(experts=3, rank=2), mixture),
    "hydralora": (sets.hydralora(experts=3, rank=2), mixture),
    "lily": (sets.lily(experts=3, rank=4), lily),
}


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_each_token_has_the_update_of_its_formula(case: str, backbone: str) -> None:
    rules, formula = CASES[case]

    def rewrite(plain: nn.Module, parts: dict[str, Any]) -> None:
        own = {k: p for k, p in parts.items() if not k.startswith("shared/")}
        assert len(own) == len(blocks(plain))
        for key, p in own.items():
            linear = plain.get_submodule(key.removesuffix("/parallel").replace("/", "."))
            beside(linear, p, formula)

    agrees(backbone, rules, rewrite, eps=32)


def beside(linear: Any, p: Any, formula: Any) -> None:
    def forward(x: Tensor) -> Tensor:
        added = torch.stack([formula(p, token) for token in x.reshape(-1, x.shape[-1])])
        return nn.functional.linear(x, linear.weight, linear.bias) + added.reshape(
            *x.shape[:-1], -1
        )

    linear.forward = forward


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_it_starts_as_the_base_trains_comes_off_and_does_not_merge(
    case: str, backbone: str
) -> None:
    assert starts_as_the_base(backbone, CASES[case][0])
    trains_and_comes_off(backbone, CASES[case][0])
    with pytest.raises(OperationError, match=r"merge\(model\) at "):
        surgery.merge(stirred(backbone, CASES[case][0]))


@pytest.mark.parametrize(
    ("rules", "count"),
    [
        (sets.toplora(), 12 * 8 * (2 * 768 + 2304 + 1)),
        (sets.molora(), 12 * 4 * (768 + 8 * (768 + 2304))),
        (sets.hydralora(), 12 * (8 * 768 + 3 * (768 + 8 * 2304))),
        (sets.lily(), 12 * 16 * (768 + 4) + 4 * 16 * 2304),
    ],
    ids=["toplora", "molora", "hydralora", "lily"],
)
def test_it_trains_as_much_of_a_vit_b_as_its_formula_says(rules: Any, count: int) -> None:
    assert surgery.plan(vit_b(), rules).trainable == count


def test_gates_are_shown_for_each_token() -> None:
    model = stirred("vit", sets.molora(experts=3))
    model(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    shown = surgery.routing(model)
    assert len(shown) == 3
    assert all(routed.gates.shape == (2 * 5, 3) for routed in shown.values())
    assert 0 < surgery.balance_loss(model) <= 9


def test_layers_of_lily_of_one_size_share_their_ups() -> None:
    made = parts(surgery.apply(swin(), sets.lily(experts=2, rank=3)))
    ups = {id(p.ups) for key, p in made.items() if not key.startswith("shared/")}
    assert len(ups) == 2, "Swin has two widths"


def test_lily_is_what_peft_makes_of_one_token() -> None:
    """Which of several tokens mixes one B for all: see `lily`."""
    made, theirs = adapted(
        lambda peft: peft.LilyConfig(r=3, num_B=4, scaling=0.5, target_modules=["0"]), layer()
    )
    ups = taken(family.Ups(8, 3, 4).double(), B=theirs.lily_B["default"].weight.reshape(4, 3, 8).mT)
    part = taken(
        family.Lily(12, ups, 0.5).double(),
        A=theirs.lily_A["default"].weight, router=theirs.lily_router["default"].weight,
    )  # fmt: skip
    x = torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        have = layer()(x) + part(x).output
        want = torch.cat([made.double()(token[None]) for token in x])
        assert (have - layer()(x)).abs().max() > 1e-3
        close(have, want)
