"""What a file says of itself and holds, read and looked at before anything is made of it.

A file may come from anywhere: what is in it is damaged, or is meant to do harm, until it is seen
not to. Sizes in its rules are known to be right from the shapes of its tensors.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules import module as registration

from .._text import first_few
from ..engine.decided import Decided
from ..engine.planning import Plan
from ..engine.vocabulary import vocabulary
from ..errors import FileError, RuleError
from ..rules.expression import decode
from ..rules.rule import Rule, Rules
from .hashes import hash_of
from .hub import file_of

FORMAT = "1"  # of the file; raised when a reader of the former could not read it
PARTS, BASE = "parts.", "base."  # where a tensor of the file belongs
LARGEST = 2**20  # an integer in rules that is no larger needs no tensor that has so many numbers
LONGEST = 2**16  # characters of one text in rules
GREATEST = 2.0**127  # of what float32 has, and bfloat16
HEADER, ABOUT = 2**24, 2**22  # bytes of a file's header, characters of what it says of itself
FEW = 64  # rules that need no tensor
LONGEST_NAME = 2**12  # characters
# what Python and torch raise where arguments make no sense
RAW: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
UNREADABLE: tuple[type[Exception], ...] = (OSError, SafetensorError, *RAW)  # of files
GIVE = "Give the rules yourself: load(model, path, rules=[...])."
FIT = "Load it into the model it was made for: the same architecture, depth and head."


class Sketch(NamedTuple):
    """A tensor of a file, as its header has it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: of none that is known

    @property
    def numbers(self) -> int:
        """How many it holds."""
        return math.prod(self.shape)


class Contents(NamedTuple):
    """A file: its name in errors, where it is, what it says of itself, and of its tensors."""

    call: str
    path: Path
    about: dict[str, Any]
    sketches: dict[str, Sketch]

    @property
    def numbers(self) -> int:
        """How many its tensors hold."""
        return sum(sketch.numbers for sketch in self.sketches.values())

    def tensors(self) -> dict[str, Tensor]:
        """They themselves, to be read where they are seen to fit. Raises FileError."""
        with opened(self.path, self.call) as file, _readable(self.call):
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            known = self.about.get("hash")  # older files have none
            if known is None or known == hash_of(sorted(found.items())):
                return found
        fact = "its tensors are not those that it was written with: it is damaged, or was changed."
        raise FileError(self.call, fact, "Save it again.")


def read(path: str | os.PathLike[str], name: str = "default") -> Contents:
    """What a file says, or that of an operation in a folder. Raises FileError."""
    return _read(path, name, f'load("{path}")')


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Sketch]]:
    """What a file says of itself, and of each tensor. Raises FileError."""
    contents = _read(path, "", f'inspect("{path}")')
    return contents.about, contents.sketches


@contextmanager
def opened(path: str | os.PathLike[str], call: str) -> Iterator[Any]:
    """A safetensors file, whose header is small and has names to print. Raises FileError."""
    if not os.path.isfile(path):
        folder = "it is a folder." if os.path.isdir(path) else "it is no plain file."
        fact = folder if os.path.lexists(path) else "there is no such file."
        raise FileError(call, fact, "Check the path.")
    if not os.access(path, os.R_OK):
        raise FileError(call, "you have no permission to read it.", "Ask its owner for it.")
    with ExitStack() as stack:
        with _readable(call):
            with open(path, "rb") as file:
                if int.from_bytes(file.read(8), "little") > HEADER:
                    raise ValueError(f"its header is longer than {HEADER:,} bytes")
            found = stack.enter_context(safe_open(path, framework="pt"))
            keys = found.keys()
        if strange := [key for key in keys if not _is_name(key)]:
            raise FileError(call, f"{strange[0]!r:.200} is no name of a tensor.", "Save it again.")
        yield found


def _is_name(text: str) -> bool:
    """Whether it can be printed: names and rules are, and a terminal obeys what cannot be."""
    return text.isprintable() and len(text) <= LONGEST_NAME


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def _sketch(piece: Any) -> Sketch:
    return Sketch(tuple(piece.get_shape()), DTYPES.get(piece.get_dtype()))


@contextmanager
def _readable(call: str) -> Iterator[None]:
    """What is wrong within a file is an error of the file."""
    try:
        yield
    except UNREADABLE as error:
        fact = f"it is no whole safetensors file ({error!s:.200})."
        raise FileError(call, fact, "Save it again.") from error


def _read(path: str | os.PathLike[str], name: str, call: str) -> Contents:
    own = file_of(path, name, call)
    with opened(own, call) as file, _readable(call):
        text = (file.metadata() or {}).get("surgery", "null")
        about = json.loads(text) if len(text) <= ABOUT else None
        sketches = {key: _sketch(file.get_slice(key)) for key in file.keys()}  # noqa: SIM118
    if not isinstance(about, dict) or about.get("format") != FORMAT or not _whole(about):
        raise FileError(
            call,
            "it was not written by surgery.save, or by a newer version, or it is damaged.",
            "A plain checkpoint of the base model is loaded by model.load_state_dict.",
        )
    return Contents(call, own, about, sketches)


def _whole(about: dict[str, Any]) -> bool:
    """Whether what a file says of itself is of the kinds that `save` writes."""
    text, sites = about.get("text"), about.get("sites")
    if not (_texts(text) and isinstance(sites, list) and all(map(_texts, sites))):
        return False
    if not all(_texts(about.get(key, [])) for key in ("beyond_rules", "read_besides")):
        return False
    whole = type(about.get("seed")) is int and isinstance(about.get("rules"), str)
    return whole and len(text or ()) == len(sites)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v.isprintable() for v in value)


# its rules -------------------------------------------------------------------------------------


