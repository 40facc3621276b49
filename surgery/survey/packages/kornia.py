"""Models of kornia: matching of features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, Tensor]]


def loftr() -> Built:
    """LoFTR's transformer: attention by a kernel, of one picture and of both in turn; networks
    that read a token and its message.

    ffn: layers.*.mlp
    qkv: layers.*.{q,k,v}_proj
    proj: layers.*.merge
    head: -
    prompts: no; two streams go through every layer in turn, and are matched token by token
    """
    from kornia.feature.loftr.loftr_module import LocalFeatureTransformer

    config = {
        "d_model": 32, "nhead": 2, "layer_names": ["self", "cross"] * 2, "attention": "linear",
    }  # fmt: skip
    return LocalFeatureTransformer(config), (torch.randn(1, 12, 32), torch.randn(1, 10, 32))
