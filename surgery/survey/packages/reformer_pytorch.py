"""Models of reformer-pytorch: attention among tokens of one bucket, reversible layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def language_model() -> Built:
    """Reformer: queries are keys, hashed to buckets; reversible layers by an autograd function.

    ffn: reformer.layers.blocks.*.g.net.fn.fn
    qkv: reformer.layers.blocks.*.f.net.fn.{toqk,tov}
    proj: reformer.layers.blocks.*.f.net.fn.to_out
    head: out.1
    prompts: no; tokens are cut to buckets of one size
    refuses: grad; nothing before the layers is trained, so their backward never runs
    """
    from reformer_pytorch import ReformerLM

    model = ReformerLM(
        num_tokens=50, dim=32, depth=2, max_seq_len=16, heads=2, dim_head=16, bucket_size=4,
        n_hashes=2,
        ff_chunks=1,
    )  # fmt: skip
    return model, torch.randint(0, 50, (2, 16))
