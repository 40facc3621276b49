"""Packed files of quantised weights: codes and statistics come back, nothing half is written."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import FileError, OperationError
from surgery.methods.one_bit import bi_adaptformer, bi_lora
from surgery.parts.binary import QuantisedLinear
from surgery.state import packed
from tests.methods.reference import (
    BACKBONES,
    BOTH,
    INPUTS,
    parts,
    stirred,
    vit,
)
from tests.methods.test_one_bit import BITS, EPS32, codes

RULES = pytest.mark.parametrize(
    "rules",
    [bi_adaptformer(rank=8), bi_lora(rank=8), bi_adaptformer(rank=6, bits=2), bi_lora(5, bits=2)],
)


def layers(model: nn.Module) -> list[QuantisedLinear]:
    return [each for each in model.modules() if isinstance(each, QuantisedLinear)]


@RULES
@BOTH
def test_a_packed_file_brings_back_codes_and_statistics(
    backbone: str, rules: Any, tmp_path: Path
) -> None:
    tuned = stirred(backbone, rules)
    path = packed.save(tuned, tmp_path / "tuned.bin")
    model = packed.load(surgery.apply(BACKBONES[backbone](), rules, seed=9).eval(), path)
    with torch.no_grad():
        for have, want in zip(layers(model), layers(tuned), strict=True):
            assert torch.equal(have.cells(), want.cells())
            w = want.quantised()
            assert (have.quantised() - w).abs().max() <= EPS32 * w.abs().max()
        x = INPUTS[backbone]
        answer = tuned(x)
        assert (model(x) - answer).abs().max() <= 16 * EPS32 * answer.abs().max()
        for key, p in tuned.get_submodule("head").named_parameters():
            assert torch.equal(model.get_submodule("head").get_parameter(key), p.float().double())
    again = packed.save(model, tmp_path / "again.bin")
    assert again.read_bytes() == path.read_bytes()


@RULES
def test_in_float32_it_answers_within_rounding(rules: Any, tmp_path: Path) -> None:
    tuned = stirred("vit", rules).float()
    path = packed.save(tuned, tmp_path / "tuned.bin")
    model = packed.load(surgery.apply(vit().float(), rules, seed=9).eval(), path)
    x = INPUTS["vit"].float()
    with torch.no_grad():
        for have, want in zip(layers(model), layers(tuned), strict=True):
            w = want.quantised()
            assert (have.quantised() - w).abs().max() <= 4 * EPS32 * w.abs().max()
        answer = tuned(x)
        assert (model(x) - answer).abs().max() <= 64 * EPS32 * answer.abs().max()


def test_a_loaded_model_trains_on(tmp_path: Path) -> None:
    path = packed.save(stirred("vit", bi_lora(rank=4)), tmp_path / "tuned.bin")
    model = packed.load(surgery.apply(vit(), bi_lora(rank=4)), path)
    model(INPUTS["vit"]).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in surgery.parameters(model))


@BITS
def test_the_bytes_are_as_the_format_says(bits: int, tmp_path: Path) -> None:
    """Written out one number at a time: codes from the lowest bits on, mean, deviation, head."""
    model = stirred("vit", bi_lora(rank=3, bits=bits)).float()
    want = b""
    for part in parts(model).values():
        for each in part.parts:
            for layer in (each.down, each.up):
                w = layer.weight.detach()
                normal = ((w - w.mean()) / (w.std() + 1e-5)).flatten().tolist()
                index = [min(range(2**bits), key=lambda i: abs(codes(bits)[i] - x)) for x in normal]
                per = 8 // bits
                for start in range(0, len(index), per):
                    byte = sum(c << bits * i for i, c in enumerate(index[start : start + per]))
                    want += byte.to_bytes(1, "little")
                want += struct.pack("<2f", w.mean(), w.std())
    for p in (model.head.weight, model.head.bias):  # type: ignore[union-attr]
        want += struct.pack(f"<{p.numel()}f", *p.flatten().tolist())  # type: ignore[operator,union-attr]
    assert packed.save(model, tmp_path / "x").read_bytes() == want


def test_a_constant_weight_comes_back(tmp_path: Path) -> None:
    model = surgery.apply(vit(), bi_adaptformer(rank=2))
    with torch.no_grad():
        layers(model)[0].weight.fill_(0.25)
    path = packed.save(model, tmp_path / "x")
    again = packed.load(surgery.apply(vit(), bi_adaptformer(rank=2), seed=4), path)
    assert torch.equal(layers(again)[0].weight, layers(model)[0].weight)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = surgery.apply(vit(), bi_adaptformer(rank=4))
    path, before = packed.save(model, tmp_path / "x"), state(model)
    data = path.read_bytes()
    damaged = b"\xff" * (len(data) // 8)
    for bad, match in (
        (data[:-1], rf"it has {len(data) - 1:,} bytes, and this model's has {len(data):,}"),
        (data + b"0", "bytes"),
        (b"", "it has 0 bytes"),
        (damaged + data[len(damaged) :], "no weight of 2 values has these codes"),
    ):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(FileError, match=match):
            packed.load(model, tmp_path / "bad")
    with pytest.raises(FileError, match="there is no such file"):
        packed.load(model, tmp_path / "none")
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_nothing_half_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = surgery.apply(vit(), bi_adaptformer(rank=4))
    with pytest.raises(FileError, match="there is no folder"):
        packed.save(model, tmp_path / "none" / "x")
    monkeypatch.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        packed.save(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_two_bits_that_no_four_values_have_are_refused_while_the_weights_are_there(
    tmp_path: Path,
) -> None:
    model = surgery.apply(vit(), bi_adaptformer(rank=4, bits=2))
    with torch.no_grad():
        w = layers(model)[0].weight
        w.uniform_(-0.01, 0.01)
        w.view(-1)[0], w.view(-1)[1] = 3.0, -3.0
    with pytest.raises(FileError, match="no weight of 4 values has these codes"):
        packed.save(model, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_packed_file_holds_nothing_else(tmp_path: Path) -> None:
    plain = surgery.at(surgery.ffn, surgery.parallel(surgery.adapter()))
    other = surgery.apply(vit(), [*bi_lora(rank=4), plain])
    with pytest.raises(OperationError, match=r"it holds parts\.blocks/0/mlp"):
        packed.save(other, tmp_path / "x")
    with pytest.raises(OperationError, match="it holds no quantised weight"):
        packed.load(surgery.apply(vit(), "linear_probe"), tmp_path / "x")
    with pytest.raises(OperationError, match="was never operated"):
        packed.save(vit(), tmp_path / "x")
    with pytest.raises(OperationError, match="merged"):
        packed.save(surgery.merge(surgery.apply(vit(), bi_lora(rank=4))), tmp_path / "x")
