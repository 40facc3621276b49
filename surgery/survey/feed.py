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
MOST = 20  # guesses for one set of arguments, and sets of arguments
TOKENS = r"tokens?\b.{0,60}?features\D{0,12}(\d+)"
SHAPES = (
    r"x\d+ and (\d+)x\d+|tensor a \(\d+\).*tensor b \((\d+)\)|with shape \[\*, (\d+)\]"
    r"|to have (\d+) channels"
)
MODAL = ("input_ids", "pixel_values", "input_features", "input_values", "inputs", "past_values")
COMPANIONS = (
    "image_grid_thw", "image_sizes", "bbox", "pixel_attention_mask", "image_grid_hws",
    "pixel_position_ids", "image_position_ids", "past_time_features", "past_observed_mask",
    "target_sizes", "num_patches", "num_images", "grid_thw", "spatial_shapes",
)  # fmt: skip


def feed(model: nn.Module, seconds: float = 30.0) -> Inputs:
    """Inputs by name with which one forward of `model` runs.

    Tries every modality that the forward takes, then its main input alone; mends the guess by the
    arguments, tokens and shapes that an error names. Raises the first error where none works.
    """
    deadline = time.monotonic() + seconds
    told: Exception | None = None
    tried: set[str] = set()
    for names in _starts(model):
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
    """Each guess with what came of it: None where the forward ran."""
    queue = [(names, 0)]
    for names, width in queue:  # grows while it is walked
        choices = [_choices(model, name, width) for name in names]
        for values in itertools.islice(itertools.product(*choices), MOST):
            inputs: Inputs | None = dict(zip(names, values, strict=True))
            while inputs is not None and _mark(inputs) not in tried:
                tried.add(_mark(inputs))
                error = _error(model, inputs)
                yield error, inputs
                if error is None or time.monotonic() > deadline:
                    return
                told = _told(error)
                more = _mended(told, names, _signature(model), width)
                queue += [m for m in more if m not in queue and len(queue) < MOST]
                inputs = _with_tokens(model, inputs, told)


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


def _told(error: Exception) -> str:
    """What an error says, and the lines of code that led to it: they name what is missing."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.line or "" for f in frames if "/torch/" not in f.filename]
    return " ".join([str(error), *lines[:-3:-1]])


def _mended(
    told: str, names: list[str], given: dict[str, Any], width: int
) -> Iterator[tuple[list[str], int]]:
    """What to try next: (names, width of features), by the arguments and shapes an error names."""
    if re.search(TOKENS, told, re.IGNORECASE):
        return
    shapes = re.search(SHAPES, told)
    if shapes and not width:
        yield names, int(next(each for each in shapes.groups() if each))
    words = dict.fromkeys(re.findall(r"[a-z_]+", told))
    named = [each for word in words for each in (word, f"{word}s") if each in given]
    for name in (*named, "decoder_input_ids", "decoder_input_values"):
        if name in given and name not in names and name != "inputs_embeds":
            yield [*names, name], width


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
    kinds = {"mm_token_type_ids": (ids == known).long()}
    return {
        **inputs,
        "input_ids": ids,
        **(kinds if "mm_token_type_ids" in _signature(model) else {}),
    }
