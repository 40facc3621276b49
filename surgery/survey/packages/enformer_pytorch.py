"""Models of enformer-pytorch: a tower of convolutions, then attention by distance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def enformer() -> Built:
    """Enformer: convolutions and softmax pooling, then attention with projected relative positions.

    ffn: transformer.*.1.fn
    qkv: transformer.*.0.fn.1.to_{q,k,v} transformer.*.0.fn.1.to_rel_k? stem.2.to_attn_logits?
        conv_tower.*.2.to_attn_logits?
    proj: transformer.*.0.fn.1.to_out
    head: _heads.human final_pointwise.1.2?
    prompts: some; distances are worked out anew in every attention
    """
    from enformer_pytorch import Enformer

    model = Enformer.from_hparams(
        dim=48, depth=2, heads=2, output_heads={"human": 5}, target_length=4, dim_divisible_by=4,
        num_downsamples=3,
    )  # fmt: skip
    return model, torch.randint(0, 4, (2, 64))
