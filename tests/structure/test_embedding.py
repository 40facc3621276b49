"""What tokens are made of, told by structure: words, patches, pieces of lines and volumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import transformers as hf
from torch import nn

from backbones.point_mae import PointMAE
from surgery import attn
from surgery.structure.embedding import embedded
from surgery.structure.module_tree import Tree
from tests import models

SIZES = models.hf_sizes(1)
WORDS: dict[str, Any] = {**SIZES, "vocab_size": 32}
SEQ: dict[str, Any] = {
    "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    **WORDS, "conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def swin() -> nn.Module:
    name = "swin_tiny_patch4_window7_224"
    return timm.create_model(name, img_size=32, window_size=2, embed_dim=24, depths=(1,) * 4)


def clip() -> nn.Module:
    text = {**WORDS, "eos_token_id": 2}
    vision = {**SIZES, "image_size": 16, "patch_size": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision))


MADE: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "timm vit": (models.tiny_vit, {"map"}),
    "torchvision vit": (models.torchvision_vit, {"map"}),
    "hf vit": (models.hf_vit, {"map"}),
    "clip's images, with a table of positions": (models.hf_clip_vision, {"map"}),
    "swin": (swin, {"map"}),
    "spectrograms": (lambda: hf.ASTModel(hf.ASTConfig(**SIZES, max_length=64)), {"map"}),
    "gpt2": (models.hf_gpt2, {"words"}),
    "llama": (models.hf_llama, {"words"}),
    "bert": (models.hf_bert, {"words"}),
    "albert, whose table is narrow": (
        lambda: hf.AlbertModel(hf.AlbertConfig(**WORDS, embedding_size=8)),
        {"words"},
    ),
    "t5, whose table is shared": (
        lambda: hf.T5Model(
            hf.T5Config(d_model=24, d_kv=12, d_ff=48, num_layers=1, num_heads=2, vocab_size=40)
        ),
        {"words"},
    ),
    "two towers": (clip, {"map", "words"}),
    "whisper": (lambda: hf.WhisperModel(hf.WhisperConfig(**SEQ)), {"line", "words"}),
    "wav2vec2": (lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**SPEECH)), {"line"}),
    "video": (
        lambda: hf.VideoMAEModel(hf.VideoMAEConfig(**SIZES, image_size=16, patch_size=8)),
        {"volume"},
    ),
    "point clouds": (
        lambda: PointMAE(5, num_groups=8, group_size=4, embed_dim=24, depth=1, num_heads=2),
        {"line"},
    ),
    "linear patches, with a table of positions": (
        lambda: hf.Siglip2VisionModel(
            hf.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=4)
        ),
        {""},
    ),
    "plain features": (models.encoder, {""}),
}


@pytest.mark.parametrize(("make", "kinds"), MADE.values(), ids=MADE)
def test_what_tokens_are_made_of(make: Callable[[], nn.Module], kinds: set[str]) -> None:
    tree = Tree(make())
    told = [embedded(site, tree) for site in attn.find(tree)]
    assert {each.kind for each in told} == kinds
    assert all(bool(each.makers) == bool(each.kind) for each in told)
