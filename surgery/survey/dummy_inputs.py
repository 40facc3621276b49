"""Inputs with which one forward of any model runs: guessed, run, and mended by what errors say.

`feed` chooses which arguments a forward wants, all its modalities first, and gives what an error
asks for. `guesses` says what one argument may be, by its name and the model's config.
"""

from __future__ import annotations

import inspect
import itertools
import re
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._inputs import call

Inputs = dict[str, Any]
Guess = Callable[[Any, str, int], Iterator[Any]]

LENGTH = 12  # tokens
GRID = 12  # patches a side, where pictures come as patches
MOST = 20  # sets of arguments
TRIALS = 64  # guesses for one set
NEVER = ("inputs_embeds", "labels", "past_key_values", "use_cache", "return_dict")  # to be given
MODAL = (
    "input_ids", "pixel_values", "input_features", "input_values", "inputs", "past_values",
    "flattened_patches",
)  # fmt: skip
COMPANIONS = (
    "image_grid_thw", "image_sizes", "bbox", "pixel_attention_mask", "image_grid_hws",
    "pixel_position_ids", "image_position_ids", "past_time_features", "past_observed_mask",
    "target_sizes", "num_patches", "num_images", "grid_thw", "spatial_shapes",
)  # fmt: skip
TOKENS = r"tokens?\b.{0,60}?(?:features|given to the model is)\D{0,12}(\d+)"  # how many are wanted
SHAPES = (  # which width is wanted
    r"x\d+ and (\d+)x\d+|tensor a \(\d+\).*tensor b \((\d+)\)|with shape \[\*, (\d+)\]"
    r"|to have (\d+) channels|match model \((\d+)\)"
)
MELS = (
    "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_feat_size",
    "input_dim", "feature_projection_input_dim", "n_mel_bins",
)  # fmt: skip


def feed(model: nn.Module, seconds: float = 30.0, whole: bool = False) -> Inputs:
    """Inputs by name with which one forward of `model` runs.

    whole  with every modality that the forward takes, or not at all

    Tries every modality that the forward takes, then its main input alone; mends the guess by the
    arguments, tokens and shapes that an error names. Raises the first error where none works.
    """
    deadline = time.monotonic() + seconds
    first_error: Exception | None = None
    tried: set[str] = set()
    for names in itertools.islice(_starts(model), 2 if whole else None):
        for error, inputs in _search(model, names, tried, deadline):
            if error is None:
                return inputs
            first_error = first_error or error
    raise first_error or TypeError("its forward takes nothing that could be guessed")


def unfed(model: nn.Module, inputs: Inputs) -> list[str]:
    """The modalities that the forward takes and the inputs leave out."""
    return [n for n in MODAL if n in _signature(model) and n not in inputs]


def refusal(model: nn.Module) -> str:
    """The first error of a forward that is given every modality it takes."""
    attempts = _search(model, next(_starts(model)), set(), time.monotonic() + 5)
    return next((one_line(error)[:200] for error, _ in attempts if error), "")


def forward(model: nn.Module, inputs: Any) -> Any:
    """One forward, with the same random numbers every time."""
    torch.manual_seed(1)
    return call(model, inputs)


def one_line(error: BaseException) -> str:
    """The message of an error, its line breaks gone."""
    return " ".join(str(error).split())


def _starts(model: nn.Module) -> Iterator[list[str]]:
    """Which arguments to give first: all modalities, then fewer."""
    parameters = _signature(model)
    needed = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    main_names = getattr(model, "main_input_name", "input_ids")
    main_names = main_names if isinstance(main_names, (list, tuple)) else [main_names]
    main = [n for n in main_names if n in parameters]
    modal = [n for n in MODAL if n in parameters]
    companions = [n for n in COMPANIONS if n in parameters]
    everything = [*needed, *modal, *companions]
    for names in (everything, [*needed, *modal], [*needed, *main], needed, main):
        if names:
            yield list(dict.fromkeys(names))


def _signature(model: nn.Module) -> dict[str, inspect.Parameter]:
    open_ended = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(model.forward).parameters
    return {n: p for n, p in parameters.items() if p.kind not in open_ended}


