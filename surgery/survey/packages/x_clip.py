"""Models of x-clip."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, Tensor]]


def clip() -> Built:
    """CLIP: a tower of words and one of patches, of two widths, and what brings both to one.

    ffn: {text,visual}_transformer.transformer.layers.*.1.fn
    qkv: {text,visual}_transformer.transformer.layers.*.0.fn.to_qkv
    proj: {text,visual}_transformer.transformer.layers.*.0.fn.to_out.0
    head: to_text_latent to_visual_latent visual_transformer.to_cls_tokens.1?
    prompts: some; among patches, not among words, whose mask has a row for each
    """
    from x_clip import CLIP

    model = CLIP(
        dim_text=32, dim_image=48, dim_latent=16, num_text_tokens=50, text_enc_depth=2,
        text_seq_len=16,
        text_heads=2, text_dim_head=16, visual_enc_depth=2, visual_heads=2, visual_dim_head=16,
        visual_image_size=32, visual_patch_size=8, visual_patch_dropout=0.0,
    )  # fmt: skip
    return model, (torch.randint(1, 50, (2, 16)), torch.randn(2, 3, 32, 32))
