"""Adapters of one and two bits a weight, against their formulae written out."""

from __future__ import annotations

import copy
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import surgery
from surgery.errors import FileError, MatchError, OperationError, RuleError
from surgery.methods.one_bit import bi_adaptformer, bi_lora
from surgery.parts.binary import QuantisedLinear, binary_adapter, binary_lora
from surgery.state import packed
from tests.methods.reference import (
    BOTH,
    INPUTS,
    agrees,
    blocks,
    merges,
    parts,
    reverts,
    starts_as_the_base,
    stirred,
    untrained,
    vit,
    vit_b,
)

BITS = pytest.mark.parametrize("bits", [1, 2])
EPS32 = torch.finfo(torch.float32).eps


@lru_cache
def codes(bits: int) -> list[float]:
    """Each code is the median of its cell of a normal variable, cells are cut halfway."""
    normal = NormalDist()
    values = [i - (2**bits - 1) / 2 for i in range(2**bits)]
    for _ in range(200):
        cuts = [(a + b) / 2 for a, b in pairwise(values)]
        p = [0.0, *map(normal.cdf, cuts), 1.0]
        values = [normal.inv_cdf((a + b) / 2) for a, b in pairwise(p)]
    return values


def quantise(w: Tensor, bits: int = 1) -> Tensor:
    """b std + mean, with b the code nearest to (w - mean) / (std + 1e-5)."""
    mean, std = w.sum() / w.numel(), ((w - w.mean()) ** 2).sum().div(w.numel() - 1).sqrt()
    code = torch.tensor(codes(bits), dtype=w.dtype)
    nearest = ((w - mean) / (std + 1e-5)).unsqueeze(-1).sub(code).abs().argmin(-1)
    return code[nearest] * std + mean


def run(part: Any, x: Tensor, bits: int, relu: bool) -> Tensor:
    hidden = x @ quantise(part.down.weight, bits).T
    return (hidden.clamp(min=0) if relu else hidden) @ quantise(part.up.weight, bits).T


def test_the_codes_are_the_printed_ones() -> None:
    assert codes(1) == pytest.approx([-0.67449, 0.67449], abs=1e-5)
    assert codes(2) == pytest.approx([-1.2657, -0.3778, 0.3778, 1.2657], abs=1e-4)


@BITS
@BOTH
def test_bi_adaptformer_is_the_formula(backbone: str, bits: int) -> None:
    def rewrite(plain: nn.Module, made: dict[str, Any]) -> None:
        for block, part in zip(blocks(plain), made.values(), strict=True):
            norm, mlp, kept = block.norm2.forward, block.mlp.forward, {}

            def keep(u: Tensor, norm: Any = norm, kept: Any = kept) -> Any:
                kept["u"] = u
                return norm(u)

            def add(z: Tensor, mlp: Any = mlp, kept: Any = kept, part: Any = part) -> Any:
                return mlp(z) + 0.5 * run(part, kept["u"], bits, relu=True)

            block.norm2.forward, block.mlp.forward = keep, add

    agrees(backbone, bi_adaptformer(rank=8, scale=0.5, bits=bits), rewrite)


@BITS
@BOTH
def test_bi_lora_is_the_formula(backbone: str, bits: int) -> None:
    def rewrite(plain: nn.Module, made: dict[str, Any]) -> None:
        for block, part in zip(blocks(plain), made.values(), strict=True):
            qkv = block.attn.qkv.forward

            def add(x: Tensor, qkv: Any = qkv, part: Any = part) -> Tensor:
                q, k, v = qkv(x).chunk(3, -1)
                dq, dv = (0.5 * run(each, x, bits, relu=False) for each in part.parts)
                return torch.cat([q + dq, k, v + dv], -1)

            block.attn.qkv.forward = add

    agrees(backbone, bi_lora(rank=8, scale=0.5, bits=bits), rewrite)


@BITS
def test_the_gradient_passes_the_codes_and_the_statistics(bits: int) -> None:
    torch.manual_seed(0)
    layer = QuantisedLinear(12, 6, bits).double()
    g, w = torch.randn(6, 12, dtype=torch.float64), layer.weight.detach()
    (layer.quantised() * g).sum().backward()
    mean, std, n = w.mean(), w.std(), w.numel()
    b = (quantise(w, bits) - mean) / std
    through = g * std / (std + 1e-5)  # of each weight, by its code
    by_mean = g.sum() - through.sum()
    by_std = (g * b).sum() - (through * (w - mean)).sum() / (std + 1e-5)
    want = through + by_mean / n + by_std * (w - mean) / ((n - 1) * std)
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rules", [bi_adaptformer(rank=4), bi_lora(rank=4)])
@BOTH
def test_all_is_trained_and_comes_off_and_does_not_start_as_the_base(
    backbone: str, rules: Any
) -> None:
    assert untrained(backbone, rules) == []
    assert not starts_as_the_base(backbone, rules)
    reverts(backbone, rules)


