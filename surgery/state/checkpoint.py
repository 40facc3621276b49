"""Save and load: one safetensors file with the parts, what was unfrozen, and the rules as data."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from .._shards import into_shards, mesh_of, together, told_by_all, whole
from .._text import first_few
from ..engine.apply import operated
from ..engine.conditions import APPLYING, DISABLED, FILLING, MAKING, READING, WRITING, check_state
from ..engine.journal import Journal
from ..engine.obstacles import dotted
from ..engine.operation import Operation, check_operable, operations
from ..engine.owned import is_alone, own_values, show
from ..engine.trained import (
    Place,
    adopt,
    beyond_rules,
    buffers_of,
    changed_buffers,
    changed_frozen,
    first_paths,
    lost_module,
    parameters_of,
    trained_of,
)
from ..engine.watched import check_watched
from ..errors import FileError, OperationError
from ..parts.room import can_have_room, room_of, used
from ..rules.rule import Rules
from ..structure.anatomy import roles_of
from ..structure.layers import named_modules
from ..structure.module_tree import Tree
from .fitting import check_alike, check_indices, check_keys
from .foreign import acting, made
from .formats import reader_of
from .hashes import hash_of, hash_of_base
from .reading import BASE, FORMAT, PARTS, Contents, Sketch, plan_of, read
from .writing import write

Model = TypeVar("Model", bound=nn.Module)


def state_dict(
    model: nn.Module, *, name: str = "default", sharded: bool = False
) -> dict[str, Tensor]:
    """The tensors that make an operated model what it is beyond its base.

    sharded  of a model in shards (fully_shard, tensor parallel) the DTensors as they lie, which
             torch.distributed.checkpoint saves, and loads into; else they are gathered, one after
             the other, and all processes must call it

    `parts.<key>` are those of the parts, each stored once; `base.<key>` those of the base that
    were unfrozen, and buffers that have changed since (running statistics). What is trained without
    a rule (unfrozen by hand, of a new module) is of the last operation. Tensors are views, but for
    those that were gathered.
    Raises OperationError where nothing was done under that name, and inside `disabled`.

    >>> from surgery import apply, at, unfreeze
    >>> model = apply(nn.Sequential(nn.Linear(8, 2)), at("0", unfreeze))
    >>> sorted(state_dict(model))
    ['base.0.bias', 'base.0.weight']
    """
    found = _held(model, name)
    return found if sharded else {key: whole(tensor) for key, tensor in found.items()}


def _held(model: nn.Module, name: str) -> dict[str, Tensor]:
    """As `state_dict`, the tensors as they lie: what is written to them is written to the model."""
    operation = _operation(model, name)
    parts = {PARTS + key: tensor for key, tensor in operation.state_dict().items()}
    for path, part in operation.named_modules():
        if room_of(part) is not None:  # what is room is of no file
            parts |= {f"{PARTS}{path}.{key}": tensor.detach() for key, tensor in used(part)}
            del parts[f"{PARTS}{path}.scale"]  # which the rules tell
    own = own_values(operations(model), operation)
    trained = [*trained_of(model, operation), *changed_buffers(model, operation, own)]
    order = {path: i for i, (path, _) in enumerate(named_modules(model))}
    trained.sort(key=lambda place: order[place.path.rpartition(".")[0]])
    base = {
        key: own.get((place.module, place.name), place.tensor).detach()
        for key, place in _keyed(model, trained).items()
    }
    return {**parts, **base}


def load_state_dict(
    model: nn.Module, tensors: Mapping[str, Tensor], *, name: str = "default"
) -> None:
    """Fill an operated model with the tensors of `state_dict`, all or nothing.

    Raises FileError where a key is missing or one too many, or a shape or dtype differs.

    >>> import torch
    >>> from surgery import apply, at, unfreeze
    >>> a, b = (apply(nn.Sequential(nn.Linear(8, 2)), at("0", unfreeze)) for _ in range(2))
    >>> load_state_dict(b, state_dict(a))
    >>> torch.equal(a[0].weight, b[0].weight)
    True
    """
    fill(model, tensors, name)


def fill(
    model: nn.Module,
    given: Mapping[str, Tensor] | Contents,
    name: str,
    spared: Collection[str] = (),
) -> None:
    """As `load_state_dict`; of a file, whose tensors are read where its header fits.

    spared  the keys of tensors that are left out, and need not be there
    """
    known: Mapping[str, Tensor | Sketch] = given.sketches if isinstance(given, Contents) else given
    known = {key: each for key, each in known.items() if key not in spared}
    operation, places = _operation(model, name), _places(model, name)
    check_state(model, "load_state_dict(model, ...)", WRITING)
    required = set(_held(model, name)) - set(buffers(model)) - set(spared)
    check_keys(required, known, places, type(model).__name__)
    check_alike(known, places)
    found = _read(given, places) if isinstance(given, Contents) else given
    tensors = {key: found[key] for key in known}
    check_indices(operation, tensors, PARTS)
    journal, done = Journal(), operations(model)
    put_by = bool(own_values(done, operation))
    own = {**operation.own}
    if put_by:
        places |= _own_buffers(model, operation, tensors)
    try:
        for key, tensor in tensors.items():
            journal.overwrite(places[key], tensor)
        if put_by:
            show(done, {each: each.strength for each in done}, journal)
    except BaseException:
        operation.own = own
        journal.undo()
        raise
    operation.start.given([key.removeprefix(PARTS) for key in tensors])


def _read(contents: Contents, places: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a file, which each process reads."""
    return together(mesh_of(places.values()), contents.tensors, contents.call)


