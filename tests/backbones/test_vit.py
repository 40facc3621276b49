"""vit(): local files of timm's and of Google's layout fill a small transformer, or say why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from backbones.vit import vit

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def source() -> VisionTransformer:
    torch.manual_seed(1)
    model = timm.create_model(NAME, num_classes=7)
    assert isinstance(model, VisionTransformer)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def stored(source: VisionTransformer, file: Path) -> Path:
    state = {key: tensor.detach().clone() for key, tensor in source.state_dict().items()}
    if file.suffix == ".safetensors":
        save_file(state, file)
    elif file.suffix == ".pth":
        torch.save({"state_dict": {f"module.{key}": t for key, t in state.items()}}, file)
    else:
        np.savez(file, allow_pickle=False, **google(state))
    return file


def google(s: dict[str, Tensor], heads: int = 3) -> dict[str, np.ndarray]:
    """The arrays of the published .npz files: kernels (in, out), q, k, v apart and by heads."""
    made = {
        "embedding/kernel": s["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": s["patch_embed.proj.bias"],
        "cls": s["cls_token"],
        "Transformer/posembed_input/pos_embedding": s["pos_embed"],
        "Transformer/encoder_norm/scale": s["norm.weight"],
        "Transformer/encoder_norm/bias": s["norm.bias"],
        "head/kernel": s["head.weight"].T,
        "head/bias": s["head.bias"],
    }
    for i in range(12):
        block, to = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        made |= {
            f"{to}/LayerNorm_0/scale": s[f"{block}.norm1.weight"],
            f"{to}/LayerNorm_0/bias": s[f"{block}.norm1.bias"],
            f"{to}/LayerNorm_2/scale": s[f"{block}.norm2.weight"],
            f"{to}/LayerNorm_2/bias": s[f"{block}.norm2.bias"],
        }
        attn, mlp = f"{to}/MultiHeadDotProductAttention_1", f"{to}/MlpBlock_3"
        rows = zip(s[f"{block}.attn.qkv.weight"].chunk(3), s[f"{block}.attn.qkv.bias"].chunk(3),
                   ("query", "key", "value"), strict=True)  # fmt: skip
        for weight, bias, name in rows:
            made[f"{attn}/{name}/kernel"] = weight.T.reshape(192, heads, -1)
            made[f"{attn}/{name}/bias"] = bias.reshape(heads, -1)
        made[f"{attn}/out/kernel"] = s[f"{block}.attn.proj.weight"].T.reshape(heads, -1, 192)
        made[f"{attn}/out/bias"] = s[f"{block}.attn.proj.bias"]
        for j in (0, 1):
            made[f"{mlp}/Dense_{j}/kernel"] = s[f"{block}.mlp.fc{j + 1}.weight"].T
            made[f"{mlp}/Dense_{j}/bias"] = s[f"{block}.mlp.fc{j + 1}.bias"]
    return {key: tensor.numpy() for key, tensor in made.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz"])
def test_a_file_fills_all_and_the_head_where_it_fits(
    source: VisionTransformer, tmp_path: Path, suffix: str
) -> None:
    file = stored(source, tmp_path / f"weights{suffix}")
    wanted = source.state_dict()
    same = vit(NAME, 7, checkpoint=file).state_dict()
    assert all(torch.equal(same[key], tensor) for key, tensor in wanted.items())
    other = vit(NAME, 5, checkpoint=str(file)).state_dict()
    assert other["head.weight"].shape == (5, 192)
    body = {key for key in wanted if not key.startswith("head.")}
    assert all(torch.equal(other[key], wanted[key]) for key in body)
    assert "head.weight" not in vit(NAME, 0, checkpoint=file).state_dict()


def test_without_weights_it_is_timm_at_its_start() -> None:
    torch.manual_seed(3)
    made = vit(NAME, 5)
    torch.manual_seed(3)
    theirs = timm.create_model(NAME, num_classes=5)
    pairs = zip(made.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match=r"no file 'ViT-B_16.npz'.*give a file"):
        vit(NAME, checkpoint="ViT-B_16.npz")


def test_a_file_that_leaves_blocks_unfilled(source: VisionTransformer, tmp_path: Path) -> None:
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("blocks.11.")}
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"12 tensors are not in it, such as blocks\.11\.norm1"):
        vit(NAME, 7, checkpoint=tmp_path / "short.pth")


def test_two_sources_and_other_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"both given\. Give one"):
        vit(NAME, pretrained=True, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=r"it is a ResNet, .* Use timm\.create_model"):
        vit("resnet18")