def test_the_start() -> None:
    model = surgery.apply(vit(), bi_adaptformer(rank=32))
    for part in parts(model).values():
        assert part.down.bias is part.up.bias is None
        assert part.up.weight.abs().max() <= 0.002
        assert 0.0008 < part.up.weight.std() < 0.001  # 0.00088 after the cut at two deviations
        assert 0.95 * 24**-0.5 < part.down.weight.abs().max() <= 24**-0.5
        assert part.act[1].p == 0.1


@BOTH
def test_bi_lora_merges_and_bi_adaptformer_does_not(backbone: str) -> None:
    merges(backbone, bi_lora(rank=8, scale=0.5))
    merges(backbone, bi_lora(rank=8, bits=2))
    with pytest.raises(OperationError, match="BinaryAdapter stands at a span"):
        surgery.merge(stirred(backbone, bi_adaptformer(rank=8)))
    rule = surgery.at(surgery.fc1, binary_adapter(rank=8))
    with pytest.raises(OperationError, match="BinaryAdapter is not linear"):
        surgery.merge(stirred(backbone, rule))


@pytest.mark.parametrize(
    ("rules", "count", "size"),
    [(bi_adaptformer(), 589_824, 73_920), (bi_lora(), 1_179_648, 147_840)],
)
def test_counts_and_bytes_on_a_vit_base(rules: Any, count: int, size: int, tmp_path: Path) -> None:
    assert surgery.plan(vit_b(), rules).trainable == count
    model = surgery.apply(
        copy.deepcopy(vit_b()).to_empty(device="cpu").requires_grad_(False), rules
    )
    with torch.no_grad():
        for p in surgery.parameters(model):
            p.normal_()
    assert packed.save(model, tmp_path / "x").stat().st_size == size


# the rest --------------------------------------------------------------------------------------


def test_a_deep_copy_and_a_saved_file_have_each_weight_once(tmp_path: Path) -> None:
    model = stirred("vit", bi_lora(rank=4))
    keys = {key for key in surgery.state_dict(model) if key.startswith("parts.")}
    assert len(keys) == 3 * 2 * 2
    path = surgery.save(model, tmp_path / "x.safetensors")
    with safe_open(path, framework="pt") as file:
        assert keys <= set(file.keys())
    again = surgery.load(vit(), path, rules=bi_lora(rank=4)).eval()
    with torch.no_grad():
        assert torch.equal(again(INPUTS["vit"]), model(INPUTS["vit"]))
        assert torch.equal(copy.deepcopy(model)(INPUTS["vit"]), model(INPUTS["vit"]))


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (binary_adapter(rank=0), r"binary_adapter\(rank=0\)"),
        (binary_lora(rank=1.5), r"binary_lora\(rank=1.5\)"),  # type: ignore[arg-type]
        (binary_adapter(bits=3), r"binary_adapter\(bits=3\): weights have one bit or two"),
        (binary_lora(bits=True), r"bits=True"),
        (binary_lora(rows="q _k v w o"), "72 features, which are not 5 equal chunks"),
    ],
)
def test_wrong_arguments_are_told(part: Any, match: str) -> None:
    with pytest.raises(RuleError, match=match):
        surgery.apply(vit(), surgery.at(surgery.fused, part))


def test_a_model_without_attention_is_refused() -> None:
    mlp = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    with pytest.raises(MatchError):
        surgery.apply(mlp, bi_lora())


def test_projections_of_their_own_have_a_pair_each() -> None:
    layers_ = [nn.ModuleDict({n: nn.Linear(8, 8) for n in ("q", "k", "v", "o")}) for _ in range(2)]
    rule = surgery.at(surgery.where("*.q") | surgery.where("*.v"), binary_lora(rank=2))
    model = surgery.apply(nn.ModuleList(layers_), rule)
    assert all(each.down.weight.shape == (2, 8) for each in parts(model).values())
    assert len(parts(model)) == 4


def test_weights_that_are_no_numbers_are_not_packed(tmp_path: Path) -> None:
    model = surgery.apply(nn.Sequential(nn.Linear(8, 8)), surgery.at("0", binary_lora(rank=4)))
    with torch.no_grad():
        next(iter(surgery.parameters(model))).fill_(torch.nan)
    with pytest.raises(FileError):
        packed.save(model, tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []
