"""Bases of every kind: quantised, with weights in buffers, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery import (
    adapter,
    append,
    at,
    ffn,
    moa,
    parallel,
    shared,
    unfreeze,
)
from tests import models
from tests.laws import checks as laws
from tests.laws.checks import raised

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated",
    "ignore:torch.quantize_per_tensor",
)


class Int8Linear(nn.Module):
    """What 8-bit layers look like: integers for weights, a scale, features in the model's dtype."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        weight = torch.randint(-127, 127, (8, 8)).to(torch.int8)
        if kind == "float8":
            weight = torch.randn(8, 8).to(torch.float8_e4m3fn)
        self.scale = nn.Parameter(torch.full((8, 1), 0.01), requires_grad=False)
        if kind == "buffer":
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class Quantised(nn.Module):
    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.lin = Int8Linear(kind, dtype)
        self.norm = nn.LayerNorm(8, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.lin(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["parameter", "float8"])
def test_parts_beside_quantised_weights_are_of_the_norms_dtype(kind: str, dtype: Any) -> None:
    model, x = nn.Sequential(Quantised(kind, dtype)), torch.randn(4, 8, dtype=dtype)
    mark = surgery.fingerprint(model)
    for edit in (append, parallel):
        surgery.apply(model, at("0.lin", edit(lambda s: nn.Linear(8, 8))), example=x)
        assert {p.dtype for p in model.surgery.parameters()} == {dtype}
        model(x).float().square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in surgery.parameters(model))
        surgery.revert(model)
        assert surgery.fingerprint(model) == mark


def test_parts_beside_weights_in_buffers_and_without_any_norm() -> None:
    part = append(lambda s: nn.Linear(8, 8))
    model = surgery.apply(
        nn.Sequential(Int8Linear("parameter", torch.float32)),
        at("0", part),
        example=torch.ones(2, 8),
    )
    assert {p.dtype for p in surgery.parameters(model)} == {torch.float32}
    bare = nn.Sequential(nn.Identity())
    bare.register_buffer("table", torch.zeros(2, 2, dtype=torch.int8, device="meta"))
    surgery.apply(bare, at("0", part))
    assert {(p.dtype, p.device.type) for p in surgery.parameters(bare)} == {(torch.float32, "meta")}


def test_the_bias_of_a_quantised_weight_tells_its_dtype() -> None:
    model = Quantised("parameter", torch.float32)
    model.lin.bias = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    surgery.apply(model, at("lin", append(lambda s: nn.Linear(8, 8))))
    assert {p.dtype for p in model.surgery.parameters()} == {torch.bfloat16}


def test_integers_and_packed_weights_cannot_be_unfrozen_into_silence() -> None:
    model = nn.Sequential(Quantised("parameter", torch.float32))
    model[0].lin.scale = None
    raised(surgery.RuleError, lambda: surgery.apply(model, at("0.lin", unfreeze)))


def test_a_dynamically_quantised_base_can_be_adapted() -> None:
    quantise = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantise is None:
        pytest.skip("this torch quantises nothing by itself")
    x = torch.randn(2, 5, 24)
    model = quantise(models.tiny_vit(), {nn.Linear}, torch.qint8)
    base, x = laws.outcome(model, models.images()), models.images()
    rule = at("blocks.*.mlp", parallel(lambda s: surgery.parts.Adapter(24, 4)))
    surgery.apply(model, rule, example=x)
    assert {p.dtype for p in surgery.parameters(model)} == {torch.float32}
    assert torch.equal(laws.outcome(model, x), base)
    part = model.surgery.default.get_submodule("blocks/2/mlp/parallel")
    _last_block_alone(model, x, part)
    surgery.revert(model)
    assert torch.equal(laws.outcome(model, x), base)


def _last_block_alone(model: nn.Module, x: Tensor, part: nn.Module) -> None:
    """Gradient comes to the last part: torch has no derivative for what lies behind it."""
    out = model.norm(model.blocks[2](model.patch_embed(x).detach()))
    out.square().sum().backward()
    assert part.up.weight.grad.abs().sum() > 0


def test_a_meta_model_is_operated_then_materialised_and_loaded() -> None:
    rules = [at(ffn, parallel(shared(moa(rank=4, dropout=0.5)), scale=0.1)), at("head", unfreeze)]
    rules.append(at(ffn, append(adapter(rank=2), residual=True)))
    wanted = surgery.apply(models.tiny_vit().eval(), rules)
    laws.stir(wanted)
    with torch.device("meta"):
        model = models.tiny_vit().eval()
    surgery.plan(model, rules)
    surgery.apply(model, rules, example=torch.empty(1, 3, 16, 16, device="meta"))
    model.to_empty(device="cpu")
    model.load_state_dict(wanted.state_dict())
    assert [n for n, m in model.named_modules() if m.training and "/" in n] == []
    assert torch.equal(laws.outcome(model, models.images()), laws.outcome(wanted, models.images()))
    trained = [k for k, p in wanted.named_parameters() if p.requires_grad]
    assert [k for k, p in model.named_parameters() if p.requires_grad] == trained
    laws.train(model, models.images())
    surgery.revert(model)
    assert not hasattr(model, "surgery")
    assert torch.equal(model.head.weight, wanted.head.weight)  # the base that filled it
