"""Models of g-mlp-pytorch: a gate over positions instead of attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def gmlp() -> Built:
    """gMLP: what stands between the projections mixes positions, by a matrix and not by data.

    ffn: layers.*.fn.fn.fn?
    qkv: -
    proj: -
    head: any
    prompts: no; a matrix over positions
    """
    from g_mlp_pytorch import gMLP

    model = gMLP(num_tokens=50, dim=32, depth=2, seq_len=16)
    return model, torch.randint(0, 50, (2, 16))


def amlp() -> Built:
    """aMLP: the same with a small attention in the gate.

    ffn: layers.*.fn.fn.fn?
    qkv: layers.*.fn.fn.fn.attn.to_qkv
    proj: layers.*.fn.fn.fn.attn.to_out
    head: to_logits
    prompts: no; a matrix over positions
    """
    from g_mlp_pytorch import gMLP

    model = gMLP(num_tokens=50, dim=32, depth=2, seq_len=16, attn_dim=16)
    return model, torch.randint(0, 50, (2, 16))
