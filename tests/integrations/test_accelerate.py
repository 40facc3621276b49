"""Accelerate: what its folders hold, and going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

import surgery
from surgery import at, lora, unfreeze
from surgery.integrations.accelerate import adapters_alone

pytestmark = pytest.mark.filterwarnings("ignore")  # what accelerate says of its older ways

RULES = [at("0", lora(rank=2)), at("2", unfreeze)]
X = torch.linspace(-1, 1, 24).view(3, 8)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def operated() -> nn.Module:
    return surgery.apply(build(), RULES)


def prepared(alone: bool, *models: nn.Module) -> tuple[Any, list[Any]]:
    """An accelerator and an optimiser for each model."""
    accelerator, optimisers = Accelerator(cpu=True), []
    for model in models:
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        optimisers.append(accelerator.prepare(model, optimiser)[1])
    if alone:
        adapters_alone(accelerator)
    return accelerator, optimisers


def step(accelerator: Any, optimisers: list[Any], *models: nn.Module) -> None:
    for model, optimiser in zip(models, optimisers, strict=True):
        accelerator.backward(model(X).square().sum())
        optimiser.step()
        optimiser.zero_grad()


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return [*one] == [*other] and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("alone", [True, False])
def test_it_goes_on_to_the_bit(alone: bool, tmp_path: Path) -> None:
    """Of several models, in any order; without the hooks, too: its folders are whole then."""
    made = [operated, build, operated]
    models = [build() for build in made]
    run = prepared(alone, *models)
    step(*run, *models)
    run[0].save_state(str(tmp_path))
    step(*run, *models)
    others = [build() for build in made]
    again = prepared(alone, *others)
    again[0].load_state(str(tmp_path))
    assert not any(map(same, models, others))
    step(*again, *others)
    assert all(map(same, models, others))


def test_what_a_folder_holds(tmp_path: Path) -> None:
    model = operated()
    accelerator, optimisers = prepared(True, model)
    step(accelerator, optimisers, model)
    accelerator.save_state(str(tmp_path / "alone"))
    assert not list((tmp_path / "alone").glob("model*"))
    kept = load_file(tmp_path / "alone" / "surgery.default.safetensors")
    assert {*kept} == {*surgery.state_dict(model)}
    assert same(surgery.load(build(), tmp_path / "alone"), model)
    other = build()
    prepared(True, other)[0].load_state(str(tmp_path / "alone"))  # not operated yet
    assert same(other, model)


def test_folders_that_are_whole_are_read(tmp_path: Path) -> None:
    model, other = operated(), operated()
    accelerator, optimisers = prepared(False, model)
    step(accelerator, optimisers, model)
    accelerator.save_state(str(tmp_path))
    prepared(True, other)[0].load_state(str(tmp_path))
    assert same(other, model)
