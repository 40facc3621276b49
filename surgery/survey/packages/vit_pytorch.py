"""Models of vit-pytorch, each from its own reading of a paper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Any]


def _pictures(size: int = 32, number: int = 2) -> Tensor:
    return torch.randn(number, 3, size, size)


def vit() -> Built:
    """ViT.

    ffn: transformer.layers.*.1
    qkv: transformer.layers.*.0.to_qkv
    proj: transformer.layers.*.0.to_out.0
    head: mlp_head
    prompts: yes; transformer.layers.* is a list, its elements are called
    """
    from vit_pytorch import ViT

    return ViT(
        image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2, dim_head=16,
        mlp_dim=64,
    ), _pictures()  # fmt: skip


def vit_with_registers() -> Built:
    """Simple ViT with register tokens after the patches.

    ffn: transformer.layers.*.1
    qkv: transformer.layers.*.0.to_qkv
    proj: transformer.layers.*.0.to_out
    head: linear_head
    prompts: yes; transformer.layers.* is a list, its elements are called
    """
    from vit_pytorch.simple_vit_with_register_tokens import SimpleViT

    return SimpleViT(
        image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2, dim_head=16,
        mlp_dim=64,
    ), _pictures()  # fmt: skip


def deepvit() -> Built:
    """DeepViT: heads are mixed after the softmax (re-attention).

    ffn: transformer.layers.*.1
    qkv: transformer.layers.*.0.to_qkv
    proj: transformer.layers.*.0.to_out.0
    head: mlp_head
    prompts: yes; transformer.layers.* is a list, its elements are called
    """
    from vit_pytorch.deepvit import DeepViT

    return DeepViT(
        image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2, dim_head=16,
        mlp_dim=64,
    ), _pictures()  # fmt: skip


def cait() -> Built:
    """CaiT: layer scale around both, talking heads, a class token that comes late.

    ffn: {patch,cls}_transformer.layers.*.1
    qkv: {patch,cls}_transformer.layers.*.0.fn.to_{q,kv}
    proj: {patch,cls}_transformer.layers.*.0.fn.to_out.0
    head: mlp_head
    prompts: yes; two towers: the class token's reads the patches of the first
    """
    from vit_pytorch.cait import CaiT

    return CaiT(
        image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, cls_depth=2, heads=2,
        dim_head=16, mlp_dim=64,
    ), _pictures()  # fmt: skip


def t2t() -> Built:
    """T2T-ViT: a transformer of one head, without output projection, in the embedding.

    ffn: to_patch_embedding.*.layers.*.1 transformer.layers.*.1
    qkv: to_patch_embedding.*.layers.*.0.to_qkv transformer.layers.*.0.to_qkv
    proj: transformer.layers.*.0.to_out.0
    head: mlp_head
    prompts: some; in transformer.layers.*, not in the embedding, which folds tokens to a square
    """
    from vit_pytorch.t2t import T2TViT

    return T2TViT(
        image_size=32, num_classes=5, dim=32, depth=2, heads=2, dim_head=16, mlp_dim=64,
        t2t_layers=((7, 4), (3, 2)),
    ), _pictures()  # fmt: skip


def cct() -> Built:
    """CCT: post-norm in part, tokens pooled by a softmax over one linear's scores.

    ffn: classifier.blocks.*.(linear1 to linear2)
    qkv: classifier.blocks.*.self_attn.qkv
    proj: classifier.blocks.*.self_attn.proj
    head: classifier.fc classifier.attention_pool?
    prompts: yes; classifier.blocks.* are called
    """
    from vit_pytorch.cct import CCT

    return CCT(
        img_size=32, embedding_dim=32, n_conv_layers=1, num_layers=2, num_heads=2, mlp_ratio=2,
        num_classes=5, positional_embedding="learnable",
    ), _pictures()  # fmt: skip


def cross_vit() -> Built:
    """CrossViT: two encoders of two widths whose class tokens read each other's patches.

    ffn: multi_scale_encoder.layers.*.{0,1}.layers.*.1
    qkv: multi_scale_encoder.layers.*.{0,1}.layers.*.0.to_{q,kv}
        multi_scale_encoder.layers.*.2.layers.*.*.fn.to_{q,kv}
    proj: multi_scale_encoder.layers.*.{0,1}.layers.*.0.to_out.0
        multi_scale_encoder.layers.*.2.layers.*.*.fn.to_out.0
    head: sm_mlp_head lg_mlp_head
    prompts: some; in each encoder's layers.*, its elements are called; not in the cross-attention
        layers
    """
    from vit_pytorch.cross_vit import CrossViT

    return CrossViT(
        image_size=32, num_classes=5, depth=2, sm_dim=24, sm_patch_size=8, sm_enc_depth=1,
        sm_enc_heads=2, sm_enc_dim_head=12, sm_enc_mlp_dim=48, lg_dim=32, lg_patch_size=16,
        lg_enc_depth=2, lg_enc_heads=2, lg_enc_dim_head=16, lg_enc_mlp_dim=64,
        cross_attn_depth=2, cross_attn_heads=2, cross_attn_dim_head=16,
    ), _pictures()  # fmt: skip


def pit() -> Built:
    """PiT: stages between which tokens are pooled on a square.

    ffn: layers.*.layers.*.1
    qkv: layers.*.layers.*.0.to_qkv
    proj: layers.*.layers.*.0.to_out.0
    head: mlp_head
    prompts: some; within each stage, not through layers.1, which folds tokens to a square
    """
    from vit_pytorch.pit import PiT

    return PiT(
        image_size=32, patch_size=8, num_classes=5, dim=32, depth=(2, 2), heads=(2, 4),
        dim_head=16, mlp_dim=64,
    ), _pictures()  # fmt: skip


def levit() -> Built:
    """LeViT: 1x1 convolutions on maps, biases of positions.

    ffn: backbone.*.layers.*.1
    qkv: backbone.*.layers.*.0.to_{q,k,v}.0
    proj: backbone.*.layers.*.0.to_out.1
    head: mlp_head
    prompts: no; maps, and a bias for every pair of positions
    """
    from vit_pytorch.levit import LeViT

    return LeViT(
        image_size=64, num_classes=5, stages=2, dim=(32, 48), depth=2, heads=(2, 3), mlp_mult=2,
        dim_key=8, dim_value=16,
    ), _pictures(64)  # fmt: skip


def cvt() -> Built:
    """CvT: queries, keys and values by depthwise separable convolutions of maps.

    ffn: layers.*.2.layers.*.1
    qkv: layers.*.2.layers.*.0.to_{q,kv}.net.2
    proj: layers.*.2.layers.*.0.to_out.0
    head: to_logits
    prompts: no; maps
    """
    from vit_pytorch.cvt import CvT

    return CvT(
        num_classes=5, s1_emb_dim=16, s1_heads=1, s1_depth=1, s2_emb_dim=32, s2_heads=2,
        s2_depth=2, s3_emb_dim=48, s3_heads=3, s3_depth=2,
    ), _pictures(64)  # fmt: skip


def twins_svt() -> Built:
    """Twins-SVT: attention within patches, then to patches shrunk by a convolution.

    ffn: layers.*.{1,3}.layers.*.{1,3}.fn
    qkv: layers.*.{1,3}.layers.*.{0,2}.fn.to_q layers.*.{1,3}.layers.*.0.fn.to_kv
        layers.*.{1,3}.layers.*.2.fn.to_kv?
    proj: layers.*.{1,3}.layers.*.{0,2}.fn.to_out.0
    head: layers.6
    prompts: no; maps
    """
    from vit_pytorch.twins_svt import TwinsSVT

    return TwinsSVT(
        num_classes=5, s1_emb_dim=16, s1_local_patch_size=4, s1_global_k=4, s2_emb_dim=24,
        s2_local_patch_size=4, s2_global_k=4, s3_emb_dim=32, s3_local_patch_size=2,
        s3_global_k=2, s3_depth=2, s4_emb_dim=48, s4_local_patch_size=2, s4_global_k=2,
        s4_depth=1,
    ), _pictures(128)  # fmt: skip


def crossformer() -> Built:
    """CrossFormer: windows near and far, a network of coordinates for each bias.

    ffn: layers.*.1.layers.*.{1,3}
    qkv: layers.*.1.layers.*.{0,2}.to_qkv
    proj: layers.*.1.layers.*.{0,2}.to_out
    head: to_logits
    prompts: no; windows of maps
    """
    from vit_pytorch.crossformer import CrossFormer

    return CrossFormer(
        num_classes=5, dim=(32, 64, 96, 128), depth=(1, 1, 2, 1), global_window_size=(2, 2, 2, 2),
        local_window_size=2, cross_embed_kernel_sizes=((4, 8), (2, 4), (2, 4), (2, 4)),
    ), _pictures(64)  # fmt: skip


def max_vit() -> Built:
    """MaxViT: inverted bottlenecks, windows, grids.

    ffn: layers.*.{3,7}.fn
    qkv: layers.*.{2,6}.fn.to_qkv
    proj: layers.*.{2,6}.fn.to_out.0
    head: mlp_head
    prompts: no; windows of maps
    """
    from vit_pytorch.max_vit import MaxViT

    return MaxViT(
        num_classes=5, dim=32, depth=(1, 2), dim_head=16, dim_conv_stem=16, window_size=4,
    ), _pictures()  # fmt: skip


def mobile_vit() -> Built:
    """MobileViT: small transformers within convolutional blocks.

    ffn: trunk.*.1.transformer.layers.*.1
    qkv: trunk.*.1.transformer.layers.*.0.to_qkv
    proj: trunk.*.1.transformer.layers.*.0.to_out.0
    head: to_logits.2 to_logits.0.0?
    prompts: some; within each transformer's layers.*, a list whose elements are called, if taken
        out before maps are folded
    """
    from vit_pytorch.mobile_vit import MobileViT

    return MobileViT(
        image_size=(64, 64), dims=[32, 40, 48], num_classes=5,
        channels=[8, 16, 24, 24, 32, 32, 40, 40, 48, 48, 64],
    ), _pictures(64)  # fmt: skip


def nest() -> Built:
    """NesT: one transformer for each level, on blocks of maps.

    ffn: layers.*.0.layers.*.1
    qkv: layers.*.0.layers.*.0.to_qkv
    proj: layers.*.0.layers.*.0.to_out.0
    head: mlp_head
    prompts: no; maps
    """
    from vit_pytorch.nest import NesT

    return NesT(
        image_size=32, patch_size=4, num_classes=5, dim=16, heads=2, num_hierarchies=2,
        block_repeats=(1, 2), mlp_mult=2,
    ), _pictures()  # fmt: skip


def xcit() -> Built:
    """XCiT: attention among channels, with a product over tokens; class attention at the end.

    ffn: xcit_transformer.layers.*.2 cls_transformer.layers.*.1
    qkv: xcit_transformer.layers.*.0.fn.to_qkv cls_transformer.layers.*.0.fn.to_{q,kv}
    proj: xcit_transformer.layers.*.0.fn.to_out.0 cls_transformer.layers.*.0.fn.to_out.0
    head: mlp_head
    prompts: some; in cls_transformer.layers.*; xcit_transformer works on maps
    """
    from vit_pytorch.xcit import XCiT

    return XCiT(
        image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, cls_depth=2, heads=2,
        dim_head=16, mlp_dim=64,
    ), _pictures()  # fmt: skip


def parallel_vit() -> Built:
    """ViT with two attentions and two networks side by side in every block.

    ffn: transformer.layers.*.1.fns.*
    qkv: transformer.layers.*.0.fns.*.to_qkv
    proj: transformer.layers.*.0.fns.*.to_out.0
    head: mlp_head
    prompts: yes; transformer.layers.* is a list, its elements are called
    """
    from vit_pytorch.parallel_vit import ViT

    return ViT(
        image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2, dim_head=16,
        mlp_dim=64,
    ), _pictures()  # fmt: skip


def nvit() -> Built:
    """nViT: every matrix L2-normed by a parametrization, no norm layers, gated networks.

    ffn: layers.*.1
    qkv: layers.*.0.to_{q,k,v}.linear
    proj: layers.*.0.to_out.linear
    head: to_pred.linear
    prompts: yes; layers.* is a list, its elements are called
    """
    from vit_pytorch.normalized_vit import nViT

    return nViT(
        image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2, dim_head=16,
        mlp_dim=96,
    ), _pictures()  # fmt: skip


def jumbo_vit() -> Built:
    """ViT with a wide class token, cut to tokens for attention, with a network of its own for all
    layers.

    ffn: layers.*.1 jumbo_ff.1
    qkv: layers.*.0.to_qkv
    proj: layers.*.0.to_out
    head: linear_head
    idle: layers.1.1; the head reads the class tokens alone
    prompts: no; tokens are cut into wide class tokens and patches by number within every block
    """
    from vit_pytorch.jumbo_vit import JumboViT

    return JumboViT(
        image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2, dim_head=16,
        mlp_dim=2, jumbo_cls_k=2,
    ), _pictures()  # fmt: skip


def simple_uvit() -> Built:
    """U-ViT: long skips between the halves, tokens that are joined by features.

    ffn: transformer.layers.*.2
    qkv: transformer.layers.*.1.to_qkv
    proj: transformer.layers.*.1.to_out
    head: linear_head
    prompts: some; skips join the tokens of one block with those of another
    """
    from vit_pytorch.simple_uvit import SimpleUViT

    return SimpleUViT(
        image_size=32, patch_size=8, num_classes=5, dim=32, depth=4, heads=2, dim_head=16,
        mlp_dim=64,
    ), _pictures()  # fmt: skip


def rvt() -> Built:
    """RvT: rotary positions on a square, queries by a convolution, gated networks.

    ffn: transformer.layers.*.1
    qkv: transformer.layers.*.0.to_q.conv.net.1 transformer.layers.*.0.to_kv
    proj: transformer.layers.*.0.to_out.0
    head: mlp_head
    idle: transformer.layers.1.0.to_q.conv.net; the head reads the class token, whose query no
        convolution makes
    prompts: no; tokens are folded to a square, rotary positions for so many
    """
    from vit_pytorch.rvt import RvT

    return RvT(
        image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2, dim_head=16,
        mlp_dim=64,
    ), _pictures()  # fmt: skip


def vivit() -> Built:
    """ViViT: a transformer over space, then one over time.

    ffn: {spatial,temporal}_transformer.layers.*.1
    qkv: {spatial,temporal}_transformer.layers.*.0.to_qkv
    proj: {spatial,temporal}_transformer.layers.*.0.to_out.0
    head: mlp_head
    prompts: yes; two towers; layers.* is a list, its elements are called
    """
    from vit_pytorch.vivit import ViViT

    return ViViT(
        image_size=32, image_patch_size=16, frames=4, frame_patch_size=2, num_classes=5, dim=32,
        spatial_depth=2, temporal_depth=2, heads=2, dim_head=16, mlp_dim=64,
    ), torch.randn(2, 3, 4, 32, 32)  # fmt: skip


def regionvit() -> Built:
    """RegionViT: regional tokens, each among those of its window; one attention called twice.

    ffn: layers.*.2.layers.*.1
    qkv: layers.*.2.layers.*.0.to_qkv
    proj: layers.*.2.layers.*.0.to_out.0
    head: to_logits
    prompts: no; windows, maps
    """
    from vit_pytorch.regionvit import RegionViT

    return RegionViT(
        dim=(16, 24, 32, 48), depth=(1, 1, 2, 1), window_size=2, num_classes=5,
    ), _pictures(64)  # fmt: skip


def look_vit() -> Built:
    """LookViT: few tokens look up many, and the same map turned round serves the many.

    ffn: layers.*.{1,5}
    qkv: layers.*.{0,2}.to_{q,k,v} layers.*.3.to_v
    proj: layers.*.{0,2,3}.to_out.1
    head: to_logits
    prompts: no; two streams, whose one map of attention fixes both numbers of tokens
    """
    from vit_pytorch.look_vit import LookViT

    return LookViT(
        dim=32, image_size=32, num_classes=5, depth=2, patch_size=8, heads=2, dim_head=16,
        cross_attn_heads=2, cross_attn_dim_head=16, highres_patch_size=4,
    ), _pictures()  # fmt: skip


def scalable_vit() -> Built:
    """ScalableViT: 1x1 convolutions on maps, keys and values shrunk, the value goes round the
    softmax too.

    ffn: layers.*.0.layers.*.{1,3}
    qkv: layers.*.0.layers.*.{0,4}.to_q layers.*.0.layers.*.4.to_{k,v}
        layers.*.0.layers.*.0.to_{k,v}?
    proj: layers.*.0.layers.*.{0,4}.to_out.0
    head: mlp_head
    prompts: no; maps
    """
    from vit_pytorch.scalable_vit import ScalableViT

    return ScalableViT(
        num_classes=5, dim=16, heads=(1, 2), depth=(1, 2), ssa_dim_key=(8, 8),
        reduction_factor=(2, 1), window_size=(4, None), iwsa_dim_key=8, iwsa_dim_value=8,
        ssa_dim_value=8,
    ), _pictures(64)  # fmt: skip


def na_vit() -> Built:
    """NaViT: pictures of several sizes in one row, a mask that keeps them apart, a pooler that
    reads them.

    ffn: transformer.layers.*.1
    qkv: transformer.layers.*.0.to_{q,kv} attn_pool.to_{q,kv}
    proj: transformer.layers.*.0.to_out.0 attn_pool.to_out.0
    head: mlp_head
    prompts: no; a mask for every pair of tokens
    """
    from vit_pytorch.na_vit import NaViT

    model = NaViT(
        image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2, dim_head=16,
        mlp_dim=64,
    )  # fmt: skip
    return model, ([[torch.randn(3, 32, 32), torch.randn(3, 16, 32)], [torch.randn(3, 24, 32)]],)


def na_vit_nested() -> Built:
    """NaViT over nested tensors.

    ffn: transformer.layers.*.1
    qkv: transformer.layers.*.0.to_{queries,keys,values} attn_pool.to_{queries,keys,values}
    proj: transformer.layers.*.0.to_out attn_pool.to_out
    head: mlp_head
    prompts: no; nested tensors, whose rows differ in length
    refuses: nested tensor; parts take tensors of one shape
    """
    from vit_pytorch.na_vit_nested_tensor import NaViT

    model = NaViT(
        image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2, dim_head=16,
        mlp_dim=64,
    )  # fmt: skip
    return model, ([torch.randn(3, 32, 32), torch.randn(3, 16, 32)],)
