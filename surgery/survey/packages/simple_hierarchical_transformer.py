"""Models of simple-hierarchical-transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def decoder() -> Built:
    """Two hierarchies of tokens side by side, merged after every layer.

    ffn: layers.*.*.ff hierarchical_merges.*.net?
    qkv: layers.*.*.attn.to_qkv
    proj: layers.*.*.attn.to_out
    head: to_logits
    prompts: no; hierarchies are joined token by token, windows
    """
    from simple_hierarchical_transformer import HierarchicalTransformer

    model = HierarchicalTransformer(
        num_tokens=50, dim=32, depth=2, seq_len=16, heads=2, dim_head=16, hierarchies=(1, 2),
        window_sizes=(8, None),
    )  # fmt: skip
    return model, torch.randint(0, 50, (2, 16))
