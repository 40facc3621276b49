"""Models of diffusers: denoisers that are conditioned on time and words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any]]


def _times() -> Tensor:
    return torch.tensor([3, 4])


def _example(**conditions: Any) -> dict[str, Any]:
    """A picture of 8 x 8 in four channels, and what it is conditioned on."""
    return {"hidden_states": torch.randn(2, 4, 8, 8), "return_dict": False, **conditions}


def dit() -> Built:
    """DiT: adaptive norms of time and class in every block; networks are lists run in a loop.

    ffn: transformer_blocks.*.ff
    qkv: transformer_blocks.*.attn1.to_{q,k,v}
    proj: transformer_blocks.*.attn1.to_out.0
    head: proj_out_2 proj_out_1?
    prompts: yes; transformer_blocks.* are called
    """
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    classes = torch.tensor([1, 2])
    return model, _example(class_labels=classes, timestep=torch.tensor([3, 4]))


def pixart() -> Built:
    """PixArt: one embedder of time, registered behind the blocks; cross-attention to words.

    ffn: transformer_blocks.*.ff
    qkv: transformer_blocks.*.{attn1,attn2}.to_{q,k,v}
    proj: transformer_blocks.*.{attn1,attn2}.to_out.0
    head: proj_out
    prompts: yes; transformer_blocks.* are called
    """
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8,
        cross_attention_dim=32, caption_channels=24, norm_num_groups=4,
        use_additional_conditions=False,
    )  # fmt: skip
    return model, _example(encoder_hidden_states=torch.randn(2, 5, 24), timestep=_times())


def flux() -> Built:
    """Flux: joint attention of words and picture, then blocks whose attention and network end in
    one matrix.

    ffn: transformer_blocks.*.{ff,ff_context}
    qkv: transformer_blocks.*.attn.{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj}
        single_transformer_blocks.*.attn.to_{q,k,v}
    proj: transformer_blocks.*.attn.{to_out.0,to_add_out} single_transformer_blocks.*.proj_out?
    head: proj_out norm_out.linear?
    prompts: no; rotary positions, made once for all tokens
    """
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=20,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.randint(0, 4, (16, 3)).float(),
        "txt_ids": torch.zeros(5, 3),
        "return_dict": False,
    }


def sd3() -> Built:
    """Stable Diffusion 3: joint attention; the last block gives no words back.

    ffn: transformer_blocks.*.{ff,ff_context}
    qkv: transformer_blocks.*.attn.{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj}
    proj: transformer_blocks.*.attn.{to_out.0,to_add_out}
    head: proj_out norm_out.linear?
    prompts: some; two streams, joined for attention and cut by number
    idle: transformer_blocks.2.attn.add_q_proj; its queries give words that nothing reads
    """
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    return model, _example(
        encoder_hidden_states=torch.randn(2, 5, 24),
        pooled_projections=torch.randn(2, 20),
        timestep=_times(),
    )


def auraflow() -> Built:
    """AuraFlow: joint blocks, then single ones over words and picture together; gated networks.

    ffn: joint_transformer_blocks.*.{ff,ff_context} single_transformer_blocks.*.ff
    qkv: joint_transformer_blocks.*.attn.{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj}
        single_transformer_blocks.*.attn.to_{q,k,v}
    proj: joint_transformer_blocks.*.attn.{to_out.0,to_add_out}
        single_transformer_blocks.*.attn.to_out.0
    head: proj_out norm_out.linear?
    prompts: some; two streams, then one that is cut by number at the end
    """
    from diffusers import AuraFlowTransformer2DModel

    model = AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
        caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    times = torch.tensor([0.3, 0.7])
    return model, _example(encoder_hidden_states=torch.randn(2, 5, 24), timestep=times)


def unet() -> Built:
    """Stable Diffusion's U-Net: transformers among convolutions.

    ffn: {down,up}_blocks.*.attentions.*.transformer_blocks.*.ff
        mid_block.attentions.*.transformer_blocks.*.ff
    qkv: {down,up}_blocks.*.attentions.*.transformer_blocks.*.{attn1,attn2}.to_{q,k,v}
        mid_block.attentions.*.transformer_blocks.*.{attn1,attn2}.to_{q,k,v}
    proj: {down,up}_blocks.*.attentions.*.transformer_blocks.*.{attn1,attn2}.to_out.0
        mid_block.attentions.*.transformer_blocks.*.{attn1,attn2}.to_out.0
    head: any
    prompts: some; transformer_blocks.* are called on plain tokens, one or few between two maps
    """
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=8,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=4,
    )  # fmt: skip
    example = {"sample": torch.randn(2, 4, 8, 8), "timestep": _times(), "return_dict": False}
    return model, {**example, "encoder_hidden_states": torch.randn(2, 5, 24)}


def wan() -> Built:
    """Wan: video, rotary positions, cross-attention to words.

    ffn: blocks.*.ffn
    qkv: blocks.*.{attn1,attn2}.to_{q,k,v}
    proj: blocks.*.{attn1,attn2}.to_out.0
    head: proj_out
    prompts: no; rotary positions, made once for all tokens
    """
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=48, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    video = torch.randn(2, 4, 2, 8, 8)
    words = torch.randn(2, 5, 16)
    return model, {
        **_example(encoder_hidden_states=words, timestep=_times()),
        "hidden_states": video,
    }


def ltx_video() -> Built:
    """LTX-Video: rotary positions, cross-attention to words.

    ffn: transformer_blocks.*.ff
    qkv: transformer_blocks.*.{attn1,attn2}.to_{q,k,v}
    proj: transformer_blocks.*.{attn1,attn2}.to_out.0
    head: proj_out
    prompts: no; rotary positions, made once for all tokens
    """
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        cross_attention_dim=32, caption_channels=24,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "timestep": _times(),
        "encoder_attention_mask": torch.ones(2, 5),
        "num_frames": 2,
        "height": 2,
        "width": 2,
        "return_dict": False,
    }


def lumina2() -> Built:
    """Lumina 2: refiners of noise and of words, then both in one; gated networks with the gate
    behind.

    ffn: {noise_refiner,context_refiner,layers}.*.feed_forward
    qkv: {noise_refiner,context_refiner,layers}.*.attn.to_{q,k,v}
    proj: {noise_refiner,context_refiner,layers}.*.attn.to_out.0
    head: norm_out.linear_2 norm_out.linear_1?
    prompts: no; rotary positions, made once for all tokens
    """
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 32, 32), cap_feat_dim=16,
    )  # fmt: skip
    words, mask = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    times = torch.tensor([0.3, 0.7])
    return model, _example(encoder_hidden_states=words, encoder_attention_mask=mask, timestep=times)


def sana() -> Built:
    """Sana: attention by a ReLU kernel, networks of convolutions with a depthwise one between.

    ffn: transformer_blocks.*.ff?
    qkv: transformer_blocks.*.{attn1,attn2}.to_{q,k,v}
    proj: transformer_blocks.*.{attn1,attn2}.to_out.0
    head: proj_out
    prompts: no; tokens are folded to maps
    """
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=24, sample_size=8,
    )  # fmt: skip
    return model, _example(encoder_hidden_states=torch.randn(2, 5, 24), timestep=_times())


def cogvideox() -> Built:
    """CogVideoX: words and video in one attention and one network, cut by number after each.

    ffn: transformer_blocks.*.ff
    qkv: transformer_blocks.*.attn1.to_{q,k,v}
    proj: transformer_blocks.*.attn1.to_out.0
    head: proj_out norm_out.linear?
    prompts: some; two streams, joined for attention and network and cut by number
    """
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=24, num_layers=2, sample_width=8, sample_height=8,
        sample_frames=5, max_text_seq_length=5,
    )  # fmt: skip
    video, words = torch.randn(2, 2, 4, 8, 8), torch.randn(2, 5, 24)
    return model, {
        **_example(encoder_hidden_states=words, timestep=_times()),
        "hidden_states": video,
    }


def prior() -> Built:
    """The prior of unCLIP: embeddings, time and the words as tokens, the last of which is read.

    ffn: transformer_blocks.*.ff
    qkv: transformer_blocks.*.attn1.to_{q,k,v}
    proj: transformer_blocks.*.attn1.to_out.0
    head: proj_to_clip_embeddings
    prompts: yes; transformer_blocks.* are called
    """
    from diffusers import PriorTransformer

    model = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=24,
        num_embeddings=5, additional_embeddings=4,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 24),
        "timestep": _times(),
        "proj_embedding": torch.randn(2, 24),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "return_dict": False,
    }
