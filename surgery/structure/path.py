"""Path patterns, parsed once. Strings only: this file knows nothing of torch.

An address matches a whole path, step by step:

    blocks.3.mlp        these names
    blocks.*.mlp        `*`: any one step
    **.attn.qkv         `**`: any number of steps, none included
    layers.{stage}.**   `{stage}`: any one step, captured under that name
    *.{mlp,attn}        `{a,b}`: either name
    blocks.[-4:].mlp    `[3]`, `[-1]`, `[:-4]`: position among siblings, with Python's meaning
    blocks.*.(a to b)   a span: from the input of `a` to the output of `b`, as anatomy prints it
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..errors import RuleError


class Step(NamedTuple):
    """One step of a path: its name, and its position among `siblings` children of one parent."""

    name: str
    position: int
    siblings: int


@dataclass(frozen=True)
class _Name:
    names: tuple[str, ...]

    def fits(self, step: Step) -> bool:
        return step.name in self.names


@dataclass(frozen=True)
class _Any:
    capture: str | None

    def fits(self, step: Step) -> bool:
        return True


@dataclass(frozen=True)
class _Position:
    index: int | slice

    def fits(self, step: Step) -> bool:
        chosen = range(step.siblings)
        if isinstance(self.index, slice):
            return step.position in chosen[self.index]
        return step.position == self.index % step.siblings and (
            -step.siblings <= self.index < step.siblings
        )


_Matcher = _Name | _Any | _Position | None  # None stands for `**`
_SPAN = re.compile(r"(?:(.+)\.)?\(([^()]+) to ([^()]+)\)")
_POSITION = re.compile(r"\[(?:(-?\d+)|(-?\d+)?:(-?\d+)?(?::(-?0*[1-9]\d*)?)?)\]")


@lru_cache(maxsize=1024)
def parse(text: str) -> tuple[_Matcher, ...]:
    """Turn an address into its matchers. Raises RuleError on a step that means nothing."""
    if text == "":
        return ()
    if ends := split_span(text):
        for part in ends:
            parse(part)
        return (_Name(()),)  # no one path: a span is found by its ends
    return tuple(_parse_step(step, text) for step in _steps(text))


def split_span(text: str) -> tuple[str, str, str] | None:
    """The addresses of what holds a span, and from there of its two ends; None for one module.

    >>> split_span("layers.*.(linear1 to linear2)")
    ('layers.*', 'linear1', 'linear2')
    """
    found = _SPAN.fullmatch(text)
    return (found[1] or "", found[2], found[3]) if found else None


def alternatives(text: str) -> list[tuple[str, str]]:
    """Each name that an address lists in braces, and the address with that name alone.

    >>> alternatives("blocks.*.{attn,mlp}")
    [('attn', 'blocks.*.attn'), ('mlp', 'blocks.*.mlp')]
    """
    found = []
    for braces in re.finditer(r"\{([^{}]+,[^{}]+)\}", text):
        for name in map(str.strip, braces[1].split(",")):
            found.append((name, text[: braces.start()] + name + text[braces.end() :]))
    return found


def without_slices(text: str) -> str:
    """An address with any step in place of each slice, which may come to nothing as Python's do.

    >>> without_slices("blocks.[12:].{fc1,fc2}.[0]")
    'blocks.*.{fc1,fc2}.[0]'
    """
    return re.sub(r"\[[^\]]*:[^\]]*\]", "*", text)


def _steps(text: str) -> list[str]:
    return re.split(r"\.(?![^\[]*\])", text)


def _parse_step(step: str, text: str) -> _Matcher:
    if step == "**":
        return None
    if step == "*":
        return _Any(None)
    if re.fullmatch(r"\{\w+\}", step):
        return _Any(step[1:-1])
    if re.fullmatch(r"\{[^{}*\[\],]+(,[^{}*\[\],]+)+\}", step):
        return _Name(tuple(name.strip() for name in step[1:-1].split(",")))
    if position := _POSITION.fullmatch(step):
        return _Position(_index(position))
    if step and not re.search(r"[*{}\[\],\s]", step):
        return _Name((step,))
    raise RuleError(
        f'"{text}"',
        f'the step "{step}" is no address step.' if step else "it has an empty step.",
        "A step is a name, *, **, {name}, {a,b} or [position]; for anything finer use a predicate, "
        "where(lambda site: ...).",
    )


def _index(position: re.Match[str]) -> int | slice:
    number, *bounds = position.groups()
    if number is not None:
        return int(number)
    start, stop, step = (int(b) if b else None for b in bounds)
    return slice(start, stop, step)


def match(text: str, path: tuple[Step, ...]) -> dict[str, str] | None:
    """What the address `text` captures on the whole of `path`, or None where it does not match.

    >>> match("layers.{stage}.*.mlp", (Step("layers", 0, 1), Step("2", 2, 4), Step("0", 0, 1),
    ...                                Step("mlp", 1, 2)))
    {'stage': '2'}
    """
    return _match(parse(text), path, 0, 0, {})


def _match(
    matchers: tuple[_Matcher, ...], path: tuple[Step, ...], i: int, j: int, captures: dict[str, str]
) -> dict[str, str] | None:
    """What the matchers from the i-th on capture on the path from its j-th step on."""
    while i < len(matchers):
        matcher = matchers[i]
        if matcher is None:
            return _match_any(matchers, path, i, j, captures)
        if j == len(path) or not matcher.fits(path[j]):
            return None
        if isinstance(matcher, _Any) and matcher.capture:
            if captures.get(matcher.capture, path[j].name) != path[j].name:
                return None
            captures = {**captures, matcher.capture: path[j].name}
        i, j = i + 1, j + 1
    return captures if j == len(path) else None


def _match_any(
    matchers: tuple[_Matcher, ...], path: tuple[Step, ...], i: int, j: int, captures: dict[str, str]
) -> dict[str, str] | None:
    """The same where the i-th matcher is `**`: by the fewest steps that let the rest match."""
    last = len(path) - sum(m is not None for m in matchers[i + 1 :])
    if None not in matchers[i + 1 :]:  # the last `**`: what follows has one place to be
        return _match(matchers, path, i + 1, last, captures) if last >= j else None
    for k in range(j, last + 1):
        if (result := _match(matchers, path, i + 1, k, captures)) is not None:
            return result
    return None


def generalise(path: str) -> str:
    """A path with every numeric step replaced by `*`: the shape of an address.

    >>> generalise("blocks.11.mlp.fc1")
    'blocks.*.mlp.fc1'
    """
    return ".".join("*" if step.isdigit() else step for step in path.split("."))


def closest(
    text: str, paths: Iterable[str], preferred: Sequence[str] = (), most: int = 2
) -> list[tuple[str, int]]:
    """The addresses that exist and look most like `text`, each with how many paths it has.

    Addresses in `preferred`, first ones first, come before others that look as much like it.

    >>> closest("blocks.*.feed_forward", ["blocks.0.mlp", "blocks.1.mlp", "head"], most=1)
    [('blocks.*.mlp', 2)]
    """
    counts = Counter(generalise(path) for path in paths if path)
    steps = [step for step in generalise(text).split(".") if step != "**"]
    anywhere = len(steps) < len(text.split("."))
    rank = {address: i for i, address in enumerate(preferred)}

    def order(address: str) -> tuple[float, int, int, str]:
        existing = address.split(".")
        ways = [(steps, existing)]
        if anywhere:
            ways.append((steps[::-1], existing[::-1]))
        alike = max(sum(map(_alike, asked, there)) for asked, there in ways)
        likeness = alike / max(len(steps), 1 if anywhere else len(existing))
        return -round(likeness, 3), rank.get(address, len(rank)), len(existing), address

    return [(address, counts[address]) for address in sorted(counts, key=order)[:most]]


def _alike(a: str, b: str) -> float:
    """1 for the same step, less for one that may have been mistyped, else 0."""
    ratio = difflib.SequenceMatcher(None, a, b).ratio()
    return ratio if ratio > 0.6 else 0.0
