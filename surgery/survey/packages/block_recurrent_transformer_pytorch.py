"""Models of block-recurrent-transformer-pytorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def decoder() -> Built:
    """A block-recurrent decoder: its first layer also reads a state, and writes it by attention of
    its own.

    ffn: layers.*.1
    qkv: layers.*.0.to_{q,kv}
        layers.*.0.state_container.{q_to_state,q_from_state,state_to_q,state_to_kv}
    proj: layers.*.0.to_out layers.*.0.state_container.to_state_out
    head: to_logits
    prompts: no; rotary positions and a mask of so many words, keys and values are handed out
    """
    from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

    model = BlockRecurrentTransformer(
        num_tokens=50, dim=32, depth=3, heads=2, dim_head=16, max_seq_len=16, block_width=8,
        num_state_vectors=8,
    )  # fmt: skip
    return model, torch.randint(0, 50, (2, 16))
