"""Models of x-transformers: attention and networks as alternating elements of one list."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor | tuple[Tensor, ...]]


def _words(length: int = 12) -> Tensor:
    return torch.randint(0, 50, (2, length))


def decoder() -> Built:
    """A decoder: each attention and each network is an element of one list, with its norms.

    ffn: attn_layers.layers.*.1.ff
    qkv: attn_layers.layers.*.1.to_{q,k,v}
    proj: attn_layers.layers.*.1.to_out
    head: to_logits
    prompts: some; words behind a causal mask
    """
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=2, attn_dim_head=16)
    return TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=layers), _words()


def rotary_glu_decoder() -> Built:
    """A decoder as Llama is: rotary positions, RMSNorm, gated networks, one key and value for all
    heads.

    ffn: attn_layers.layers.*.1.ff
    qkv: attn_layers.layers.*.1.to_{q,k,v}
    proj: attn_layers.layers.*.1.to_out
    head: to_logits
    prompts: no; rotary positions, made once for all words
    """
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(
        dim=32, depth=2, heads=2, attn_dim_head=16, rotary_pos_emb=True, ff_glu=True, ff_swish=True,
        use_rmsnorm=True, ff_no_bias=True, attn_kv_heads=1,
    )  # fmt: skip
    return TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=layers), _words()


def post_norm_encoder() -> Built:
    """An encoder with its norms behind.

    ffn: attn_layers.layers.*.1.ff
    qkv: attn_layers.layers.*.1.to_{q,k,v}
    proj: attn_layers.layers.*.1.to_out
    head: to_logits
    prompts: yes; attn_layers.layers.* are lists, attention and network in turn
    """
    from x_transformers import Encoder, TransformerWrapper

    layers = Encoder(dim=32, depth=2, heads=2, attn_dim_head=16, pre_norm=False)
    return TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=layers), _words()


def sandwich_decoder() -> Built:
    """A decoder with a norm before and behind each (sandwich).

    ffn: attn_layers.layers.*.1.ff
    qkv: attn_layers.layers.*.1.to_{q,k,v}
    proj: attn_layers.layers.*.1.to_out
    head: to_logits
    prompts: some; words behind a causal mask
    """
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, shift_tokens=0, sandwich_norm=True)
    return TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=layers), _words()


def vit() -> Built:
    """A vision transformer of the same layers.

    ffn: attn_layers.layers.*.1.ff
    qkv: attn_layers.layers.*.1.to_{q,k,v}
    proj: attn_layers.layers.*.1.to_out
    head: mlp_head
    prompts: yes; attn_layers.layers.* are lists, attention and network in turn
    """
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=32, depth=2, heads=2, attn_dim_head=16)
    model = ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=layers)
    return model, torch.randn(2, 3, 32, 32)


def encoder_decoder() -> Built:
    """Encoder and decoder; the loss of teacher forcing is its output.

    ffn: {encoder,decoder.net}.attn_layers.layers.*.1.ff
    qkv: {encoder,decoder.net}.attn_layers.layers.*.1.to_{q,k,v}
    proj: {encoder,decoder.net}.attn_layers.layers.*.1.to_out
    head: decoder.net.to_logits
    prompts: some; two towers, the second of words behind a causal mask
    """
    from x_transformers import XTransformer

    model = XTransformer(
        dim=32, enc_num_tokens=50, enc_depth=2, enc_heads=2, enc_attn_dim_head=16,
        enc_max_seq_len=16,
        dec_num_tokens=50, dec_depth=2, dec_heads=2, dec_attn_dim_head=16, dec_max_seq_len=16,
    )  # fmt: skip
    return model, (_words(), _words(9))
