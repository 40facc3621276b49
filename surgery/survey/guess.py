"""What an argument of a forward may be, guessed from its name and the model's config."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

LENGTH = 12  # tokens
GRID = 12  # patches a side, where pictures come as patches

PICTURE = (
    r"^((prompt_|high_res_)?pixel_values|prompt_masks|images?|flattened_patches|flattened_pixels)$"
)
SPECTROGRAM = r"^(input_features|audio_values|spectrogram)$"
FLOATS = r"embeds$|_feats$|^(encoder_)?hidden_states$|^(inputs|encoder_outputs|context|latents)$"
TRAJECTORY = r"^(states|actions|rewards|returns_to_go|timesteps)$"
MELS = (
    "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_feat_size",
    "input_dim", "feature_projection_input_dim", "n_mel_bins",
)  # fmt: skip


def guesses(config: Any, name: str, width: int = 0) -> Iterator[Any]:
    """Values that an argument of this name may take, the likeliest first.

    width  of its features, where an error has told

    >>> [tuple(each.shape) for each in guesses(None, "bbox")]
    [(1, 12, 4)]
    """
    for pattern, guess in CASES:
        if re.search(pattern, name):
            yield from guess(config, name, width)
            return


def first(config: Any, names: tuple[str, ...], default: Any, vision: bool = False) -> Any:
    """The first of some fields that a config has, or, level by level, those below it.

    vision  look at what is about pictures before the rest of a level
    """
    level = [] if config is None else [config]
    while level:
        for name in names:
            for each in level:
                if (found := getattr(each, name, None)) is not None:
                    return found
        level = [v for each in level for v in vars(each).values() if hasattr(v, "sub_configs")]
        if vision:
            level.sort(key=lambda c: not re.search("vision|image", c.model_type))
    return default


def noise(*shape: int) -> Tensor:
    """The same random numbers every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def ids(*shape: int) -> Tensor:
    """The same small whole numbers every time."""
    return torch.randint(5, 50, shape, generator=torch.Generator().manual_seed(0))


def _side(config: Any) -> tuple[int, int]:
    size = first(config, ("image_size", "img_size", "input_size"), 64, vision=True)
    size = list(size.values()) if isinstance(size, dict) else size
    sizes = list(size)[-2:] if isinstance(size, (list, tuple)) else [size]
    return int(sizes[0]), int(sizes[-1])


def _whole(config: Any, names: tuple[str, ...], default: int) -> int:
    found = first(config, names, default, vision=True)
    return found if isinstance(found, int) else default


def _pictures(config: Any, name: str, width: int) -> Iterator[Any]:
    side, patches = _side(config), GRID * GRID
    channels = _whole(config, ("num_channels", "in_channels", "in_chans", "num_input_channels"), 3)
    patch = _whole(config, ("patch_size", "spatial_patch_size"), 16)
    frames = _whole(config, ("num_frames", "frames_per_clip"), 0)
    flat = channels * patch * patch * _whole(config, ("temporal_patch_size",), 1)
    if width:
        yield from (noise(patches, width), noise(1, patches, width))
        yield from (noise(1, channels, width, width), noise(1, 2, channels, width, width))
    if first(config, ("spatial_merge_size", "merge_kernel_size"), 0, vision=True):
        yield from (noise(patches, flat), noise(patches, channels, patch, patch))
        yield noise(1, patches, flat)
    if frames:
        yield from (noise(1, frames, channels, *side), noise(1, channels, frames, *side))
    yield from (noise(1, channels, *side), noise(1, 1, channels, *side))
    yield from (noise(1, patches, flat), noise(patches, flat), noise(1, 1, patches, flat))
    yield from (noise(1, n, channels, *side) for n in (2, 3, 5))
    yield noise(1, 1, channels, 8 * patch, 8 * patch)
    yield noise(1, 1, _whole(config, ("max_num_tiles",), 1), channels, *side)
    yield noise(1, channels, min(side), min(side))
    yield noise(1, channels, 224, 224)
    if max(side) <= 384:  # above, more memory than there may be
        yield noise(1, channels, 4 * side[0], 4 * side[1])


def _videos(config: Any, name: str, width: int) -> Iterator[Any]:
    yield noise(1, first(config, ("num_frames",), 2), 3, *_side(config))


def _grids(config: Any, name: str, width: int) -> Iterator[Any]:
    yield torch.tensor([[GRID, GRID] if name.endswith(("hws", "shapes")) else [1, GRID, GRID]])


def _places(config: Any, name: str, width: int) -> Iterator[Any]:
    yield torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))[None]


def _sizes(config: Any, name: str, width: int) -> Iterator[Any]:
    yield torch.tensor([[GRID, GRID] if name == "target_sizes" else list(_side(config))])


