"""Networks beside the model, against their formulae written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import surgery
from surgery.methods import side_networks as sets
from tests.methods.reference import INPUTS, close, parts, stirred, trains_and_comes_off, vit, vit_b

X = INPUTS["vit"]
METHODS = {"lst": lambda: sets.lst(reduction=4), "dtl": lambda: sets.dtl(fed=2)}


def lst(p: dict[str, Any], features: list[Tensor]) -> Tensor:
    """What is added behind the last block: U s of s_i = f((1 - u) D y_i + u s_{i-1})."""
    s: Tensor | None = None
    for i, y in enumerate(features):
        rung = p[f"blocks/{i}/side"]
        new = y @ rung.down.weight.t() + rung.down.bias
        u = 1 / (1 + torch.exp(-rung.alpha / 0.1))
        s = (1 - u) * new + (0 if s is None else u * s)
        h = F.layer_norm(s, s.shape[-1:], rung.norm.weight, rung.norm.bias)
        h = h @ rung.fc1.weight.t() + rung.fc1.bias
        h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
        s = s + h @ rung.fc2.weight.t() + rung.fc2.bias
    up = p[f"blocks/{len(features) - 1}/append"].up
    assert s is not None
    return s @ up.weight.t() + up.bias


@torch.no_grad()
def test_lst_is_its_formula() -> None:
    plain = vit()
    model = stirred("vit", METHODS["lst"]())
    p = parts(model)
    x = plain.pos_drop(plain._pos_embed(plain.patch_embed(X)))
    features = []
    for each in plain.blocks:
        x = each(x)
        features.append(x)
    want = plain.norm(x + lst(p, features))
    got = model.forward_features(X)
    close(got, want)


@torch.no_grad()
def test_dtl_is_its_formula() -> None:
    plain = vit()
    model = stirred("vit", METHODS["dtl"]())
    p = parts(model)
    x = plain.pos_drop(plain._pos_embed(plain.patch_embed(X)))
    s, n = torch.zeros_like(x), len(plain.blocks)
    for i, each in enumerate(plain.blocks):
        x = each(x)
        track = p[f"blocks/{i}/side"]
        s = s + x @ track.A.t() @ track.B.t()
        if i >= n - 2:
            x = x + s / (1 + torch.exp(-100 * s))
    close(model.forward_features(X), plain.norm(x))


@pytest.mark.parametrize("name", METHODS)
def test_they_start_as_the_base_train_and_come_off(name: str) -> None:
    rules = METHODS[name]()
    model = vit()
    want = model(X)
    surgery.apply(model, rules, example=X)
    torch.testing.assert_close(model(X), want, rtol=0, atol=0)
    trains_and_comes_off("vit", rules)


def test_no_gradient_goes_through_the_blocks_of_lst() -> None:
    model = surgery.apply(vit(), METHODS["lst"]())
    seen = []
    for each in model.blocks[:-1]:
        each.register_forward_hook(lambda m, args, y: seen.append(y.requires_grad))
    model(X)
    assert seen == [False, False]


def test_published_counts() -> None:
    assert (
        surgery.plan(vit_b(), sets.lst()).added
        == 12 * (96 * 769 + 1 + 192 + 96 * 384 * 2 + 480) + 97 * 768
    )
    assert surgery.plan(vit_b(), sets.dtl()).added == 12 * 2 * 2 * 768
