"""PEFT's folders, read: a configuration and its tensors, made rules and filled in."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..engine.conditions import APPLYING, check_state
from ..engine.operation import Operation, check_operable
from ..engine.trained import Place, buffers_of
from ..errors import FileError
from ..parts.shared_low_rank import SharedLoRA
from ..parts.sparse_updates import rows
from ..rules.edits import parallel
from ..rules.rule import Rule, at
from ..rules.weights import weight
from ..structure.layers import named_modules
from .foreign import (
    Content,
    Entry,
    Held,
    Joint,
    Joints,
    check_held,
    folded,
    held_in,
    joints_of,
    operate,
    read_json,
    rules_of,
    times,
)
from .hub import folder_of
from .peft_format import CORES, Config, Target, plain_name
from .peft_layers import edits_of, entries_of, is_principal
from .peft_targets import inner_key, targets_of, widest
from .reading import FIT

Model = TypeVar("Model", bound=nn.Module)
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
UNTIE = "Untie them first: give one module a parameter of its own, a clone."


def load_peft(model: Model, folder: Any, *, name: str = "default", example: Any = None) -> Model:
    """Operate `model` by an adapter that PEFT saved, and fill it; returns the model.

    Read are LoRA (rsLoRA, DoRA, PiSSA, OLoRA, of convolutions, tables of words, rows of these,
    nn.MultiheadAttention, single parameters), IA3, OFT, VeRA, LoHa, LoKr and LN tuning, with all
    that says where; the model then answers as PEFT's. Dropout of PEFT's stays where the part has
    one: at linear layers.

    folder   with `adapter_config.json` and `adapter_model.safetensors`; or "hf:user/name"
    name     of the operation
    example  as `apply` takes it

    All or nothing: the model is untouched where anything does not fit. Nothing in the files is
    ever executed. Raises FileError, what it does not know by name; and what `apply` raises.

    >>> from surgery import apply, at, lora, save_peft
    >>> import tempfile
    >>> def build():
    ...     _ = torch.manual_seed(0)
    ...     return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> tuned, x = apply(build(), at("0", lora(rank=2))), torch.ones(1, 8)
    >>> _ = [nn.init.normal_(p) for p in tuned.surgery.parameters()]
    >>> again = load_peft(build(), save_peft(tuned, tempfile.mkdtemp() + "/tuned"))
    >>> torch.equal(again(x), tuned(x)), torch.equal(again(x), build()(x))
    (True, False)
    """
    call = f'load_peft("{folder}")'
    check_operable(model)
    check_state(model, call, APPLYING)
    path = folder_of(folder, call)
    config = Config(call, read_json(path / CONFIG, call))
    with held_in(_tensors(path, call), call) as (whole, _):
        read(model, config, folded(_named(whole, model, call)), name=name, example=example)
    return model


def read(
    model: nn.Module, config: Config, held: dict[str, Held], *, name: str, example: Any
) -> None:
    """Operate a model by a configuration and tensors, by their names in the model."""
    shapes = {key: each.shape for key, each in held.items()}
    layers = targets_of(config, model, shapes)
    words = word_layers(config, model, shapes)
    if config.kind == "TRAINABLE_TOKENS":
        layers, words = words, layers
    if not layers and not words:
        config.fail(f"its target_modules mean no layer of this {type(model).__name__}.", FIT)
    base, held = base_of(config, model, layers), _scaled(config, held, layers)
    held = _once(config, model, held, words)

    def rules() -> list[Rule]:
        meant = layers if config.kind != "LN_TUNING" else []
        edits = [(layer.path, layer.name, edits_of(config, layer, shapes)) for layer in meant]
        return [*rules_of(model, edits, base.values()), *_words(config, words)]

    def check(entries: dict[str, Entry]) -> None:
        wanted = {key: entry.shape for key, entry in entries.items()} | _cores(config, layers)
        check_held(held, wanted, entries, config.fail, lambda key: _is_base(config, key))
        _check_base(config, held, layers, base)

    def entries(joints: Joints) -> dict[str, Entry]:
        return _entries([*layers, *words], joints, base)

    cores = partial(_fill_cores, config, held)
    operate(model, Content(config.call, rules, entries, check, held, cores), name, example)


def _scaled(config: Config, held: Mapping[str, Held], layers: list[Target]) -> dict[str, Held]:
    """What a file holds, by LoRA's scale where our parts have none."""
    found = dict(held)
    for layer in layers if config.kind == "LORA" else ():
        name = f"{layer.key}.bias" if layer.bias else f"{layer.key}.lora_B.weight"
        pissa = config["init_lora_weights"] == "pissa" and is_principal(config, layer)
        if name in held and (layer.bias or pissa):
            found[name] = times(held[name], config.scale(layer))
    alone = config.kind == "TRAINABLE_TOKENS"  # beside LoRA, they have a name more
    return {k.replace(f".{_ROWS}", f".{_WORDS}") if alone else k: t for k, t in found.items()}


