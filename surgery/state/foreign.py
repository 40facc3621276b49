"""What a file of another library holds, put into a model by rules that are made for it."""

from __future__ import annotations

import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .._text import first_few
from ..engine.activity import activate
from ..engine.apply import revert
from ..engine.conditions import FILLING, MAKING, check_state
from ..engine.hooked_weights import HookedWeight
from ..engine.operation import Operation, operations
from ..engine.planning import Plan
from ..engine.trained import Place
from ..errors import FileError, RuleError
from ..parts.room import without_room
from ..rules.edits import Edit, unfreeze
from ..rules.rule import Rule, at
from ..rules.weights import weight
from ..structure.layers import named_modules
from ..structure.path import generalise
from .reading import FIT, RAW, opened

FLOATS = {"F64", "F32", "F16", "BF16"}


class Held(NamedTuple):
    """A tensor in a file, known by its header alone: its whole name there, its shape, its type."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    get: Callable[[], Tensor]


def times(held: Held, factor: float) -> Held:
    """A tensor by a number."""
    return held if factor == 1.0 else held._replace(get=lambda: held.get() * factor)


class Entry(NamedTuple):
    """A tensor of a file, as it lies in one of ours: in this view, less what is `offset`."""

    view: Tensor
    shape: tuple[int, ...]
    offset: Tensor | None = None

    def get(self) -> Tensor:
        """What the file has."""
        value = self.view.detach() if self.offset is None else self.view.detach() + self.offset
        return value.reshape(self.shape)

    def put(self, value: Tensor) -> None:
        """Take what the file has."""
        value = value.reshape(self.view.shape).to(self.view)
        self.view.copy_(value if self.offset is None else value - self.offset)


class Joint(NamedTuple):
    """A part, how it is joined to its place, and to what rows of it."""

    part: nn.Module
    place: str
    scale: float | None = None
    rows: slice | None = None


Joints = list[tuple[str, Joint]]


class Content(NamedTuple):
    """What a file means in a model.

    call     for errors
    rules    made when they are asked for: what is wrong with them is an error of the file
    entries  where its tensors lie, by their names, in parts that are joined so
    check    raises FileError where these are not what the file has
    held     the file's tensors, by their names
    last     what else is filled, where there is any
    """

    call: str
    rules: Callable[[], list[Rule]]
    entries: Callable[[Joints], dict[str, Entry]]
    check: Callable[[dict[str, Entry]], None]
    held: Mapping[str, Held]
    last: Callable[[Operation], None] = lambda operation: None


def operate(model: nn.Module, content: Content, name: str, example: Any) -> None:
    """Operate a model by what a file means, all or nothing."""
    with nullcontext() if example is not None else guarded(content.call):  # a model's errors pass
        plan = Plan(model, content.rules(), seed=0, name=name, balance=None, example=example)
        sketch = plan.parts
        spots = [(p.site.path, Joint(sketch[p.key], p.edit.place)) for p in plan.placements]
        entries = content.entries(spots)
    content.check(entries)
    if plan.is_without_memory:
        check_state(model, content.call, MAKING, FILLING)
    with made(model, name, acting(model)):
        plan.apply(example)
        operation = operations(model)[-1]
        with torch.no_grad():
            _fill(content, content.entries(joints_of(operation)))
            content.last(operation)
        operation.start.given([key for key, _ in operation.named_parameters()])


def _fill(content: Content, entries: Mapping[str, Entry]) -> None:
    """Put what a file has where it lies. Raises FileError where its numbers make no such tensor."""
    for key, entry in entries.items():
        with guarded(content.call):
            value = content.held[key].get().reshape(entry.shape)
        entry.put(value)


@contextmanager
def made(model: nn.Module, name: str, others: dict[str, float]) -> Iterator[None]:
    """An operation is made, all or nothing; others that act do not meanwhile: its values are told
    from the base."""
    earlier = len(operations(model))
    try:
        if others:
            activate(model, None)
        yield
        if others:
            activate(model, {**others, name: 1.0})
    except BaseException:
        if len(operations(model)) > earlier:
            revert(model, name=name)
        if others:
            activate(model, others)
        raise


def acting(model: nn.Module) -> dict[str, float]:
    """How much each operation acts, if any does."""
    strengths = {operation.name: operation.strength for operation in operations(model)}
    return strengths if any(strengths.values()) else {}


@contextmanager
def guarded(call: str) -> Iterator[None]:
    """What a file's numbers come to is an error of the file, whatever it is."""
    try:
        yield
    except RuleError as error:
        raise FileError(call, f"it makes no part here ({error!s:.500}).", FIT) from error
    except RAW as error:
        told = f"{type(error).__name__}: {error!s:.200}"
        raise FileError(call, f"it makes no part here ({told}).", FIT) from error


def joints_of(operation: Operation) -> Joints:
    """The parts of an operation, each with the place that it is joined to, without rows."""
    return [
        (
            hooked.path.partition("[")[0],
            Joint(without_room(action.part), action.place, action.scale, rows),
        )
        for hooked in operation.hooked_sites
        for rows in [hooked.rows if isinstance(hooked, HookedWeight) else None]
        for action in hooked.actions
    ]


def rules_of(
    model: nn.Module, edits: Iterable[tuple[str, str, tuple[Edit, ...]]], base: Collection[Place]
) -> list[Rule]:
    """A rule for each kind of edits, and for what is trained of the base.

    edits  each with a path, and the name of the parameter that is meant there, "" for the module
    """
    grouped: dict[tuple[str, str], tuple[tuple[Edit, ...], list[str]]] = {}
    for path, name, own in edits:
        grouped.setdefault((name, repr(own)), (own, []))[1].append(path)
    trained: dict[str, list[str]] = {}
    for place in base:
        if isinstance(place.tensor, nn.Parameter):
            trained.setdefault(place.path.rpartition(".")[0], []).append(place.name)
    for path, names in trained.items():
        whole = set(names) >= {name for name, _ in model.get_submodule(path).named_parameters()}
        edit = unfreeze if whole else unfreeze(*names)
        grouped.setdefault(("", repr(edit)), ((edit,), []))[1].append(path)
    return [
        at(weight(f"{address}.{name}", tied=False) if name else address, *edit)
        for (name, _), (edit, paths) in grouped.items()
        for address in addresses(model, dict.fromkeys(paths))
    ]


def addresses(model: nn.Module, paths: Mapping[str, None]) -> list[str]:
    """Paths, those that differ by numbers alone as one address, where it means no others."""
    alike: dict[str, list[str]] = {}
    for path, _ in named_modules(model):
        alike.setdefault(generalise(path), []).append(path)
    found: dict[str, None] = {}
    for path in paths:
        address = generalise(path)
        found[address if all(other in paths for other in alike[address]) else path] = None
    return list(found)


def fail(call: str, fact: str, remedy: str) -> NoReturn:
    """Raise FileError."""
    raise FileError(call, fact, remedy)


# files -----------------------------------------------------------------------------------------


@contextmanager
def held_in(path: Path, call: str) -> Iterator[tuple[dict[str, Held], dict[str, str]]]:
    """What a safetensors file holds by whole names, and what it says of itself. Raises FileError"""
    with opened(path, call) as file:
        held = {}
        for key in file.keys():  # noqa: SIM118 (no mapping)
            piece = file.get_slice(key)
            shape = tuple(piece.get_shape())
            held[key] = Held(key, shape, piece.get_dtype(), partial(file.get_tensor, key))
        yield held, file.metadata() or {}


DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
LARGEST_CONFIG = 2**22  # bytes
PICKLED: tuple[type[Exception], ...] = (
    *RAW, OSError, zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip


def pickled(path: Path, call: str) -> dict[str, Held]:
    """What a file of torch.save holds, of tensors alone: nothing in it is executed, nor unpacked.

    Raises FileError.
    """
    remedy = "Save it again, by torch.save, or as safetensors."
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                fail(call, f"its {path.name} is packed, to what size nobody knows.", remedy)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PICKLED as error:
        fact = f"its {path.name} is no whole file of tensors alone ({error!s:.200})."
        raise FileError(call, fact, remedy) from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and type(t) in (Tensor, nn.Parameter) for key, t in state.items()
    ):
        fail(call, f"its {path.name} holds more than tensors by their names.", remedy)
    kinds = {key: DTYPES.get(t.dtype, str(t.dtype)) for key, t in state.items()}
    return {k: Held(k, tuple(t.shape), kinds[k], t.detach) for k, t in state.items()}


