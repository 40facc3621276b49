"""Models of perceiver-pytorch: latents that read long inputs by cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor | dict[str, Tensor]]


def perceiver() -> Built:
    """Perceiver: in every block latents read the picture, then each other.

    ffn: layers.*.cross_ff.fn layers.*.self_attns.*.1.fn
    qkv: layers.*.cross_attn.fn.to_{q,kv} layers.*.self_attns.*.0.fn.to_{q,kv}
    proj: layers.*.cross_attn.fn.to_out layers.*.self_attns.*.0.fn.to_out
    head: to_logits
    prompts: yes; among the latents: layers.* are called
    """
    from perceiver_pytorch import Perceiver

    return Perceiver(
        input_channels=3, num_freq_bands=3, max_freq=4.0, depth=2, num_latents=6, latent_dim=32,
        cross_heads=1, latent_heads=2, cross_dim_head=16, latent_dim_head=16, num_classes=5,
        self_per_cross_attn=1,
    ), torch.randn(2, 8, 8, 3)  # fmt: skip


def perceiver_io() -> Built:
    """Perceiver IO: one block that reads the input, blocks among latents, queries that read them.

    ffn: cross_attend_block.cross_ff.fn layers.*.self_attns.*.1.fn
    qkv: cross_attend_block.cross_attn.fn.to_{q,kv} layers.*.self_attns.*.0.fn.to_{q,kv}
        decoder_cross_attn.fn.to_{q,kv}
    proj: cross_attend_block.cross_attn.fn.to_out layers.*.self_attns.*.0.fn.to_out
        decoder_cross_attn.fn.to_out
    head: to_logits
    prompts: some; among the latents of layers.*; in cross_attend_block none hears another
    """
    from perceiver_pytorch import PerceiverIO

    model = PerceiverIO(
        dim=24, queries_dim=20, logits_dim=5, depth=2, num_latents=6, latent_dim=32,
        cross_heads=1, latent_heads=2, cross_dim_head=16, latent_dim_head=16,
    )  # fmt: skip
    return model, {"data": torch.randn(2, 9, 24), "queries": torch.randn(2, 4, 20)}


def perceiver_lm() -> Built:
    """Perceiver IO over words.

    ffn: perceiver_io.cross_attend_block.cross_ff.fn perceiver_io.layers.*.self_attns.*.1.fn
    qkv: perceiver_io.cross_attend_block.cross_attn.fn.to_{q,kv}
        perceiver_io.layers.*.self_attns.*.0.fn.to_{q,kv}
        perceiver_io.decoder_cross_attn.fn.to_{q,kv}
    proj: perceiver_io.cross_attend_block.cross_attn.fn.to_out
        perceiver_io.layers.*.self_attns.*.0.fn.to_out perceiver_io.decoder_cross_attn.fn.to_out
    head: perceiver_io.to_logits
    prompts: some; among the latents of layers.*; in cross_attend_block none hears another
    """
    from perceiver_pytorch.perceiver_io import PerceiverLM

    return PerceiverLM(
        num_tokens=50, dim=24, max_seq_len=12, depth=2, num_latents=6, latent_dim=32,
        cross_heads=1, latent_heads=2, cross_dim_head=16, latent_dim_head=16,
    ), torch.randint(0, 50, (2, 12))  # fmt: skip
