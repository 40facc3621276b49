"""The balance loss: its gradient in both ways to have it, its value, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import append, at, ffn, moa, parallel, prepend, shared
from tests.engine.balanced import (
    BOTH_KINDS,
    BOTH_WAYS,
    WAYS,
    WEIGHT,
    assert_close,
    explicit,
    implicit,
    inputs,
    operated,
    reference,
    router,
)
from tests.laws.checks import raised
from tests.models import images, tiny_vit


def test_the_balance_loss_matters_in_these_tests() -> None:
    """Without it the router's gradient is another: a missing one would be seen."""
    want, without = router(reference()), router(implicit(operated()))
    assert (want - without).abs().max() > 0.01 * want.abs().max()


@BOTH_KINDS
@BOTH_WAYS
def test_eager(way: str, top_k: int | None) -> None:
    balance, run = WAYS[way]
    assert_close(run(operated(balance=balance, top_k=top_k)), reference(top_k))


def test_balance_loss_before_a_forward_is_refused() -> None:
    for model in (operated(), copy.deepcopy(operated())):
        raised(surgery.GraftError, lambda model=model: surgery.balance_loss(model))


def test_balance_loss_with_balance_in_apply_is_its_value_without_gradient() -> None:
    model, plain = operated(balance=WEIGHT), operated()
    model(inputs()), plain(inputs())
    value, want = surgery.balance_loss(model), surgery.balance_loss(plain)
    assert not value.requires_grad
    assert value.item() == pytest.approx(want.item(), rel=1e-12)


def test_balance_loss_sums_over_sites() -> None:
    model = operated()
    model(inputs())
    each = [surgery.ops.balance(r.gates).item() for r in surgery.routing(model).values()]
    assert len(each) == 3
    assert surgery.balance_loss(model).item() == pytest.approx(sum(each), rel=1e-6)


def test_balance_loss_is_as_fine_as_the_gates() -> None:
    model = operated()
    model(inputs())
    assert surgery.balance_loss(model).dtype == torch.float64


def test_balance_loss_of_a_model_that_does_not_route_is_zero() -> None:
    model = surgery.apply(tiny_vit(), "adapter")
    model(images())
    assert surgery.balance_loss(model).item() == 0


def test_nothing_accumulates_over_forwards() -> None:
    model = operated()
    for _ in range(3):
        model(inputs())
    assert surgery.balance_loss(model) <= 3 * 4
    assert_close(explicit(model), reference())


def test_gradient_accumulation_adds_up() -> None:
    model = operated(balance=WEIGHT)
    implicit(model)
    got = implicit(model)
    assert_close(got, {k: 2 * g for k, g in reference().items()})


class Pulled(nn.Module):
    """A part with a loss of its own: the squares of its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def penalty(self) -> Tensor:
        return self.weight.square().sum()


def test_penalty_is_one_sum_of_what_parts_add_to_the_loss() -> None:
    rules = [
        at("0.linear1", append(lambda site: Pulled(site.out))),
        at("1.linear1", append(shared(lambda site: Pulled(site.out)))),
        at("1.linear2", prepend(shared(lambda site: Pulled(site.width)))),
        at(ffn, parallel(shared(moa(heads=2, rank=4)))),
    ]
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)]
    model = surgery.apply(nn.Sequential(*layers), rules)
    model(torch.randn(2, 5, 16))
    own = sum(p.numel() for m in model.modules() if isinstance(m, Pulled) for p in m.parameters())
    for balance in (0.5, 0.01, 0.0):
        got = surgery.penalty(model, balance=balance)
        torch.testing.assert_close(got, own + balance * surgery.balance_loss(model))
    got.backward()
    assert all((m.weight.grad == 2).all() for m in model.modules() if isinstance(m, Pulled))


def test_penalty_of_parts_that_neither_route_nor_pull_is_zero() -> None:
    model = surgery.apply(nn.Sequential(nn.Linear(4, 4)), at("0", surgery.lora(rank=2)))
    assert surgery.penalty(model) == 0  # and no forward has run
