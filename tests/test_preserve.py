"""What a model keeps of a forward is, after one of ours, what it was."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import at, ffn, lora
from surgery._preserve import preserved


class Filling(nn.Module):
    """Positions that are written into a buffer once, up to where a number says (rotary ones)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(64, width), persistent=False)
        self.filled, self.seen, self.by_length = 0, [], {}
        self.cache = {"k": [deque(maxlen=3)]}
        self.total = torch.zeros(())
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if n > self.filled:
            self.table[:n] = torch.arange(1.0, n + 1)[:, None].sin()
            self.filled = n
        self.seen.append(n)
        self.cache["k"][0].append(n)
        self.total += n
        self.by_length[n] = self.table[:n]
        self.last = x
        return x + self.table[:n]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions = Filling(16)
        self.layers = nn.ModuleList(
            [nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(2)]
        )
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.positions(x)
        for layer in self.layers:
            x = layer(x)
        answer: Tensor = self.head(x.mean(1))
        return answer


X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))


def model() -> Any:
    torch.manual_seed(0)
    return Model().eval()


@pytest.mark.parametrize("rules", [at(ffn, lora(rank=2)), "lora", "vpt_deep", "ssf"])
def test_a_model_that_fills_a_table_answers_as_before(rules: Any) -> None:
    want = model()(X)
    planned = model()
    before = surgery.fingerprint(planned)
    surgery.plan(planned, rules, example=X)
    surgery.anatomy(planned, X)
    assert surgery.fingerprint(planned) == before
    assert (planned.positions.seen, planned.positions.by_length) == ([], {})
    assert planned.positions.last is None
    assert planned.positions.total == 0
    assert not planned.positions.cache["k"][0]
    torch.testing.assert_close(planned(X), want, rtol=0, atol=0)
    operated = surgery.apply(model(), rules, example=X)
    assert operated.positions.filled == 0
    with surgery.disabled(operated), torch.no_grad():  # by torch's fused layers, which round so
        torch.testing.assert_close(operated(X), want)


def test_what_was_kept_before_stays() -> None:
    built = model()
    built(X)
    table, seen = built.positions.table.clone(), list(built.positions.seen)
    with preserved(built, kept=True):
        built(torch.randn(2, 9, 16))
        built.positions.new = 1
    assert built.positions.filled == 6
    assert built.positions.seen == seen
    assert not hasattr(built.positions, "new")
    torch.testing.assert_close(built.positions.table, table, rtol=0, atol=0)


def test_layers_that_become_others_when_they_first_run_stay_those() -> None:
    built = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    with preserved(built, kept=True):
        built(torch.randn(2, 3))
    assert built[0].in_features == 3
    assert built(torch.randn(2, 3)).shape == (2, 4)