def _once(
    config: Config, model: nn.Module, held: dict[str, Held], words: list[Target]
) -> dict[str, Held]:
    """What a file holds, without the rows of a table that is tied to one that has the very same."""
    tables = {id(layer.weight): layer.path for layer in words}
    for path, module in named_modules(model):
        first = tables.get(id(module._parameters.get("weight")), path)
        one, two = (held.get(f"{each}.{_WORDS}") for each in (first, path))
        if first != path and one and two:
            if not torch.equal(one.get(), two.get()):
                config.fail(f"{first} and {path} have other rows, and are one here.", UNTIE)
            held = {key: each for key, each in held.items() if each is not two}
    return held


_ROWS = "trainable_tokens_delta"
_WORDS = f"token_adapter.{_ROWS}"


# the files -------------------------------------------------------------------------------------


def _tensors(folder: Path, call: str) -> Path:
    if not os.path.lexists(folder / TENSORS):
        if not os.path.lexists(folder / "adapter_model.bin"):
            raise FileError(call, f"there is no {TENSORS} in it.", "Give a folder that PEFT saved.")
        remedy = "Load it by PEFT where you trust it, and save_pretrained it again, as safetensors."
        raise FileError(call, "its tensors are pickled, and a pickle may run code.", remedy)
    return folder / TENSORS


def _named(whole: dict[str, Held], model: nn.Module, call: str) -> dict[str, Held]:
    """What is in a file, by plain names."""
    roots, held = set(model._modules), dict[str, Held]()
    for key, each in whole.items():
        name = plain_name(key, roots)
        if name in held:
            fact = f"it has {held[name].key:.200} and {key:.200}, which are one to this model."
            raise FileError(call, fact, "Save it again, from one adapter.")
        held[name] = each
    return held


def _is_base(config: Config, key: str) -> bool:
    """Whether a tensor is the base's own, saved beside: a table of words that has a LoRA; with
    bias="all", a bias of a module that is saved whole, before and after, once more."""
    holder, kept, _ = re.sub(r"\.(original_module|modules_to_save)\.", ".|.", key).partition(".|.")
    return key.endswith(".base_layer.weight") or bool(kept and config.saves(holder))


def _check_base(
    config: Config, held: dict[str, Held], layers: list[Target], base: dict[str, Place]
) -> None:
    """Raise FileError where the base was another (its table of words had other rows, say), or
    tensors that are tied here are not the same in the file."""
    tables = {f"{layer.key}.base_layer.weight": layer.weight for layer in layers}
    for key, each in held.items():
        if key.endswith(".base_layer.weight") and key not in base:
            own = tables.get(key)
            if own is None or not torch.equal(each.get().to(own), own):
                remedy = "Load that table into the model first: it is in the file."
                config.fail(f"{key} is another than this model's.", remedy)
    first: dict[int, str] = {}
    for key, place in base.items():
        one = first.setdefault(id(place.tensor), key)
        if one != key:
            two = (held[name].get() for name in (one, key))
            if not torch.equal(*two):
                config.fail(f"{one} and {key} differ, and are one in this model.", UNTIE)


# rules and places ------------------------------------------------------------------------------


def base_of(config: Config, model: nn.Module, layers: list[Target]) -> dict[str, Place]:
    """The tensors of the base that a file has, by their names in it. Raises FileError."""
    found: dict[str, Place] = {}
    for layer in layers if config.kind == "LN_TUNING" else ():
        found |= _held(layer.module, layer.path, f"{layer.path}.ln_tuning_layers")
    whole = ""
    for path, module in named_modules(model):
        if path and config.saves(path) and not (whole and path.startswith(f"{whole}.")):
            found, whole = found | _held(module, path, inner_key(path, layers)), path
    if config["bias"] != "none":
        found |= _biases(config, model, layers, {place.path for place in found.values()})
    _check_tied(config, model, found)
    return found


