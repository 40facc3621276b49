"""Models of palm-pytorch: one projection for attention and network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def palm() -> Built:
    """PaLM: one projection makes queries, a key, a value and the hidden units of the network.

    ffn: -
    qkv: *.fn.fused_attn_ff_proj?
    proj: *.fn.attn_out?
    head: 4
    prompts: some; words behind a causal mask
    """
    from palm_pytorch import PaLM

    model = PaLM(num_tokens=50, dim=32, depth=2, heads=2, dim_head=16)
    return model, torch.randint(0, 50, (2, 16))