def _own_buffers(
    model: nn.Module, operation: Operation, keys: Collection[str]
) -> dict[str, Tensor]:
    """What an operation has made of buffers that a file fills, by their keys: its own from now."""
    found = {}
    for key, place in _keyed(model, buffers_of(model)).items():
        if key in keys:
            where = place.module, place.name
            operation.own[where] = operation.own.get(where, place.tensor).detach().clone()
            found[key] = operation.own[where]
    return found


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    verify: bool = False,
) -> Path:
    """Write what an operation added and trained to one safetensors file, rules and all.

    verify  also a hash of the base, for load(..., verify=True); all of it is read

    The file appears whole or not at all. Of a model in shards all processes call it, and the first
    writes. Rules that hold code of the user's own (a lambda, say)
    are kept as text only, and `load` must be given them. Raises OperationError, FileError, OSError.

    >>> from surgery import apply, at, unfreeze
    >>> model = apply(nn.Sequential(nn.Linear(8, 2)), at("0", unfreeze))
    >>> import tempfile
    >>> save(model, tempfile.mkdtemp() + "/tuned.safetensors").name
    'tuned.safetensors'
    """
    operation, tensors = _operation(model, name), _held(model, name)
    if operation.start.lost() or any(tensor.is_meta for tensor in tensors.values()):
        raise FileError(
            f'save("{path}")',
            f"this {type(model).__name__} is, or was made, on the meta device: there are no values "
            "to save.",
            'Give it memory first, model.to_empty(device="cpu"), and load or train it.',
        )
    _tell_changed(model, f'save("{path}")')
    record = operation.record
    about = {
        "format": FORMAT,
        "rules": record["data"],
        "text": [row["rule"] for row in record["rows"]],
        "sites": [row["paths"] for row in record["rows"]],
        "seed": record["seed"],
        "modules": record.get("modules", ""),
        "roles": record.get("roles", {}),
        "read_besides": sorted(operation.read_besides),
        "beyond_rules": [*_keyed(model, beyond_rules(model, operation))],
        "alone": _is_alone(model, operation),
        **({"base": hash_of_base(model)} if verify else {}),
    }

    def header(full: Mapping[str, Tensor]) -> dict[str, str]:
        return {"surgery": json.dumps({**about, "hash": hash_of(sorted(full.items()))})}

    mesh = mesh_of([*tensors.values(), *model.parameters()])
    write(tensors, header, Path(path), f'save("{path}")', mesh)
    return Path(path)


