"""Real files, changed to do harm: each kind is a function of random numbers and a folder with one.

A folder has one file of safetensors, and what the format has beside it: `adapter_config.json` of
PEFT's, `surgery.json` of ours. A file of `surgery.save` lies in a folder by itself.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import socket
import struct
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

OURS, PEFT, FOLDER = "ours", "peft", "folder"  # formats
Kind = Callable[[Random, Path], None]
KINDS: dict[str, tuple[tuple[str, ...], Kind]] = {}  # by name: the formats that have it

NUMBERS: list[Any] = [
    -1, 0, 1, 2, 3, 2**20, 2**31, 10**9, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(10**15), 1.5,
    -0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), True, None, "2", "-1", [], {},
    [2], [[]], {"list": []},
]  # fmt: skip
TEXTS: list[Any] = [
    "", ".", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "\u202eabc", "\x1b[2J\x1b[31m", "\n",
    "a" * 5000, "a" * 70_000, "\ud800", "\U0001f4a5", "*", "**", "*" * 300, ".".join(["**"] * 40),
    "{a,b}" * 20, "{a," * 40 + "b" + "}" * 40, "[", "[]", "[-1]", "{", "a.b.c", "__class__", "%s%n",
    "{0.__class__}", "import os", "head", "blocks.*", "blocks.{i}.qkv", "hf:user/name",
]  # fmt: skip
ODD = [*NUMBERS, *TEXTS, {"name": "ffn"}, {"nn": "Linear"}, {"nn": "Module"}, {"a": {"b": [1]}}]


def kind(*formats: str) -> Callable[[Kind], Kind]:
    """Lists a kind under its name, said in words."""

    def listed(function: Kind) -> Kind:
        KINDS[function.__name__.replace("_", " ")] = formats, function
        return function

    return listed


CHANGED = (AttributeError, LookupError, OSError, RecursionError, SafetensorError, StopIteration,
           TypeError, ValueError, struct.error)  # fmt: skip


def mutate(format: str, rng: Random, folder: Path) -> str:
    """Change what is in a folder, now and then twice; the kind."""
    name = rng.choice([name for name, (formats, _) in KINDS.items() if format in formats])
    for _ in range(1 if rng.random() < 0.9 else 2):
        if all(file.stat().st_size < 2**26 for file in folder.iterdir() if file.is_file()):
            with suppress(*CHANGED):  # where the first change has left nothing for the next
                KINDS[name][1](rng, folder)
    return name


def tensors_of(folder: Path) -> Path:
    """The file of safetensors."""
    return next(folder.glob("*.safetensors"))


# bytes -----------------------------------------------------------------------------------------


def _header(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def _written(file: Path, header: Any, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


def _entries(header: dict[str, Any]) -> list[str]:
    return [key for key in header if key != "__metadata__"]


def _flipped(rng: Random, file: Path, start: int, end: int | None) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(start, end or len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


@kind(OURS, PEFT, FOLDER)
def bits_of_the_header(rng: Random, folder: Path) -> None:
    file = tensors_of(folder)
    _flipped(rng, file, 0, 8 + struct.unpack("<Q", file.read_bytes()[:8])[0])


@kind(OURS, PEFT)
def bits_of_the_body(rng: Random, folder: Path) -> None:
    file = tensors_of(folder)
    if rng.random() < 0.6:
        change_about(
            rng, folder, lambda about: about
        )  # of a file without a hash, it may be anything
    _flipped(rng, file, 8 + struct.unpack("<Q", file.read_bytes()[:8])[0], None)


@kind(OURS, PEFT, FOLDER)
def a_file_cut_or_longer(rng: Random, folder: Path) -> None:
    file = rng.choice([each for each in folder.iterdir() if each.is_file()])
    data = file.read_bytes()
    cut = data[: rng.randrange(len(data))]
    file.write_bytes(rng.choice([cut, data + rng.randbytes(rng.choice([1, 8, 999]))]))


@kind(OURS, PEFT, FOLDER)
def lengths_of_the_header(rng: Random, folder: Path) -> None:
    file = tensors_of(folder)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    odd = [
        0,
        1,
        length - 1,
        length + 1,
        length * 2,
        len(data),
        2**24,
        10**8,
        2**32,
        2**63,
        2**64 - 1,
    ]
    file.write_bytes(struct.pack("<Q", rng.choice(odd)) + data[8:])


@kind(OURS, PEFT, FOLDER)
def other_formats(rng: Random, folder: Path) -> None:
    file = rng.choice([each for each in folder.iterdir() if each.is_file()])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("archive/data.pkl", b"\0" * 2**22)
    told = ["", "{}", "null", "\ufeff{}", "<html>", "[" * 10**5, '{"a":' * 10**5, "1" * 10**5]
    made = [text.encode() for text in told]
    made += [rng.randbytes(999), gzip.compress(b"\0" * 2**22), packed.getvalue(), _pickle(folder)]
    made += ['{"r": 8}'.encode("utf-16"), b"\xff\xfe", file.read_bytes()[::-1]]
    file.write_bytes(rng.choice(made))


class _Harm:
    """A pickle that makes a folder where it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.makedirs, (self.path, 0o777, True)


