"""Layers that a model has and does not call: with an example their weights are the places."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery import at, fused, lora, proj, qkv, weight
from surgery.errors import GraftError
from surgery.spec.case import stir

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_classes": 5}


def beit() -> nn.Module:
    return Beit(**SIZES, depth=2, num_heads=3)


def eva() -> nn.Module:
    return Eva(**SIZES, depth=2, num_heads=3)


def swin() -> nn.Module:
    sizes = {**SIZES, "patch_size": 4}
    return SwinTransformerV2(**sizes, depths=(2, 2), num_heads=(3, 6), window_size=4)


class Reads(nn.Module):
    """An attention that computes with the weights of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, m.weight, m.bias) for m in (self.a, self.b, self.c))
        mixed = torch.softmax(q @ k.mT / 24**0.5, -1) @ v
        return F.linear(mixed, self.d.weight, self.d.bias)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 8, 8)
        self.attns = nn.ModuleList([Reads() for _ in range(2)])
        self.ffns = nn.ModuleList(
            [nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
             for _ in range(2)]
        )  # fmt: skip
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        for attn, ffn in zip(self.attns, self.ffns, strict=True):
            x = x + attn(x)
            x = x + ffn(x)
        answer: Tensor = self.head(x.mean(1))
        return answer


MODELS = {"beit": beit, "eva": eva, "swin": swin, "own": Own}
METHODS = ("lora", "vera", "krona", "dora", "pissa", "hira", "oft")
ALL = pytest.mark.parametrize("name", MODELS)


@cache
def _base(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():  # norms and layer scales that start at zero hide what is behind them
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def base(name: str) -> Any:
    return copy.deepcopy(_base(name))


@ALL
@pytest.mark.parametrize("rules", METHODS)
def test_each_method_that_merges_runs_trains_merges_and_comes_off(name: str, rules: str) -> None:
    model, x = base(name), X.double()
    before, want = surgery.fingerprint(model), model(x)
    surgery.apply(model, rules, example=x)
    torch.testing.assert_close(model(x), want)
    stir(model, 0)
    tuned = model(x)
    assert (tuned - want).abs().max() > 1e-4
    tuned.square().sum().backward()
    assert all(p.grad is not None for p in model.surgery.parameters() if p.requires_grad)
    model.zero_grad(set_to_none=True)
    surgery.merge(model)
    torch.testing.assert_close(model(x), tuned)
    surgery.unmerge(model)
    torch.testing.assert_close(model(x), tuned, rtol=0, atol=0)
    surgery.revert(model)
    assert surgery.fingerprint(model) == before


@ALL
def test_the_update_is_that_of_the_weight(name: str) -> None:
    model = surgery.apply(base(name), at(qkv | proj, lora(rank=2)), example=X.double())
    stir(model, 1)
    plain = base(name)
    with torch.no_grad():
        for key, part in model.surgery.default.named_children():
            path = key.removesuffix("/parallel").removesuffix("/weight").replace("/", ".")
            plain.get_submodule(path).weight += part.B[0] @ part.A[0]
    torch.testing.assert_close(model(X.double()), plain(X.double()))


@ALL
def test_files_know_what_a_forward_told(name: str, tmp_path: Path) -> None:
    model = surgery.apply(base(name), "lora", example=X.double())
    stir(model, 1)
    surgery.save(model, tmp_path / "a.safetensors")
    again = surgery.load(base(name), tmp_path / "a.safetensors")
    torch.testing.assert_close(again(X.double()), model(X.double()), rtol=0, atol=0)


@ALL
def test_parts_of_the_input_go_before_the_attention(name: str) -> None:
    model = surgery.apply(base(name), "arc_att", example=X.double())
    model(X.double()).sum().backward()
    paths = {hooked.path.rpartition(".")[2] for hooked in model.surgery.default.hooked_sites}
    assert paths == ({"attn"} if name != "own" else {"0", "1"})


@pytest.mark.parametrize("name", ["beit", "eva", "swin"])
def test_fused_rows_are_scaled_apart(name: str) -> None:
    rules = at(fused, surgery.append(surgery.parts.rescale(rows="_q k v")))
    model = surgery.apply(base(name), rules, example=X.double())
    stir(model, 0)
    plain = base(name)
    with torch.no_grad():
        for key, part in model.surgery.default.named_children():
            path = key.removesuffix("/weight/append").replace("/", ".")
            rows = torch.cat([torch.ones_like(part.v[0]), part.v[0], part.v[1]])
            plain.get_submodule(path).weight *= rows[:, None]
    torch.testing.assert_close(model(X.double()), plain(X.double()))


@pytest.mark.parametrize("name", ["beit", "eva", "swin"])
def test_without_an_example_it_is_refused_with_what_to_do(name: str) -> None:
    model = surgery.apply(base(name), "lora")
    with pytest.raises(GraftError, match=r"without calling them(?s:.*)example=inputs"):
        model(X.double())


def test_an_address_of_the_weight_does_too() -> None:
    rules = at(weight("**.qkv.weight"), lora(rank=2))
    model = surgery.apply(base("beit"), rules, example=X.double())
    stir(model, 1)
    assert (model(X.double()) - base("beit")(X.double())).abs().max() > 1e-4


def test_layers_that_are_called_stay_the_places() -> None:
    plan = surgery.plan(base("beit"), at(qkv | proj, lora(rank=2)), example=X.double())
    paths = {site.path.split(".", 2)[2] for site in plan.sites}
    assert paths == {"attn.qkv.weight", "attn.proj"}


class Both(Reads):
    """It calls a layer, and reads its weight besides."""

    def forward(self, x: Tensor) -> Tensor:
        q = (self.a(x) + F.linear(x, self.a.weight, self.a.bias)) / 2
        k, v = self.b(x), self.c(x)
        answer: Tensor = self.d(torch.softmax(q @ k.mT / 24**0.5, -1) @ v)
        return answer


def test_a_layer_that_is_called_and_read_is_a_note() -> None:
    model: Any = Own().eval()
    model.attns = nn.ModuleList([Both() for _ in range(2)])
    surgery.apply(model, "lora", example=X)
    assert "reads the weight of attns.0.a, attns.1.a without a call" in str(surgery.report(model))
