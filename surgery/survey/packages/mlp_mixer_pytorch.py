"""Models of mlp-mixer-pytorch: networks over positions and over features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def mixer() -> Built:
    """MLP-Mixer in one nn.Sequential: networks over tokens, then over features.

    ffn: *.1.fn *.0.fn?
    qkv: -
    proj: -
    head: 6
    prompts: no; networks over tokens
    """
    from mlp_mixer_pytorch import MLPMixer

    model = MLPMixer(image_size=32, channels=3, patch_size=8, dim=32, depth=2, num_classes=5)
    return model, torch.randn(2, 3, 32, 32)
