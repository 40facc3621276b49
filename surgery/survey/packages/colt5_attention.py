"""Models of colt5-attention: a light branch for all tokens, a heavy one for some."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def _block() -> nn.Module:
    from colt5_attention import ConditionalRoutedTransformerBlock

    block: nn.Module = ConditionalRoutedTransformerBlock(
        32, num_heavy_attn_tokens_q=4, num_heavy_attn_tokens_kv=4, num_heavy_ff_tokens=4,
        light_dim_head=16, light_heads=2, light_window_size=4, heavy_dim_head=16, heavy_heads=2,
    )  # fmt: skip
    return block


def blocks() -> Built:
    """CoLT5: a narrow network and local attention for all tokens, wide ones for those that a router
    picks.

    ffn: *.conditional_ff.{light_ff,heavy_ff}
    qkv: *.conditional_attn.light_attn.to_qkv *.conditional_attn.heavy_attn.to_{q,kv}
    proj: *.conditional_attn.{light_attn,heavy_attn}.to_out
    head: -
    prompts: some; windows and the number of routed tokens would count them
    refuses: none beside it; of to_kv the model reads the weight, without a bias to shift
    """
    model = nn.Sequential(*(_block() for _ in range(2)))
    return model, torch.randn(2, 16, 32)
