"""Graphs made of an operated model: by torch.fx, TorchScript, vmap. Right, or refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor, nn

import surgery
from surgery import adapter, append, at, lora
from tests.laws import checks as laws
from tests.methods.test_methods import SETS, rules_of
from tests.models import images, tiny_vit


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


RULE = append(adapter(rank=2), residual=True)


@pytest.mark.parametrize("where", ["a", "b", "b.0"])
def test_a_graph_of_an_operated_model_is_refused_with_the_way_round(where: str) -> None:
    model, x = surgery.apply(Net(), at(where, RULE)), torch.randn(2, 8)
    model(x)
    model.b(model.a(x))
    with pytest.raises(surgery.GraftError, match=r"torch\.fx(.|\n)*surgery\.apply\(graph, rules\)"):
        torch.fx.symbolic_trace(model)(x)
    model(x)


@pytest.mark.parametrize("where", ["a", "b.0"])
def test_an_operated_graph_is_right(where: str) -> None:
    graph, x = torch.fx.symbolic_trace(Net()), torch.randn(2, 8)
    surgery.apply(graph, at(where, RULE), example=x)
    graph(x).sum().backward()
    assert all(p.grad is not None for p in surgery.parameters(graph))


def test_torchscript_is_refused_by_name() -> None:
    with pytest.raises(surgery.OperationError, match=r"torch\.jit\.script"):
        torch.jit.script(surgery.apply(Net(), at("a", RULE)))


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_traced_by_torchscript_and_mapped_by_vmap(name: str) -> None:
    model: Any = surgery.apply(tiny_vit().eval(), rules_of(name))
    laws.stir(model)
    x = images(batch=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of what is traced
        want = model(x)
        traced = torch.jit.trace(model, x, check_trace=False)
        torch.testing.assert_close(traced(x), want, atol=1e-5, rtol=1e-5)
        mapped = torch.func.vmap(lambda one: model(one[None])[0])(x)
        torch.testing.assert_close(mapped, want, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's own, of what is traced
def test_a_merged_model_is_traced_too() -> None:
    model: Any = surgery.merge(surgery.apply(tiny_vit().eval(), at("**.qkv", lora(rank=2))))
    traced = torch.jit.trace(model, images(), check_trace=False)
    torch.testing.assert_close(traced(images()), model(images()))
