"""Models of torchscale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor | dict[str, Any]]


def retnet() -> Built:
    """RetNet: retention, a product of queries and keys that decays; gates beside both; the head
    registered first.

    ffn: layers.*.ffn
    qkv: layers.*.retention.{q,k,v}_proj
    proj: layers.*.retention.out_proj
    head: output_projection
    prompts: no; decays for so many words
    """
    from torchscale.architecture.config import RetNetConfig
    from torchscale.architecture.retnet import RetNetDecoder

    config = RetNetConfig(
        decoder_embed_dim=32, decoder_value_embed_dim=48, decoder_retention_heads=2,
        decoder_ffn_embed_dim=48, decoder_layers=2, vocab_size=50, no_output_layer=False,
    )  # fmt: skip
    words = nn.Embedding(50, 32)
    return RetNetDecoder(config, embed_tokens=words), torch.randint(0, 50, (2, 12))


def encoder() -> Built:
    """An encoder with norms within network and attention (Magneto), without a head.

    ffn: layers.*.ffn
    qkv: layers.*.self_attn.{k,v,q}_proj
    proj: layers.*.self_attn.out_proj
    head: -
    prompts: some; words, with a mask of padding
    """
    from torchscale.architecture.config import EncoderConfig
    from torchscale.architecture.encoder import Encoder

    config = EncoderConfig(
        encoder_embed_dim=32, encoder_attention_heads=2, encoder_ffn_embed_dim=64,
        encoder_layers=2, vocab_size=50, no_output_layer=True, subln=True,
    )  # fmt: skip
    model = Encoder(config, embed_tokens=nn.Embedding(50, 32))
    return model, {"src_tokens": torch.randint(0, 50, (2, 12))}
