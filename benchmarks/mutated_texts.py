"""As `mutations`, of what is said in words: a file's rules, a configuration of PEFT's, a list."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from surgery.engine.vocabulary import vocabulary

from .mutations import FOLDER, NUMBERS, ODD, OURS, PEFT, TEXTS, change_about, kind

CONFIG, LIST = "adapter_config.json", "surgery.json"
LOOPS = ["(a+)+$", "(a|a)*$", "(a|aa)+$", "(.*)*$", "(.*)*x", "(?:.*)+x", "((a*)*)*$", "(.+)+\\1",
         ".*" * 6 + "x", ".*" * 12 + "x", "(.*?)" * 9 + "x", "(?=(.*)*)x", "(a?){40}a{40}",
         "(?:(?:.*){9}){9}x", "[^x]*" * 8 + "x", "(\\w+\\.?)+$", "a{1,65535}{1,65535}",
         "(?P<a>.*)(?P=a)(?P=a)x", "(.{0,99}){99}x", "|".join(["a.*b.*c.*"] * 2000), "(" * 5000,
         "(?:" * 90 + ".*" + ")*" * 90, "\\", "[", "*", "(?i)(.*.*)*=", ".*", "((((.*))))",
         "(.*\\.)?q.*"]  # fmt: skip


# what a file of ours says ----------------------------------------------------------------------


def _places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = (
        data.items() if isinstance(data, dict) else enumerate(data) if type(data) is list else ()
    )
    for key, item in items:
        yield from _places(item, (*path, key))


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def _put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    _at(data, path[:-1])[path[-1]] = value
    return data


def _anything(rng: Random) -> Any:
    word = {"word": rng.choice(sorted(vocabulary())), "given": [], "named": {}}
    word["given"] = rng.sample(
        [2, "head", {"name": "ffn"}, None, {"nn": "Linear"}], rng.randint(0, 2)
    )
    word["named"] = dict.fromkeys(rng.sample(["rank", "by", "times", "x"], rng.randint(0, 1)), 2)
    return rng.choice([word, rng.choice(ODD), rng.choice(ODD)])


@kind(OURS, FOLDER)
def notes_and_rules(rng: Random, folder: Path) -> None:
    """Anything at any place."""

    def change(about: Any) -> Any:
        for _ in range(rng.randint(1, 2)):
            about = _put(about, rng.choice([*_places(about)]), _anything(rng))
        return about

    change_about(rng, folder, change)


@kind(OURS, FOLDER)
def numbers_in_rules(rng: Random, folder: Path) -> None:
    """Ranks below zero, of billions, as text; scales that are none."""

    def change(about: Any) -> Any:
        places = [
            p for p in _places(about["rules"]) if type(_at(about["rules"], p)) in (int, float)
        ]
        if places:
            _put(about["rules"], rng.choice(places), rng.choice(NUMBERS))
        return about

    change_about(rng, folder, change)


@kind(OURS, FOLDER)
def words_in_rules(rng: Random, folder: Path) -> None:
    words = [*vocabulary(), *TEXTS[:8], "eval", "Linear", "Parameter", "modules", "__import__"]

    def change(about: Any) -> Any:
        rules = about["rules"]
        places = [p for p in _places(rules) if p and p[-1] in ("word", "name", "nn")]
        texts = [p for p in _places(rules) if type(_at(rules, p)) is str and p not in places]
        for some, other in ((places, words), (texts, TEXTS)):
            if some and rng.random() < 0.7:
                _put(rules, rng.choice(some), rng.choice(other))
        return about

    change_about(rng, folder, change)


def _nested(word: str, depth: int, inner: Any, other: Any = None) -> Any:
    for _ in range(depth):
        given = [inner] if other is None else [inner, other]
        inner = {"word": word, "given": given, "named": {}}
    return inner


@kind(OURS, FOLDER)
def rules_without_end(rng: Random, folder: Path) -> None:
    """Many rules, deep selectors and parts, wide choices, addresses that fit in many ways."""
    depth = rng.choice([10, 100, 300, 3000])
    star = rng.choice([".".join(["**"] * 30), "**.{a,b}" * 20, "{i}." * 50 + "x", "*." * 100])
    ffn = {"name": "ffn"}

    def change(about: Any) -> Any:
        rules = about["rules"]["list"]
        lora = {"word": "lora", "given": [], "named": {"rank": 2}}
        words = ["~", "inside", "holding", "nearest", "until", "span", "[]", "|", "&"]
        joints = ["shared", "parallel", "append", "combined"]
        way = rng.randrange(4)
        if way == 0:
            most = 2**22 // len(json.dumps(about))  # more is refused for its length
            times = rng.choice([2, 10, most // 2, most, 2 * most])
            about["rules"]["list"] *= times
            if rng.random() < 0.7:
                about["text"], about["sites"] = about["text"] * times, about["sites"] * times
        elif way == 1:
            word, inner = rng.choice(words), rng.choice([ffn, star])
            other = rng.choice([star, ffn, "**"]) if word in "|&" else None
            rules[0]["given"][0] = _nested(word, depth, inner, other)
        elif way == 2:
            rules[0]["given"][1:] = [_nested(rng.choice(joints), depth, lora)]
        else:
            rules[0]["given"] = [rules[0]["given"][0]] + [lora] * depth
        return about

    change_about(rng, folder, change)


@kind(FOLDER)
def lists_of_operations(rng: Random, folder: Path) -> None:
    file = folder / LIST
    said = json.loads(file.read_text())
    for _ in range(rng.randint(1, 2)):
        said = _put(said, rng.choice([*_places(said)]), rng.choice(ODD))
    file.write_text(json.dumps(said))


# what a configuration of PEFT's says -----------------------------------------------------------

TEXTUAL = ("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules")
NAMED = ("rank_pattern", "alpha_pattern")
OPTIONS = [
    *TEXTUAL, *NAMED, "r", "lora_alpha", "alpha", "bias", "use_dora", "use_rslora", "peft_type",
    "modules_to_save", "layers_to_transform", "target_parameters", "trainable_token_indices",
    "oft_block_size", "decompose_factor", "num_cayley_neumann_terms", "auto_mapping",
    "init_lora_weights", "lora_dropout", "fan_in_fan_out", "new_option",
]  # fmt: skip


def _said(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    said = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(change(said)))


@kind(PEFT)
def options(rng: Random, folder: Path) -> None:
    def change(said: dict[str, Any]) -> Any:
        for _ in range(rng.randint(1, 3)):
            place = rng.choice([*_places(said)] + [(name,) for name in OPTIONS])
            if rng.random() < 0.2 and len(place) == 1:
                said.pop(place[0], None)
            elif place:
                _put(said, place, rng.choice([*ODD, ["head"], "head", {"head": 2}, {"(": 2}]))
        return said

    _said(folder, change)


@kind(PEFT)
def numbers_in_options(rng: Random, folder: Path) -> None:
    numbers = [n for n in OPTIONS if n in ("r", "alpha") or n.startswith(("lora_", "oft_", "num_"))]
    _said(folder, lambda said: {**said, rng.choice(numbers): rng.choice(NUMBERS)})


@kind(PEFT)
def patterns(rng: Random, folder: Path) -> None:
    """Regular expressions that take for ever, or are none."""

    def change(said: dict[str, Any]) -> Any:
        for _ in range(rng.randint(1, 2)):
            loop = rng.choice(LOOPS)
            name = rng.choice([*TEXTUAL, *NAMED])
            said[name] = {loop: 2} if name in NAMED else rng.choice([loop, [loop], loop + "|head"])
        return said

    _said(folder, change)


@kind(PEFT)
def options_without_end(rng: Random, folder: Path) -> None:
    size = rng.choice([10**3, 10**4, 10**5, 10**6])
    made: list[Callable[[], Any]] = [
        lambda: ["head"] * size, lambda: [f"a{i}" for i in range(size)], lambda: "a" * size,
        lambda: "head|" * (size // 5) + "x", lambda: {f"a{i}": 2 for i in range(size)},
        lambda: [*range(size)], lambda: ["a" * size], lambda: [["head"]] * size,
    ]  # fmt: skip
    odd = rng.choice(made)()
    name = rng.choice(OPTIONS)
    text = json.dumps({**json.loads((folder / CONFIG).read_text()), name: odd})
    deep = ', "x": ' + "[" * size + "]" * size + "}"
    ends = ["}", "}", deep, " " * size + "}", ', "r": 3, "r": "x", "peft_type": "LORA"}']
    (folder / CONFIG).write_text(text[:-1] + rng.choice(ends))
