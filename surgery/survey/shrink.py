"""Small models of every transformers type: its config, every width divided by one number.

One divisor for all widths keeps every relation between them (heads x head width, gates, towers
that meet), so no type needs a recipe of its own. Layers, vocabularies and images are cut too.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

# fields by name: widths, to be divided, and what only sounds like one (vocab_size, window_size)
WIDTH = re.compile(
    r"(size|sizes|dims?|channels|width|rank|features|filters|planes|units|lowrank|ffn|feats)\d?$"
    r"|^(d_model|d_ff|d_kv|d_inner|d_head|d_latents|n_embd|n_inner|dff|dim|dim_ff)$|_dims?_"
    r"|hidden|upsample_groups|dim_head|^dim_|mamba_d_|channel_list|channel_size|pw_out_channel"
)
NO_WIDTH = re.compile(
    r"vocab|kernel|window|chunk|block|num_hidden|(patch|image|img|stride|crop|grid|batch|merge)_size"
    r"|(codebook|roi|spec|pool|train|cache|background|unit)_size|(feat|k)_sizes|patch_sizes"
    r"|(?<!upsample_)group|tile|frame|bucket|table|resample_|max_im|image_embedding_size|tubelet"
    r"|hidden_layers|num_layers|layer_ids|pos_emb|_labels|context|hidden_state_ind|^num_features"
)
# numbers of layers, and what only sounds like one (max_window_layers of Qwen2)
DEPTH = re.compile(r"(^|_)(layers?|depths?|num_blocks|n_layer|blocks_per_stage|block_repeats)$")
NO_DEPTH = re.compile(
    r"^(max|min|rope|aligner)_|feat_extract|upsampling|feature_layer|source_layers"
)
LISTED = re.compile(  # numbers that layers have: global_attn_indexes of SAM, moe_layers of Llama 4
    r"(ids|idxs|index|indexes|indices|layers|hybrid_layer_ids|global_attention_blocks)$"
)
TOKEN = re.compile(r"(_id|_ids|token_index|_indices|mask_index|blank_id|vocab_offset)$")
EXPERTS = re.compile(r"num\w*_experts$|n_routed_experts$|moe_num_experts$")
HEADS = re.compile(r"heads$|^n_head$|^num_\w*heads_per")
HEAD_WIDTH = re.compile(r"head_?dim$|d_head$|d_kv$|head_size$|mrope_section|rotary_dim|dim_head$")
IMAGE = re.compile(r"(^|_)(image|img)_size$|^input_size$|pretrain_image_size|grid_pinpoints$")
UNSET = {  # that no default gives
    "vocab_size": 1024,  # ESM, Wav2Vec2-BERT
    "n_routed_experts": 8,  # dots1
    "n_shared_experts": 1,
    "image_token_index": 3,  # BLIP-2
    "image_token_id": 3,  # Chameleon, Emu3
    "video_token_index": 4,  # InstructBLIP for video
    "video_token_id": 4,  # MiniCPM-V
    "audio_token_id": 2,  # Voxtral
    "pad_token_id": 0,  # more than a hundred types
    "num_experts": 8,  # Gemma 4
    "num_experts_per_tok": 2,  # DeepSeek-V2, dots1
    "top_k_experts": 2,  # Gemma 4
    "moe_intermediate_size": 64,
    "deepstack_layer_map": [],  # Granite 4 Vision
    "clip_qkv": 8.0,  # OLMo
    "downsample_rate": "4/8",  # Granite 4 Vision
    "rope_theta": 10000.0,  # DBRX
    "dropout_rate": 0.0,  # the encoder of T5Gemma 2
    "prediction_length": 8,  # Autoformer, Informer
    "vocabulary_map": {},  # Chameleon, Emu3
}
KINDS = {"layer_types": "full_attention", "mlp_layer_types": "sparse"}  # of every layer, the same


class Shrink(NamedTuple):
    """How far: widths divided by `by`, at most `layers` layers, images above twice `image` cut."""

    by: int = 8
    layers: int | None = 4
    image: int | None = 128
    vocab: int | None = 2048
    heads: bool = False  # divide the number of heads, not their width
    sections: bool = False  # write out the sections of a rotary embedding in three dimensions
    grid: int = 1  # an image is a multiple of so many patches a side


def shrunk(config: Any, how: Shrink, tokens: list[int] | None = None) -> Any:
    """A config of the same class, made small; sub-configs with it.

    >>> from transformers import BertConfig
    >>> small = shrunk(BertConfig(), Shrink(by=8, layers=2))
    >>> small.hidden_size, small.intermediate_size, small.num_hidden_layers, small.vocab_size
    (96, 384, 2, 2048)
    """
    if isinstance(getattr(config, "architecture", None), str):
        return config  # built by its name in timm, at one size: TimmWrapper, the tower of Gemma 3n
    tokens = tokens if tokens is not None else sorted(_large_tokens(config, how))
    fields, changes = vars(config), _changes(config, how, tokens)
    changes |= {k: False for k in ("use_pretrained_backbone", "use_cache") if k in fields}
    changes |= {k: v for k, v in UNSET.items() if fields.get(k, 0) is None}
    changes |= _by_heads({**fields, **changes}, how)
    changes |= _whole_grid({**fields, **changes}, how.grid)
    _meet(changes)
    return type(config)(**changes)


def _changes(config: Any, how: Shrink, tokens: list[int]) -> dict[str, Any]:
    """The fields of a config made small, but for those that its class gives by itself."""
    depth, defaults = _depth(config), vars(type(config)())
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if _is_config(value):
            changes[name] = shrunk(value, how, tokens)
        elif name == "_out_indices" and value and len(value) > 1:  # of backbones: BEiT, ConvNeXt
            changes["out_indices"] = _indices(value, depth, how.layers)
        elif not name.startswith("_") and name not in ("model_type", "transformers_version"):
            small = _smaller(name, value, how, depth, tokens)
            by_itself = _is_derived(config, name, value) and value == defaults.get(name)
            if small != defaults.get(name) and not by_itself:
                changes[name] = small
    return changes


def _is_derived(config: Any, name: str, value: Any) -> bool:
    """Whether the config works a list out by itself where none is given, such as layer_types.

    Pictures are not of its size, and made small: the grid_pinpoints of LLaVA-NeXT.
    """
    field = getattr(type(config), "__dataclass_fields__", {}).get(name)
    unset = field and field.default is None and field.default_factory is dataclasses.MISSING
    return bool(unset) and isinstance(value, list) and not IMAGE.search(name)


def _by_heads(fields: dict[str, Any], how: Shrink) -> dict[str, Any]:
    """What follows from the number of heads, where a config leaves it open."""
    width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if not isinstance(width, int) or not isinstance(heads, int) or not heads:
        return {}
    head_dim = fields.get("head_dim") or width // heads
    changes: dict[str, Any] = {"head_dim": head_dim, "num_key_value_heads": heads}
    changes = {k: v for k, v in changes.items() if fields.get(k, 0) is None}  # Mixtral; Nemotron
    rope = fields.get("rope_parameters")
    if how.sections and isinstance(rope, dict) and "mrope_section" not in rope:  # Qwen2-VL
        half = int(head_dim * (rope.get("partial_rotary_factor") or 1)) // 2
        sections = [half - 2 * (half // 3), half // 3, half // 3]
        changes["rope_parameters"] = {**rope, "mrope_section": sections}
    return changes


def _whole_grid(fields: dict[str, Any], grid: int) -> dict[str, Any]:
    """An image of a whole grid of patches, which towers that merge patches ask for."""
    image, patch = fields.get("image_size"), fields.get("patch_size")
    if not isinstance(image, int) or not isinstance(patch, int) or image < 2 * grid * patch:
        return {}
    return {"image_size": image - image % (grid * patch)} if grid > 1 else {}


def _meet(changes: dict[str, Any]) -> None:
    """Let every tower end in the width of the text, and read in that of the encoder."""
    text = getattr(changes.get("text_config"), "hidden_size", None)
    if text and isinstance(changes.get("hidden_size"), int):  # Ovis 2
        changes["hidden_size"] = text
    encoder_config = changes.get("encoder_config")
    encoder = getattr(encoder_config, "hidden_size", None)
    encoder = encoder or getattr(encoder_config, "hidden_dim", None)  # Granite Speech
    for tower in filter(_is_config, changes.values()):
        for name in ("out_hidden_size", "output_dim"):  # Qwen2.5-VL, GLM-OCR; Qwen3-ASR
            if text and isinstance(getattr(tower, name, None), int):
                setattr(tower, name, text)
        if encoder and isinstance(getattr(tower, "encoder_hidden_size", None), int):
            tower.encoder_hidden_size = encoder  # the Q-Former of Granite Speech


# what an error of building says is missing -----------------------------------------------------


def mended(config: Any, error: Exception) -> bool:
    """Whether a config was given what an error of building says is missing from it."""
    if isinstance(error, AttributeError) and _is_config(error.obj):
        return _given_field(error.obj, str(error.name))
    given: list[bool] = []
    for part in (config, *filter(_is_config, vars(config).values())):
        if type(error) is TypeError:
            given.append(_given_kinds(part))
        elif isinstance(error, KeyError):
            given.append(_given_rope(part, error))
    return any(given)


def _given_field(config: Any, name: str) -> bool:
    """DBRX has no rope_theta, Moonshine Streaming no num_key_value_heads."""
    value = vars(config).get("num_attention_heads") if "heads" in name else UNSET.get(name)
    if value is not None:
        setattr(config, name, value)
    return value is not None


def _given_kinds(config: Any) -> bool:
    """LFM2-MoE and DeepSeek-OCR 2 have no kinds of layers, and index them."""
    unset = [name for name in KINDS if getattr(config, name, 0) is None]
    for name in unset:
        setattr(config, name, [KINDS[name]] * _depth(config))
    return bool(unset)


def _given_rope(config: Any, error: KeyError) -> bool:
    """Cohere Compass asks for a rotary embedding of every kind of layer, and has one."""
    kinds = getattr(config, "layer_types", None) or ()
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or error.args[0] not in kinds:
        return False
    plain = {"rope_type": "default", "rope_theta": UNSET["rope_theta"], **rope}
    config.rope_parameters = {kind: rope.get(kind, plain) for kind in set(kinds)}
    return not set(kinds) <= set(rope)


# what one field becomes ------------------------------------------------------------------------


def _smaller(name: str, value: Any, how: Shrink, depth: int, tokens: list[int]) -> Any:
    if isinstance(value, dict):
        if "layer" in name and all(isinstance(k, int) for k in value):  # one for each layer
            return {k: v for k, v in value.items() if k < (how.layers or depth)}
        return {k: _smaller(str(k), v, how, depth, tokens) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return _smaller_list(name, value, how, depth, tokens)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return _number(name, value, how, tokens)


def _smaller_list(name: str, value: Any, how: Shrink, depth: int, tokens: list[int]) -> Any:
    if value and depth and how.layers:
        if len(value) == depth and all(isinstance(v, str) for v in value):
            return _kinds(value, how.layers)  # layer_types, the layers_block_type of Zamba
        if _numbers_layers(name, value):
            return _indices(value, depth, how.layers)
        if len(value) == depth > how.layers:  # one for each layer: no_rope_layers of SmolLM3
            value = value[: how.layers]
    return type(value)(_smaller(name, v, how, depth, tokens) for v in value)


def _numbers_layers(name: str, value: Any) -> bool:
    """Whether a list numbers layers; one of tokens has a like name, and no layer in it."""
    of_tokens = TOKEN.search(name) and "layer" not in name  # visual_indicator_token_ids of Ovis 2
    return bool(LISTED.search(name)) and _increases(value) and not of_tokens


def _number(name: str, value: int, how: Shrink, tokens: list[int]) -> int:
    if DEPTH.search(name) and not NO_DEPTH.search(name):
        return _fewer_layers(name, value, how.layers or value)
    if EXPERTS.search(name):
        return min(value, 32)
    if name == "mm_tokens_per_image":  # Gemma 3: its pictures have fewer patches
        return min(value, 16)
    if how.heads and HEADS.search(name):
        return max(1, value // how.by)
    if how.heads and HEAD_WIDTH.search(name):
        return value
    if name == "mrope_section":  # Cosmos 3 Edge
        return max(1, value // how.by)
    if how.vocab and "vocab_size" in name:
        return min(value, how.vocab)
    return _size(name, value, how, tokens)


def _fewer_layers(name: str, value: int, most: int) -> int:
    # of several stages (depths of Swin), or that share keys (num_kv_shared_layers of Gemma 3n)
    some = "depths" in name or "shared" in name
    return min(value, max(1, most // 2) if some else most)


def _size(name: str, value: int, how: Shrink, tokens: list[int]) -> int:
    large_token = how.vocab and TOKEN.search(name) and value >= how.vocab and value in tokens
    if how.vocab and large_token:
        return how.vocab - len(tokens) + tokens.index(value)  # the last of the vocabulary
    if IMAGE.search(name):
        return value // 4 if how.image and value > how.image * 2 else value
    if WIDTH.search(name) and not NO_WIDTH.search(name) and value >= 4 * how.by:
        return _even(name, value // how.by)
    return value


def _even(name: str, value: int) -> int:
    """A free width as a multiple of 8, which grouped products ask for."""
    return -(-value // 8) * 8 if "intermediate" in name else value


def _is_config(value: Any) -> bool:
    return hasattr(value, "sub_configs") and hasattr(value, "model_type")


def _depth(config: Any) -> int:
    """How many layers a config has, 0 where it counts them otherwise."""
    for name in (
        "num_hidden_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "depth",
        "encoder_layers",
    ):
        if isinstance(count := getattr(config, name, None), int):
            return count
    return 0


def _large_tokens(config: Any, how: Shrink) -> set[int]:
    """The tokens that a smaller vocabulary would not have."""
    tokens: set[int] = set()
    for name, value in vars(config).items():
        if _is_config(value):
            tokens |= _large_tokens(value, how)
        elif TOKEN.search(name) and how.vocab:
            ids = value if isinstance(value, (list, tuple)) else [value]
            tokens |= {v for v in ids if isinstance(v, int) and v >= how.vocab}
    return tokens


def _increases(values: Any) -> bool:
    return all(isinstance(v, int) for v in values) and list(values) == sorted(set(values))


def _indices(values: Any, depth: int, layers: int | None) -> Any:
    """Layer numbers moved to a model of fewer layers, evenly."""
    if not layers or depth <= layers or not _increases(values) or values[-1] > depth:
        return values
    moved = [v * layers // depth for v in values]
    return type(values)(sorted(set(moved)) if len(values) > layers else moved)


def _kinds(values: Any, layers: int) -> Any:
    """The first few of a list of kinds, in which every kind still occurs where there is room."""
    kept = list(values[:layers])
    for kind in dict.fromkeys(values):
        if kind not in kept and len(kept) > len(set(kept)):
            last = max(i for i, k in enumerate(kept) if kept.count(k) > 1)
            kept[last] = kind
    return type(values)(kept)
