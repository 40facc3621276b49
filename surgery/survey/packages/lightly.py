"""Models of lightly: vision transformers for learning without labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def masked_vit() -> Built:
    """A vision transformer for masked learning; its head is never used.

    ffn: vit.encoder.layers.*.mlp
    qkv: -
    proj: -
    head: -
    prompts: yes; vit.encoder.layers.* are called
    """
    from lightly.models.modules.masked_vision_transformer_torchvision import (
        MaskedVisionTransformerTorchvision,
    )
    from torchvision.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    return MaskedVisionTransformerTorchvision(vit), torch.randn(2, 3, 32, 32)