def _is_alone(model: nn.Module, operation: Operation) -> bool:
    """As `is_alone`: each process sees its pieces."""
    alone = is_alone(operations(model), operation)
    return all(told_by_all(mesh_of(model.parameters()), alone))


def _tell_changed(model: nn.Module, call: str) -> None:
    """Warn of what was trained by hand and frozen again: nobody knows that it is to be kept."""
    if paths := changed_frozen(model):
        warnings.warn(
            f"{call}: {first_few(paths)} are frozen, and were written to since the rules were "
            "applied: they are not in the file. If they were trained, let them ask for a gradient "
            "(requires_grad_(True)) as you save, or add at(..., unfreeze) to the rules.",
            stacklevel=3,
        )


def load(
    model: Model,
    path: str | os.PathLike[str],
    *,
    rules: Rules | None = None,
    name: str = "default",
    balance: float | None = None,
    example: Any = None,
    head: bool = True,
    verify: bool = False,
    room: int | None = None,
) -> Model:
    """Operate `model` by the rules in a file and fill what they add; returns the model.

    A model that was operated by the same rules under the same name is filled. Read, too: folders
    that PEFT saved (`load_peft`) or adapters, and LoRA files of image models (kohya's, LyCORIS).

    path     of a file; of a folder that `save_pretrained` here wrote; "hf:user/name", such a folder
             on the Hugging Face Hub, or "hf:user/name@revision/file.safetensors"
    rules    instead of those in the file, which cannot carry code of the user's own
    example  as `apply` takes it; what a forward decided when the file was made, the file knows
    head     False: what is in the file of heads is left out, for other classes than it was made for
    verify   whether the base must be the very one that the file was made for, as its hash tells
    room     as `apply` takes it: for how many ranks there is to be room for files of `swap`

    All or nothing: the model is untouched where anything does not fit. Nothing in the file is ever
    executed. Raises FileError, and what `apply` raises.

    >>> from surgery import apply, at, unfreeze
    >>> import tempfile, torch
    >>> def build():
    ...     return nn.Sequential(nn.Linear(8, 2))
    >>> tuned = apply(build(), at("0", unfreeze))
    >>> again = load(build(), save(tuned, tempfile.mkdtemp() + "/tuned.safetensors"))
    >>> torch.equal(again[0].weight, tuned[0].weight)
    True
    """
    check_operable(model)
    if not operations(model):
        check_state(model, f'load("{path}")', APPLYING)
    into_shards(model)
    ours = {"rules": rules, "balance": balance, "verify": verify, "room": room}
    if reader := reader_of(path, head=head, **ours):
        reader(model, Path(path), name=name, example=example)
        return model
    mesh = mesh_of(model.parameters())
    contents = together(mesh, lambda: read(path, name), f'load("{path}")')
    about = contents.about
    _check_base(model, about.get("base") if verify else "", contents.call)
    spared = _of_heads(model, head, contents.call)
    if rules is None and _is_same(model, name, about, room):
        fill(model, contents, name, spared)
        return model
    check_state(model, contents.call, APPLYING)
    plan = plan_of(contents, model, rules, name=name, balance=balance, example=example, room=room)
    if plan.is_without_memory:
        check_state(model, f'load("{path}")', MAKING, FILLING)
    others = acting(model) if about.get("alone") else {}
    with made(model, name, others):
        plan.apply(example)
        _adopt(model, [key for key in about.get("beyond_rules", []) if key not in spared])
        fill(model, contents, name, spared)
        _operation(model, name).read_besides.update(about.get("read_besides", []))
    return model


