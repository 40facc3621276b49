"""Faults put on purpose: an error raised at any chosen line of surgery that a call runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

HERE = str(Path(__file__).resolve().parents[1])
Line = tuple[str, int]


class Fault(Exception):
    """The error that is put there, if it is to be no other."""


class Tripwire:
    """Raises once, at the n-th time that a line of surgery is about to run; 0: writes them down.

    where  the line at which it raised; lines: all that ran until then
    """

    def __init__(self, at_event: int, error: type[BaseException] = Fault) -> None:
        self.remaining, self.error, self.lines = at_event, error, list[Line]()
        self.where: Line | None = None
        self.recording = at_event == 0
        self.last: dict[FrameType, int] = {}  # the last line of each function with a `with`

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(HERE):
            return None
        return self.step if _has_with(frame.f_code) else self.count

    def step(self, frame: FrameType, event: str, arg: object) -> Any:
        """What Python calls before each line of a function with a `with` in it."""
        if event == "line":
            number, last = frame.f_lineno, self.last.get(frame, 0)
            self.last[frame] = number
            leaves_with = last > number and source(_line(frame)).startswith("with ")
            if leaves_with:  # on the way out of one: Python would never call __exit__
                return self.step
            self.count(frame, event, arg)
        return self.step

    def count(self, frame: FrameType, event: str, arg: object) -> Any:
        """What it calls before each line of any other function of surgery."""
        if event == "line":
            if self.recording:
                self.lines.append(_line(frame))
            self.remaining -= 1
            if self.remaining == 0:
                self.where = _line(frame)
                raise self.error  # which ends the tracing
        return self.count

    def run(self, call: Callable[[], object]) -> None:
        """Make a call with the fault in it, and catch that fault."""
        tracing = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        except self.error:
            assert self.where, "it raised of itself"
        finally:
            sys.settrace(tracing)
            self.last.clear()  # frames, each with its locals: whole models


def _line(frame: FrameType) -> Line:
    return frame.f_code.co_filename, frame.f_lineno


def events(call: Callable[[], object]) -> list[Line]:
    """Every line of surgery that `call` runs, in order, repeats included."""
    wire = Tripwire(0)
    wire.run(call)
    return wire.lines


def source(line: Line) -> str:
    """What is written there."""
    return _text(line[0])[line[1] - 1].strip()


def committed(line: Line) -> bool:
    """Whether nothing remains to be done there but to return the model."""
    return source(line) in ("return model", "return self.model")


_WITHS: dict[int, tuple[CodeType, bool]] = {}  # by id: code is slow to hash


def _has_with(code: CodeType) -> bool:
    known = _WITHS.get(id(code))
    if known is None:
        numbers = {number for *_, number in code.co_lines() if number}
        withs = any(source((code.co_filename, n)).startswith("with ") for n in numbers)
        known = _WITHS[id(code)] = code, withs
    return known[1]


@lru_cache(maxsize=100)
def _text(file: str) -> list[str]:
    return Path(file).read_text().splitlines()