def _pickle(folder: Path) -> bytes:
    return pickle.dumps({"a": _Harm(str(folder.parent / "HARM"))})


@kind(OURS, PEFT, FOLDER)
def pickles(rng: Random, folder: Path) -> None:
    """As torch's own, beside the tensors or in their place."""
    file = tensors_of(folder)
    target = rng.choice(["adapter_model.bin", "pytorch_model.bin", file.name])
    if target == file.name or rng.random() < 0.6:
        file.unlink()
    if rng.random() < 0.5:
        (folder / target).write_bytes(_pickle(folder))
    else:
        torch.save({"a": _Harm(str(folder.parent / "HARM"))}, folder / target)


# what a header says ----------------------------------------------------------------------------


def _each(rng: Random, folder: Path, change: Callable[[dict[str, Any], str], None]) -> None:
    """Change a header at one to three of its tensors."""
    header, body = _header(tensors_of(folder))
    for _ in range(rng.randint(1, 3)):
        with suppress(*CHANGED):
            change(header, rng.choice(_entries(header)))
    _written(tensors_of(folder), header, body)


DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "U64", "BOOL", "C64", "F8_E4M3",
          "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "f32", "", "X", 5, None, [], "F32\0"]  # fmt: skip


@kind(OURS, PEFT, FOLDER)
def dtypes(rng: Random, folder: Path) -> None:
    _each(rng, folder, lambda header, key: header[key].update(dtype=rng.choice(DTYPES)))


@kind(OURS, PEFT, FOLDER)
def shapes(rng: Random, folder: Path) -> None:
    def change(header: dict[str, Any], key: str) -> None:
        own = header[key]["shape"]
        other = rng.choice(_entries(header))
        odd: list[Any] = [
            [*own, 1], own[::-1], own[1:], [], [0], [0, 2**62], [2**62, 2**62], [2**40], [-1, -1],
            [1] * 300, [[1]], None, "2", {}, [rng.choice(NUMBERS)], header[other]["shape"],
        ]  # fmt: skip
        header[key]["shape"] = rng.choice(odd)

    _each(rng, folder, change)


@kind(OURS, PEFT, FOLDER)
def offsets(rng: Random, folder: Path) -> None:
    def change(header: dict[str, Any], key: str) -> None:
        start, end = header[key]["data_offsets"]
        odd: list[Any] = [
            [end, start], [0, end], [start, end + 4], [start - 4, end], [2**60, 2**61], [-4, end],
            [start, 2**64], [start], [start, end, end], None, "0", [0.5, end], header[
                rng.choice(_entries(header))]["data_offsets"],
        ]  # fmt: skip
        header[key]["data_offsets"] = rng.choice(odd)

    _each(rng, folder, change)


@kind(OURS, PEFT, FOLDER)
def names(rng: Random, folder: Path) -> None:
    def change(header: dict[str, Any], key: str) -> None:
        odd = rng.choice([*TEXTS, key + ".x", "../" + key, "module." + key, key.upper(), key[:-1]])
        header[odd] = header.pop(key) if rng.random() < 0.7 else dict(header[key])

    _each(rng, folder, change)


@kind(OURS, PEFT, FOLDER)
def keys_twice(rng: Random, folder: Path) -> None:
    header, body = _header(tensors_of(folder))
    key = rng.choice([*header])
    again = {**header[key], **({"shape": [1]} if key != "__metadata__" else {"surgery": "{}"})}
    text = json.dumps(header)[:-1] + f", {json.dumps(key)}: {json.dumps(again)}}}"
    _written(tensors_of(folder), text.encode(), body)


@kind(OURS, PEFT, FOLDER)
def tensors_missing_or_more(rng: Random, folder: Path) -> None:
    held = load_file(tensors_of(folder))
    meta = _header(tensors_of(folder))[0].get("__metadata__")
    one, other = rng.choice(sorted(held)), rng.choice(sorted(held))
    if rng.random() < 0.4:
        held.pop(one)
    elif rng.random() < 0.5:
        held[rng.choice(["parts.x", "base.x", "x", "base.head.weight"])] = held[one].clone()
    else:
        held[one], held[other] = held[other], held[one]
    save_file(held, tensors_of(folder), metadata=meta)


FILLED = [float("nan"), float("inf"), -float("inf"), 1e38, 1e-42, -0.0]
WIDER = [torch.float16, torch.bfloat16, torch.float64]
OTHER = [torch.int64, torch.bool, torch.uint8, torch.complex64]
CHANGES: list[Callable[[torch.Tensor, Random], torch.Tensor]] = [
    lambda t, rng: torch.full_like(t, rng.choice(FILLED)) if t.is_floating_point() else t + 1,
    lambda t, rng: t.to(rng.choice(WIDER)),
    lambda t, rng: t.to(rng.choice(OTHER)),
    lambda t, rng: t.flatten(),
    lambda t, rng: t[None],
    lambda t, rng: t[:0] if t.dim() else t,
    lambda t, rng: t.mT if t.dim() > 1 else t,
    lambda t, rng: torch.cat([t[None]] * 2),
]


