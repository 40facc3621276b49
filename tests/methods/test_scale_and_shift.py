"""SSF against models whose every operation is scaled and shifted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import surgery
from surgery import append, at, fc1, norm, parallel
from surgery.methods.scale_and_shift import ssf
from surgery.parts.scale import ScaleShift, scale_shift
from tests.laws import checks as laws
from tests.methods.reference import (
    BACKBONES,
    BOTH,
    agrees,
    close,
    merges,
    parts,
    starts_as_the_base,
    stirred,
    trains_and_comes_off,
    untrained,
    vit,
)
from tests.models import encoder, hf_vit, images, tiny_vit

BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
HF = (
    *(f"attention.{letter}_proj" for letter in "qkvo"), "layernorm_before", "layernorm_after",
    "mlp.fc1", "mlp.fc2",
)  # fmt: skip
TORCH = ("self_attn", "linear1", "linear2", "norm1", "norm2")
OPERATIONS: dict[str, list[str]] = {
    "vit": ["patch_embed.proj", *(f"blocks.{i}.{o}" for i in range(3) for o in BLOCK), "norm"],
    "swin": [
        "patch_embed.proj", "patch_embed.norm",
        *(f"layers.0.blocks.{i}.{o}" for i in range(2) for o in BLOCK),
        "layers.1.downsample.norm", "layers.1.downsample.reduction",
        *(f"layers.1.blocks.{i}.{o}" for i in range(2) for o in BLOCK),
        "norm",
    ],
    "hf": [
        "vit.embeddings.patch_embeddings.projection",
        *(f"vit.layers.{i}.{o}" for i in range(3) for o in HF),
        "vit.layernorm",
    ],
    "encoder": [f"layers.{i}.{o}" for i in range(2) for o in TORCH],
}  # fmt: skip


def scaled(plain: nn.Module, parts: dict[str, Any], paths: list[str]) -> None:
    """Let every operation give gamma * y + beta; a convolution's features are on axis 1."""
    for path in paths:
        module, part = plain.get_submodule(path), parts[f"{path.replace('.', '/')}/append"]
        module.register_forward_hook(hook(module, part.gamma, part.beta))


def hook(module: nn.Module, gamma: Tensor, beta: Tensor) -> Any:
    def act(y: Tensor) -> Tensor:
        if isinstance(module, nn.Conv2d):
            return gamma[None, :, None, None] * y + beta[None, :, None, None]
        return gamma * y + beta

    return lambda m, args, y: (act(y[0]), *y[1:]) if isinstance(y, tuple) else act(y)


@BOTH
def test_every_operation_is_scaled_and_shifted(backbone: str) -> None:
    agrees(backbone, ssf(), lambda plain, parts: scaled(plain, parts, OPERATIONS[backbone]))


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_these_and_no_others(name: str) -> None:
    builders = {**BACKBONES, "hf": hf_vit, "encoder": encoder}
    made = parts(surgery.apply(builders[name](), ssf()))
    assert sorted(made) == sorted(f"{o.replace('.', '/')}/append" for o in OPERATIONS[name])
    assert not any("head" in key or "classifier" in key for key in made)


@pytest.mark.parametrize("name", ["hf", "encoder"])
def test_other_families_are_scaled_and_shifted_too(name: str) -> None:
    build: Any = hf_vit if name == "hf" else encoder
    x = images() if name == "hf" else torch.randn(2, 5, 24)
    model = surgery.apply(build().eval(), ssf()).eval()
    plain = build().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "surgery." not in k})
    with torch.no_grad():
        base = answer(plain, x)
        scaled(plain, parts(model), OPERATIONS[name])
        have, want = answer(model, x), answer(plain, x)
    assert torch.allclose(have, want, atol=1e-5)
    assert (want - base).abs().max() > 1e-3


