"""LoRA files of image models, read: those of kohya's sd-scripts, of LyCORIS, and diffusers' older.

LoRA (a middle is multiplied into its down factor), DoRA's lengths of rows beside it, LoHa and LoKr
are parts of these names. Of all else, the weights are unfrozen, and become what the file makes of
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.trained import Place
from ..parts.deltas import loha, lokr
from ..parts.low_rank import lora
from ..parts.row_lengths import magnitude
from ..rules.edits import Edit, append, parallel
from ..rules.part import shared
from ..rules.rule import Rule
from ..rules.selector import where
from ..structure.layers import is_conv, is_torch_attention, named_modules
from .foreign import (
    FLOATS,
    Content,
    Entry,
    Held,
    Joint,
    Joints,
    check_held,
    fail,
    folded,
    guarded,
    held_in,
    operate,
    rules_of,
)
from .kohya_names import MERGE, Tensors, modules_in
from .kohya_weights import BIASES, LOHA, LOKR, LORA, changed, form_of, rank_of
from .peft_format import LARGEST, Config, Target
from .peft_layers import entries_of
from .peft_reading import read
from .reading import FIT, RAW


class Layer(NamedTuple):
    """A module that a file changes: edits and tensors of parts, and what its parameters become."""

    target: Target
    edits: tuple[Edit, ...]
    tensors: Tensors
    values: Tensors


def load_kohya(model: nn.Module, path: Path, *, name: str, example: Any) -> None:
    """Operate a model by a LoRA file, and fill it. Raises FileError."""
    call = f'load("{path}")'
    with held_in(path, call) as (whole, about):
        modules, words = modules_in(model, whole, call)
        if said := about.get("lora_adapter_metadata"):
            config = _config(said, words, call)
            held = {f"{at}.{k}": t for at, tensors in modules.items() for k, t in tensors.items()}
            read(model, config, held, name=name, example=example)
            return
        with guarded(call):
            layers = _layers(model, modules, call)
        base = {f"{layer.target.key}.{n}": _place(layer, n) for layer in layers
                for n in layer.values}  # fmt: skip
        held = {f"{layer.target.key}.{n}": each for layer in layers
                for n, each in (layer.tensors | layer.values).items()}  # fmt: skip

        def rules() -> list[Rule]:
            edits = [(layer.target.path, layer.target.name, layer.edits) for layer in layers]
            return rules_of(model, [each for each in edits if each[2]], base.values())

        def check(entries: dict[str, Entry]) -> None:
            held.update({k: _shaped(held[k], e.shape) for k, e in entries.items() if k in held})
            wanted = {key: entry.shape for key, entry in entries.items()}
            check_held(held, wanted, entries, partial(fail, call))

        entries = partial(_entries, layers, base)
        operate(model, Content(call, rules, entries, check, held), name, example)


def _config(text: str, words: list[str], call: str) -> Config:
    """What diffusers says of a model's adapter: PEFT's configuration, by the word for the model."""
    try:
        said = json.loads(text)
        (word,) = words
        start = f"{word}." if word else ""
        own = {k.removeprefix(start): v for k, v in said.items() if k.startswith(start)}
    except (ValueError, RecursionError, AttributeError):
        fail(call, "its lora_adapter_metadata is damaged, or for several models.", "Load each.")
    return Config(call, own, MERGE)


def _place(layer: Layer, name: str) -> Place:
    module = layer.target.module
    tensor = module._parameters[name]
    assert tensor is not None  # the layer was seen to have it
    return Place(f"{layer.target.path}.{name}", module, name, tensor)


def _shaped(held: Held, shape: tuple[int, ...]) -> Held:
    """Of a shape that differs in axes of 1 alone: a linear layer's may be written as a kernel's."""
    same = [n for n in held.shape if n != 1] == [n for n in shape if n != 1]
    return held._replace(shape=shape) if same else held


def _entries(layers: list[Layer], base: Mapping[str, Place], joints: Joints) -> dict[str, Entry]:
    by_path: dict[str, list[Joint]] = {}
    for path, joint in joints:
        by_path.setdefault(path, []).append(joint)
    found = {k: Entry(place.tensor, tuple(place.tensor.shape)) for k, place in base.items()}
    for layer in layers:
        found |= entries_of(layer.target, by_path.get(layer.target.place, []))
    return found


# one module ------------------------------------------------------------------------------------


def _layers(model: nn.Module, found: Mapping[str, Tensors], call: str) -> list[Layer]:
    modules, others = dict(named_modules(model)), _tied(model)
    for path in found:
        if path in others:
            fact = f"{path} and {others[path]} are one, or share a parameter."
            fail(call, fact, "Untie them first: give one a module, or a parameter, of its own.")
    return [
        _layer(Target(path, modules[path], path, path, _name(modules, path)), found[path], call)
        for path in found
    ]


def _name(modules: Mapping[str, nn.Module], path: str) -> str:
    """What a part stands at: a linear layer that is called, or the weight of any other."""
    holder = modules[path.rpartition(".")[0]]
    return "weight" if is_conv(modules[path]) or is_torch_attention(holder) else ""


def _tied(model: nn.Module) -> dict[str, str]:
    """The modules that are another's, too, or have a parameter that another has; with that one."""
    first, found = dict[int, str](), dict[str, str]()
    for path, module in named_modules(model, aliases=True):
        for each in (module, *module._parameters.values()):
            other = path if each is None else first.setdefault(id(each), path)
            if other != path:
                found |= {path: other, other: path}
    return found