@kind(OURS, PEFT, FOLDER)
def values_and_dtypes(rng: Random, folder: Path) -> None:
    """Of a whole file, without a hash: NaN, infinities, other dtypes and shapes."""
    held = load_file(tensors_of(folder))
    meta = _header(tensors_of(folder))[0].get("__metadata__")
    for key in rng.sample(sorted(held), rng.randint(1, len(held))):
        held[key] = rng.choice(CHANGES)(held[key], rng).contiguous()
    save_file(held, tensors_of(folder), metadata=meta)
    change_about(rng, folder, lambda about: about)


@kind(OURS, PEFT, FOLDER)
def files_far_larger_than_they_seem(rng: Random, folder: Path) -> None:
    """Holes in the disk: as large as their headers say."""
    header, body = _header(tensors_of(folder))
    key, most = rng.choice(_entries(header)), rng.choice([2**28, 2**31, 2**33])
    end = max(header[each]["data_offsets"][1] for each in _entries(header))
    name = rng.choice([key, "parts.x", "base.head.weight", "x"])
    entry = {"dtype": "F32", "shape": [most // 4], "data_offsets": [end, end + most]}
    if name == key:
        entry = {**entry, "dtype": "U8", "shape": [most]}
    _written(tensors_of(folder), {**header, name + ("" if name != key else ".y"): entry}, body)
    with tensors_of(folder).open("r+b") as file:
        file.truncate(tensors_of(folder).stat().st_size + most)


@kind(OURS, PEFT, FOLDER)
def metadata(rng: Random, folder: Path) -> None:
    header, body = _header(tensors_of(folder))
    meta = header.get("__metadata__", {})
    text = meta.get("surgery", "{}")
    odd: list[Any] = [
        None, 1, [], "x", {}, {"surgery": 1}, {"surgery": None}, {"surgery": ""}, {"surgery": "["},
        {"surgery": "[" * 10**5}, {"surgery": text + text}, {"surgery": "\ufeff" + text},
        {"surgery": json.dumps(text)}, {**meta, "surgery": text.replace(":", "=", 1)},
        {"surgery": "[" + "[]," * rng.choice([10**5, 10**6, 5 * 10**6]) + "[]]"},
        {"surgery": '{"a":1,' * 10**4}, {"surgery": text.replace("}", ",}")},
        {**meta, **{str(i): "x" for i in range(10**4)}},
    ]  # fmt: skip
    _written(tensors_of(folder), {**header, "__metadata__": rng.choice(odd)}, body)


@kind(OURS, PEFT, FOLDER)
def headers_without_end(rng: Random, folder: Path) -> None:
    """Of many tensors, of many names, of spaces, deep."""
    header, body = _header(tensors_of(folder))
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
    count = rng.choice([10**3, 10**4, 10**5])
    text, deep = json.dumps(header).encode(), b"[" * count + b"]" * count
    start = rng.choice(["t", "parts.t", "base.t", _entries(header)[0]])
    made: list[Callable[[], Any]] = [
        lambda: {**header, **{f"{start}{i}": empty for i in range(count)}},
        lambda: b" " * (100 * count) + text, lambda: text[:-1] + b', "x": ' + deep + b"}",
        lambda: {**header, "a" * count: empty},
    ]  # fmt: skip
    _written(tensors_of(folder), rng.choice(made)(), body)


def change_about(rng: Random, folder: Path, change: Callable[[Any], Any]) -> None:
    """Change what a file says of itself, its rules as data; mostly without a hash of tensors."""
    header, body = _header(tensors_of(folder))
    if "surgery" not in header.get("__metadata__", {}):
        return
    about = json.loads(header["__metadata__"]["surgery"])
    about["rules"] = json.loads(about["rules"]) if about["rules"] else ""
    if rng.random() < 0.8:
        about.pop("hash", None)
    about = change(about)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**5)  # to write what is deep
    if isinstance(about, dict) and "rules" in about:
        about["rules"] = json.dumps(about["rules"])
    header["__metadata__"]["surgery"] = json.dumps(about)
    sys.setrecursionlimit(limit)
    _written(tensors_of(folder), header, body)


# what is no file -------------------------------------------------------------------------------


@kind(OURS, PEFT, FOLDER)
def no_plain_files(rng: Random, folder: Path) -> None:
    """Folders, pipes, sockets, links in a circle and to what never ends, no permission, nothing."""
    file = rng.choice([each for each in folder.iterdir() if each.is_file()])
    kept = folder / "kept"
    shutil.move(file, kept)

    def bound() -> None:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(file))

    def forbidden() -> None:
        shutil.copyfile(kept, file)
        file.chmod(0)

    rng.choice([
        file.mkdir, lambda: os.mkfifo(file), bound, forbidden, lambda: None,
        lambda: file.symlink_to(file), lambda: file.symlink_to(folder / "none"),
        lambda: file.symlink_to("/dev/zero"), lambda: file.symlink_to("/dev/full"),
        lambda: file.symlink_to("/proc/self/mem"), lambda: file.symlink_to(kept),
        lambda: os.link(kept, file), lambda: file.symlink_to(folder),
    ])()  # fmt: skip
