"""Tensors that do not fit the places that they are for: refused before one is read or written."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery import at, parallel, unfreeze, weight
from surgery.errors import FileError
from surgery.methods import fourierft, mosa, sct, sparse, unilora, waveft
from surgery.parts import rows
from tests.models import images, tiny_vit

INDEXED: dict[str, Any] = {
    "sparse": sparse(), "fourierft": fourierft(n=20), "waveft": waveft(n=20), "mosa": mosa(rank=4),
    "unilora": unilora(size=100), "sct": sct(channels=8),
}  # fmt: skip


def vit() -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit().eval()


def written(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A file with other tensors, and no hash of them."""
    with safe_open(folder / "good", framework="pt") as file:
        about = json.loads(file.metadata()["surgery"])
    about.pop("hash")
    save_file(tensors, folder / "bad", metadata={"surgery": json.dumps(about)})
    return folder / "bad"


def refused(path: Path, told: str) -> None:
    model = vit()
    before = surgery.fingerprint(model)
    with pytest.raises(FileError, match=told):
        surgery.load(model, path)
    assert surgery.fingerprint(model) == before


@pytest.mark.parametrize("name", INDEXED)
def test_positions_beyond_what_they_point_into(name: str, tmp_path: Path) -> None:
    """On a GPU they would end the process, in a forward: no exception tells of them."""
    surgery.save(surgery.apply(vit(), INDEXED[name]), tmp_path / "good")
    held = load_file(tmp_path / "good")
    keys = [k for k, t in held.items() if not t.is_floating_point() and not k.endswith("uses")]
    assert keys
    for value in (-1, 2**20) if held[keys[0]].dtype == torch.int64 else (200,):
        for key in keys:
            other = held[key].clone()
            other.view(-1)[-1] = value
            refused(written(tmp_path, {**held, key: other}), f"has .*{value}")
    surgery.load(vit(), written(tmp_path, held))(images())


def test_rows_of_words_beyond_the_table(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))

    rules = at(weight("0.weight"), parallel(rows([1, 8])))
    surgery.save(surgery.apply(build(), rules), tmp_path / "good")
    held = load_file(tmp_path / "good")
    key = next(key for key in held if key.endswith("index"))
    path = written(tmp_path, {**held, key: torch.tensor([1, 9])})
    with pytest.raises(FileError, match="has 1 to 9, and there are 0 to 8"):
        surgery.load(build(), path)


@pytest.mark.parametrize("key", ["base.head.weight", "base.none", "parts.none"])
def test_a_tensor_without_end_is_not_read(key: str, tmp_path: Path) -> None:
    """A hole in the disk of 64 GiB, which the header says is a tensor."""
    surgery.save(surgery.apply(vit(), at("head", unfreeze)), tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    end, most = len(data) - 8 - length, 2**33
    header.pop(key, None)
    offsets = [[0, 0]] if key == "base.head.weight" else []
    header = {k: v for k, v in header.items() if k == "__metadata__" or not offsets}
    start = 0 if offsets else end
    entry = {"dtype": "F32", "shape": [most // 4], "data_offsets": [start, start + most]}
    text = json.dumps({**header, key: entry}).encode()
    (tmp_path / "bad").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with (tmp_path / "bad").open("r+b") as file:
        file.truncate(8 + len(text) + start + most)
    began = time.process_time()
    refused(tmp_path / "bad", "head|no place|none")
    assert time.process_time() - began < 1


def test_more_rules_than_tensors_bear_out(tmp_path: Path) -> None:
    surgery.save(surgery.apply(vit(), at("head", unfreeze)), tmp_path / "good")
    held = load_file(tmp_path / "good")
    with safe_open(tmp_path / "good", framework="pt") as file:
        about = json.loads(file.metadata()["surgery"])

    def repeated(times: int) -> Path:
        rules = {"list": json.loads(about["rules"])["list"] * times}
        said = {**about, "text": about["text"] * times, "sites": about["sites"] * times}
        meta = {"surgery": json.dumps({**said, "rules": json.dumps(rules)})}
        save_file(held, tmp_path / "bad", metadata=meta)
        return tmp_path / "bad"

    surgery.load(vit(), repeated(60))
    began = time.process_time()
    refused(repeated(10_000), "10,000 of them, and 2 tensors")
    assert time.process_time() - began < 1


def test_a_header_without_end_is_not_parsed(tmp_path: Path) -> None:
    """The parser of safetensors takes 100 MB: 1.5 million tensors, 12 seconds and 1.3 GiB."""
    surgery.save(surgery.apply(vit(), at("head", unfreeze)), tmp_path / "good")
    data = (tmp_path / "good").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = data[8 : 8 + length] + b" " * (2**24 + 8)
    (tmp_path / "bad").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    refused(tmp_path / "bad", "its header is longer than 16,777,216 bytes")
    text = text[: 2**23]
    (tmp_path / "long").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    surgery.load(vit(), tmp_path / "long")


def test_notes_without_end_are_not_parsed(tmp_path: Path) -> None:
    """As Python's lists they would take 20 times the room that they take in the file."""
    surgery.save(surgery.apply(vit(), at("head", unfreeze)), tmp_path / "good")
    with safe_open(tmp_path / "good", framework="pt") as file:
        about = file.metadata()["surgery"]
    for more, told in ((2**20, ""), (2**22, "not written by surgery.save, or by a newer")):
        meta = {"surgery": about[:-1] + ', "more": "' + "x" * more + '"}'}
        save_file(load_file(tmp_path / "good"), tmp_path / "bad", metadata=meta)
        if told:
            refused(tmp_path / "bad", told)
        else:
            surgery.load(vit(), tmp_path / "bad")


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\u202e", "a\nb", "a" * 5000])
def test_names_that_a_terminal_would_obey(name: str, tmp_path: Path) -> None:
    surgery.save(surgery.apply(vit(), at("head", unfreeze)), tmp_path / "good")
    held = load_file(tmp_path / "good")
    refused(written(tmp_path, {**held, name: torch.zeros(1)}), "is no name of a tensor")
