"""What a model answers must not depend on where it reads how many tokens there are.

In a loop over blocks that nobody calls, `b, n, d = x.shape` may stand before it: then n is that of
all tokens, as it must be in the loop, and none behind it (a mean as the sum over n).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .._text import first_few
from ..errors import GraftError
from .answers import apart
from .counting import Replay
from .hooks import HookedSite
from .reading import Reading


def check_counting(hooked_sites: list[HookedSite], run: Callable[[], Any], answer: Any) -> None:
    """Raise GraftError where a model uses the number of all tokens when others are out again.

    answer  what it answers
    """
    sites = [hooked for hooked in hooked_sites if hooked.inserts and hooked.ends]
    if not sites:
        return
    with Reading((), sys._getframe()):  # as the answer came
        if _counts(sites, run, answer) and not apart(answer, run()) and _counts_behind(sites, run):
            raise GraftError(
                f"insert(...) at {first_few(hooked.path for hooked in sites)}",
                "before blocks that it does not call the model reads how many tokens there are, "
                "with those inserted, and seems to use the number where they are out again.",
                "Let it read the number where it uses it (x.shape[1]), or use a method that adds "
                "no tokens.",
            )


def _counts(sites: list[HookedSite], run: Callable[[], Any], answer: Any) -> bool:
    """Whether it answers otherwise where tokens say that they are as many as before."""
    with _set(sites, miscounts=True):
        try:
            return apart(answer, run())
        except Exception:
            return True


def _counts_behind(sites: list[HookedSite], run: Callable[[], Any]) -> bool:
    """Whether it answers otherwise where there are twice as many, and the same comes of them.

    (Twice as many, as windows and heads of tokens divide them then, too.)
    """
    replay = Replay()
    with _set(sites, replay=replay):
        answer = run()
    replay.repeat()
    with _set(sites, replay=replay, doubles=True):
        try:
            return apart(answer, run())
        except Exception:
            return True


@contextmanager
def _set(
    sites: list[HookedSite],
    *,
    miscounts: bool = False,
    replay: Replay | None = None,
    doubles: bool = False,
) -> Iterator[None]:
    """The ends of the sites, and what they put in, are so."""
    _tell(sites, miscounts, replay, doubles)
    try:
        yield
    finally:
        _tell(sites, False, None, False)


def _tell(sites: list[HookedSite], miscounts: bool, replay: Replay | None, doubles: bool) -> None:
    for hooked in sites:
        hooked.tokens.doubles = doubles
        for end in hooked.ends:
            end.miscounts, end.replay = miscounts, replay
