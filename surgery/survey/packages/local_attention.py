"""Models of local-attention: each token reads those near to it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def language_model() -> Built:
    """A decoder whose tokens read those in two windows, gated networks.

    ffn: layers.*.1.branch
    qkv: layers.*.0.branch.to_qkv
    proj: layers.*.0.branch.to_out
    head: to_logits
    prompts: some; windows, which would lie otherwise; a causal mask
    """
    from local_attention import LocalTransformer

    model = LocalTransformer(
        num_tokens=50, max_seq_len=16, dim=32, depth=2, heads=2, dim_head=16,
        local_attn_window_size=4,
        num_residual_streams=1,
    )  # fmt: skip
    return model, torch.randint(0, 50, (2, 16))
