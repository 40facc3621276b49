"""Models of speechbrain: speech."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, ...] | dict[str, Tensor]]


def encoder() -> Built:
    """An encoder of nn.MultiheadAttention that hands out its maps.

    ffn: layers.*.pos_ffn.ffn
    qkv: -
    proj: -
    head: -
    prompts: some; maps of attention are handed out
    """
    from speechbrain.lobes.models.transformer.Transformer import TransformerEncoder

    model = TransformerEncoder(num_layers=2, nhead=2, d_ffn=64, d_model=32)
    return model, (torch.randn(2, 12, 32),)


def conformer() -> Built:
    """Conformer: relative positions, a parameter for queries, keys and values.

    ffn: layers.*.{ffn_module1,ffn_module2}.1.ffn
    qkv: layers.*.mha_layer.linear_pos?
    proj: layers.*.mha_layer.out_proj
    head: -
    prompts: no; 2 n - 1 relative positions
    """
    from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder

    model = ConformerEncoder(num_layers=2, d_model=32, d_ffn=64, nhead=2, kernel_size=7)
    return model, {"src": torch.randn(2, 12, 32), "pos_embs": torch.randn(1, 23, 32)}


def branchformer() -> Built:
    """Branchformer: attention beside a gated convolution, one linear for both; no network.

    ffn: layers.*.convolution_branch?
    qkv: layers.*.mha_layer.linear_pos?
    proj: layers.*.mha_layer.out_proj
    head: -
    prompts: no; 2 n - 1 relative positions
    """
    from speechbrain.lobes.models.transformer.Branchformer import BranchformerEncoder

    model = BranchformerEncoder(
        num_layers=2, d_model=32, nhead=2, kernel_size=7, csgu_linear_units=64
    )
    return model, {"src": torch.randn(2, 12, 32), "pos_embs": torch.randn(1, 23, 32)}


def recogniser() -> Built:
    """An encoder and a decoder of nn.MultiheadAttention; the head is another module.

    ffn: {encoder,decoder}.layers.*.pos_ffn.ffn
    qkv: -
    proj: -
    head: -
    prompts: some; two towers, the second of words behind a causal mask
    """
    from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR

    model = TransformerASR(
        tgt_vocab=50, input_size=20, d_model=32, nhead=2, num_encoder_layers=2,
        num_decoder_layers=2, d_ffn=64, dropout=0.0,
    )  # fmt: skip
    return model, (torch.randn(2, 12, 20), torch.randint(1, 50, (2, 6)))
