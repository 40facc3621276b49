"""Models of h-transformer-1d: attention in a hierarchy of blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def encoder() -> Built:
    """H-Transformer: attention in a hierarchy of blocks, each pair of them averaged for the next.

    ffn: layers.layers.*.1.fn
    qkv: layers.layers.*.0.fn.to_qkv
    proj: layers.layers.*.0.fn.to_out
    head: to_logits
    prompts: some; tokens are padded to blocks, a mask of so many words
    """
    from h_transformer_1d import HTransformer1D

    model = HTransformer1D(
        num_tokens=50, dim=32, depth=2, max_seq_len=16, heads=2, dim_head=16, block_size=4
    )
    return model, torch.randint(0, 50, (2, 16))
