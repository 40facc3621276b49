"""The balance loss: its gradient in both ways to have it, its value, what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch

import surgery
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
