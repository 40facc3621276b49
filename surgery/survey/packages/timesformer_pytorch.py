"""Models of timesformer-pytorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def timesformer() -> Built:
    """TimeSformer: attention over time, then over space, then the network.

    ffn: layers.*.2.fn
    qkv: layers.*.{0,1}.fn.to_qkv
    proj: layers.*.{0,1}.fn.to_out.0
    head: to_out
    prompts: no; tokens are folded to frames and patches
    """
    from timesformer_pytorch import TimeSformer

    model = TimeSformer(
        dim=32, num_frames=4, num_classes=5, image_size=32, patch_size=16, depth=2, heads=2,
        dim_head=16,
        rotary_emb=False,
    )  # fmt: skip
    return model, torch.randn(2, 4, 3, 32, 32)
