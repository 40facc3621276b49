"""Models of performer-pytorch: attention by random features, without a softmax over tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def encoder() -> Built:
    """Performer: random features of queries and keys instead of a softmax over tokens.

    ffn: net.layers.*.1.fn.fn
    qkv: net.layers.*.0.fn.to_{q,k,v}
    proj: net.layers.*.0.fn.to_out
    head: -
    prompts: yes; net.layers.* is a list, its elements are called
    """
    from performer_pytorch import Performer

    model = Performer(dim=32, depth=2, heads=2, dim_head=16)
    return model, torch.randn(2, 16, 32)


def language_model() -> Built:
    """Performer over words, with ReLU for its kernel.

    ffn: performer.net.layers.*.1.fn.fn
    qkv: performer.net.layers.*.0.fn.to_{q,k,v}
    proj: performer.net.layers.*.0.fn.to_out
    head: to_out
    prompts: yes; performer.net.layers.* is a list, its elements are called
    """
    from performer_pytorch import PerformerLM

    model = PerformerLM(
        num_tokens=50, max_seq_len=16, dim=32, depth=2, heads=2, dim_head=16,
        generalized_attention=True,
        rotary_position_emb=False,
    )  # fmt: skip
    return model, torch.randint(0, 50, (2, 16))