def answer(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


def test_a_convolution_is_scaled_channel_by_channel() -> None:
    model: Any = stirred("vit", ssf())
    conv, part = model.patch_embed.proj, parts(model)["patch_embed/proj/append"]
    x = torch.randn(2, 3, 48, 16, dtype=torch.float64)
    with torch.no_grad():
        base: Tensor = nn.functional.conv2d(x, conv.weight, conv.bias, conv.stride)
        assert base.shape == (2, 24, 6, 2)
        for i in range(24):
            close(conv(x)[:, i], part.gamma[i] * base[:, i] + part.beta[i])


@BOTH
def test_it_starts_at_random_near_the_base(backbone: str) -> None:
    assert not starts_as_the_base(backbone, ssf())
    part = ScaleShift(100_000)
    for values, mean in ((part.gamma, 1.0), (part.beta, 0.0)):
        assert abs(values.mean().item() - mean) < 5e-4
        assert abs(values.std().item() - 0.02) < 5e-4
    assert not getattr(part, "starts_at_zero", False)


@BOTH
def test_gradient_comes_to_all_and_all_comes_off(backbone: str) -> None:
    trains_and_comes_off(backbone, ssf())


def test_it_merges_into_linears_convolutions_and_norms() -> None:
    merges("vit", ssf())


def test_merged_weights_are_those_of_the_formula() -> None:
    model: Any = stirred("vit", ssf())
    with torch.no_grad():
        for path in ("blocks.1.attn.qkv", "blocks.1.norm2", "patch_embed.proj"):
            part = parts(model)[f"{path.replace('.', '/')}/append"]
            module: Any = model.get_submodule(path)
            first = part.gamma.reshape(-1, *[1] * (module.weight.dim() - 1))
            weight, bias = first * module.weight, part.gamma * module.bias + part.beta
            surgery.merge(model)
            close(module.weight, weight)
            close(module.bias, bias)
            surgery.unmerge(model)


def test_on_swin_a_shift_has_no_bias_to_merge_into_but_where_it_is_left_out() -> None:
    model: Any = stirred("swin", ssf())
    with pytest.raises(surgery.OperationError, match=r"downsample\.reduction: ScaleShift adds a b"):
        surgery.merge(model)
    merges("swin", ssf(mergeable=True))
    left = {
        key
        for key, part in parts(stirred("swin", ssf(mergeable=True))).items()
        if part.beta is None
    }
    assert left == {"layers/1/downsample/reduction/append"}
    assert untrained("swin", ssf(mergeable=True)) == []
    assert (
        surgery.plan(vit(), ssf(mergeable=True)).trainable == surgery.plan(vit(), ssf()).trainable
    )


def test_counts() -> None:
    """Swin-B: 22 c a block, 2 c for the embedding and its norm each, 12 c a merging: 0.28 M."""
    widths = {128: 2, 256: 2, 512: 18, 1024: 2}
    swin_b = sum(22 * c * n for c, n in widths.items()) + 4 * 128 + 12 * 896 + 2 * 1024
    counts = {"vit_base_patch16_224": 205_824, "swin_base_patch4_window7_224": swin_b}
    for name, count in counts.items():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        assert surgery.plan(model, ssf()).trainable == count
    assert swin_b == 278_016


def test_the_head_is_trained_and_left_out() -> None:
    model = surgery.apply(tiny_vit(), ssf())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "surgery" not in name} == {"head.weight", "head.bias"}


def test_a_file_carries_gamma_and_beta(tmp_path: Path) -> None:
    model = stirred("vit", ssf())
    path = surgery.save(model, tmp_path / "ssf.safetensors")
    other = surgery.load(vit(), path, rules=ssf())
    assert all(
        torch.equal(part.gamma, parts(model)[key].gamma)
        and torch.equal(part.beta, parts(model)[key].beta)
        for key, part in parts(other).items()
    )


def test_it_is_mostly_joined_after_a_module() -> None:
    assert at(norm, scale_shift()) == at(norm, append(scale_shift()))


def test_where_it_cannot_stand_is_told() -> None:
    with pytest.raises(surgery.RuleError, match="it is given 24 features where 96 are needed"):
        surgery.apply(vit(), at(fc1, parallel(scale_shift())))


class PerHead(nn.Module):
    """RetNet's: a norm of every head's features, which holds no number of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Retention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(32), PerHead()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = self.heads((q @ k.mT / 3).softmax(-1) @ v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)  # type: ignore[no-any-return]


def test_a_norm_of_each_head_is_as_wide_as_a_head(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Retention(), Retention(), nn.Linear(32, 3)).eval()

    x, operated, other = torch.randn(2, 6, 32), model(), model()
    surgery.apply(operated, "ssf", example=x)
    widths = {n: len(p) for n, p in operated.named_parameters() if "heads/append" in n}
    assert set(widths.values()) == {8}
    laws.stir_parts(operated)
    surgery.save(operated, tmp_path / "a.safetensors")
    surgery.load(other, tmp_path / "a.safetensors")
    assert torch.equal(other(x), operated(x))
