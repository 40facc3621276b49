"""Models of gluonts: forecasts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Tensor]]


def _past(series: int = 0) -> dict[str, Tensor]:
    shape = (2, 16, series) if series else (2, 16)
    return {"past_target": torch.randn(shape), "past_observed_values": torch.ones(shape)}


def patch_tst() -> Built:
    """PatchTST: patches of a series as tokens, all read at once at the end.

    ffn: encoder.layers.*.(linear1 to linear2)
    qkv: -
    proj: -
    head: flatten args_proj?
    prompts: yes; encoder.layers.* are called
    """
    from gluonts.torch.model.patch_tst.module import PatchTSTModel

    model = PatchTSTModel(
        prediction_length=4, context_length=16, patch_len=4, stride=4, padding_patch="end",
        num_feat_dynamic_real=0, d_model=32, nhead=2, dim_feedforward=64, dropout=0.0,
        activation="gelu", norm_first=True, num_encoder_layers=2, scaling="mean",
    )  # fmt: skip
    return model, _past()


def i_transformer() -> Built:
    """iTransformer: a series is a token.

    ffn: encoder.layers.*.(linear1 to linear2)
    qkv: -
    proj: -
    head: projection args_proj?
    prompts: yes; encoder.layers.* are called
    """
    from gluonts.torch.model.i_transformer.module import ITransformerModel

    model = ITransformerModel(
        prediction_length=4, context_length=16, d_model=32, nhead=2, dim_feedforward=64,
        dropout=0.0, activation="gelu", norm_first=True, num_encoder_layers=2, scaling="mean",
    )  # fmt: skip
    return model, _past(3)