def _biases(
    config: Config, model: nn.Module, layers: list[Target], known: set[str]
) -> dict[str, Place]:
    """Those of all modules, or of layers with parts alone, where they are not known already."""
    found: dict[str, Place] = {}
    inner = {id(layer.module): f"{layer.key}.base_layer" for layer in layers if not layer.bias}
    for path, module in named_modules(model):
        own, where = module._parameters.get("bias"), f"{path}.bias".strip(".")
        meant = config["bias"] == "all" or id(module) in inner
        if own is not None and meant and where not in known:
            key = f"{inner.get(id(module)) or inner_key(path, layers)}.bias".strip(".")
            found[key] = Place(where, module, "bias", own)
    return found


def _held(module: nn.Module, path: str, key: str) -> dict[str, Place]:
    """All that a module holds, and those below it."""
    holders = dict(named_modules(module))
    tensors = {
        f"{inner}.{name}".strip("."): Place(f"{path}.{inner}.{name}", holder, name, tensor)
        for inner, holder in holders.items()
        for name, tensor in holder._parameters.items()
        if tensor is not None
    }
    tensors |= {place.path: place for place in buffers_of(module)}
    return {
        f"{key}.{name}": place._replace(path=f"{path}.{name}") for name, place in tensors.items()
    }


def _check_tied(config: Config, model: nn.Module, found: dict[str, Place]) -> None:
    """Raise FileError where a tensor of the base is another's too, which PEFT would leave alone."""
    mine, known = {(id(p.module), p.name) for p in found.values()}, dict[int, str]()
    tensors = {id(place.tensor): place.path for place in found.values()}
    for path, module in named_modules(model):
        for name, tensor in module._parameters.items():
            if id(tensor) in tensors and (id(module), name) not in mine:
                known[id(tensor)] = f"{path}.{name}"
    for i, other in known.items():
        config.fail(
            f"{tensors[i]} is saved whole, and tied to {other}, which PEFT leaves as it was.",
            UNTIE,
        )


def word_layers(config: Config, model: nn.Module, shapes: Any) -> list[Target]:
    """The tables of words of which a few rows are trained. Raises FileError where there is none."""
    if not config["trainable_token_indices"]:
        return []
    tail, modules = f".{_WORDS}", dict(named_modules(model))
    paths = [key.removesuffix(tail) for key in shapes if key.endswith(tail)]
    tables = (nn.Embedding, nn.Linear)
    known = [p for p in paths if isinstance(modules.get(p), tables) and ids_of(config, p)]
    if not known:
        config.fail("it has no tensor for its trainable_token_indices in this model.", FIT)
    return [Target(path, modules[path], path, path, "weight") for path in known]


def ids_of(config: Config, path: str) -> list[int]:
    """The rows of a table that are trained."""
    asked = config["trainable_token_indices"] or config["token_indices"]
    if isinstance(asked, list):
        return asked
    return next((ids for name, ids in asked.items() if path.endswith(name)), [])


def _words(config: Config, words: list[Target]) -> list[Rule]:
    return [at(weight(layer.place), parallel(rows(ids_of(config, layer.path)))) for layer in words]


def _entries(layers: list[Target], joints: Joints, base: dict[str, Place]) -> dict[str, Entry]:
    by_path: dict[str, list[Joint]] = {}
    for path, joint in joints:
        by_path.setdefault(path, []).append(joint)
    found = {k: Entry(place.tensor, tuple(place.tensor.shape)) for k, place in base.items()}
    for layer in layers:
        found |= entries_of(layer, by_path.get(layer.place, []))
    return found


# the matrices that the layers of VeRA share ----------------------------------------------------


def _cores(config: Config, layers: list[Target]) -> dict[str, tuple[int, ...]]:
    """Their shapes: of the widest layer, and of the one that gives most."""
    if config.kind != "VERA" or not config["save_projection"]:
        return {}
    width, out = widest(layers)
    return {CORES[0]: (config["r"], width), CORES[1]: (out, config["r"])}


def _fill_cores(config: Config, held: dict[str, Held], operation: Operation) -> None:
    """Give each size of layers its slice of them; drawn as PEFT draws them where not saved."""
    parts: list[Any] = [joint.part for _, joint in joints_of(operation)]
    cores = [part.core for part in parts if isinstance(part, SharedLoRA)]
    if not cores:
        return
    if config["save_projection"]:
        A, B = (held[name].get() for name in CORES)
    else:
        width, out = max(c.A.shape[1] for c in cores), max(len(c.B) for c in cores)
        draw = torch.Generator("cpu").manual_seed(config["projection_prng_key"])
        A, B = (_drawn(shape, draw) for shape in ((config["r"], width), (out, config["r"])))
    for core in cores:
        core.A.copy_(A[:, : core.A.shape[1]])
        core.B.copy_(B[: len(core.B)])


def _drawn(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
