"""Gradient checkpointing, reentrant and not: the right gradients, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgery
from tests.engine.balanced import (
    BOTH_KINDS,
    BOTH_WAYS,
    WAYS,
    WEIGHT,
    Checkpointed,
    assert_close,
    compiled,
    explicit,
    gradients,
    implicit,
    inputs,
    operated,
    reference,
    rules,
)
from tests.laws import checks as laws
from tests.laws.checks import raised
from tests.models import tiny_vit


@BOTH_KINDS
@BOTH_WAYS
def test_checkpointing_not_reentrant(way: str, top_k: int | None) -> None:
    balance, run = WAYS[way]
    model = operated(balance=balance, top_k=top_k)
    assert_close(run(model, Checkpointed(model, False)), reference(top_k))


@BOTH_KINDS
def test_reentrant_checkpointing_with_balance_in_apply(top_k: int | None) -> None:
    model = operated(balance=WEIGHT, top_k=top_k)
    assert_close(implicit(model, Checkpointed(model, True)), reference(top_k))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_with_balance_loss_is_refused() -> None:
    model = operated()
    run = Checkpointed(model, True)
    for _ in range(2):  # the backward of a first step leaves gates with a gradient of their own
        y = run(inputs().requires_grad_())
        told = str(raised(surgery.GraftError, lambda: surgery.balance_loss(model)))
        assert "use_reentrant=False" in told
        assert "balance=0.01" in told
        y.sum().backward()
    with torch.no_grad():
        run(inputs())
        assert surgery.balance_loss(model) > 0


def test_balance_loss_between_a_reentrant_backward_and_the_next_forward_is_not_wrong() -> None:
    model = operated()
    Checkpointed(model, True)(inputs().requires_grad_()).sum().backward()
    model.zero_grad()
    with pytest.raises((surgery.GraftError, RuntimeError)):
        surgery.balance_loss(model).backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("way", ["balance=", "balance=function"])
@pytest.mark.usefixtures("fresh_compiler")
def test_checkpointing_under_compile_with_balance_in_apply(way: str, reentrant: bool) -> None:
    balance, run = WAYS[way]
    model = operated(balance=balance, depth=2)
    assert_close(run(model, compiled(Checkpointed(model, reentrant))), reference(depth=2))


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.usefixtures("fresh_compiler")
def test_checkpointing_under_compile_with_balance_loss_is_right_or_refused(reentrant: bool) -> None:
    model = operated(depth=2)
    try:
        got = explicit(model, compiled(Checkpointed(model, reentrant)))
    except (surgery.GraftError, torch._dynamo.exc.TorchDynamoException):
        return
    assert_close(got, reference(depth=2))


@BOTH_WAYS
def test_timms_own_checkpointing(way: str) -> None:
    balance, run = WAYS[way]
    model = operated(balance=balance)
    model.set_grad_checkpointing(True)
    try:
        got = run(model)
    except surgery.GraftError:
        got = None
    assert got is not None or balance is None, "refused, where it should be right"
    assert_close(got or reference(), reference())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_that_drops_all_gradients_does_not_hide_it() -> None:
    class Whole(nn.Module):
        def __init__(self, vit: nn.Module) -> None:
            super().__init__()
            self.vit = vit

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.vit, x, use_reentrant=True)

    model = operated()
    Whole(model)(inputs())
    raised(surgery.GraftError, lambda: surgery.balance_loss(model))


def parts_alone() -> nn.Module:
    """A model in which nothing of the base is trained: no version counter moves in disabled()."""
    torch.manual_seed(0)
    model = tiny_vit().double().train()
    surgery.apply(model, rules()[:1], balance=WEIGHT)
    laws.stir(model)
    return model


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("build", [operated, parts_alone])
def test_a_checkpointed_backward_inside_disabled_is_not_silently_wrong(
    build: Callable[[], nn.Module], reentrant: bool
) -> None:
    want = implicit(build())
    model = build()
    y = Checkpointed(model, reentrant)(inputs().requires_grad_())
    with surgery.disabled(model):
        try:
            y.square().sum().backward()
        except (RuntimeError, surgery.SurgeryError):
            return
    assert_close(gradients(model), want)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own: no grad
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpointed_backward_of_a_disabled_forward_is_not_silently_wrong(
    reentrant: bool,
) -> None:
    model, x = parts_alone(), inputs().requires_grad_()
    torch.manual_seed(0)
    plain, same = tiny_vit().double().train(), x.detach().clone().requires_grad_()
    plain(same).square().sum().backward()
    with surgery.disabled(model):
        y = Checkpointed(model, reentrant)(x)
    try:
        y.square().sum().backward()
    except (RuntimeError, surgery.SurgeryError):
        return
    assert_close({"x": x.grad}, {"x": same.grad})
    assert all(not g.any() for g in gradients(model).values())
