"""Models of iTransformer: a token is a whole series."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def inverted() -> Built:
    """iTransformer: each series is a token; values are gated by head.

    ffn: layers.*.1.branch
    qkv: layers.*.0.branch.to_qkv.0
    proj: layers.*.0.branch.to_out.1
    head: pred_heads.*
    prompts: some; values of the first layer are mixed into those of the others
    """
    from iTransformer import iTransformer

    model = iTransformer(
        num_variates=4, lookback_len=24, depth=2, dim=32, pred_length=6, heads=2, dim_head=16,
        num_residual_streams=1, flash_attn=False,
    )  # fmt: skip
    return model, torch.randn(2, 24, 4)


def inverted_2d() -> Built:
    """iTransformer of two dimensions: a gated loop and attention over time, then attention over
    series.

    ffn: layers.*.{1,2}.ff
    qkv: layers.*.{1,2}.attn.to_qkv.0 layers.*.0.to_qkva.0?
    proj: layers.*.{1,2}.attn.to_out.1
    head: pred_heads.*
    prompts: some; within each attention, between two foldings of tokens
    """
    from iTransformer import iTransformer2D

    model = iTransformer2D(
        num_variates=4, num_time_tokens=3, lookback_len=24, depth=2, dim=32, pred_length=6, heads=2,
        dim_head=16, flash_attn=False,
    )  # fmt: skip
    return model, torch.randn(2, 24, 4)
