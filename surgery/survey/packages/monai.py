"""Models of monai: pictures of two and three dimensions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor | tuple[Tensor, ...]]


def vit() -> Built:
    """ViT of volumes; hidden states are handed out; network registered before attention, output
    before qkv.

    ffn: blocks.*.mlp
    qkv: blocks.*.attn.qkv
    proj: blocks.*.attn.out_proj
    head: classification_head
    prompts: yes; blocks.* are called
    refuses: never ran; norm_cross_attn is not called
    """
    from monai.networks.nets import ViT

    model = ViT(
        in_channels=1, img_size=(16, 16, 16), patch_size=(8, 8, 8), hidden_size=32, mlp_dim=64,
        num_layers=2, num_heads=2, classification=True, num_classes=5,
    )  # fmt: skip
    return model, torch.randn(2, 1, 16, 16, 16)


def unetr() -> Built:
    """UNETR: a ViT whose hidden states feed a decoder of convolutions.

    ffn: vit.blocks.*.mlp
    qkv: vit.blocks.*.attn.qkv
    proj: vit.blocks.*.attn.out_proj
    head: out decoder*? encoder*?
    prompts: some; hidden states that are handed out are folded to maps
    refuses: never ran; norm_cross_attn is not called
    """
    from monai.networks.nets import UNETR

    model = UNETR(
        in_channels=1, out_channels=2, img_size=(32, 32), feature_size=4, hidden_size=24,
        mlp_dim=48, num_heads=2, spatial_dims=2,
    )  # fmt: skip
    return model, torch.randn(2, 1, 32, 32)


def swin_unetr() -> Built:
    """Swin UNETR: windows; every stage feeds the decoder.

    ffn: swinViT.layers*.*.blocks.*.mlp
    qkv: swinViT.layers*.*.blocks.*.attn.qkv
    proj: swinViT.layers*.*.blocks.*.attn.proj
    head: out decoder*? encoder*?
    prompts: no; windows of maps
    """
    from monai.networks.nets import SwinUNETR

    model = SwinUNETR(
        in_channels=1, out_channels=2, depths=(2, 2, 1, 1), num_heads=(1, 2, 2, 2), window_size=4,
        feature_size=12, spatial_dims=2,
    )  # fmt: skip
    return model, torch.randn(2, 1, 64, 64)


def autoencoder() -> Built:
    """A ViT, then transposed convolutions.

    ffn: blocks.*.mlp
    qkv: blocks.*.attn.qkv
    proj: blocks.*.attn.out_proj
    head: any
    prompts: yes; blocks.* are called
    refuses: never ran; norm_cross_attn is not called
    """
    from monai.networks.nets import ViTAutoEnc

    model = ViTAutoEnc(
        in_channels=1, img_size=(16, 16), patch_size=(4, 4), hidden_size=32, mlp_dim=64,
        num_layers=2, num_heads=2, spatial_dims=2, deconv_chns=4,
    )  # fmt: skip
    return model, torch.randn(2, 1, 16, 16)


def restormer() -> Built:
    """Restormer: attention among channels of maps, networks with a depthwise convolution between.

    ffn: {encoder,decoder}_levels.*.*.ffn? {latent,refinement}.*.ffn?
    qkv: {encoder,decoder}_levels.*.*.attn.qkv.conv {latent,refinement}.*.attn.qkv.conv
        {encoder,decoder}_levels.*.*.attn.qkv_dwconv.conv?
        {latent,refinement}.*.attn.qkv_dwconv.conv?
    proj: {encoder,decoder}_levels.*.*.attn.project_out.conv
        {latent,refinement}.*.attn.project_out.conv
    head: any
    prompts: no; maps
    """
    from monai.networks.nets.restormer import Restormer

    model = Restormer(
        spatial_dims=2, in_channels=1, out_channels=1, dim=8, num_blocks=(1, 1), heads=(1, 2),
        num_refinement_blocks=1,
    )  # fmt: skip
    return model, torch.randn(2, 1, 16, 16)


def decoder_only() -> Built:
    """A decoder: network registered before attention, output projection before queries.

    ffn: blocks.*.mlp
    qkv: blocks.*.attn.to_{q,k,v}
    proj: blocks.*.attn.out_proj
    head: to_logits
    prompts: some; words behind a causal mask
    refuses: never ran; norm_cross_attn is not called
    """
    from monai.networks.nets import DecoderOnlyTransformer

    model = DecoderOnlyTransformer(
        num_tokens=50, max_seq_len=16, attn_layers_dim=32, attn_layers_depth=2, attn_layers_heads=2,
    )  # fmt: skip
    return model, torch.randint(0, 50, (2, 12))


def diffusion_unet() -> Built:
    """A U-Net with transformers, whose output projection and network come before the queries.

    ffn: {down,up}_blocks.*.attentions.*.transformer_blocks.*.ff
        middle_block.attention.transformer_blocks.*.ff
    qkv: {down,up}_blocks.*.attentions.*.transformer_blocks.*.{attn1,attn2}.to_{q,k,v}
        middle_block.attention.transformer_blocks.*.{attn1,attn2}.to_{q,k,v}
    proj: {down,up}_blocks.*.attentions.*.transformer_blocks.*.{attn1,attn2}.out_proj
        middle_block.attention.transformer_blocks.*.{attn1,attn2}.out_proj
    head: any
    prompts: some; transformer_blocks.* are called on plain tokens, one between two maps
    """
    from monai.networks.nets import DiffusionModelUNet

    model = DiffusionModelUNet(
        spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=1, channels=(8, 16),
        attention_levels=(False, True), norm_num_groups=4, num_head_channels=8,
        with_conditioning=True, cross_attention_dim=12,
    )  # fmt: skip
    times, words = torch.tensor([3, 4]), torch.randn(2, 5, 12)
    return model, (torch.randn(2, 1, 16, 16), times, words)
