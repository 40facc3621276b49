"""Modules whose weights are read and those that are skipped: no part there is silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery import (
    append,
    at,
    parallel,
    prepend,
    replace,
    span,
    unfreeze,
)
from tests import models
from tests.engine.refusals import apply_error, plan_error
from tests.engine.test_verify import Branches
from tests.laws.checks import Linears, plain, raised

Build = Callable[[], nn.Module]


@pytest.mark.parametrize("edit", [parallel, append, prepend, replace], ids=lambda e: e.__name__)
def test_the_output_projection_of_multihead_attention_is_refused_at_once(edit: Any) -> None:
    said = plan_error(models.encoder(), at("**.out_proj", edit(plain)))
    assert 'at("**.out_proj", ...)' in said
    assert "nn.MultiheadAttention reads the weight of layers.0.self_attn.out_proj" in said
    assert 'at("layers.0.self_attn", ...)' in said
    said = plan_error(models.encoder(), at(nn.Linear, edit(plain)))
    assert "~inside(nn.MultiheadAttention)" in said
    surgery.plan(
        models.encoder(), at(nn.Linear & ~surgery.inside(nn.MultiheadAttention), edit(plain))
    )


def test_a_span_may_not_end_there_either() -> None:
    said = plan_error(
        models.encoder(), at(span("layers.*.self_attn.out_proj", "layers.*.linear1"), append(plain))
    )
    assert "layers.0.self_attn.out_proj" in said


def test_the_output_projection_may_be_unfrozen() -> None:
    model, x = models.encoder(), torch.randn(2, 5, 24)
    surgery.apply(model, at("**.out_proj", unfreeze), example=x)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in surgery.parameters(model))


def test_attention_that_calls_its_projection_is_not_refused() -> None:
    class Calling(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.out_proj(x)

    model = nn.Sequential(Calling(24, 4))
    surgery.apply(model, at("**.out_proj", append(plain)), example=torch.randn(2, 24))


def test_a_container_that_is_never_called_is_refused_at_once() -> None:
    said = plan_error(models.encoder(), at("layers", append(plain)))
    assert "layers is a ModuleList" in said
    assert 'at("layers.*", ...)' in said


def beit() -> nn.Module:
    from timm.models.beit import Beit

    return Beit(16, 8, embed_dim=24, depth=2, num_heads=3, num_classes=5, init_values=0.1)


def eva() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(16, 8, embed_dim=24, depth=2, num_heads=3, num_classes=5)


def swin_v2() -> nn.Module:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "window_size": 4, "num_classes": 5}
    return SwinTransformerV2(**sizes, depths=(1, 1), num_heads=(3, 3))


def torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    sizes = {"patch_size": [4, 4], "embed_dim": 24, "window_size": [4, 4], "num_classes": 5}
    return SwinTransformer(**sizes, depths=[1, 1], num_heads=[3, 3], stochastic_depth_prob=0.0)


READERS: dict[str, tuple[Build, int, str]] = {
    "beit": (beit, 16, "blocks.0.attn.qkv"),
    "eva": (eva, 16, "blocks.0.attn.qkv"),
    "swin v2": (swin_v2, 32, "layers.0.blocks.0.attn.qkv"),
    "torchvision swin": (torchvision_swin, 32, "features.1.0.attn.qkv"),
    "torchvision swin proj": (torchvision_swin, 32, "features.1.0.attn.proj"),
}


@pytest.mark.parametrize("edit", [parallel, append, prepend, replace], ids=lambda e: e.__name__)
@pytest.mark.parametrize("family", READERS)
def test_a_weight_that_is_read_without_a_call_is_named(family: str, edit: Any) -> None:
    build, size, path = READERS[family]
    model, x = build().eval(), models.images(size=size)
    said = apply_error(model, at(path, edit(plain)), x)
    assert f"1 of 1 sites ({path}) never ran" in said
    assert f"the model reads the weight of {path} without calling it" in said
    assert f'at("{path.rpartition(".")[0]}", ...)' in said
    surgery.apply(model, at(path, unfreeze), example=x)
    surgery.revert(model)
    surgery.apply(model, at(path, edit(plain)))
    assert path in str(raised(surgery.GraftError, lambda: model(x)))


def test_a_module_that_is_skipped_is_told_apart_from_one_that_is_read() -> None:
    class Skips(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return self.one(x).to(self.two.weight.dtype)

    said = apply_error(Skips(), at(nn.Linear, append(plain)), torch.randn(2, 8))
    assert "1 of 2 sites (two) never ran" in said
    assert "reads" not in said
    assert "Give an example" in said


def test_a_span_whose_beginning_is_read_only_is_no_silence() -> None:
    class Reads(Linears):
        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.linear(x, self.one.weight))

    for edit in (parallel, prepend):
        model, x = Reads(), torch.randn(2, 8)
        said = apply_error(model, at(span("one", "two"), edit(plain)), x)
        assert "(one to two)" in said
        inner = at(span("0.one", "0.two"), edit(plain))
        if edit is prepend:
            assert 'such as at("0", ...)' in apply_error(nn.Sequential(Reads()), inner, x)
        surgery.apply(model, at(span("one", "two"), edit(plain)))
        raised(surgery.GraftError, lambda model=model, x=x: model(x))