def _search(
    model: nn.Module, names: list[str], tried: set[str], deadline: float
) -> Iterator[tuple[Exception | None, Inputs]]:
    """Each guess with what came of it: None where the forward ran.

    What an error says is missing is tried at once, what it may hint at when all else has failed.
    """
    known = {(tuple(names), 0)}
    now, later = [_trials(model, tuple(names), 0, {})], list[Iterator[Inputs]]()
    while now or later:
        now = now or [later.pop(0)]
        inputs = next(now[-1], None)
        if inputs is None:
            now.pop()
        while inputs is not None and _mark(inputs) not in tried:
            tried.add(_mark(inputs))
            error = _error(model, inputs)
            yield error, inputs
            if error is None or time.monotonic() > deadline:
                return
            for sure, wanted, width in _hints(error, inputs, _signature(model)):
                if (wanted, width) not in known and len(known) < MOST:
                    known.add((wanted, width))
                    trials = _trials(model, wanted, width, {} if width else inputs)
                    (now if sure else later).append(trials)
            inputs = _with_tokens(model, inputs, one_line(error))


def _trials(model: nn.Module, names: tuple[str, ...], width: int, near: Inputs) -> Iterator[Inputs]:
    """The likeliest values of all arguments first, nearest of all those that got so far."""
    config, ranked = getattr(model, "config", None), list[list[tuple[int, Any]]]()
    for name in names:
        # the towers of Qwen2-VL, GLM-4V and their like call patches hidden_states
        patches = name == "hidden_states" and "grid_thw" in _signature(model)
        values = [near[name]] if name in near else []
        values += guesses(config, "pixel_values" if patches else name, width)
        ranked.append(list(enumerate({_mark({"": value}): value for value in values}.values())))
    picks = sorted(itertools.product(*ranked), key=lambda pick: sum(rank for rank, _ in pick))
    for pick in picks[:TRIALS]:
        yield {name: value for name, (_, value) in zip(names, pick, strict=True)}


def _mark(inputs: Inputs) -> str:
    """Inputs that differ in values alone are the same guess."""
    return repr({k: (v.shape, v.dtype) if isinstance(v, Tensor) else v for k, v in inputs.items()})


def _error(model: nn.Module, inputs: Inputs) -> Exception | None:
    try:
        with torch.no_grad():
            forward(model, inputs)
    except Exception as error:
        return error
    return None


def _hints(
    error: Exception, inputs: Inputs, parameters: dict[str, Any]
) -> Iterator[tuple[bool, tuple[str, ...], int]]:
    """What to try next: whether it is sure to help, names, and the width of their features."""
    message, names = one_line(error), tuple(inputs)
    if re.search(TOKENS, message, re.IGNORECASE):
        return  # what `_with_tokens` mends
    if shapes := re.search(SHAPES, message):
        of_a_sum = "tensor a" in message  # either term may be the wrong one
        yield not of_a_sum, names, int(next(filter(None, shapes.groups())))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
    code = " ".join(f.line or "" for f in frames[-2:])
    sure = [*(_nones(error, parameters) if "None" in message else [])]
    sure += _arguments(message, parameters)
    unsure = [*_arguments(code, parameters), "decoder_input_ids", "decoder_input_values"]
    for name in dict.fromkeys([*sure, *unsure]):
        if name in parameters and name not in (*names, *NEVER):
            yield name in sure, (*names, name), 0


def _arguments(text: str, parameters: Iterable[str]) -> list[str]:
    """The arguments of a forward that a text names, in the singular too."""
    words = dict.fromkeys(re.findall(r"[a-z_]+", text))
    return [name for word in words for name in (word, f"{word}s") if name in parameters]


def _nones(error: Exception, parameters: dict[str, Any]) -> list[str]:
    """The arguments of a forward that an inner function was given None for."""
    frames = [f for f, _ in traceback.walk_tb(error.__traceback__)]
    inner = [f for f in frames[::-1] if len({*f.f_locals} & {*parameters}) < len(parameters) / 2]
    return [n for f in inner for n, v in f.f_locals.items() if v is None and n in parameters]


