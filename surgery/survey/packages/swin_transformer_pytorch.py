"""Models of swin-transformer-pytorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def swin() -> Built:
    """Swin: windows, shifted in every other block; blocks are pairs in a list.

    ffn: stage*.layers.*.*.mlp_block.fn.fn
    qkv: stage*.layers.*.*.attention_block.fn.fn.to_qkv
    proj: stage*.layers.*.*.attention_block.fn.fn.to_out
    head: mlp_head
    prompts: no; windows of maps
    """
    from swin_transformer_pytorch import SwinTransformer

    model = SwinTransformer(
        hidden_dim=16, layers=(2, 2, 2, 2), heads=(2, 2, 4, 4), num_classes=5, head_dim=8,
        window_size=2,
        downscaling_factors=(2, 2, 2, 2),
    )  # fmt: skip
    return model, torch.randn(2, 3, 32, 32)
