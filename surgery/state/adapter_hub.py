"""Folders of adapters (adapter-hub), read: bottlenecks, LoRA and IA3, and heads of the model's own.

Of adapters 1.3. What is silent in its configuration is how training starts and goes on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .._text import first_few
from ..engine.trained import Place
from ..parts.adapters import Adapter
from ..parts.low_rank import LoRA
from ..parts.prefixes import Prefix
from ..parts.row_lengths import Rescale
from ..rules.edits import Edit
from ..rules.rule import Rule, at
from ..rules.selector import Where
from ..structure.layers import named_modules
from ..structure.path import generalise
from .foreign import (
    Content,
    Entry,
    Held,
    Joints,
    addresses,
    check_held,
    fail,
    guarded,
    held_in,
    operate,
    pickled,
    read_json,
    rules_of,
)
from .hub_places import MERGE, Hub, Spot, bottleneck, low_rank
from .hub_prefixes import prefixes
from .reading import FIT

CONFIG = "adapter_config.json"
FILES = ("adapter.safetensors", "pytorch_adapter.bin")
HEADS = ("model_head.safetensors", "pytorch_model_head.bin")
SHARED = "shared_parameters"
PREFIX = "prefix_tuning.prefix_tunings"  # of the model; each layer has it again
POOLED = "prefix_tuning.pool.prefix_tunings"
AT = ("adapters", "loras", POOLED)  # what stands at a module
_KINDS = "|".join(map(re.escape, (*AT, SHARED, PREFIX)))
_KEY = re.compile(rf"(.+?)\.({_KINDS})\.([^.]+)\.(.+)")


def is_adapter_hub(said: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of adapters."""
    return "config" in said and "model_type" in said and "peft_type" not in said


def load_adapters(model: nn.Module, folder: Path, *, name: str, example: Any, head: bool) -> None:
    """Operate a model by a folder that adapters saved, and fill it. Raises FileError.

    head  False: the head in it is left out
    """
    call = f'load("{folder}")'
    said = read_json(folder / CONFIG, call)
    with ExitStack() as stack:
        whole = _read(folder, FILES, call, stack)
        heads = _read(folder, HEADS, call, stack) if head else {}
        hub = Hub(call, said, model, _start(model, [*whole], call))
        with guarded(call):
            spots = _spots(hub, whole)
        base = _head(hub, heads)
        held = {f"{spot.key}.{k}": each for spot in spots for k, each in spot.tensors.items()}
        held |= {hub.named(key): each for key, each in heads.items()}

        def check(entries: dict[str, Entry]) -> None:
            wanted = {key: entry.shape for key, entry in entries.items()}
            check_held(held, wanted, entries, partial(fail, call))

        rules, entries = partial(_rules, hub, spots, base), partial(_entries, spots, base)
        operate(model, Content(call, rules, entries, check, held), name, example)


def _read(folder: Path, names: tuple[str, ...], call: str, stack: ExitStack) -> dict[str, Held]:
    """What is in the first of these files that is there. Raises FileError where it must be."""
    for name in names:
        if os.path.isfile(folder / name):
            if name.endswith(".bin"):
                return pickled(folder / name, call)
            return stack.enter_context(held_in(folder / name, call))[0]
    if names is FILES:
        fail(call, f"there is neither {' nor '.join(names)} in it.", "Give a folder of adapters.")
    return {}


def _start(model: nn.Module, keys: list[str], call: str) -> Callable[[str], str]:
    """How the file's names of modules are this model's: with another start, or the same."""
    paths = {path for path, _ in named_modules(model)}
    own = {found[1] for key in keys if (found := _KEY.fullmatch(key)) and found[2] in AT}
    own = {re.sub(r"\.\w+_adapters$", "", path) for path in own}
    first = {path.partition(".")[0] for path in own}
    starts: list[Callable[[str], str]] = [lambda path: path]
    if len(first) == 1:
        starts.append(lambda path: path.partition(".")[2])
    for child in model._modules:
        starts.append(lambda path, child=child: f"{child}.{path}")  # type: ignore[misc]
    fits = [start for start in starts if all(start(path) in paths for path in own)]
    if not fits:
        lost = first_few([path for path in sorted(own) if path not in paths])
        fail(call, f"it has {lost}, and this {type(model).__name__} has no such module.", FIT)
    return fits[0]


def _spots(hub: Hub, whole: Mapping[str, Held]) -> list[Spot]:
    """The places that a folder's tensors are for. Raises FileError for what is not known."""
    grouped: dict[tuple[str, str], dict[str, Held]] = {}
    for key, each in whole.items():
        found = _KEY.fullmatch(key)
        if found is None or found[3] != hub.said.get("name"):
            fail(hub.call, f"{key:.200} is of a kind that is not known here.", MERGE)
        where = ("", found[2]) if found[2] in (SHARED, PREFIX) else (found[1], found[2])
        grouped.setdefault(where, {})[found[4].removeprefix("self_prefix.")] = each
    shared, pooled = grouped.pop(("", SHARED), {}), grouped.pop(("", PREFIX), {})
    layers = {path: tensors for (path, kind), tensors in grouped.items() if kind == POOLED}
    spots = prefixes(hub, layers, pooled) if layers or pooled else []
    for (path, kind), tensors in grouped.items():
        if kind != POOLED:
            make = low_rank if kind == "loras" else bottleneck
            spots.append(make(hub, path, tensors, shared))
    _check_whole(hub, grouped)
    return spots