def read_json(path: Path, call: str) -> dict[str, Any]:
    """What a configuration says. Raises FileError where it is none."""
    if not os.path.isfile(path):
        raise FileError(call, f"there is no {path.name} in it.", "Give a folder that PEFT saved.")
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_CONFIG + 1)
        said = json.loads(data) if len(data) <= LARGEST_CONFIG else None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(
            call, f"its {path.name} cannot be read ({error!s:.200}).", "Save it again."
        ) from error
    if not isinstance(said, dict):
        raise FileError(call, f"its {path.name} is no configuration.", "Save it again.")
    return said


def check_held(
    held: Mapping[str, Held],
    wanted: Mapping[str, tuple[int, ...]],
    entries: Mapping[str, Entry],
    fail: Callable[[str, str], NoReturn],
    spared: Callable[[str], bool] = lambda key: False,
) -> None:
    """Call `fail` unless a file has just what is wanted, by names, of these shapes, in floats.

    entries  where what is wanted lies in the model: numbers there may be of other types
    spared   what the file may have besides
    """
    extra = [key for key in held if key not in wanted and not spared(key)]
    if lost := [key for key in wanted if key not in held]:
        fail(f"it lacks {first_few(lost)}, which its configuration asks for.", FIT)
    if extra:
        told = first_few([f"{key:.200}" for key in extra])
        fail(f"it has {told}, which its configuration gives no place for.", FIT)
    for key, shape in wanted.items():
        if held[key].shape != shape:
            fail(f"{key} is {held[key].shape} in it, and {shape} in this model.", FIT)
        number = key in entries and not entries[key].view.is_floating_point()
        if not number and held[key].dtype not in FLOATS:
            fail(f"{key} is of {held[key].dtype}, which holds no weights.", "Save floats.")


# a product of three, as one of two -------------------------------------------------------------

# the middle of three factors of a kernel, and those beside it: up, and down; up's axes are turned
MIDDLES = {
    "lora_mid": ("lora_B.weight", "lora_A.weight", False),
    "hada_t1": ("hada_w1_a", "hada_w1_b", True),
    "hada_t2": ("hada_w2_a", "hada_w2_b", True),
    "lokr_t2": ("lokr_w2_a", "lokr_w2_b", True),
}


def folded(held: Mapping[str, Held]) -> dict[str, Held]:
    """What a file holds, the middle of each product of three multiplied into its down factor."""
    found = dict(held)
    for key, core in held.items():
        path, _, name = key.rpartition(".")
        if name not in MIDDLES or len(core.shape) < 3:
            continue
        up, down, turned = MIDDLES[name]
        up, down = f"{path}.{up}", f"{path}.{down}"
        if up in found and down in found:
            del found[key]
            found[down] = _product(core, found[down], flat=turned)
            if turned:
                found[up] = _turned(found[up])
    return found


def _turned(held: Held) -> Held:
    return held._replace(shape=held.shape[::-1], get=lambda: held.get().mT)


def _product(core: Held, down: Held, flat: bool) -> Held:
    """(m, n, ...) by (n, j); where they do not fit each other, of a shape that fits nowhere."""
    fits = core.shape[1] == down.shape[0] and set(down.shape[2:]) <= {1}
    shape = (core.shape[0], *down.shape[1:2], *core.shape[2:])
    shape = (shape[0], math.prod(shape[1:])) if flat else shape

    def product() -> Tensor:
        matrix = down.get().flatten(1)
        return torch.einsum("m n ..., n j -> m j ...", core.get().to(matrix), matrix).reshape(shape)

    return down._replace(shape=shape if fits else (), get=product)
