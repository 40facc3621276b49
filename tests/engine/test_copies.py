"""Copies, pickles and functional calls have parts, gates and gradients of their own."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.engine.balanced import (
    BOTH_KINDS,
    BOTH_WAYS,
    WAYS,
    WEIGHT,
    assert_close,
    explicit,
    gradients,
    implicit,
    inputs,
    operated,
    reference,
)
from tests.laws.checks import raised


def saved_whole(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved_whole,
}


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a forward"])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("balance", [None, WEIGHT], ids=["balance_loss", "balance="])
def test_a_copy_has_the_gradients_and_the_original_none(
    how: str, balance: float | None, ran: bool
) -> None:
    model = operated(balance=balance)
    if ran:
        model(inputs())
    clone = COPIES[how](model)
    assert_close((explicit if balance is None else implicit)(clone), reference())
    assert gradients(model) == {}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_keeps_sharing_routing_and_disabling(how: str) -> None:
    model, x = operated().eval(), inputs()
    clone = COPIES[how](model)
    assert len(surgery.parameters(clone)) == len(surgery.parameters(model))
    clone(x)
    assert list(surgery.routing(clone)) == [f"blocks.{i}.mlp" for i in range(3)]
    with surgery.disabled(clone):
        base = clone(x)
    assert not torch.equal(base, clone(x))
    raised(surgery.GraftError, lambda: surgery.routing(model))


def test_functional_call_runs_with_the_tensors_it_is_given() -> None:
    model, x = operated().eval(), inputs()
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(torch.func.functional_call(model, tensors, (x,)), model(x))
    changed = {k: v + 0.1 if "surgery." in k else v for k, v in tensors.items()}
    other = torch.func.functional_call(model, changed, (x,))
    model.load_state_dict(changed)
    assert torch.equal(other, model(x))


@BOTH_WAYS
def test_functional_call_has_the_gradients(way: str) -> None:
    balance, _ = WAYS[way]
    model, x = operated(balance=balance), inputs()
    free = {k: p.detach().clone().requires_grad_() for k, p in named_free(model).items()}
    loss = torch.func.functional_call(model, free, (x,)).square().sum()
    if balance is None:
        loss = loss + WEIGHT * surgery.balance_loss(model)
    grads = torch.autograd.grad(loss, list(free.values()))
    assert_close(dict(zip(free, grads, strict=True)), reference())


def named_free(model: nn.Module) -> dict[str, Tensor]:
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


@BOTH_KINDS
def test_func_grad_equals_backward(top_k: int | None) -> None:
    model, x = operated(balance=WEIGHT, top_k=top_k), inputs()

    def loss(free: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, free, (x,)).square().sum()

    free = {k: p.detach() for k, p in named_free(model).items()}
    assert_close(torch.func.grad(loss)(free), reference(top_k))
