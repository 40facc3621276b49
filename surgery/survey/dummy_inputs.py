"""What an argument of a forward may be, guessed from its name and the model's config."""

from __future__ import annotations

import inspect
import itertools
import re
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

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

Inputs = dict[str, Any]
MOST = 20  # sets of arguments
TRIALS = 64  # guesses for one set
NEVER = ("inputs_embeds", "labels", "past_key_values", "use_cache", "return_dict")  # to be given
TOKENS = r"tokens?\b.{0,60}?(?:features|given to the model is)\D{0,12}(\d+)"
SHAPES = (
    r"x\d+ and (\d+)x\d+|tensor a \(\d+\).*tensor b \((\d+)\)|with shape \[\*, (\d+)\]"
    r"|to have (\d+) channels|match model \((\d+)\)"
)
MODAL = (
    "input_ids", "pixel_values", "input_features", "input_values", "inputs", "past_values",
    "flattened_patches",
)  # fmt: skip
COMPANIONS = (
    "image_grid_thw", "image_sizes", "bbox", "pixel_attention_mask", "image_grid_hws",
    "pixel_position_ids", "image_position_ids", "past_time_features", "past_observed_mask",
    "target_sizes", "num_patches", "num_images", "grid_thw", "spatial_shapes",
)  # fmt: skip


def feed(model: nn.Module, seconds: float = 30.0, whole: bool = False) -> Inputs:
    """Inputs by name with which one forward of `model` runs.

    whole  with every modality that the forward takes, or not at all

    Tries every modality that the forward takes, then its main input alone; mends the guess by the
    arguments, tokens and shapes that an error names. Raises the first error where none works.
    """
    deadline = time.monotonic() + seconds
    told: Exception | None = None
    tried: set[str] = set()
    for names in itertools.islice(_starts(model), 2 if whole else None):
        for error, inputs in _search(model, names, tried, deadline):
            if error is None:
                return inputs
            told = told or error
    raise told or TypeError("its forward takes nothing that could be guessed")


def unfed(model: nn.Module, inputs: Inputs) -> list[str]:
    """The modalities that the forward takes and the inputs leave out."""
    return [n for n in MODAL if n in _signature(model) and n not in inputs]


def refusal(model: nn.Module) -> str:
    """The first error of a forward that is given every modality it takes."""
    tried: set[str] = set()
    found = _search(model, next(_starts(model)), tried, time.monotonic() + 5)
    return next((" ".join(str(error).split())[:200] for error, _ in found if error), "")


def run(model: nn.Module, inputs: Inputs) -> Any:
    """One forward, with the same random numbers every time."""
    torch.manual_seed(1)
    return model(**inputs)


def _starts(model: nn.Module) -> Iterator[list[str]]:
    """Which arguments to give first: all modalities, then fewer."""
    given = _signature(model)
    needed = [n for n, p in given.items() if p.default is inspect.Parameter.empty]
    main = [n for n in _main(model) if n in given]
    modal = [n for n in MODAL if n in given]
    companions = [n for n in COMPANIONS if n in given]
    all_of_it = [*needed, *modal, *companions]
    for names in (all_of_it, [*needed, *modal], [*needed, *main], needed, main):
        if names:
            yield list(dict.fromkeys(names))


def _main(model: nn.Module) -> list[str]:
    named = getattr(model, "main_input_name", "input_ids")
    return list(named) if isinstance(named, (list, tuple)) else [named]


def _signature(model: nn.Module) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = inspect.signature(model.forward).parameters
    return {n: p for n, p in found.items() if p.kind not in kinds}


def _search(
    model: nn.Module, names: list[str], tried: set[str], deadline: float
) -> Iterator[tuple[Exception | None, Inputs]]:
    """Each guess with what came of it: None where the forward ran.

    What an error says is missing is tried at once, what it may hint at when all else has failed.
    """
    case = (tuple(names), 0)
    known, now = {case}, [_trials(model, *case, {})]
    later: list[tuple[tuple[str, ...], int, Inputs]] = []
    while now or later:
        now = now or [_trials(model, *later.pop(0))]
        inputs = next(now[-1], None)
        if inputs is None:
            now.pop()
        while inputs is not None and _mark(inputs) not in tried:
            tried.add(_mark(inputs))
            error = _error(model, inputs)
            yield error, inputs
            if error is None or time.monotonic() > deadline:
                return
            for sure, more in _mended(error, inputs, _signature(model)):
                if more not in known and len(known) < MOST:
                    known.add(more)
                    near = {} if more[1] else inputs
                    now.append(_trials(model, *more, near)) if sure else later.append((*more, near))
            inputs = _with_tokens(model, inputs, " ".join(str(error).split()))