def _ones(config: Any, name: str, width: int) -> Iterator[Any]:
    if name.endswith("mask"):
        yield torch.ones(1, 1, _whole(config, ("max_num_tiles",), 1), dtype=torch.long)
    yield from (torch.tensor([1]), torch.tensor([[1]]), torch.tensor([2]))


def _boxes(config: Any, name: str, width: int) -> Iterator[Any]:
    boxes = torch.tensor([[[1, 2, 3, 4]] * LENGTH])
    yield boxes if name == "bbox" else boxes / 4


def _pixel_masks(config: Any, name: str, width: int) -> Iterator[Any]:
    yield torch.ones(1, *_side(config), dtype=torch.long)
    yield torch.ones(1, 1, *_side(config), dtype=torch.long)
    yield torch.ones(1, GRID * GRID, dtype=torch.long)
    yield torch.ones(1, 1, dtype=torch.long)


def _masks(config: Any, name: str, width: int) -> Iterator[Any]:
    for length in (LENGTH, 128, 3000):
        yield torch.ones(1, length, dtype=torch.long)
    yield torch.ones(1, LENGTH, dtype=torch.bool)


def _spectrograms(config: Any, name: str, width: int) -> Iterator[Any]:
    if width:
        yield from (noise(1, 128, width), noise(1, width, 128))
    mels = _whole(config, MELS, 80)
    for frames in (3000, 128, 1000):
        yield from (noise(1, mels, frames), noise(1, frames, mels))
    yield noise(1, 1, 1001, 64)


def _waves(config: Any, name: str, width: int) -> Iterator[Any]:
    if mels := first(config, ("num_mel_bins",), 0):
        yield noise(1, first(config, ("max_length",), 1024), mels)
    yield from (noise(1, 19200), noise(1, 1, 19200), noise(1, 1, 24000), ids(1, LENGTH))


def _floats(config: Any, name: str, width: int) -> Iterator[Any]:
    other: tuple[str, ...] = ()
    other += ("encoder_hidden_size", "cross_attention_hidden_size") if "encoder" in name else ()
    other += ("visual_feat_dim",) if "visual" in name else ()
    names = (*other, "hidden_size", "d_model", "embed_dim", "dim", "n_embd")
    size = width or _whole(config, names, 64)
    yield from (noise(1, LENGTH, size), ids(1, LENGTH), noise(1, size, LENGTH))


def _trajectories(config: Any, name: str, width: int) -> Iterator[Any]:
    size = {"states": "state_dim", "actions": "act_dim"}.get(name, "")
    yield ids(1, LENGTH) if name == "timesteps" else noise(1, LENGTH, _whole(config, (size,), 1))


def _series(config: Any, name: str, width: int) -> Iterator[Any]:
    length = _whole(config, ("context_length", "max_position_embeddings"), 32)
    past = length + max(first(config, ("lags_sequence",), None) or [0])
    if name.endswith("time_features"):
        yield noise(1, past, _whole(config, ("num_time_features",), 0))
    elif name.endswith("mask"):
        yield torch.ones(1, past)
    else:
        yield from (noise(1, past), noise(1, 512))
        yield noise(1, length, _whole(config, ("num_input_channels", "input_size"), 1))


def _others(config: Any, name: str, width: int) -> Iterator[Any]:
    yield ids(1, LENGTH)
    if width and not name.endswith("input_ids"):
        yield noise(1, width)
    if books := _whole(config, ("num_codebooks", "n_codebooks", "num_quantizers"), 0):
        yield from (ids(1, LENGTH, books), ids(1, LENGTH, books + 1), ids(1, books, LENGTH))
    if not name.endswith("input_ids"):
        yield from (noise(1, LENGTH), torch.tensor([1]), LENGTH)


CASES: tuple[tuple[str, Callable[[Any, str, int], Iterator[Any]]], ...] = (
    (PICTURE, _pictures),
    (r"^pixel_values_videos$|^videos$", _videos),
    (r"_grid_|^grid_thw$|^spatial_shapes$", _grids),
    (r"^(pixel|image)_position_ids$", _places),
    (r"^(image|target)_sizes$", _sizes),
    (r"^aspect_ratio_|merge_sizes$|_per_sample$", _ones),
    (r"^bbox$|^visual_pos$", _boxes),
    (r"^pixel_(attention_)?mask$", _pixel_masks),
    (SPECTROGRAM, _spectrograms),
    (r"^(input_values|audio|waveform)$", _waves),
    (r"^(past|future)_(?!key_values)", _series),
    (r"attention_mask|(?<!_pos)_mask$", _masks),
    (FLOATS, _floats),
    (TRAJECTORY, _trajectories),
    (r"", _others),
)
