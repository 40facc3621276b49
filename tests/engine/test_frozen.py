"""What was trained by hand and frozen again is told of; nothing that is ordinary is."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import at, lora, unfreeze
from tests.models import images, tiny_vit

RULES = [at("blocks.*.attn.qkv", lora(rank=2)), at("head", unfreeze)]


def operated() -> nn.Module:
    torch.manual_seed(0)
    return surgery.apply(tiny_vit(), RULES)


def train(model: nn.Module, parameters: list[Any] | None = None, **named: Any) -> None:
    chosen = surgery.parameters(model) if parameters is None else parameters
    optimiser = torch.optim.AdamW(chosen, lr=0.1, **named)
    for _ in range(2):
        optimiser.zero_grad()
        model(images()).square().sum().backward()
        optimiser.step()


def told(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("fused", [False, True])
def test_what_was_trained_and_frozen_again_is_told_by_name(tmp_path: Path, fused: bool) -> None:
    model, path = operated(), tmp_path / "a.safetensors"
    model.blocks[0].norm1.requires_grad_(True)
    train(model, [p for p in model.parameters() if p.requires_grad], fused=fused)
    model.blocks[0].norm1.requires_grad_(False)
    (said,) = told(lambda: surgery.save(model, path))
    assert "blocks.0.norm1.weight, blocks.0.norm1.bias are frozen" in said
    model.blocks[0].norm1.requires_grad_(True)  # the remedy
    assert not told(lambda: surgery.save(model, path))
    again = surgery.load(tiny_vit(), path)
    assert torch.equal(again.blocks[0].norm1.weight, model.blocks[0].norm1.weight)
    model.blocks[0].norm1.requires_grad_(False)
    (said,) = told(lambda: surgery.revert(model))
    assert "blocks.0.norm1.weight, blocks.0.norm1.bias: frozen now" in said


def test_a_model_that_was_trained_whole_and_frozen_again_is_told_of(tmp_path: Path) -> None:
    model = operated()
    model.requires_grad_(True)
    train(model, [*model.parameters()])
    model.requires_grad_(False)
    assert "are frozen" in told(lambda: surgery.save(model, tmp_path / "a.safetensors"))[0]


def _cast(model: nn.Module) -> None:
    model.double().half().float().to("cpu")


def _load(model: nn.Module) -> None:
    for _ in range(3):
        model.load_state_dict(tiny_vit().state_dict())


def _resume(model: nn.Module) -> None:
    for _ in range(3):
        model.load_state_dict(copy.deepcopy(model.state_dict()))


def _merge(model: nn.Module) -> None:
    surgery.unmerge(surgery.merge(model))
    with surgery.disabled(model):
        model(images())
    surgery.merge(model)
    surgery.unmerge(model)


def _second(model: nn.Module) -> None:
    surgery.apply(model, at("blocks.[0].norm1", unfreeze), name="second")
    train(model)
    surgery.revert(model, name="second")


def _copied(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(copy.deepcopy(model)))


@pytest.mark.parametrize("use", [train, _cast, _load, _resume, _merge, _second, _copied])
def test_ordinary_use_is_not_told_of(tmp_path: Path, use: Callable[[nn.Module], Any]) -> None:
    model = operated()
    train(model)
    model = use(model) or model
    train(model)
    assert not told(lambda: surgery.save(model, tmp_path / "a.safetensors"))
    assert not told(lambda: surgery.revert(model))