def _check_whole(hub: Hub, grouped: Mapping[tuple[str, str], Any]) -> None:
    """Raise FileError where a layer is neither in the file nor said to be left out."""
    own: dict[tuple[str, str], set[str]] = {}
    for path, kind in grouped:
        stem, dot, word = path.rpartition(".")
        stem, word = (stem, dot + word) if word.endswith("_adapters") else (path, "")
        named = hub.named(stem)
        own.setdefault((generalise(named), word + kind), set()).add(named)
    left_out = {number for config in hub.configs for number in config.get("leave_out") or []}
    for path, _ in named_modules(hub.model):
        numbers = {int(step) for step in path.split(".") if step.isdecimal()}
        for (address, _), there in own.items():
            if generalise(path) == address and path not in there and not numbers & left_out:
                fact = f"it has tensors for {first_few(sorted(there))}, and none for {path}."
                fail(hub.call, fact, FIT)


def _head(hub: Hub, heads: Mapping[str, Held]) -> dict[str, Place]:
    """The tensors of the model's own head, by their names. Raises FileError."""
    modules, found = dict(named_modules(hub.model)), dict[str, Place]()
    for key in heads:
        holder, _, name = hub.named(key).rpartition(".")
        tensor = modules[holder]._parameters.get(name) if holder in modules else None
        if tensor is None:
            fact = f"{key:.200}, of its head, is no tensor of this {type(hub.model).__name__}."
            fail(hub.call, fact, "Leave the head out: load(model, folder, head=False).")
        found[hub.named(key)] = Place(f"{holder}.{name}", modules[holder], name, tensor)
    return found


def _rules(hub: Hub, spots: list[Spot], base: Mapping[str, Place]) -> list[Rule]:
    """A rule for each kind of edits, and for the head."""
    plain = [(spot.site, "", spot.edits) for spot in spots if spot.within is None]
    grouped: dict[str, tuple[Callable[[str], Where], tuple[Edit, ...], list[str]]] = {}
    for spot in spots:
        if spot.within:
            key = repr((spot.within("x"), spot.edits))
            grouped.setdefault(key, (spot.within, spot.edits, []))[2].append(spot.block)
    found = rules_of(hub.model, plain, base.values())
    for within, edits, blocks in grouped.values():
        for address in addresses(hub.model, dict.fromkeys(blocks)):
            found.append(at(within(address), *edits))
    return found


def _entries(spots: list[Spot], base: Mapping[str, Place], joints: Joints) -> dict[str, Entry]:
    found = {k: Entry(place.tensor, tuple(place.tensor.shape)) for k, place in base.items()}
    by_site: dict[str, list[nn.Module]] = {}
    for path, joint in joints:
        start, bracket, _ = path.partition("(")
        by_site.setdefault(start + bracket, []).append(joint.part)
    for spot in spots:
        for part in by_site.get(spot.site, []):
            if isinstance(part, spot.kind):
                own = _TENSORS[spot.kind](part, spot)
                found |= {f"{spot.key}.{name}": entry for name, entry in own.items()}
    return found


def _adapter_tensors(part: Any, spot: Spot) -> dict[str, Entry]:
    return {
        f"{word}.{name}": Entry(tensor, tuple(tensor.shape))
        for word, linear in (("down", part.down), ("up", part.up))
        for name, tensor in linear.named_parameters()
    }


def _lora_tensors(part: Any, spot: Spot) -> dict[str, Entry]:
    (k, rank, width), size = part.A.shape, part.B.shape[1]
    return {"lora_A": Entry(part.A, (k * rank, width)), "lora_B": Entry(part.B, (k * size, rank))}


def _rescale_tensors(part: Any, spot: Spot) -> dict[str, Entry]:
    return {"lora_B": Entry(part.v, (part.v.numel(), 1))}


def _prefix_tensors(part: Any, spot: Spot) -> dict[str, Entry]:
    parts = (part,) if part.features is None else (part.features, part.up)
    starts = ("",) if part.features is None else ("", "up.")
    return {
        start + name: Entry(tensor, tuple(tensor.shape))
        for start, module in zip(starts, parts, strict=True)
        for name, tensor in module.named_parameters()
    }


_TENSORS: dict[type[nn.Module], Callable[[Any, Spot], dict[str, Entry]]] = {
    Adapter: _adapter_tensors, LoRA: _lora_tensors, Rescale: _rescale_tensors,
    Prefix: _prefix_tensors,
}  # fmt: skip
