"""Models of infini-transformer-pytorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def decoder() -> Built:
    """Infini-Transformer: causal attention, with keys and values handed out.

    ffn: layers.*.1
    qkv: layers.*.0.to_qkv
    proj: layers.*.0.to_out
    head: to_logits
    prompts: some; keys and values of all tokens are handed out
    """
    from infini_transformer_pytorch import InfiniTransformer

    model = InfiniTransformer(num_tokens=50, dim=32, depth=2, heads=2, dim_head=16)
    return model, torch.randint(0, 50, (2, 16))