def _with_tokens(model: nn.Module, inputs: Inputs, message: str) -> Inputs | None:
    """The inputs with as many image (or audio) tokens among the ids as an error asks for."""
    count, ids = re.search(TOKENS, message, re.IGNORECASE), inputs.get("input_ids")
    token = _placeholder(model, message)
    if not count or token is None or not isinstance(ids, Tensor) or ids.dim() != 2:
        return None
    text = ids[ids != token][None]
    wanted = [n for n in _counts(model, int(count[1])) if n != ids.numel() - text.numel()]
    if not wanted:
        return None
    ids = torch.cat([text[:, :4], torch.full((1, wanted[0]), token), text[:, 4:]], dim=1)
    mended = {**inputs, "input_ids": ids}
    if "attention_mask" in inputs:
        mended["attention_mask"] = torch.ones_like(ids)
    if "mm_token_type_ids" in _signature(model):  # Qwen2-VL, GLM-4V, Gemma 4
        mended["mm_token_type_ids"] = (ids == token).long()
    return mended


def _placeholder(model: nn.Module, message: str) -> int | None:
    """The token that stands for a piece of a picture, or of what else a message is about."""
    kind = re.search("audio|video|image", message.lower())
    ends = ("token_id", "token_index", "patch_id")  # patch_id: Molmo 2
    names = (*(f"{kind[0] if kind else 'image'}_{end}" for end in ends), "media_token_id")
    token = first(getattr(model, "config", None), names, None)
    return token if isinstance(token, int) else None


