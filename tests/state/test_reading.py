"""Files that are damaged, or made to do harm: FileError, and nothing was built or changed."""

from __future__ import annotations

import copy
import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery import adapter, append, at, head, inside, lora, moa, parallel, shared, unfreeze
from surgery.engine.vocabulary import vocabulary
from surgery.spec.snapshot import unchanged
from surgery.state import reading


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x).relu())


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Mlp(), Mlp(), nn.Linear(8, 2))


GOOD = {
    "lora": [at("0.fc1", lora(rank=2)), at("2", unfreeze)],
    "moa": [at("*.{fc1,fc2}", parallel(shared(moa(rank=2, heads=2)))), at("2", unfreeze)],
    "adapter": [
        at(nn.Linear & ~inside("1"), append(adapter(rank=2), residual=True)),
        at(head, unfreeze, optional=True),
    ],
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], Any]]:
    """What good files say of themselves, and their tensors."""
    folder, made = tmp_path_factory.mktemp("good"), {}
    for name, rules in GOOD.items():
        path = surgery.save(surgery.apply(build(), rules), folder / name)
        with safe_open(path, framework="pt") as opened:
            made[name] = json.loads(opened.metadata()["surgery"]), load_file(path)
    return made


def write(path: Path, about: Any, tensors: dict[str, torch.Tensor]) -> Path:
    known = {**about} if isinstance(about, dict) else about
    if isinstance(known, dict):
        known.pop("hash", None)
    save_file(tensors, path, metadata={"surgery": json.dumps(known)})
    return path


def refused(path: Path, kinds: Any = surgery.FileError, match: str | None = None) -> None:
    model = build()
    before, began = surgery.fingerprint(model), time.perf_counter()
    with pytest.raises(kinds, match=match) as caught:
        surgery.load(model, path)
    assert time.perf_counter() - began < 5
    assert caught.value.remedy
    unchanged(before, surgery.fingerprint(model), "a refused load")


# sizes that no memory holds ----------------------------------------------------------------------

SIZES = [2**20, 10**9, 2 * 10**9, 4 * 10**12, 2**62, 2**63, 2**64, 10**30, 10**400, -(10**15)]
SIZES = [*SIZES, -1, 0, 1.5, 3, float("nan"), float("inf"), "2", None, True, [2], {"list": []}]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: str(size)[:20])
@pytest.mark.parametrize(
    ("name", "word"), [("lora", "rank"), ("moa", "rank"), ("moa", "experts"), ("moa", "heads")]
)
def test_a_size_that_the_tensors_do_not_bear_out(
    name: str, word: str, size: Any, good: Any, tmp_path: Path
) -> None:
    about, tensors = copy.deepcopy(good[name])
    rules = json.loads(about["rules"])
    _set(rules, word, size)
    refused(write(tmp_path / "x", {**about, "rules": json.dumps(rules)}, tensors))


def _set(data: Any, word: str, value: Any) -> None:
    if isinstance(data, dict) and word in data:
        data[word] = value
    for item in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        _set(item, word, value)


def test_so_many_modules_that_building_them_never_ends(good: Any, tmp_path: Path) -> None:
    """Integers that are each small enough, one inside another."""
    about, tensors = copy.deepcopy(good["lora"])
    from surgery.parts.adapter_sum import coefficients, combined

    part = adapter(rank=2)
    for _ in range(4):
        part = combined(part, coefficients(count=1000))
    model = surgery.apply(build(), at("0", append(combined(adapter(rank=2), coefficients()))))
    with safe_open(surgery.save(model, tmp_path / "y"), framework="pt") as opened:
        known = json.loads(opened.metadata()["surgery"])
    from surgery.rules.expression import encode

    if not known["rules"]:
        pytest.skip("such parts are not in a file's vocabulary")
    rules = json.dumps(encode([at("0", append(part))], vocabulary()))
    lying = {**about, "rules": rules, "text": known["text"], "sites": [["0"]]}
    refused(write(tmp_path / "x", lying, tensors), match="more than")


# shapes of texts ---------------------------------------------------------------------------------


def nested(word: str, depth: int, inner: Any) -> Any:
    for _ in range(depth):
        inner = {"word": word, "given": [inner], "named": {}}
    return inner


PLACES = {
    "many stars": ".".join(["**"] * 40),
    "stars and steps": ".".join(["**", "fc1"] * 20),
    "many braces": "{a,b}" * 20,
    "deep braces": "{a," * 40 + "b" + "}" * 40,
    "long": "a." * 40_000,
    "a megabyte": "a" * 2**20,
    "deep not": nested("~", 300, {"name": "ffn"}),
    "deep inside": nested("inside", 300, {"name": "ffn"}),
    "a number": 5,
    "nothing": None,
}


@pytest.mark.parametrize("place", PLACES)
def test_places_that_are_meant_to_take_for_ever(place: str, good: Any, tmp_path: Path) -> None:
    about, tensors = good["lora"]
    rules = json.loads(about["rules"])
    rules["list"][0]["given"][0] = PLACES[place]
    kinds = (surgery.FileError, surgery.MatchError)
    refused(write(tmp_path / "x", {**about, "rules": json.dumps(rules)}, tensors), kinds)


RULES = {
    "deep JSON": "[" * 100_000,
    "deep lists": '{"list":[' * 20_000 + "]}" * 20_000,
    "a number of 5,000 digits": "1" * 5000,
    "no JSON": "{",
    "a number": "1",
    "code": '{"list": [{"word": "eval", "given": ["1"], "named": {}}]}',
    "an attribute": '{"list": [{"word": "__class__", "given": [], "named": {}}]}',
    "a class of no module": '{"list": [{"nn": "Parameter"}]}',
    "a module of another kind": '{"list": [{"nn": "modules"}]}',
}


