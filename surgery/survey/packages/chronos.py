"""Models of chronos-forecasting: series as words, and as patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def bolt() -> Built:
    """Chronos-Bolt: patches of a series through T5; embeddings and head with a way round them.

    ffn: {encoder,decoder}.block.*.layer.*.DenseReluDense
    qkv: {encoder,decoder}.block.*.layer.*.{SelfAttention,EncDecAttention}.{q,k,v}
    proj: {encoder,decoder}.block.*.layer.*.{SelfAttention,EncDecAttention}.o
    head: output_patch_embedding
    prompts: some; the first layer makes biases of distance for all, so that all need as many
    idle: decoder.block.*.layer.0.SelfAttention.{q,k}; it has one token
    """
    from chronos.chronos_bolt import ChronosBoltModelForForecasting
    from transformers import T5Config

    config = T5Config(
        vocab_size=2, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2,
        num_heads=2, feed_forward_proj="relu", pad_token_id=0,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    config.chronos_config = {
        "context_length": 32, "prediction_length": 8, "input_patch_size": 4,
        "input_patch_stride": 4, "quantiles": [0.1, 0.5, 0.9], "use_reg_token": True,
    }  # fmt: skip
    return ChronosBoltModelForForecasting(config), torch.randn(2, 32)


def chronos2() -> Built:
    """Chronos-2: attention along time, then among series.

    ffn: encoder.block.*.layer.2.mlp
    qkv: encoder.block.*.layer.{0,1}.self_attention.{q,k,v}
    proj: encoder.block.*.layer.{0,1}.self_attention.o
    head: output_patch_embedding
    prompts: no; rotary positions and a mask of patches
    idle: encoder.block.*.layer.1.self_attention.{q,k}; a series is alone in its group
    """
    from chronos.chronos2.config import Chronos2CoreConfig
    from chronos.chronos2.model import Chronos2Model

    config = Chronos2CoreConfig(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    config.chronos_config = {
        "context_length": 32, "output_patch_size": 4, "input_patch_size": 4,
        "input_patch_stride": 4, "quantiles": [0.1, 0.5, 0.9], "use_reg_token": True,
        "use_arcsinh": True, "max_output_patches": 2, "time_encoding_scale": 32,
    }  # fmt: skip
    return Chronos2Model(config), torch.randn(2, 32)
