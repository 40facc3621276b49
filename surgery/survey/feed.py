"""Inputs for a model that nobody described: guessed, then mended by what an error complains of."""

from __future__ import annotations

import inspect
import itertools
import re
import time
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .guess import first, guesses

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
