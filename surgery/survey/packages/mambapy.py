"""Models of mambapy: state spaces, no attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def mamba() -> Built:
    """Mamba: a state space over tokens.

    ffn: -
    qkv: -
    proj: -
    head: -
    prompts: no; a state runs over the tokens
    refuses: without calling; of dt_proj the model reads the weight
    """
    from mambapy.mamba import Mamba, MambaConfig

    model = Mamba(MambaConfig(d_model=32, n_layers=2))
    return model, torch.randn(2, 8, 32)