def _trials(model: nn.Module, names: tuple[str, ...], width: int, near: Inputs) -> Iterator[Inputs]:
    """The likeliest values of all arguments first, nearest of all those that got so far."""
    held = {name: [near[name]] if name in near else [] for name in names}
    both = [[*held[name], *_choices(model, name, width)] for name in names]
    choices = [list(enumerate({_mark({"": v}): v for v in each}.values())) for each in both]
    ranked = sorted(itertools.product(*choices), key=lambda each: sum(rank for rank, _ in each))
    for values in ranked[:TRIALS]:
        yield {name: value for name, (_, value) in zip(names, values, strict=True)}


def _choices(model: nn.Module, name: str, width: int) -> list[Any]:
    patches = name == "hidden_states" and "grid_thw" in _signature(model)
    return list(guesses(getattr(model, "config", None), "pixel_values" if patches else name, width))


def _mark(inputs: Inputs) -> str:
    """Inputs that differ in values alone are the same guess."""
    return repr({k: (v.shape, v.dtype) if isinstance(v, Tensor) else v for k, v in inputs.items()})


def _error(model: nn.Module, inputs: Inputs) -> Exception | None:
    try:
        with torch.no_grad():
            run(model, inputs)
    except Exception as error:
        return error
    return None


def _mended(
    error: Exception, inputs: Inputs, given: dict[str, Any]
) -> Iterator[tuple[bool, tuple[tuple[str, ...], int]]]:
    """What to try next: whether it is sure to help, then names and the width of features."""
    told, names = " ".join(str(error).split()), tuple(inputs)
    if re.search(TOKENS, told, re.IGNORECASE):
        return
    if shapes := re.search(SHAPES, told):
        width = int(next(each for each in shapes.groups() if each))
        yield "tensor a" not in told, (names, width)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    lines = " ".join(f.line or "" for f in frames[-2:])
    sure = [*(_nones(error, given) if "None" in told else []), *_arguments(told, given)]
    unsure = [*_arguments(lines, given), "decoder_input_ids", "decoder_input_values"]
    for name in dict.fromkeys([*sure, *unsure]):
        if name in given and name not in (*names, *NEVER):
            yield name in sure, ((*names, name), 0)


def _arguments(text: str, given: dict[str, Any]) -> list[str]:
    """The arguments of a forward that a text names, in the singular too."""
    words = dict.fromkeys(re.findall(r"[a-z_]+", text))
    return [each for word in words for each in (word, f"{word}s") if each in given]


def _nones(error: Exception, given: dict[str, Any]) -> list[str]:
    """The arguments of a forward that an inner function was given None for."""
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__)]
    inner = [f for f in frames[::-1] if len(set(f.f_locals) & set(given)) < len(given) / 2]
    return [n for f in inner for n, v in f.f_locals.items() if v is None and n in given]


def _with_tokens(model: nn.Module, inputs: Inputs, told: str) -> Inputs | None:
    """The inputs with as many image (or audio) tokens among the ids as an error asks for."""
    counts, ids = re.search(TOKENS, told, re.IGNORECASE), inputs.get("input_ids")
    kind = re.search("audio|video|image", told.lower())
    ends = ("token_id", "token_index", "patch_id")
    names = (*(f"{kind[0] if kind else 'image'}_{end}" for end in ends), "media_token_id")
    known = first(getattr(model, "config", None), names, None)
    if not counts or not isinstance(known, int) or not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    width: int = model.get_input_embeddings().weight.shape[-1]  # type: ignore[operator]
    rest, wanted = ids[ids != known][None], [int(counts[1])]
    wanted += [wanted[0] // width] if wanted[0] % width == 0 else []  # some count numbers
    wanted = [n for n in wanted if 0 < n <= 4096 and n != ids.numel() - rest.numel()]
    if not wanted:
        return None
    ids = torch.cat([rest[:, :4], torch.full((1, wanted[0]), known), rest[:, 4:]], dim=1)
    beside = {"mm_token_type_ids": (ids == known).long(), "attention_mask": torch.ones_like(ids)}
    needed = {k: v for k, v in beside.items() if k in inputs or k.startswith("mm")}
    return {**inputs, "input_ids": ids, **{k: needed[k] for k in needed if k in _signature(model)}}
