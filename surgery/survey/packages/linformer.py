"""Models of linformer: keys and values shrunk along the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def language_model() -> Built:
    """Linformer: keys and values are mixed down to four by a matrix over the tokens.

    ffn: linformer.net.layers.*.1.fn
    qkv: linformer.net.layers.*.0.fn.to_{q,k,v}
    proj: linformer.net.layers.*.0.fn.to_out
    head: to_logits
    prompts: no; a matrix over the tokens fixes how many there are
    """
    from linformer import LinformerLM

    return LinformerLM(
        num_tokens=50, dim=32, seq_len=16, depth=2, k=4, heads=2, dim_head=16,
    ), torch.randint(0, 50, (2, 16))  # fmt: skip


def reversible() -> Built:
    """Linformer with reversible layers: an autograd function, whose backward runs where its input
    needs it.

    ffn: linformer.net.blocks.*.g.net.fn
    qkv: linformer.net.blocks.*.f.net.fn.to_{q,k,v}
    proj: linformer.net.blocks.*.f.net.fn.to_out
    head: to_logits
    prompts: no; a matrix over the tokens fixes how many there are
    refuses: grad; nothing before the layers is trained, so their backward never runs
    """
    from linformer import LinformerLM

    return LinformerLM(
        num_tokens=50, dim=32, seq_len=16, depth=2, k=4, heads=2, dim_head=16, reversible=True,
    ), torch.randint(0, 50, (2, 16))  # fmt: skip
