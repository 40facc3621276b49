"""PEFT's folders, written: what an operation added and trained, as PEFT has such."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from .._files import check_folder, write_whole
from ..engine.conditions import UNCUT, check_state
from ..engine.hooked_weights import HookedWeight
from ..engine.operation import Operation, operations
from ..engine.owned import own_values
from ..engine.trained import changed_buffers, trained_of
from ..errors import FileError
from ..parts.rotations import OFT
from ..parts.row_lengths import Magnitude, Rescale, Shift
from ..parts.sparse_updates import Rows
from ..structure.layers import is_conv, is_torch_attention, named_modules
from .checkpoint import state_dict
from .foreign import Joint, joints_of
from .peft_format import CORES, PREFIX, Config, Target
from .peft_layers import kind_of
from .peft_packing import AS_LORA, KINDS, Layers, Packed, having, packed, refuse
from .peft_reading import CONFIG, TENSORS, base_of
from .peft_targets import targets_of

JOINED = {Magnitude: ("after",), Shift: ("after",), Rescale: ("before", "after"), OFT: ("before",)}
BIASED = ("LORA", "OFT", "VERA")  # the kinds that may train biases of their layers
KEEP = "Freeze it; or keep all there is by surgery.save(model, path)."


def save_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    base_model_name_or_path: str | None = None,
) -> Path:
    """Write an operation so that PEFT loads it, and answers as this model does; returns the folder.

    An operation is of one kind there: LoRA (with DoRA's lengths, at rows, tables of words,
    convolutions, nn.MultiheadAttention or single parameters), IA3, OFT, VeRA, LoHa, LoKr. What was
    unfrozen besides is saved whole, by module; where nothing else was done it is LN tuning. Of
    other parts `as_lora(model, rank=...)` makes LoRA first.

    folder  gets `adapter_config.json` and `adapter_model.safetensors`, each whole or not at all
    name    of the operation

    Raises FileError where PEFT has no place for a part, by its name; OperationError, OSError.

    >>> from surgery import apply, at, lora
    >>> model = apply(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), at("0", lora(rank=2)))
    >>> import tempfile
    >>> sorted(file.name for file in save_peft(model, tempfile.mkdtemp() + "/tuned").iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    target, call = Path(folder), f'save_peft("{folder}")'
    check_state(model, call, UNCUT)
    own = state_dict(model, name=name)
    operation = next(op for op in operations(model) if op.name == name)
    if operation.start.lost() or any(tensor.is_meta for tensor in own.values()):
        raise FileError(call, "the model is, or was, on meta: there are no values.", "Load them.")
    with torch.no_grad():
        said, tensors = _described(model, operation, call)
        whole = {
            key if key in CORES else PREFIX + key: tensor.detach().cpu().clone().contiguous()
            for key, tensor in tensors.items()
        }
    said |= {"base_model_name_or_path": base_model_name_or_path, "inference_mode": True}
    text = json.dumps({**said, "task_type": None}, indent=2, sort_keys=True)
    if not target.is_dir():
        check_folder(target, call)
        target.mkdir()
    metadata = {"format": "pt"}
    write_whole(target / TENSORS, lambda half: save_file(whole, half, metadata=metadata))
    write_whole(target / CONFIG, lambda half: half.write_text(text))
    return target


def _described(model: nn.Module, operation: Operation, call: str) -> Packed:
    """What PEFT's two files say of an operation: options, and tensors by name."""
    joints = _by_place(model, operation, call)
    kind = _kind(joints, call)
    said = {"peft_type": kind, **_places(model, joints)}
    saved, biases = _trained(model, operation, call)
    if kind == "TRAINABLE_TOKENS":
        said["target_modules"] = sorted(said.pop("trainable_token_indices"))
    if any(having(there, Shift) for there in joints.values()):
        said["lora_bias"] = True
    _check_names(saved, call)
    said["target_modules" if kind == "LN_TUNING" else "modules_to_save"] = saved
    layers = _layers(model, joints, said, call)
    if biases and kind not in BIASED:
        refuse(call, biases[0], "a trained bias", f"{kind} saves none of a layer that has a part")
    said |= {"bias": f"{kind.lower()}_only"} if biases else {}
    options, tensors = packed(kind, layers, call)
    if kind == "TRAINABLE_TOKENS":
        tensors |= _again(model, [layer for layer, _ in layers], tensors)
    said = {name: value for name, value in {**said, **options}.items() if value != {}}
    base = base_of(Config(call, said, AS_LORA), model, [layer for layer, _ in layers])
    return said, {**tensors, **{key: place.tensor for key, place in base.items()}}


def _again(
    model: nn.Module, tables: list[Target], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The rows of tables once more, by the names of what is tied to them."""
    first = {id(table.weight): table.path for table in tables}
    own = {path: first.get(id(m._parameters.get("weight"))) for path, m in named_modules(model)}
    name = "trainable_tokens_delta"
    return {f"{path}.{name}": tensors[f"{table}.{name}"] for path, table in own.items() if table}


# what PEFT puts into a model, by the ends of whose names it would take it for a module to save
OWN = ("base_layer", "default", "lora_dropout", "lora_A", "lora_B", "lora_embedding_A",
       "lora_embedding_B", "lora_magnitude_vector", "vera_dropout", "oft_dropout")  # fmt: skip


def _check_names(saved: list[str], call: str) -> None:
    """Raise FileError where PEFT would save a part of its own by a module's name."""
    for name in saved:
        if meant := [own for own in OWN if own.endswith(name)]:
            fact = f"{name} is trained, and PEFT would take its own {meant[0]} for it."
            raise FileError(call, fact, KEEP)


def _by_place(model: nn.Module, operation: Operation, call: str) -> dict[str, list[Joint]]:
    """The parts by place: a layer that is linear by its path, whether its weight is meant or it."""
    modules, found = dict(named_modules(model)), dict[str, list[Joint]]()
    tied = {h.path for h in operation.hooked_sites if isinstance(h, HookedWeight) and h.reads[1:]}
    for place, joint in joints_of(operation):
        holder, _, name = place.rpartition(".")
        module = modules.get(holder)
        if place in tied and kind_of(joint.part) is not Rows:
            refuse(call, place, joint.part, "modules share this weight, and PEFT would change one")
        plain = isinstance(module, nn.Linear) and name == "weight" and not _inner(modules, holder)
        own = holder if plain and kind_of(joint.part) is not Rows else place
        found.setdefault(own, []).append(joint)
    return found


def _inner(modules: dict[str, nn.Module], path: str) -> bool:
    """Whether it is the projection inside of torch's own attention."""
    above = modules.get(path.rpartition(".")[0])
    return path != "" and above is not None and is_torch_attention(above)


def _kind(joints: dict[str, list[Joint]], call: str) -> str:
    """PEFT's name of what all parts are. Raises FileError."""
    kinds = dict[str, str]()
    for place, there in joints.items():
        for joint in there:
            own = kind_of(joint.part)
            if own not in KINDS or joint.place not in JOINED.get(own, ("beside",)):
                refuse(call, place, joint.part)
            if joint.place != "beside" and joint.scale is not None:
                refuse(call, place, joint.part, "it is added to what it is given")
            if KINDS[own] != "LORA" and (joint.rows is not None or len(there) > 1):
                refuse(call, place, joint.part, "it stands at rows, or with others")
            kinds.setdefault(KINDS[own], place)
    if len(kinds) > 1:
        refuse(call, " and ".join(kinds.values()), " and ".join(kinds), "PEFT has one kind in all")
    if joints and all(len(having(there, Rows)) == len(there) for there in joints.values()):
        return "TRAINABLE_TOKENS"
    return next(iter(kinds), "LN_TUNING")


def _places(model: nn.Module, joints: dict[str, list[Joint]]) -> dict[str, Any]:
    """The options that say where the parts are."""
    modules, targets, parameters = dict(named_modules(model)), set[str](), list[str]()
    words: dict[str, list[int]] = {}
    for place, there in joints.items():
        holder, _, name = place.rpartition(".")
        rows: list[Any] = [joint.part for joint in having(there, Rows)]
        if rows:
            words[holder] = rows[0].index.tolist()
        elif place in modules:
            targets.add(place)
        elif _inner(modules, holder):
            targets.add(holder.rpartition(".")[0])
        elif holder in modules and _is_layer(modules[holder], name):
            targets.add(holder)
        else:
            parameters.append(place)
    said: dict[str, Any] = {"target_modules": sorted(targets), "trainable_token_indices": words}
    return said | ({"target_parameters": sorted(parameters)} if parameters else {})


def _is_layer(module: nn.Module, name: str) -> bool:
    """Whether PEFT knows a parameter by the layer that has it."""
    if is_torch_attention(module):
        return name == "in_proj_weight"
    return name == "weight" and (is_conv(module) or isinstance(module, nn.Embedding))


def _trained(model: nn.Module, operation: Operation, call: str) -> tuple[list[str], list[str]]:
    """What of the base is saved: modules, all that hold what is tied; and layers, their biases."""
    saved, biases = set[str](), set[str]()
    at = {place for place, _ in joints_of(operation)}
    layers = at | {place.rpartition(".")[0] for place in at}
    trained = [
        *trained_of(model, operation),
        *changed_buffers(model, operation, own_values(operations(model), operation)),
    ]
    names = {id(place.tensor): place.name for place in trained}
    for holder, module in named_modules(model):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            name = names.get(id(tensor), "")
            if name and (not holder or (holder in layers and name != "bias")):
                where, only = f"{holder}.{name}".strip("."), "neither a model's nor a layer's own"
                raise FileError(call, f"{where} is trained, and PEFT saves {only}.", KEEP)
            if name:
                (biases if holder in layers else saved).add(holder)
    return sorted(saved), sorted(biases)


def _layers(
    model: nn.Module, joints: dict[str, list[Joint]], said: dict[str, Any], call: str
) -> Layers:
    """The layers that the options mean, which are those with parts, each with its parts."""
    modules, asked = dict(named_modules(model)), said["target_modules"]
    config = Config(call, said, AS_LORA)
    if asked != sorted(path for path in modules if path and asked and config.targets(path)):
        said["target_modules"] = "|".join(map(re.escape, asked))  # a name ends another's
    layers = targets_of(Config(call, said, AS_LORA), model, ())
    places = {layer.place for layer in layers if not layer.raw or layer.place in joints}
    words = [Target(path, modules[path], path, path, "weight")
             for path in said.get("trainable_token_indices", ())]  # fmt: skip
    if lost := {*joints} - places - {layer.place for layer in words}:
        refuse(call, min(lost), "a part", "PEFT's names do not tell it from others")
    return [(layer, joints.get(layer.place, [])) for layer in [*layers, *words]]