def _check_base(model: nn.Module, known: Any, call: str) -> None:
    """Raise FileError unless the base of a model has the hash that a file knows; "": any."""
    if known == "":
        return
    if known is None:
        fact = "the file holds no hash of its base."
        raise FileError(call, fact, "Save it by save(model, path, verify=True).")
    if known != hash_of_base(model):
        raise FileError(
            call,
            f"this {type(model).__name__} is another base than the file was made for.",
            "Give the model the weights that it had then.",
        )


def _is_same(model: nn.Module, name: str, about: Mapping[str, Any], room: int | None) -> bool:
    """Whether a model was operated under this name by the rules of a file, at the same places, and
    has the room that is asked for, if any is."""
    return any(
        operation.name == name
        and bool(operation.record["data"])
        and operation.record["data"] == about["rules"]
        and [row["paths"] for row in operation.record["rows"]] == about["sites"]
        and (
            room is None
            or all(room_of(p) == room for p in operation.children() if can_have_room(p))
        )
        for operation in operations(model)
    )


def _of_heads(model: nn.Module, head: bool, call: str) -> set[str]:
    """Without a head, the keys of what heads hold. Raises FileError where the model has none."""
    if head:
        return set()
    tree = Tree(model)
    heads = [site for role in roles_of(tree)["head"] for site in tree.sites[role.order : role.end]]
    if not heads:
        raise FileError(call, f"no head is found in this {type(model).__name__}.", "Leave head=.")
    return {
        BASE + dotted(site.path, tensor)
        for site in heads
        for tensor in (*site.module._parameters, *site.module._buffers)
    }


def _operation(model: nn.Module, name: str) -> Operation:
    done = {op.name: op for op in operated(model, "state_dict(model)", merged=None)}
    if name not in done:
        known = f"It was operated under: {', '.join(done)}."
        raise OperationError(
            f'name="{name}"', f"this {type(model).__name__} was not operated under it.", known
        )
    check_state(model, "state_dict(model)", READING, DISABLED)
    into_shards(model)
    operated(model, "state_dict(model)")  # what is merged is not what was trained
    _check_room(model, done[name])
    check_watched(done[name], "state_dict(model)")
    if lost := lost_module(model, done[name]):
        raise OperationError(
            "state_dict(model)",
            f"a {type(lost).__name__} was replaced by another module since the model was "
            "operated (SyncBatchNorm?): what was trained or grafted there is not known any more.",
            "Convert the model first, and apply the rules then.",
        )
    return done[name]


def _check_room(model: nn.Module, operation: Operation) -> None:
    """Raise OperationError where ranks that are not used lie in pieces: no view leaves them out."""
    if mesh_of(operation.parameters()) is None or all(
        room_of(part) is None for part in operation.children()
    ):
        return
    raise OperationError(
        "state_dict(model)",
        f"parts of this {type(model).__name__} have room for more ranks, and are in shards.",
        "Apply the rules without room= before it is sharded.",
    )


def _adopt(model: nn.Module, keys: list[str]) -> None:
    """Train what a file holds beyond what its rules unfreeze. Raises FileError."""
    by_key = _keyed(model, [*parameters_of(model), *buffers_of(model)])
    if missing := [key for key in keys if key not in by_key]:
        raise FileError(
            "load",
            f"the file has {first_few(missing)}, trained without a rule, which this "
            f"{type(model).__name__} has no place for.",
            "Change the model first as it was changed then: the same new modules, head and "
            "parametrizations.",
        )
    adopt(model, [by_key[key] for key in keys])


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those of the base that a file may fill, by their keys in it."""
    return {key: place.tensor for key, place in _keyed(model, buffers_of(model)).items()}


def _keyed(model: nn.Module, places: Iterable[Place]) -> dict[str, Place]:
    """Places of the base by their keys in a file."""
    paths = first_paths(model)
    return {BASE + dotted(paths[id(place.module)], place.name): place for place in places}


def _places(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Every tensor of the model that a file may fill, by its key in the file."""
    return {**buffers(model), **_held(model, name)}