def _counts(model: nn.Module, count: int) -> list[int]:
    """How many tokens may be meant by a number in an error: some count numbers, not features."""
    width: int = model.get_input_embeddings().weight.shape[-1]  # type: ignore[operator]
    whole = [count // width] if count % width == 0 else []
    return [n for n in (count, *whole) if 0 < n <= 4096]


# guesses by name -------------------------------------------------------------------------------


def guesses(config: Any, name: str, width: int = 0) -> Iterator[Any]:
    """Values that an argument of this name may take, the likeliest first.

    width  of its features, where an error says it

    >>> [tuple(guess.shape) for guess in guesses(None, "bbox")]
    [(1, 12, 4)]
    """
    guess = next(guess for pattern, guess in CASES if re.search(pattern, name))
    yield from guess(config, name, width)


def first(config: Any, names: tuple[str, ...], default: Any, vision: bool = False) -> Any:
    """The first of some fields that a config has, or, level by level, those below it.

    vision  look at what is about pictures before the rest of a level
    """
    level = [] if config is None else [config]
    while level:
        for name in names:
            for part in level:
                if (value := getattr(part, name, None)) is not None:
                    return value
        level = [v for part in level for v in vars(part).values() if hasattr(v, "sub_configs")]
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
    value = first(config, names, default, vision=True)
    return value if isinstance(value, int) else default


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
        yield from (noise(patches, flat), noise(patches, channels, patch, patch))  # Qwen; MiniCPM
        yield noise(1, patches, flat)
    if frames:  # TimeSformer, VideoMAE
        yield from (noise(1, frames, channels, *side), noise(1, channels, frames, *side))
    yield from (noise(1, channels, *side), noise(1, 1, channels, *side))  # ViT; Idefics 2
    yield from (noise(1, patches, flat), noise(patches, flat), noise(1, 1, patches, flat))  # Fuyu
    yield from (noise(1, n, channels, *side) for n in (2, 3, 5))  # LLaVA-NeXT: a whole, its crops
    yield noise(1, 1, channels, 8 * patch, 8 * patch)  # Idefics 3
    yield noise(1, 1, _whole(config, ("max_num_tiles",), 1), channels, *side)  # Llama 3.2 Vision
    yield noise(1, channels, min(side), min(side))
    yield noise(1, channels, 224, 224)  # Deformable DETR, D-FINE
    if max(side) <= 384:  # above, more memory than there may be
        yield noise(1, channels, 4 * side[0], 4 * side[1])  # RF-DETR


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
    yield from (torch.tensor([1]), torch.tensor([[1]]), torch.tensor([2]))  # VideoLLaMA 3


def _boxes(config: Any, name: str, width: int) -> Iterator[Any]:
    boxes = torch.tensor([[[1, 2, 3, 4]] * LENGTH])  # of words: LayoutLM; of objects: LXMERT
    yield boxes if name == "bbox" else boxes / 4


def _pixel_masks(config: Any, name: str, width: int) -> Iterator[Any]:
    side = _side(config)
    for shape in (side, (1, *side), (GRID * GRID,), (1,)):
        yield torch.ones(1, *shape, dtype=torch.long)


def _masks(config: Any, name: str, width: int) -> Iterator[Any]:
    for length in (LENGTH, 128, 3000):
        yield torch.ones(1, length, dtype=torch.long)
    yield torch.ones(1, LENGTH, dtype=torch.bool)


def _spectrograms(config: Any, name: str, width: int) -> Iterator[Any]:
    if width:
        yield from (noise(1, 128, width), noise(1, width, 128))
    mels = _whole(config, MELS, 80)
    for frames in (3000, 128, 1000):  # Whisper takes 3000; mels first, and Parakeet mels last
        yield from (noise(1, mels, frames), noise(1, frames, mels))
    yield noise(1, 1, 1001, 64)  # CLAP


def _waves(config: Any, name: str, width: int) -> Iterator[Any]:
    if mels := first(config, ("num_mel_bins",), 0):  # Audio Spectrogram Transformer
        yield noise(1, first(config, ("max_length",), 1024), mels)
    yield from (noise(1, 19200), noise(1, 1, 19200), noise(1, 1, 24000), ids(1, LENGTH))  # EnCodec


def _floats(config: Any, name: str, width: int) -> Iterator[Any]:
    encoder = ("encoder_hidden_size", "cross_attention_hidden_size") if "encoder" in name else ()
    visual = ("visual_feat_dim",) if "visual" in name else ()  # LXMERT
    names = (*encoder, *visual, "hidden_size", "d_model", "embed_dim", "dim", "n_embd")
    size = width or _whole(config, names, 64)
    yield from (noise(1, LENGTH, size), ids(1, LENGTH), noise(1, size, LENGTH))


def _trajectories(config: Any, name: str, width: int) -> Iterator[Any]:
    size = {"states": "state_dim", "actions": "act_dim"}.get(name, "")  # Decision Transformer
    yield ids(1, LENGTH) if name == "timesteps" else noise(1, LENGTH, _whole(config, (size,), 1))


def _series(config: Any, name: str, width: int) -> Iterator[Any]:
    length = _whole(config, ("context_length", "max_position_embeddings"), 32)
    past = length + max(first(config, ("lags_sequence",), None) or [0])  # Autoformer, Informer
    if name.endswith("time_features"):
        yield noise(1, past, _whole(config, ("num_time_features",), 0))
    elif name.endswith("mask"):
        yield torch.ones(1, past)
    else:
        yield from (noise(1, past), noise(1, 512))
        yield noise(1, length, _whole(config, ("num_input_channels", "input_size"), 1))  # PatchTST


def _others(config: Any, name: str, width: int) -> Iterator[Any]:
    yield ids(1, LENGTH)
    if width and not name.endswith("input_ids"):
        yield noise(1, width)
    if books := _whole(config, ("num_codebooks", "n_codebooks", "num_quantizers"), 0):  # CSM
        yield from (ids(1, LENGTH, books), ids(1, LENGTH, books + 1), ids(1, books, LENGTH))
    if not name.endswith("input_ids"):
        yield from (noise(1, LENGTH), torch.tensor([1]), LENGTH)


CASES: tuple[tuple[str, Guess], ...] = (
    (r"^((prompt_|high_res_)?pixel_values|prompt_masks|images?)$", _pictures),
    (r"^flattened_(patches|pixels)$", _pictures),
    (r"^pixel_values_videos$|^videos$", _videos),
    (r"_grid_|^grid_thw$|^spatial_shapes$", _grids),
    (r"^(pixel|image)_position_ids$", _places),
    (r"^(image|target)_sizes$", _sizes),
    (r"^aspect_ratio_|merge_sizes$|_per_sample$", _ones),
    (r"^bbox$|^visual_pos$", _boxes),
    (r"^pixel_(attention_)?mask$", _pixel_masks),
    (r"^(input_features|audio_values|spectrogram)$", _spectrograms),
    (r"^(input_values|audio|waveform)$", _waves),
    (r"^(past|future)_(?!key_values)", _series),
    (r"attention_mask|(?<!_pos)_mask$", _masks),
    (r"embeds$|_feats$|^(encoder_)?hidden_states$", _floats),
    (r"^(inputs|encoder_outputs|context|latents)$", _floats),
    (r"^(states|actions|rewards|returns_to_go|timesteps)$", _trajectories),
    (r"", _others),
)
