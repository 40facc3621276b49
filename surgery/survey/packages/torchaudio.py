"""Models of torchaudio: speech."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, ...]]


def conformer() -> Built:
    """Conformer: half a network, nn.MultiheadAttention, convolution, half a network.

    ffn: conformer_layers.*.{ffn1,ffn2}.sequential
    qkv: -
    proj: -
    head: -
    prompts: some; a convolution over tokens would mix them in, a mask of padding
    """
    from torchaudio.models import Conformer

    model = Conformer(
        input_dim=32, num_heads=2, ffn_dim=64, num_layers=2, depthwise_conv_kernel_size=7
    )
    return model, (torch.randn(2, 12, 32), torch.tensor([12, 12]))


def emformer() -> Built:
    """Emformer: segments of a stream, each with what lies right of it.

    ffn: emformer_layers.*.pos_ff
    qkv: emformer_layers.*.attention.emb_to_{query,key_value}
    proj: emformer_layers.*.attention.out_proj
    head: -
    prompts: no; a mask of segments
    """
    from torchaudio.models import Emformer

    model = Emformer(
        input_dim=32, num_heads=2, ffn_dim=64, num_layers=2, segment_length=4,
        right_context_length=1,
    )  # fmt: skip
    return model, (torch.randn(2, 13, 32), torch.tensor([12, 12]))


def wav2vec2() -> Built:
    """wav2vec 2.0: positions by a convolution whose weight is parametrized.

    ffn: encoder.transformer.layers.*.feed_forward
    qkv: encoder.transformer.layers.*.attention.{k,v,q}_proj
    proj: encoder.transformer.layers.*.attention.out_proj
    head: aux
    prompts: yes; encoder.transformer.layers.* are called
    """
    from torchaudio.models import wav2vec2_model

    model = wav2vec2_model(
        "group_norm", [(16, 10, 5), (16, 3, 2)], False, 32, 0.0, 8, 4, 2, 2, 0.0, 64, 0.0, 0.0,
        False, 0.0, 5,
    )  # fmt: skip
    return model, (torch.randn(2, 400),)


def wavlm() -> Built:
    """WavLM: the first layer's biases of distance, gated, serve all; the weights of an attention
    that is not called.

    ffn: encoder.transformer.layers.*.feed_forward
    qkv: encoder.transformer.layers.*.attention.attention?
    proj: encoder.transformer.layers.*.attention.attention.out_proj?
    head: aux
    prompts: some; the first layer makes biases of distance for all, so that all need as many
    """
    from torchaudio.models import wavlm_model

    model = wavlm_model(
        "group_norm", [(16, 10, 5), (16, 3, 2)], False, 32, 0.0, 8, 4, 2, 2, 16, 32, 0.0, 64, 0.0,
        0.0, False, 0.0, 5,
    )  # fmt: skip
    return model, (torch.randn(2, 400),)
