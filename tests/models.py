"""Tiny models of several families, built at random from their configurations: no download."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def tiny_vit(**changes: Any) -> VisionTransformer:
    """timm: width 24, depth 3, 16x16 images, 5 classes."""
    chosen: dict[str, Any] = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 3,
        "num_classes": 5,
    }
    return VisionTransformer(**{**chosen, **changes})


def images(batch: int = 2, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 3, size, size, generator=generator)


def words_in(batch: int = 2, length: int = 6, vocabulary: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer as TorchvisionViT

    return TorchvisionViT(
        image_size=16,
        patch_size=8,
        num_layers=3,
        num_heads=3,
        hidden_dim=24,
        mlp_dim=96,
        num_classes=5,
    )


def hf_sizes(layers: int = 3) -> dict[str, Any]:
    return {
        "hidden_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "intermediate_size": 96,
    }


def hf_vit(layers: int = 3) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**hf_sizes(layers), image_size=16, patch_size=8, num_labels=5)
    return ViTForImageClassification(config).eval()


def hf_bert(layers: int = 3) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(**hf_sizes(layers), vocab_size=32, max_position_embeddings=16, num_labels=5)
    return BertForSequenceClassification(config).eval()


def hf_clip_vision(layers: int = 3) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**hf_sizes(layers), image_size=16, patch_size=8)).eval()


def hf_gpt2(layers: int = 3) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=24,
        n_layer=layers,
        n_head=3,
        vocab_size=32,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def hf_llama(layers: int = 3) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**hf_sizes(layers), vocab_size=32, max_position_embeddings=16)
    return LlamaForCausalLM(config).eval()


def encoder(**changes: Any) -> nn.TransformerEncoder:
    """torch: width 24, two layers, batch first."""
    chosen: dict[str, Any] = {"dim_feedforward": 48, "dropout": 0.0, "batch_first": True}
    layer = nn.TransformerEncoderLayer(24, 3, **{**chosen, **changes})
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class TinyUNet(nn.Module):
    """Named as diffusers' UNet: a block of a residual with a grouped convolution, and attention."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 3, stride=2, padding=1)
        block = {"resnets": [ResnetBlock2D(width)], "attentions": [Transformer2DModel(width)]}
        lists = {name: nn.ModuleList(modules) for name, modules in block.items()}
        self.down_blocks = nn.ModuleList([nn.ModuleDict(lists)])
        self.conv_out = nn.Conv2d(width, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block["attentions"][0](block["resnets"][0](x))
        return self.conv_out(x)


class ResnetBlock2D(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(2, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.conv1(self.norm1(x)).tanh())


class Transformer2DModel(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.proj_in = nn.LayerNorm(width), nn.Conv2d(width, width, 1)
        self.attn1 = nn.ModuleDict(
            {name: nn.Linear(width, width, bias=False) for name in ("to_q", "to_k", "to_v")}
        )
        self.attn1["to_out"] = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.proj_in(x).flatten(2).mT
        normed = self.norm(h)
        q, k, v = (self.attn1[name](normed) for name in ("to_q", "to_k", "to_v"))
        h = h + self.attn1["to_out"][0]((q @ k.mT / 3).softmax(-1) @ v)
        return x + h.mT.unflatten(2, x.shape[2:])
