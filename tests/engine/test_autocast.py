"""Autocast: gradients near those of float32, and a balance loss that is scaled with the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from tests.engine.balanced import (
    WAYS,
    WEIGHT,
    Checkpointed,
    Grads,
    assert_close,
    compiled,
    explicit,
    gradients,
    implicit,
    inputs,
    operated,
    reference,
)
from tests.laws.checks import raised
from tests.models import images


def under(dtype: torch.dtype, model: nn.Module, run: Any = None) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return (model if run is None else run)(x).float()

    return forward


def in_float32(dtype: torch.dtype, top_k: int | None = None) -> Grads:
    """The reference under autocast: the explicit form, without checkpointing."""
    model = operated(top_k=top_k, dtype=torch.float32)
    return explicit(model, under(dtype, model))


@pytest.mark.parametrize("way", ["balance=", "balance=function"])
def test_bf16_autocast_has_the_gradients_of_the_explicit_form(way: str) -> None:
    balance, run = WAYS[way]
    model = operated(balance=balance, top_k=None, dtype=torch.float32)
    got = run(model, under(torch.bfloat16, model))
    assert all(g.dtype == torch.float32 for g in got.values())
    assert_close(got, in_float32(torch.bfloat16), 0.02)


def test_bf16_autocast_is_near_float32() -> None:
    model = operated(top_k=None, dtype=torch.float32)
    want = explicit(model)
    got = in_float32(torch.bfloat16)
    for key, b in want.items():
        assert (got[key] - b).norm() <= 0.1 * b.norm() + 1e-6, key


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_bf16_autocast_with_checkpointing(reentrant: bool) -> None:
    model = operated(balance=WEIGHT, top_k=None, dtype=torch.float32)
    got = implicit(model, under(torch.bfloat16, model, Checkpointed(model, reentrant)))
    assert_close(got, in_float32(torch.bfloat16), 0.02)


def test_fp16_autocast_refuses_a_number_for_balance() -> None:
    model = operated(balance=WEIGHT, dtype=torch.float32)
    told = str(raised(surgery.GraftError, lambda: under(torch.float16, model)(images())))
    assert "scaler.get_scale()" in told


@pytest.mark.usefixtures("fresh_compiler")
def test_fp16_autocast_refuses_a_number_for_balance_under_compile_too() -> None:
    model = operated(balance=WEIGHT, dtype=torch.float32)
    with pytest.raises(Exception, match=r"get_scale|Observed exception"):
        compiled(under(torch.float16, model))(images())


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_function_for_balance_follows_the_scale_of_the_loss(reentrant: bool | None) -> None:
    scale = 1024.0
    model = operated(balance=lambda: WEIGHT * scale, top_k=None, dtype=torch.float32)
    inner = model if reentrant is None else Checkpointed(model, reentrant)
    (
        under(torch.float16, model, inner)(images().requires_grad_()).square().sum() * scale
    ).backward()
    got = {k: g / scale for k, g in gradients(model).items()}
    assert_close(got, in_float32(torch.float16), 0.02)


def test_the_scale_is_asked_for_in_backward_not_in_forward() -> None:
    asked: list[float] = []
    model = operated(balance=lambda: asked.append(1.0) or WEIGHT)
    y = model(inputs())
    assert asked == []
    y.square().sum().backward()
    assert len(asked) == 3
    assert_close(gradients(model), reference())


def test_fp16_autocast_with_balance_loss_is_scaled_with_the_loss() -> None:
    model = operated(top_k=None, dtype=torch.float32)
    y = under(torch.float16, model)(images())
    ((y.square().sum() + WEIGHT * surgery.balance_loss(model)) * 1024.0).backward()
    got = {k: g / 1024 for k, g in gradients(model).items()}
    assert_close(got, in_float32(torch.float16), 0.02)