def rules_of(contents: Contents) -> list[Rule]:
    """The rules that a file carries. Raises FileError where it has none that can be right."""
    call, about = contents.call, contents.about
    if not about["rules"]:
        held = "; ".join(about["text"])
        raise FileError(call, f"its rules hold code that a file cannot carry: {held}", GIVE)
    try:
        data = json.loads(about["rules"])
        if len(data["list"]) > FEW + len(contents.sketches):
            raise ValueError(
                f"{len(data['list']):,} of them, and {len(contents.sketches):,} tensors"
            )
        strange = next(_strange(data, max(LARGEST, contents.numbers)), "")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise FileError(call, f"its rules are damaged ({error!s:.200}).", GIVE) from error
    if strange:
        raise FileError(call, f"its rules hold {strange}, which no tensor in it bears out.", GIVE)
    rules = decode(data, vocabulary())
    if not isinstance(rules, list) or not all(isinstance(rule, Rule) for rule in rules):
        raise FileError(call, "what it holds are no rules.", GIVE)
    return rules


def _strange(data: Any, most: int) -> Iterator[str]:
    """What is too large for rules of such a file."""
    if isinstance(data, (list, dict)):
        for item in data.values() if isinstance(data, dict) else data:
            yield from _strange(item, most)
    elif isinstance(data, int) and abs(data) > most:
        yield f"the number {data:.3g}" if abs(data) < 1e300 else "a number beyond all measure"
    elif isinstance(data, float) and not abs(data) < GREATEST:
        yield f"the number {data:.3g}"
    elif isinstance(data, str) and len(data) > LONGEST:
        yield f"a text of {len(data):,} characters"


# what they would make --------------------------------------------------------------------------


def plan_of(
    contents: Contents,
    model: nn.Module,
    given: Rules | None,
    *,
    name: str,
    balance: float | None,
    example: Any,
    room: int | None = None,
) -> Plan:
    """The plan of the rules given, or of a file's own, whose parts must have the shapes in it.

    Raises FileError, and what planning raises.
    """
    seed, decided = contents.about["seed"], _decided(contents.about)
    if given is not None:
        plan = Plan(
            model, given, seed=seed, name=name, balance=balance, example=example, decided=decided,
            room=room,
        )  # fmt: skip
        _check_sites(contents, plan)
        return plan
    rules = rules_of(contents)
    with nullcontext() if example is not None else _guarded(contents):  # a model's own errors pass
        plan = Plan(
            model, rules, seed=seed, name=name, balance=balance, example=example, decided=decided,
            room=room,
        )  # fmt: skip
    _check_sites(contents, plan)
    count = 1000 + 100 * (len(contents.sketches) + len(plan.placements))
    with _guarded(contents), _counted(contents, count):
        made = plan.parts
    _check_parts(contents, made, type(model).__name__)
    return plan


def _check_sites(contents: Contents, plan: Plan) -> None:
    """Raise FileError where rules match other places than when the file was made."""
    about, here = contents.about, [[site.path for site in sites] for _, sites in plan.matches]
    for rule, then, now in zip(about["text"], about["sites"], here, strict=False):
        if then != now:
            raise FileError(
                rule,
                f"it matched {len(then)} sites when the file was made ({first_few(then)}), and "
                f"{len(now)} of this {type(plan.model).__name__} ({first_few(now)}).",
                "Load it into the model it was made for: the same architecture, depth and head; "
                "and give load(..., example=inputs) if it was made with an example.",
            )
    if len(about["sites"]) != len(here):
        raise FileError("load", "the rules given are not those of the file.", "Give those rules.")


def _decided(about: dict[str, Any]) -> Decided:
    """What a forward decided when the file was made; nothing where none did."""
    roles = about.get("roles", {})
    return Decided(str(about.get("modules", "")), about["text"], about["sites"], roles)


@contextmanager
def _guarded(contents: Contents) -> Iterator[None]:
    """What a file's rules come to is an error of the file, whatever it is."""
    try:
        yield
    except RuleError as error:
        raise FileError(
            contents.call, f"its rules make no part here ({error!s:.500}).", GIVE
        ) from error
    except RAW as error:
        told = f"{type(error).__name__}: {error!s:.200}"
        raise FileError(contents.call, f"its rules make no part here ({told}).", GIVE) from error


@contextmanager
def _counted(contents: Contents, most: int) -> Iterator[None]:
    """No more than so many modules and tensors may be put into modules by this thread."""
    thread, count = threading.get_ident(), itertools.count(1)

    def check(module: nn.Module, name: str, added: Any) -> None:
        if threading.get_ident() == thread and next(count) > most:
            raise FileError(
                contents.call,
                f"its rules make more than {most:,} modules and tensors, and it holds "
                f"{len(contents.sketches):,} tensors.",
                GIVE,
            )

    with (
        registration.register_module_module_registration_hook(check),
        registration.register_module_parameter_registration_hook(check),
    ):
        yield


def _check_parts(contents: Contents, made: dict[str, nn.Module], kind: str) -> None:
    """Raise FileError where the shapes of the parts are not those in the file."""
    there = {k: s.shape for k, s in contents.sketches.items() if k.startswith(PARTS)}
    first = {id(part): key for key, part in reversed(made.items())}
    here = {
        f"{PARTS}{key}.{name}": tuple(tensor.shape)
        for key, part in made.items()
        if first[id(part)] == key
        for name, tensor in part.state_dict().items()
    }
    if lost := [key for key in {**here, **there} if there.get(key) != here.get(key)]:
        key = lost[0]
        raise FileError(
            contents.call,
            f"{key} is {there.get(key, 'not')} in the file, and {here.get(key, 'not')} among what "
            f"its rules make of this {kind}.",
            FIT,
        )
