"""Models of open_clip."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Tensor, Tensor]]


def _pair() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 32, 32), torch.randint(1, 50, (2, 12))


def clip() -> Built:
    """CLIP: nn.MultiheadAttention in both towers, heads that are parameters.

    ffn: {visual.transformer,transformer}.resblocks.*.mlp
    qkv: -
    proj: -
    head: any
    prompts: some; among patches; words have a causal mask of one size
    """
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=8, image_size=32)
    text = CLIPTextCfg(context_length=12, vocab_size=50, width=24, heads=2, layers=2)
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text), _pair()


def coca() -> Built:
    """CoCa: a pooler of six queries, a decoder whose cross-attention blocks are a list of their
    own.

    ffn: {visual,text}.transformer.resblocks.*.mlp text_decoder.{resblocks,cross_attn}.*.mlp
    qkv: -
    proj: -
    head: any
    prompts: some; among patches; words have a causal mask of one size
    """
    from open_clip.coca_model import CLIPTextCfg, CLIPVisionCfg, CoCa, MultimodalCfg

    vision = CLIPVisionCfg(
        layers=2, width=32, head_width=16, patch_size=8, image_size=32, attentional_pool=True,
        attn_pooler_heads=2, attn_pooler_queries=6, output_tokens=True,
    )  # fmt: skip
    text = CLIPTextCfg(
        context_length=12, vocab_size=50, width=24, heads=2, layers=2, embed_cls=True,
        output_tokens=True,
    )  # fmt: skip
    both = MultimodalCfg(context_length=12, vocab_size=50, width=24, heads=2, layers=2, mlp_ratio=2)
    model = CoCa(24, multimodal_cfg=both, text_cfg=text, vision_cfg=vision)
    nn.init.normal_(model.text_decoder.text_projection)  # it is left as memory was
    return model, _pair()


def own_attention() -> Built:
    """CLIP whose picture tower has an attention of its own, with a parameter for queries, keys and
    values.

    ffn: {visual.transformer,transformer}.resblocks.*.mlp
    qkv: -
    proj: visual.transformer.resblocks.*.attn.out_proj
    head: any
    prompts: some; among patches; words have a causal mask of one size
    """
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=2, width=32, head_width=16, patch_size=8, image_size=32, scale_attn_inner=True,
        scale_heads=True, block_type="custom",
    )  # fmt: skip
    text = CLIPTextCfg(context_length=12, vocab_size=50, width=24, heads=2, layers=2)
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text), _pair()
