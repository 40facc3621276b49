"""Models of st-moe-pytorch: experts between networks, no attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def block() -> Built:
    """A block of experts with a network before and behind, no attention.

    ffn: {ff_before,ff_after}.net moe? moe.experts? moe.experts.experts.*.net?
    qkv: -
    proj: -
    head: -
    prompts: no; the block is the model
    """
    from st_moe_pytorch import MoE, SparseMoEBlock

    model = SparseMoEBlock(MoE(dim=32, num_experts=4), add_ff_before=True, add_ff_after=True)
    return model, torch.randn(2, 8, 32)
