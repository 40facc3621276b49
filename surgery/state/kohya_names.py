"""The modules that a LoRA file of an image model is for: by flat names in it, by paths in a model.

One file has what belongs to several models (a UNet, text encoders). A module is named by the model
it is in and by its path there, dots written as underscores, or not.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import NamedTuple, NoReturn

from torch import nn

from .._text import first_few
from ..structure.layers import named_modules
from .foreign import Held, fail
from .kohya_original import renamed
from .kohya_weights import KNOWN

Tensors = dict[str, Held]
RENAMED = {
    "lora_down.weight": "lora_A.weight", "lora.down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight", "lora.up.weight": "lora_B.weight",
    "lora_mid.weight": "lora_mid",
}  # fmt: skip
_LONGEST_FIRST = sorted({*RENAMED, *KNOWN}, key=len, reverse=True)
_TENSOR = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, _LONGEST_FIRST))})")
# what stands before a module's path: who wrote it, and the word for the model that it is in
_WORDS = "unet|te\\d*|text_encoder(?:_\\d)?|transformer|diffusion_model|prior(?:_unet|_te)?"
_START = re.compile(rf"(?:(?:lora|lycoris)_)?((?:{_WORDS})_)?")
_LEVEL = "text_model_"  # of text encoders, one that they have no more in transformers 5
MERGE = "Merge it into its model by the library that wrote it, and save that."
TELL = 'Say which it is, by the word in the file: load(nn.ModuleDict({"te1": model}), path).'


class Group(NamedTuple):
    """The modules of a file that are of one model, and what stands before their paths there."""

    names: list[str]
    start: str
    paths: dict[str, list[str]]


def is_kohya(keys: Iterable[str]) -> bool:
    """Whether the tensors of a file are named as such files name them."""
    return any((found := _TENSOR.fullmatch(key)) and found[2] != "weight" for key in keys)


class Found(NamedTuple):
    """The tensors for each module of a model, by its path; and the words for the model."""

    modules: dict[str, Tensors]
    words: list[str]


def modules_in(model: nn.Module, whole: Mapping[str, Held], call: str) -> Found:
    """What in a file is for the modules of this model. Raises FileError; warns of the others."""
    flat = _grouped((path.replace(".", "_"), path) for path, _ in named_modules(model))
    by_name = _said_here(_parsed(whole, call), flat)
    words = _grouped((_match(name)[1] or "", name) for name in by_name)
    groups = {word: _group(model, names, flat, by_name) for word, names in words.items()}
    fitting = {word: group for word, group in groups.items() if group}
    left = {word.strip("_"): len(words[word]) for word in groups.keys() - fitting.keys()}
    if not fitting or (left and not all(map(_is_told, fitting, fitting.values()))):
        _fail_unknown(model, by_name, flat, call)
    known = [word.strip("_") for word in fitting]
    pairs = list(chain.from_iterable(group.paths.items() for group in fitting.values()))
    _check_one(pairs, f"{' and for '.join(known)} fits this {type(model).__name__}", call)
    if left:
        _warn(model, left, call)
    return Found({paths[0]: by_name[name] for name, paths in pairs}, known)


def _said_here(by_name: Mapping[str, Tensors], flat: Mapping[str, list[str]]) -> dict[str, Tensors]:
    """Names of the first UNet as those of this model, where it has these and not those."""
    say, found = renamed(flat), dict(by_name)
    for name, tensors in by_name.items():
        start = _match(name)[0]
        here = say(name.removeprefix(start))
        if here in flat and name.removeprefix(start) not in flat and start + here not in found:
            del found[name]
            found[start + here] = tensors
    return found


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def _check_one(pairs: list[tuple[str, list[str]]], told: str, call: str) -> None:
    """Raise FileError unless each name is for one module, and each module has one name."""
    seen = set[str]()
    for name, paths in pairs:
        if len(paths) > 1:
            fact = f"{name:.200} may be {paths[0]} or {paths[1]}: dots are underscores there."
            fail(call, fact, "Rename one.")
        if paths[0] in seen:
            fail(call, f"what it has for {told} alike.", TELL)
        seen.add(paths[0])


def _match(name: str) -> re.Match[str]:
    found = _START.match(name)
    assert found is not None  # all of it may be missing
    return found


def _parsed(whole: Mapping[str, Held], call: str) -> dict[str, Tensors]:
    """The tensors of each module by its name, by plain names. Raises FileError."""
    by_name: dict[str, Tensors] = {}
    for key, each in whole.items():
        if (found := _TENSOR.fullmatch(key)) is None:
            fail(call, f"{key:.200} is no tensor that is known here.", MERGE)
        tensors = by_name.setdefault(found[1].replace(".", "_"), {})
        name = RENAMED.get(found[2], found[2])
        if name in tensors:
            fact = f"it has {tensors[name].key:.200} and {key:.200}, which are one."
            fail(call, fact, "Save it again, from one adapter.")
        tensors[name] = each
    return by_name


def _group(
    model: nn.Module,
    names: list[str],
    flat: Mapping[str, list[str]],
    by_name: Mapping[str, Tensors],
) -> Group | None:
    """Modules of one model where they all are in this one, by one start; the least that does."""
    whole = min((_match(name)[0] for name in names), key=len)
    for start in _starts(whole):
        paths = {name: _paths(name.removeprefix(start), flat) for name in names}
        if all(name.startswith(start) and _fits(model, paths[name], by_name[name])
               for name in names):  # fmt: skip
            return Group(names, start, paths)
    return None


def _starts(whole: str) -> list[str]:
    return ["", *(whole[: found.end()] for found in re.finditer("_", whole))]


def _is_told(word: str, group: Group) -> bool:
    """Whether the word for a model tells what is in it: it, or what is called so, is this one."""
    paths = [path for paths in group.paths.values() for path in paths]
    inner = all(path.partition(".")[0] == word.strip("_") for path in paths)
    return word != "" and (group.start.endswith(word) or inner)


def _paths(name: str, flat: Mapping[str, list[str]]) -> list[str]:
    return flat.get(name) or flat.get(name.replace(_LEVEL, "", 1)) or []


def _fits(model: nn.Module, paths: list[str], tensors: Tensors) -> bool:
    """Whether there is such a module, of as many outputs as the tensors are for."""
    weights = [model.get_submodule(path)._parameters.get("weight") for path in paths]
    outs = _outs({name: each.shape for name, each in tensors.items()})
    return any(not outs or (weight is not None and len(weight) == outs) for weight in weights)


def _outs(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many outputs the layer has that these tensors are for; 0 where that is not told."""
    axis = -1 if "hada_t1" in shapes else 0
    names = {"lora_B.weight": 0, "diff": 0, "w_norm": 0, "hada_w1_a": axis}
    return next((shapes[name][i] for name, i in names.items() if shapes.get(name)), 0)


def _fail_unknown(
    model: nn.Module, names: Iterable[str], flat: Mapping[str, list[str]], call: str
) -> NoReturn:
    lost = [
        name
        for name in names
        if not any(_paths(name.removeprefix(start), flat) for start in _starts(_match(name)[0]))
    ]
    told = first_few([f"{name:.200}" for name in lost]) if lost else "modules of other sizes"
    fact = f"it has {told}, and this {type(model).__name__} has no such module."
    fail(call, fact, "Give the very model that it was made for, its modules named as they were.")


def _warn(model: nn.Module, left: Mapping[str, int], call: str) -> None:
    told = ", ".join(f"{count} for {word or 'no model told'}" for word, count in left.items())
    warnings.warn(
        f"{call}: it has modules more than this {type(model).__name__}'s ({told}): load it into "
        "the model that they are for, too.",
        stacklevel=6,
    )
