"""Names of the first Stable Diffusion's UNet, which SDXL's LoRA files keep, as diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

INNER = {
    "in_layers_0": "norm1", "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2", "out_layers_3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
WHOLE = {
    "input_blocks_0_0": "conv_in", "out_0": "conv_norm_out", "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2",
}  # fmt: skip
_BLOCK = re.compile(r"(input_blocks|output_blocks|middle_block)(?:_(\d{1,3}))?_(\d)_(.+)")
_RESNET = re.compile(r"down_blocks_0_resnets_(\d+)_conv1")


def renamed(names: Collection[str]) -> Callable[[str], str]:
    """How names of the first kind are said in a model of these names, dots as underscores.

    >>> renamed(["down_blocks_0_resnets_0_conv1"])("output_blocks_3_0_in_layers_2")
    'up_blocks_1_resnets_1_conv1'
    """
    depths = [int(found[1]) for name in names if (found := _RESNET.fullmatch(name))]
    layers = max(depths, default=0) + 1
    return lambda name: WHOLE.get(name) or _in_block(name, layers) or name


def _in_block(name: str, layers: int) -> str:
    """A name in a block that has so many residual layers on the way down, and one more up."""
    if (found := _BLOCK.fullmatch(name)) is None:
        return ""
    side, number, part, rest = found[1], found[2], int(found[3]), found[4]
    if side == "middle_block":
        return "" if number else _layer("mid_block", part // 2, part, rest)
    if number is None:
        return ""
    block, layer = divmod(int(number) - (side == "input_blocks"), layers + 1)
    stem = f"{'down' if side == 'input_blocks' else 'up'}_blocks_{block}"
    if rest == "op":
        return f"{stem}_downsamplers_0_conv"
    return f"{stem}_upsamplers_0_conv" if rest == "conv" else _layer(stem, layer, part, rest)


def _layer(stem: str, layer: int, part: int, rest: str) -> str:
    """A residual layer, or the attention after it."""
    if part == 1:
        return f"{stem}_attentions_{layer}_{rest}"
    return f"{stem}_resnets_{layer}_{INNER.get(rest, rest)}"