@pytest.mark.parametrize("rules", RULES)
def test_rules_that_are_none(rules: str, good: Any, tmp_path: Path) -> None:
    about, tensors = good["lora"]
    refused(write(tmp_path / "x", {**about, "rules": RULES[rules]}, tensors))


ABOUT = {
    "sites": [[[1], ["2"]], [[None], ["2"]], [["0.fc1"]], [], {}, "0.fc1", [["0.fc1"], "2"]],
    "text": [[1, 2], [None, None], "ab", {}, None, []],
    "seed": ["1", None, True, 1.5, [1], {}],
    "rules": [None, 1, [], {}, True],
    "format": [None, 1, "2", [], True],
}
WRONG = [(key, value) for key, values in ABOUT.items() for value in values]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_what_a_file_says_of_itself_is_of_wrong_kinds(
    key: str, value: Any, good: Any, tmp_path: Path
) -> None:
    about, tensors = good["lora"]
    refused(write(tmp_path / "x", {**about, key: value}, tensors))
    refused(write(tmp_path / "x", {k: v for k, v in about.items() if k != key}, tensors))


# headers -----------------------------------------------------------------------------------------


def raw(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = {
    "no byte": b"",
    "a length beyond the file": b"\xff" * 8 + b"{}",
    "no JSON": raw(b"{nonsense"),
    "metadata a number": raw({"__metadata__": {"surgery": 5}}),
    "metadata a list": raw({"__metadata__": [1]}),
    "a key twice": raw(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), b"\0" * 4),
    "a shape below zero": raw({"a": {**F32, "shape": [-1]}}, b"\0" * 4),
    "a shape beyond all": raw({"a": {**F32, "shape": [2**62, 2**62]}}, b"\0" * 4),
    "an unknown dtype": raw({"a": {**F32, "dtype": "X1"}}, b"\0" * 4),
    "offsets that overlap": raw({"a": F32, "b": F32}, b"\0" * 4),
    "no tensor": raw({"__metadata__": {"surgery": "{}"}}),
    "metadata deep": raw({"__metadata__": {"surgery": "[" * 100_000}}),
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_are_none(header: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(HEADERS[header])
    refused(path)


def test_tensors_of_dtypes_that_the_model_has_not(good: Any, tmp_path: Path) -> None:
    about, tensors = good["lora"]
    for dtype in (torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64):
        refused(write(tmp_path / "x", about, {k: t.to(dtype) for k, t in tensors.items()}))
    refused(write(tmp_path / "x", about, {}))


def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: Any) -> None:
    refused(tmp_path, match="folder")
    refused(tmp_path / "none", match="no such file")
    path = write(tmp_path / "x", *good["lora"])
    monkeypatch.setattr(reading.os, "access", lambda path, mode: False)
    refused(path, match="permission")


def test_good_files_load(good: Any, tmp_path: Path) -> None:
    for about, tensors in good.values():
        surgery.load(build(), write(tmp_path / "x", about, tensors))


def test_no_hook_on_all_modules_is_left(good: Any, tmp_path: Path) -> None:
    about, tensors = good["moa"]
    tables = (
        reading.registration._global_module_registration_hooks,
        reading.registration._global_parameter_registration_hooks,
    )
    before = [len(table) for table in tables]
    surgery.load(build(), write(tmp_path / "x", about, tensors))
    refused(write(tmp_path / "x", about, {}))
    assert [len(table) for table in tables] == before


# anything at all ---------------------------------------------------------------------------------

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 9),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "**", "*.fc1", "{a,b}", "[", "[]", "{", "a" * 70_000, "\0", "0.fc1"]),
    st.sampled_from([{"name": "ffn"}, {"nn": "Linear"}, {"nn": "Module"}, {"list": [1]}, {}, []]),
    st.builds(
        lambda word, given, named: {"word": word, "given": given, "named": named},
        st.sampled_from(sorted(vocabulary())),
        st.lists(st.sampled_from([2, "0.fc1", {"name": "ffn"}, None]), max_size=2),
        st.dictionaries(st.sampled_from(["rank", "by", "times", "x"]), st.integers(0, 3)),
    ),
)


def places_in(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = (
        data.items() if isinstance(data, dict) else enumerate(data) if type(data) is list else ()
    )
    return [path, *(p for key, item in items for p in places_in(item, (*path, key)))]


def changed(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copied = copy.deepcopy(data)
    inner = copied
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copied


def loaded_or_refused(path: Path) -> None:
    """It loads, or raises FileError (MatchError: the places are those of another model)."""
    model = build()
    before = surgery.fingerprint(model)
    try:
        surgery.load(model, path)
    except (surgery.FileError, surgery.MatchError):
        unchanged(before, surgery.fingerprint(model), "a refused load")


MANY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@MANY
@given(data=st.data())
def test_rules_and_notes_with_anything_in_them(data: Any, good: Any, tmp_path: Path) -> None:
    about, tensors = good[data.draw(st.sampled_from(sorted(good)))]
    about = {**about, "rules": json.loads(about["rules"])}
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places_in(about)))
        about = changed(about, place, data.draw(ODD))
    if isinstance(about, dict) and "rules" in about:
        about["rules"] = json.dumps(about["rules"])
    loaded_or_refused(write(tmp_path / "x", about, tensors))


@MANY
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.integers(0, 10**6))
def test_bytes_with_anything_in_them(
    place: int, byte: int, cut: int, good: Any, tmp_path: Path
) -> None:
    path = write(tmp_path / "x", *good["lora"])
    whole = bytearray(path.read_bytes())
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    whole[place % end] = byte
    path.write_bytes(whole[: cut % len(whole)] if cut % 3 == 0 else whole)
    loaded_or_refused(path)
