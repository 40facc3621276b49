"""Models of nystrom-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def nystromformer() -> Built:
    """Nystromformer: attention through the means of stretches of tokens, three softmaxes.

    ffn: layers.*.1.fn
    qkv: layers.*.0.fn.to_qkv
    proj: layers.*.0.fn.to_out.0
    head: -
    prompts: yes; layers.* is a list, its elements are called
    """
    from nystrom_attention import Nystromformer

    model = Nystromformer(dim=32, depth=2, heads=2, dim_head=16, num_landmarks=4)
    return model, torch.randn(2, 16, 32)
