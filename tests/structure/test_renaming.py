"""The renaming that other tests rest on: other names everywhere, and the same model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from surgery.structure.module_tree import Tree, span
from tests import models
from tests.structure.renaming import original, renamed


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.gamma = width, nn.Parameter(torch.ones(width))
        self.register_buffer("shift", torch.zeros(width), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma[: self.width] + self.shift


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(8, 16), nn.Linear(16, 8), Scale(8)
        self.list, self.dict = nn.ModuleList([Scale(8)]), nn.ModuleDict({"one": Scale(8)})
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs = self.runs + 1
        x = self.scale(x) + self.down(self.up(x)) * self.scale.gamma
        return self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        return self.dict["one"](self.list[0](x)) + getattr(self, "scale").gamma  # noqa: B009


def test_nothing_is_called_what_it_was_and_all_runs_as_before() -> None:
    model, x = Pair(), torch.randn(2, 8)
    before = model(x)
    other = renamed(copy.deepcopy(model))
    assert other(x).equal(before)
    assert copy.deepcopy(other)(x).equal(before)
    words = {word for name, _ in other.named_modules() for word in name.split(".")}
    words |= {name for m in other.modules() for name in (*m._parameters, *vars(m))}
    kept = words & {"up", "down", "scale", "gamma", "width", "runs", "list", "dict", "shift"}
    assert not kept
    assert {"one", "0", "weight", "in_features"} <= words
    assert {type(m).__name__ for m in other.modules()} & {"Scale", "Pair"} == set()
    assert len({type(m) for m in other.modules() if isinstance(m, Scale)}) == 1


def test_old_names_lead_nowhere_but_inside_the_model() -> None:
    model = renamed(Pair())
    with pytest.raises(AttributeError):
        _ = model.up
    with pytest.raises(AttributeError):
        _ = renamed(nn.Sequential(Scale(8)))[0].gamma
    model(torch.randn(2, 8))
    assert vars(model)[type(model)._new_names["runs"]] == 1
    assert "runs" not in vars(model)


def test_the_seed_decides() -> None:
    names = [[n for n, _ in renamed(Pair(), seed).named_parameters()] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert [len(name) for name in names] == [len(names[0])] * 3


def test_the_path_that_a_site_had() -> None:
    tree = Tree(renamed(nn.Sequential(Pair())))
    sites = {original(site): site for site in tree.sites}
    assert {"", "0", "0.up", "0.list.0", "0.dict.one"} <= set(sites)
    assert original(span(sites["0.up"], sites["0.down"])) == "0.(up to down)"


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (models.tiny_vit, models.images()),
        (models.hf_bert, models.words_in()),
        (models.hf_gpt2, models.words_in()),
    ],
)
def test_models_of_others_run_too(build, inputs) -> None:
    model = build().eval()
    before = model(inputs)
    after = renamed(model)(inputs)
    before, after = (y if isinstance(y, Tensor) else y[0] for y in (before, after))
    assert after.equal(before)
