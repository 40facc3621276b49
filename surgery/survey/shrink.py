"""Small models of every transformers type: its config, every width divided by one number.

One divisor for all widths keeps every relation between them (heads x head width, gates, towers
that meet), so no type needs a recipe of its own. Layers, vocabularies and images are cut too.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

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
DEPTH = re.compile(r"(^|_)(layers?|depths?|num_blocks|n_layer|blocks_per_stage|block_repeats)$")
NO_DEPTH = re.compile(
    r"^(max|min|rope|aligner)_|feat_extract|upsampling|feature_layer|source_layers"
)
LISTED = re.compile(
    r"(ids|idxs|index|indexes|indices|layers|hybrid_layer_ids|global_attention_blocks)$"
)
TOKEN = re.compile(r"(_id|_ids|token_index|_indices|mask_index|blank_id|vocab_offset)$")
EXPERTS = re.compile(r"num\w*_experts$|n_routed_experts$|moe_num_experts$")
HEADS = re.compile(r"heads$|^n_head$|^num_\w*heads_per")
HEAD_WIDTH = re.compile(r"head_?dim$|d_head$|d_kv$|head_size$|mrope_section|rotary_dim|dim_head$")
UNSET = {
    "vocab_size": 1024,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "image_token_index": 3,
    "image_token_id": 3,
    "video_token_index": 4,
    "video_token_id": 4,
    "audio_token_id": 2,
    "pad_token_id": 0,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
    "deepstack_layer_map": [],
    "clip_qkv": 8.0,
    "downsample_rate": "4/8",
    "rope_theta": 10000.0,
    "dropout_rate": 0.0,
    "prediction_length": 8,
    "vocabulary_map": {},
}  # that no default gives
KINDS = {"layer_types": "full_attention", "mlp_layer_types": "sparse"}  # of every layer, the same
IMAGE = re.compile(r"(^|_)(image|img)_size$|^input_size$|pretrain_image_size|grid_pinpoints$")


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
        return config  # built by name, at one size
    tokens = tokens if tokens is not None else sorted(_large_tokens(config, how))
    depth, held = _depth(config), vars(config)
    usual = vars(type(config)())
    changes: dict[str, Any] = {}
    for name, value in held.items():
        if _is_config(value):
            changes[name] = shrunk(value, how, tokens)
        elif name == "_out_indices" and value and len(value) > 1:
            changes["out_indices"] = _indices(value, depth, how.layers)
        elif not name.startswith("_") and name not in ("model_type", "transformers_version"):
            new = _smaller(name, value, how, depth, tokens)
            derived = isinstance(value, list) and _is_derived(config, name)
            derived = derived and not IMAGE.search(name)
            if new != usual.get(name) and not (derived and value == usual.get(name)):
                changes[name] = new
    changes |= {k: False for k in ("use_pretrained_backbone", "use_cache") if k in held}
    changes |= {k: v for k, v in UNSET.items() if held.get(k, 0) is None}
    changes |= _heads({**held, **changes}, how)
    changes |= _whole_grid({**held, **changes}, how.grid)
    _meet(changes)
    return type(config)(**changes)


def mended(config: Any, error: Exception) -> bool:
    """Whether a config was given what an error of building says is missing from it."""
    if isinstance(error, AttributeError) and _is_config(error.obj):
        held, name = vars(error.obj), str(error.name)
        value = held.get("num_attention_heads") if "heads" in name else UNSET.get(name)
        if value is not None:
            setattr(error.obj, name, value)
        return value is not None
    done = False
    for each in (config, *(v for v in vars(config).values() if _is_config(v))):
        for name in (n for n in KINDS if getattr(each, n, 0) is None and type(error) is TypeError):
            setattr(each, name, [KINDS[name]] * _depth(each))
            done = True
        kinds, rope = getattr(each, "layer_types", None) or (), getattr(each, "rope_parameters", 0)
        if isinstance(error, KeyError) and isinstance(rope, dict) and error.args[0] in kinds:
            done = done or not set(kinds) <= set(rope)
            plain = {"rope_type": "default", "rope_theta": UNSET["rope_theta"], **rope}
            each.rope_parameters = {kind: rope.get(kind, plain) for kind in set(kinds)}
    return done


def _heads(held: dict[str, Any], how: Shrink) -> dict[str, Any]:
    """What follows from the number of heads, where a config leaves it open."""
    width, heads = held.get("hidden_size"), held.get("num_attention_heads")
    if not isinstance(width, int) or not isinstance(heads, int) or not heads:
        return {}
    inner = held.get("head_dim") or width // heads
    found: dict[str, Any] = {"head_dim": inner, "num_key_value_heads": heads}
    found = {k: v for k, v in found.items() if held.get(k, 0) is None}
    rope = held.get("rope_parameters")
    if how.sections and isinstance(rope, dict) and "mrope_section" not in rope:
        half = int(inner * (rope.get("partial_rotary_factor") or 1)) // 2
        sections = [half - 2 * (half // 3), half // 3, half // 3]
        found["rope_parameters"] = {**rope, "mrope_section": sections}
    return found


def _whole_grid(held: dict[str, Any], grid: int) -> dict[str, Any]:
    """An image of a whole grid of patches, which towers that merge patches ask for."""
    image, patch = held.get("image_size"), held.get("patch_size")
    if not isinstance(image, int) or not isinstance(patch, int) or image < 2 * grid * patch:
        return {}
    return {"image_size": image - image % (grid * patch)} if grid > 1 else {}


def _meet(changes: dict[str, Any]) -> None:
    """Let every tower end in the width of the text, and read in that of the encoder."""
    meets = getattr(changes.get("text_config"), "hidden_size", None)
    if meets and isinstance(changes.get("hidden_size"), int):
        changes["hidden_size"] = meets
    encoder = changes.get("encoder_config")
    read = getattr(encoder, "hidden_size", None) or getattr(encoder, "hidden_dim", None)
    for each in filter(_is_config, changes.values()):
        for name in ("out_hidden_size", "output_dim"):
            if meets and isinstance(getattr(each, name, None), int):
                setattr(each, name, meets)
        if read and isinstance(getattr(each, "encoder_hidden_size", None), int):
            each.encoder_hidden_size = read


def _smaller(name: str, value: Any, how: Shrink, depth: int, tokens: list[int]) -> Any:
    if isinstance(value, dict) and "layer" in name and all(isinstance(k, int) for k in value):
        return {k: v for k, v in value.items() if k < (how.layers or depth)}
    if isinstance(value, dict):
        return {k: _smaller(str(k), v, how, depth, tokens) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and value and depth and how.layers:
        if all(isinstance(v, str) for v in value) and len(value) == depth:
            return _kinds(value, how.layers)
        if (
            LISTED.search(name)
            and _increases(value)
            and ("layer" in name or not TOKEN.search(name))
        ):
            return _indices(value, depth, how.layers)
        if len(value) == depth > how.layers:
            value = value[: how.layers]
    if isinstance(value, (list, tuple)):
        return type(value)(_smaller(name, v, how, depth, tokens) for v in value)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return _number(name, value, how, depth, tokens)


def _number(name: str, value: int, how: Shrink, depth: int, tokens: list[int]) -> int:
    if DEPTH.search(name) and not NO_DEPTH.search(name):
        most = how.layers or value
        return min(value, max(1, most // 2) if "depths" in name or "shared" in name else most)
    if EXPERTS.search(name):
        return min(value, 32)
    if name == "mm_tokens_per_image":
        return min(value, 16)
    if how.heads and HEADS.search(name):
        return max(1, value // how.by)
    if how.heads and HEAD_WIDTH.search(name):
        return value
    if name == "mrope_section":
        return max(1, value // how.by)
    if how.vocab and "vocab_size" in name:
        return min(value, how.vocab)
    if how.vocab and TOKEN.search(name) and value >= how.vocab and value in tokens:
        return how.vocab - len(tokens) + tokens.index(value)
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


def _is_derived(config: Any, name: str) -> bool:
    """Whether the config works a list out by itself where none is given."""
    fields = getattr(type(config), "__dataclass_fields__", {})
    return (
        name in fields
        and fields[name].default is None
        and (fields[name].default_factory is dataclasses.MISSING)
    )


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
        if isinstance(found := getattr(config, name, None), int):
            return found
    return 0


def _large_tokens(config: Any, how: Shrink) -> set[int]:
    found: set[int] = set()
    for name, value in vars(config).items():
        if _is_config(value):
            found |= _large_tokens(value, how)
        elif TOKEN.search(name):
            many = value if isinstance(value, (list, tuple)) else [value]
            found |= {v for v in many if isinstance(v, int) and how.vocab and v >= how.vocab}
    return found


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
