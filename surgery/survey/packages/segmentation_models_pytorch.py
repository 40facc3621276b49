"""Models of segmentation-models-pytorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def segformer() -> Built:
    """SegFormer: keys and values of shrunk maps, networks with a depthwise convolution between.

    ffn: encoder.block*.*.mlp
    qkv: encoder.block*.*.attn.{q,kv} encoder.block*.*.attn.sr?
    proj: encoder.block*.*.attn.proj
    head: segmentation_head decoder?
    prompts: no; maps
    """
    from segmentation_models_pytorch import Segformer

    model = Segformer(encoder_name="mit_b0", encoder_weights=None, classes=2)
    return model, torch.randn(2, 3, 64, 64)
