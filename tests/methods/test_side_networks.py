"""Networks beside the model, against their formulae written out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import surgery
from surgery.methods import side_networks as sets
from surgery.parts.side_networks import Bypass, Mixer
from tests.laws.test_backbones import convnext
from tests.methods.reference import INPUTS, close, parts, stirred, trains_and_comes_off, vit, vit_b
from tests.models import encoder

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


# in place of the last block's output -----------------------------------------------------------

INSTEAD = {
    "losa": lambda: sets.losa(rank=3),
    "losa, tokens": lambda: sets.losa(rank=3, tokens=5, scale=0.5),
    "res_tuning": lambda: sets.res_tuning(rank=3),
}


def bottleneck(a: Any, x: Tensor) -> Tensor:
    h = x @ a.down.weight.t() + a.down.bias
    h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    return h @ a.up.weight.t() + a.up.bias


def losa(part: Any, y: Tensor, s: Tensor) -> Tensor:
    z = y + s
    if part.tokens is not None:
        z = z + bottleneck(part.tokens, z.transpose(1, 2)).transpose(1, 2)
    return s + part.scale * bottleneck(part.channels, z)


def res_tuning(part: Any, y: Tensor, s: Tensor) -> Tensor:
    u = 1 / (1 + torch.exp(-part.alpha))
    return u * (y + bottleneck(part.across, y)) + (1 - u) * (s + bottleneck(part.along, s))


@torch.no_grad()
@pytest.mark.parametrize("name", INSTEAD)
def test_what_a_network_beside_gives_is_its_recursion(name: str) -> None:
    """From what comes to the first block on; the last is what the model's norm is given."""
    plain = vit()
    model = stirred("vit", INSTEAD[name]())
    p, step = parts(model), losa if name.startswith("losa") else res_tuning
    x = s = plain.pos_drop(plain._pos_embed(plain.patch_embed(X)))
    for i, each in enumerate(plain.blocks):
        x = each(x)
        s = step(p[f"blocks/{i}/side"], x, s)
    close(model.forward_features(X), plain.norm(s), 64)
    assert (s - x).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_it_begins_with_what_the_first_norm_is_given(norm_first: bool, told: bool) -> None:
    base, x = encoder(norm_first=norm_first).double().eval(), torch.randn(2, 5, 24).double()
    example = {"example": x} if told else {}
    model = surgery.apply(copy.deepcopy(base), sets.res_tuning(rank=3), **example)
    came: list[Tensor] = []
    base.layers[0].norm1.register_forward_pre_hook(lambda m, args: came.append(args[0]))
    want = s = x
    for i, layer in enumerate(base.layers):
        want = layer(want)
        s = res_tuning(parts(model)[f"layers/{i}/side"], want, s if i else came[0])
    assert torch.equal(came[0], x) is norm_first
    close(model(x), s, 64)


def test_without_attention_they_are_refused() -> None:
    with pytest.raises(surgery.MatchError, match=r"nearest\(norm, before=attn"):
        surgery.plan(convnext(), "losa")


@pytest.mark.parametrize("name", INSTEAD)
def test_they_train_without_the_blocks_and_come_off(name: str) -> None:
    rules = INSTEAD[name]()
    trains_and_comes_off("vit", rules, steps=3)
    model = surgery.apply(vit(), rules, example=X)
    seen = []
    for each in model.blocks[:-1]:
        each.register_forward_hook(lambda m, args, y: seen.append(y.requires_grad))
    model(X)
    assert seen == [False, False]


@pytest.mark.parametrize("name", ["losa", "res_tuning"])
def test_stages_have_networks_of_their_own(name: str) -> None:
    trains_and_comes_off("swin", getattr(sets, name)())


def test_a_mixer_of_tokens_says_how_many_it_wants() -> None:
    with pytest.raises(surgery.GraftError, match="no 7 tokens"):
        surgery.apply(vit(), sets.losa(tokens=7), example=X)
    with pytest.raises(surgery.RuleError, match=r"mixer\(tokens=0\)"):
        surgery.plan(vit(), sets.losa(tokens=0))


@torch.no_grad()
def test_where_nothing_is_heard_they_begin_with_what_is_given() -> None:
    y = torch.randn(2, 5, 8).double()
    for part, step in ((Mixer(8, 2, 5, 0.5), losa), (Bypass(8, 2), res_tuning)):
        for p in part.double().parameters():
            p.normal_()
        close(part(y, None), step(part, y, y), 64)


def test_counts_of_what_stands_in_place() -> None:
    assert surgery.plan(vit_b(), sets.losa()).added == 12 * (8 * (2 * 768 + 1) + 768) == 156_768
    tokens = 12 * (8 * (2 * 197 + 1) + 197)
    assert surgery.plan(vit_b(), sets.losa(tokens=197)).added == 156_768 + tokens
    assert surgery.plan(vit_b(), sets.res_tuning()).added == 12 * (2 * (32 * 1537 + 768) + 1)
