"""Models of fair-esm: proteins."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def esm2() -> Built:
    """ESM-2: rotary positions, tokens first, a head that is tied to the embedding.

    ffn: layers.*.(fc1 to fc2)
    qkv: layers.*.self_attn.{k,v,q}_proj
    proj: layers.*.self_attn.out_proj
    head: lm_head
    prompts: some; tokens lie along the first axis
    """
    from esm.model.esm2 import ESM2

    return ESM2(num_layers=2, embed_dim=32, attention_heads=2), torch.randint(4, 24, (2, 12))


def msa() -> Built:
    """MSA Transformer: attention along rows, tied, then along columns.

    ffn: layers.*.feed_forward_layer.layer
    qkv: layers.*.{row,column}_self_attention.layer.{k,v,q}_proj
    proj: layers.*.{row,column}_self_attention.layer.out_proj
    head: lm_head
    prompts: no; tokens are rows and columns
    """
    from argparse import Namespace

    from esm.data import Alphabet
    from esm.model.msa_transformer import MSATransformer

    sizes = Namespace(
        layers=2, embed_dim=32, ffn_embed_dim=64, attention_heads=2, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, max_tokens_per_msa=2**14, max_tokens=2**14,
        logit_bias=True, embed_positions_msa=True, embed_positions_msa_dim=32, max_positions=64,
    )  # fmt: skip
    alphabet = Alphabet.from_architecture("msa_transformer")
    return MSATransformer(sizes, alphabet), torch.randint(4, 24, (1, 3, 12))