def _layer(target: Target, tensors: Tensors, call: str) -> Layer:
    """What a file's tensors mean at one module. Raises FileError where that is not known."""
    path, module = target.path, target.module
    told = ", ".join(sorted(tensors))
    tensors = dict(tensors)
    alpha = _number(tensors.pop("alpha"), call) if "alpha" in tensors else 0.0
    tensors = {k[1:]: each for k, each in folded({f".{k}": t for k, t in tensors.items()}).items()}
    values: Tensors = {}
    for name in BIASES & tensors.keys():
        values["bias"] = _becoming(target, "bias", {"diff": tensors.pop(name)}, 0.0, call)
    if not tensors:
        if values:
            return Layer(target, (), {}, values)
        fail(call, f"{path} has {told} there, and nothing else.", MERGE)
    if form_of(tensors.keys() - {"dora_scale"}) is None:
        fail(call, f"{path} has {told:.300} there, which together mean nothing here.", MERGE)
    _check_layer(module, path, norm="w_norm" in tensors, call=call)
    if (edits := _edits(target, tensors, alpha)) is None:
        values["weight"] = _becoming(target, "weight", tensors, alpha, call)
        return Layer(target, (), {}, values)
    if "dora_scale" in tensors:
        tensors["lora_magnitude_vector"] = tensors.pop("dora_scale")
    return Layer(target, edits, tensors, values)


def _number(held: Held, call: str) -> float:
    value = float(held.get()) if held.shape in ((), (1,)) else float("nan")
    if not abs(value) <= LARGEST:
        fail(call, f"{held.key:.200} is no number that makes sense.", "Save it again.")
    return value


def _check_layer(module: nn.Module, path: str, norm: bool, call: str) -> None:
    """Raise FileError unless a change of the weight is what the file's library runs there."""
    weight, kind = module._parameters.get("weight"), type(module).__name__
    if weight is None or not (norm or isinstance(module, nn.Linear) or is_conv(module)):
        fail(call, f"{path} is a {kind}, which these tensors do not fit.", FIT)
    if is_conv(module) and module.padding_mode != "zeros":
        fail(call, f"{path} is a convolution that pads by {module.padding_mode}.", MERGE)


def _edits(target: Target, tensors: Tensors, alpha: float) -> tuple[Edit, ...] | None:
    """The parts that have the very tensors; None where no part here has."""
    shapes = {name: each.shape for name, each in tensors.items()}
    core, rank = tensors.keys() - {"dora_scale"}, rank_of(shapes)
    sign, size = (-1.0 if alpha < 0 else 1.0), abs(alpha) or None
    if "dora_scale" in tensors:
        if core != LORA or sign < 0 or not _is_of_rows(shapes["dora_scale"], target):
            return None
        own = shared(lora(rank=rank or 1, alpha=size), by=where("**"))  # each layer has its own
        return parallel(own), append(magnitude(own))
    if core == LORA:
        return (parallel(lora(rank=rank or 1, alpha=size), scale=sign),)
    if core == LOHA:
        return (parallel(loha(rank=rank or 1, alpha=size), scale=sign),)
    if core in LOKR:
        return (parallel(_lokr(shapes, rank, size), scale=sign if rank else 1.0),)
    return None


def _is_of_rows(lengths: tuple[int, ...], target: Target) -> bool:
    return lengths[:1] == (len(target.weight),) and set(lengths[1:]) <= {1}


def _lokr(
    shapes: Mapping[str, tuple[int, ...]], rank: int | None, alpha: float | None
) -> Callable[[Any], nn.Module]:
    both = "lokr_w1_a" in shapes
    left, right = (shapes["lokr_w1_a" if both else "lokr_w1"],
                   shapes["lokr_w1_b" if both else "lokr_w1"])  # fmt: skip
    return lokr(
        rank=rank or 1,
        blocks=(left[0] if left else 1, right[-1] if right else 1),
        alpha=alpha if rank else None,  # two whole factors have no rank to divide by
        whole="lokr_w2" in shapes,
        both=both,
    )


def _becoming(target: Target, name: str, tensors: Tensors, alpha: float, call: str) -> Held:
    """What a parameter becomes. Raises FileError where these tensors do not fit it."""
    parameter = target.module._parameters.get(name)
    if parameter is None:
        fail(call, f"{target.path} has no {name}, and the file has one for it.", FIT)
    for each in tensors.values():
        if each.dtype not in FLOATS and each.shape:
            fail(
                call, f"{each.key:.200} is of {each.dtype}, which holds no weights.", "Save floats."
            )
    base = parameter.detach()
    try:
        sketch = {k: t.get() if not t.shape else torch.empty(t.shape, device="meta")
                  for k, t in tensors.items()}  # fmt: skip
        changed(base.to("meta"), sketch, alpha)
    except RAW as error:
        fail(call, f"{target.path} cannot become what its tensors say ({error!s:.200}).", FIT)

    def become() -> Tensor:
        return changed(base, {key: each.get() for key, each in tensors.items()}, alpha)

    return Held(name, tuple(base.shape), "F32", become)
