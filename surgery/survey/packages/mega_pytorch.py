"""Models of mega-pytorch: one head, gated by a moving average."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def decoder() -> Built:
    """Mega: one head over a moving average; the result goes through a parameter, no module.

    ffn: layers.*.2
    qkv: layers.*.0.single_headed_attn.{to_qk,to_v}.0
    proj: -
    head: to_logits
    prompts: some; a moving average over tokens would take them in
    """
    from mega_pytorch import Mega

    model = Mega(num_tokens=50, dim=32, depth=2)
    return model, torch.randint(0, 50, (2, 16))
