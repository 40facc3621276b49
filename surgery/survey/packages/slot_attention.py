"""Models of slot-attention: slots compete for tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def slots() -> Built:
    """Slot attention: a softmax over slots, a GRU instead of an output projection, run again and
    again.

    ffn: mlp
    qkv: to_{q,k,v}
    proj: -
    head: -
    prompts: no; the slots are the output
    """
    from slot_attention import SlotAttention

    model = SlotAttention(num_slots=4, dim=32, iters=2, hidden_dim=64)
    return model, torch.randn(2, 12, 32)


def heads() -> Built:
    """Slot attention of several heads.

    ffn: mlp
    qkv: to_{q,k,v}
    proj: combine_heads
    head: -
    prompts: no; the slots are the output
    """
    from slot_attention import MultiHeadSlotAttention

    model = MultiHeadSlotAttention(num_slots=4, dim=32, iters=2, heads=2, dim_head=16)
    return model, torch.randn(2, 12, 32)
