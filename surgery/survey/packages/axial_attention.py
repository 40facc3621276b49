"""Models of axial-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def image() -> Built:
    """Axial attention along rows and columns; between them 3x3 convolutions, which are no networks.

    ffn: -
    qkv: layers.blocks.*.*.fn.fn.to_{q,kv}
    proj: layers.blocks.*.*.fn.fn.to_out
    head: -
    prompts: no; maps
    """
    from axial_attention import AxialImageTransformer

    model = AxialImageTransformer(
        dim=32, depth=2, heads=2, reversible=False, axial_pos_emb_shape=(6, 6)
    )
    return model, torch.randn(2, 32, 6, 6)
