"""Models of recurrent-memory-transformer-pytorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def decoder() -> Built:
    """A decoder with memory tokens before and behind the words.

    ffn: layers.*.1.branch
    qkv: layers.*.0.branch.to_{q,kv}
    proj: layers.*.0.branch.to_out
    head: to_logits
    prompts: no; memories are cut out by number, a mask of so many words
    """
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer

    model = RecurrentMemoryTransformer(
        dim=32, num_tokens=50, depth=2, num_memory_tokens=4, seq_len=16, heads=2, dim_head=16,
        num_residual_streams=1,
    )  # fmt: skip
    return model, torch.randint(0, 50, (2, 16))
