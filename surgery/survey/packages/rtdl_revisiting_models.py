"""Models of rtdl-revisiting-models: transformers for tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, Tensor]]


def ft_transformer() -> Built:
    """FT-Transformer: blocks are ModuleDicts in a loop; the last block has one query, the class
    token.

    ffn: backbone.blocks.*.ffn
    qkv: backbone.blocks.*.attention.W_{q,k,v}
    proj: backbone.blocks.*.attention.W_out
    head: backbone.output
    prompts: some; backbone.blocks.* is a dict, its elements are called; the last has one query
    """
    from rtdl_revisiting_models import FTTransformer

    model = FTTransformer(
        n_cont_features=4, cat_cardinalities=[3, 5], d_out=2, n_blocks=2, d_block=32,
        attention_n_heads=2, attention_dropout=0.0, ffn_d_hidden=None, ffn_d_hidden_multiplier=2,
        ffn_dropout=0.0, residual_dropout=0.0,
    )  # fmt: skip
    return model, (torch.randn(3, 4), torch.randint(0, 3, (3, 2)))
