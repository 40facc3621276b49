"""Models of spandrel: restoration of pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def _picture(size: int = 16) -> Tensor:
    return torch.rand(2, 3, size, size)


def swinir() -> Built:
    """SwinIR: windows, groups of blocks with a convolution behind.

    ffn: layers.*.residual_group.blocks.*.mlp
    qkv: layers.*.residual_group.blocks.*.attn.qkv
    proj: layers.*.residual_group.blocks.*.attn.proj
    head: any
    prompts: no; windows of maps
    """
    from spandrel.architectures.SwinIR import SwinIR

    model = SwinIR(
        img_size=16, embed_dim=24, depths=[2, 2], num_heads=[2, 2], window_size=4, mlp_ratio=2.0,
    )  # fmt: skip
    return model, _picture()


def hat() -> Built:
    """HAT: windows beside channel attention by pooling; a block of overlapping windows with all in
    one module.

    ffn: layers.*.residual_group.blocks.*.mlp layers.*.residual_group.overlap_attn.mlp
    qkv: layers.*.residual_group.blocks.*.attn.qkv layers.*.residual_group.overlap_attn.qkv
    proj: layers.*.residual_group.blocks.*.attn.proj layers.*.residual_group.overlap_attn.proj
    head: any
    prompts: no; windows of maps
    """
    from spandrel.architectures.HAT import HAT

    model = HAT(
        img_size=16, embed_dim=24, depths=(2, 2), num_heads=(2, 2), window_size=4, mlp_ratio=2.0,
        compress_ratio=3, squeeze_factor=6, upscale=2,
    )  # fmt: skip
    return model, _picture()


def dat() -> Built:
    """DAT: attention in windows, then among channels; networks with a depthwise convolution for a
    gate.

    ffn: layers.*.blocks.*.ffn
    qkv: layers.*.blocks.*.attn.qkv
    proj: layers.*.blocks.*.attn.proj
    head: any
    prompts: no; windows of maps
    """
    from spandrel.architectures.DAT import DAT

    model = DAT(
        img_size=16, embed_dim=64, split_size=[4, 4], depth=[2, 2], num_heads=[2, 2],
        expansion_factor=2.0,
    )  # fmt: skip
    return model, _picture()


def grl() -> Built:
    """GRL: windows, and stripes by way of anchors; networks of coordinates for the biases.

    ffn: layers.*.blocks.*.mlp
    qkv: layers.*.blocks.*.attn.qkv.body layers.*.blocks.*.attn.anchor.body.*.reduction?
    proj: layers.*.blocks.*.attn.proj
    head: any
    prompts: no; windows of maps
    """
    from spandrel.architectures.GRL import GRL

    model = GRL(
        img_size=16, embed_dim=24, depths=[2, 2], num_heads_window=[2, 2], num_heads_stripe=[2, 2],
        window_size=4, stripe_size=[4, 4], mlp_ratio=2.0,
    )  # fmt: skip
    return model, _picture()


def uformer() -> Built:
    """Uformer: a U-Net of windows; networks with a depthwise convolution between.

    ffn: {encoderlayer_*,decoderlayer_*,conv}.blocks.*.mlp
    qkv: {encoderlayer_*,decoderlayer_*,conv}.blocks.*.attn.qkv.to_{q,kv}
    proj: {encoderlayer_*,decoderlayer_*,conv}.blocks.*.attn.proj
    head: any
    prompts: no; windows of maps
    """
    from spandrel.architectures.Uformer import Uformer

    model = Uformer(
        img_size=64, embed_dim=8, depths=[1] * 9, num_heads=[1, 1, 2, 2, 2, 2, 2, 1, 1], win_size=4,
    )  # fmt: skip
    return model, _picture(64)


def craft() -> Built:
    """CRAFT: windows with all in one module, then attention among channels to high frequencies.

    ffn: layers.*.residual_group.srwa_blocks.*.mlp layers.*.residual_group.hf_blocks.*.ffn?
    qkv: layers.*.residual_group.srwa_blocks.*.qkv layers.*.residual_group.hf_blocks.*.attn.{q,kv}
        layers.*.residual_group.hf_blocks.*.attn.{q_dwconv,kv_dwconv}?
    proj: layers.*.residual_group.srwa_blocks.*.proj
        layers.*.residual_group.hf_blocks.*.attn.project_out
    head: any
    prompts: no; windows of maps
    """
    from spandrel.architectures.CRAFT import CRAFT

    model = CRAFT(
        embed_dim=64, depths=[2, 2], num_heads=[4, 4], window_size=4, split_size_0=2,
        split_size_1=4,
        upscale=2,
    )  # fmt: skip
    return model, _picture()


def drct() -> Built:
    """DRCT: five blocks by name in every group, each wider than the last.

    ffn: layers.*.swin*.mlp
    qkv: layers.*.swin*.attn.qkv
    proj: layers.*.swin*.attn.proj
    head: any
    prompts: no; windows of maps
    """
    from spandrel.architectures.DRCT import DRCT

    model = DRCT(
        img_size=16, embed_dim=24, depths=(2,), num_heads=(2,), window_size=4, mlp_ratio=2.0,
        gc=12, upscale=2, upsampler="pixelshuffle",
    )  # fmt: skip
    return model, _picture()


def atd() -> Built:
    """ATD: windows, categories, and a dictionary of tokens, side by side.

    ffn: layers.*.residual_group.layers.*.convffn
    qkv: layers.*.residual_group.layers.*.wqkv layers.*.residual_group.layers.*.attn_atd.{wq,wk,wv}
    proj: layers.*.residual_group.layers.*.attn_win.proj
        layers.*.residual_group.layers.*.attn_aca.proj
    head: any
    prompts: no; windows of maps
    """
    from spandrel.architectures.ATD import ATD

    model = ATD(
        img_size=16, embed_dim=24, depths=(2, 2), num_heads=(2, 2), window_size=4, category_size=16,
        num_tokens=8, reducted_dim=4, upscale=2, upsampler="pixelshuffledirect",
    )  # fmt: skip
    return model, _picture()


def omni_sr() -> Built:
    """Omni-SR: one nn.Sequential of convolutions, windows, channel attention and gated networks of
    convolutions.

    ffn: residual_layer.*.residual_layer.*.layer.*.fn?
    qkv: residual_layer.*.residual_layer.*.layer.*.fn.{to_qkv,qkv}
        residual_layer.*.residual_layer.*.layer.*.fn.qkv_dwconv?
    proj: residual_layer.*.residual_layer.*.layer.*.fn.to_out.0
        residual_layer.*.residual_layer.*.layer.{5,11}.fn.project_out
    head: any
    prompts: no; windows of maps
    """
    from spandrel.architectures.OmniSR import OmniSR

    model = OmniSR(
        num_feat=16, block_num=1, window_size=4, res_num=1, up_scale=2,
    )  # fmt: skip
    return model, _picture()


def scunet() -> Built:
    """SCUNet: half of the channels to a window block, half to convolutions.

    ffn: m_*.*.trans_block.mlp
    qkv: m_*.*.trans_block.msa.embedding_layer
    proj: m_*.*.trans_block.msa.linear
    head: any
    prompts: no; windows of maps
    """
    from spandrel.architectures.SCUNet import SCUNet

    model = SCUNet(
        config=[1, 1, 1, 1, 1, 1, 1], dim=64,
    )  # fmt: skip
    return model, _picture(64)


def swin2sr() -> Built:
    """Swin2SR: cosine windows with norms behind, a network of coordinates for the biases.

    ffn: layers.*.residual_group.blocks.*.mlp
    qkv: layers.*.residual_group.blocks.*.attn.qkv
    proj: layers.*.residual_group.blocks.*.attn.proj
    head: any
    prompts: no; windows of maps
    refuses: none beside it; of qkv the model reads the weight, without a bias to shift
    """
    from spandrel.architectures.Swin2SR import Swin2SR

    model = Swin2SR(
        img_size=16, embed_dim=24, depths=[2, 2], num_heads=[2, 2], window_size=4, mlp_ratio=2.0,
    )  # fmt: skip
    return model, _picture()


def retinexformer() -> Built:
    """Retinexformer: attention among channels, gated by a light map; networks of convolutions.

    ffn: body.*.denoiser.{encoder_layers,decoder_layers}.*.*.blocks.*.*.fn?
        body.*.denoiser.bottleneck.blocks.*.*.fn?
    qkv: body.*.denoiser.{encoder_layers,decoder_layers}.*.*.blocks.*.*.to_{q,k,v}
        body.*.denoiser.bottleneck.blocks.*.*.to_{q,k,v}
    proj: body.*.denoiser.{encoder_layers,decoder_layers}.*.*.blocks.*.*.proj
        body.*.denoiser.bottleneck.blocks.*.*.proj
    head: any
    prompts: no; windows of maps
    """
    from spandrel.architectures.RetinexFormer import RetinexFormer

    model = RetinexFormer(
        n_feat=8, stage=1, num_blocks=[1, 1, 1],
    )  # fmt: skip
    return model, _picture()
