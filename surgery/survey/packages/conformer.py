"""Models of conformer: a network before and behind, a convolution between."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def conformer() -> Built:
    """Conformer: half a network, attention with learned distances, convolution, half a network.

    ffn: layers.*.{ff1,ff2}.fn.fn
    qkv: layers.*.attn.fn.to_{q,kv}
    proj: layers.*.attn.fn.to_out
    head: -
    prompts: some; a convolution over tokens would mix them in
    """
    from conformer import Conformer

    model = Conformer(dim=32, depth=2, heads=2, dim_head=16, conv_kernel_size=7)
    return model, torch.randn(2, 12, 32)
