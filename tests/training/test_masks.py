"""Masks of what is trained of a weight: by row (GPS), by size or gradient (SHiRA)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.errors import RuleError
from surgery.training import chosen, fill, magnitudes, measure
from tests.models import images, tiny_vit

LABELS = torch.tensor([0, 1])


def model() -> Any:
    torch.manual_seed(0)
    return tiny_vit(depth=2).eval()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch), LABELS)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    named = model.named_modules()
    return {n: m for n, m in named if type(m) is nn.Linear and n != "head"}


@pytest.mark.parametrize("how", ["gps", "magnitude", "gradient"])
def test_what_is_chosen_is_trained_and_nothing_else(how: str) -> None:
    base = model()
    scores = magnitudes(base) if how == "magnitude" else measure(base, [images()], loss)
    named: Any = {"inputs": 2} if how == "gps" else {"share": 0.1}
    rules, indices = chosen(scores, base, **named)
    before = {name: m.weight.detach().clone() for name, m in linears(base).items()}
    operated = fill(surgery.apply(base, rules), indices)
    optimizer = torch.optim.SGD(surgery.parameters(operated), lr=1.0)
    loss(operated, images()).backward()
    optimizer.step()
    surgery.merge(operated, keep=False)
    assert set(indices) == set(before)
    for name, layer in linears(operated).items():
        moved = (layer.weight != before[name]).flatten().nonzero().flatten()
        assert set(moved.tolist()) <= set(indices[name].tolist())
        assert len(moved)
        score = scores[f"{name}.weight"]
        if how == "gps":
            rows = indices[name] // layer.in_features
            assert torch.equal(rows.bincount(), torch.full((layer.out_features,), 2))
            worst = score.flatten()[indices[name]].view(-1, 2).min(1).values
            assert torch.equal(worst, score.topk(2, dim=1).values[:, 1])
        else:
            n = round(0.1 * score.numel())
            assert len(indices[name]) == n
            taken = score.flatten()[indices[name]].sort().values
            assert torch.equal(taken, score.flatten().sort().values[-n:])


@pytest.mark.parametrize("named", [{}, {"share": 0.0}, {"inputs": 0}, {"share": 0.1, "inputs": 1}])
def test_one_number_says_how_much(named: Any) -> None:
    base = model()
    with pytest.raises(RuleError, match="one of both"):
        chosen(magnitudes(base), base, **named)


def test_scores_must_be_of_the_model() -> None:
    base = model()
    with pytest.raises(RuleError, match="they tell nothing of"):
        chosen({}, base, share=0.1)
