"""Models of tab-transformer-pytorch: transformers for tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, Tensor]]


def _table() -> tuple[Tensor, Tensor]:
    return torch.randint(0, 3, (3, 4)), torch.randn(3, 5)


def ft_transformer() -> Built:
    """FT-Transformer with hyper-connections: four streams of features, mixed around every branch.

    ffn: transformer.layers.*.1.branch
    qkv: transformer.layers.*.0.branch.to_qkv
    proj: transformer.layers.*.0.branch.to_out
    head: to_logits
    prompts: some; transformer.layers.* is a list, its elements are called on four streams
    """
    from tab_transformer_pytorch import FTTransformer

    return FTTransformer(
        categories=(3, 4, 5, 6), num_continuous=5, dim=32, depth=2, heads=2, dim_head=16,
        dim_out=1,
    ), _table()  # fmt: skip
