"""What can go wrong, said as rule, fact, remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TypeGuard

LONGEST = 1200  # characters of a rule, a fact, a remedy


class SurgeryError(Exception):
    """Base of every error that Surgery raises on purpose: rule, fact, remedy, a line each.

    >>> print(SurgeryError('at("x")', "it matched no module.", 'Write at("blocks.*").'))
    at("x"): it matched no module.
    Write at("blocks.*").
    """

    joint = ": "  # between rule and fact

    def __init__(self, rule: str, fact: str, remedy: str) -> None:
        # Exception.__new__ has kept the arguments; torch.compile cannot trace its __init__
        self.rule, self.fact, self.remedy = rule, fact, remedy

    def __str__(self) -> str:
        rule, fact, remedy = map(_printed, (self.rule, self.fact, self.remedy))
        return f"{rule}{self.joint}{fact}\n{remedy}" if rule else f"{fact}\n{remedy}"


def _printed(text: str) -> str:
    """A text as it may be printed: what is in it can be a file's, and a terminal obeys it."""
    cut = text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in cut)


class RuleError(SurgeryError):
    """A rule, pattern or part is ill-formed in itself, or does not suit the place it is put."""


class MatchError(SurgeryError):
    """A rule matched nothing, or not as often as it says."""

    joint = " "


class ConflictError(SurgeryError):
    """Two rules ask for what cannot both be had."""


class OperationError(SurgeryError):
    """The model is not as the call needs it: operated already, never operated, or wrapped."""


class GraftError(SurgeryError):
    """A grafted part did not run, or did not fit what it met in a forward."""


class FileError(SurgeryError):
    """A file cannot be saved, or does not fit the model it is loaded into."""


def is_integer(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether a value is an integer (True and False are none) from `least` up.

    >>> is_integer(3), is_integer(0), is_integer(True)
    (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is an integer or a float (True and False are none).

    >>> is_number(0.5), is_number(True)
    (True, False)
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def nearest_names(word: str, known: Iterable[str], most: int = 3) -> str:
    """The known names that look most like `word`, best first, joined by commas.

    >>> nearest_names("adaptorx", ["adapterx_ffn", "full", "adapter"])
    'adapter, adapterx_ffn'
    """
    close = difflib.get_close_matches(word, list(known), n=most, cutoff=0.4)
    return ", ".join(sorted(close, key=lambda name: not name.startswith(word)))
