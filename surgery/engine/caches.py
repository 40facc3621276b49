"""Caches of keys and values: tokens that are put in again at each step would stay in them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._inputs import tensors_in
from ..errors import GraftError


class Given(NamedTuple):
    """What a site was given beside tensors, and what lay in it then, with its versions."""

    containers: list[Any]
    before: list[tuple[Tensor, int]]


def given_beside(values: Iterable[Any]) -> Given | None:
    """What may be a cache that already holds something; None where nothing is."""
    if torch.compiler.is_compiling():
        return None
    containers = [value for value in values if not isinstance(value, Tensor)]
    before = [(t, _version(t)) for t in tensors_in(containers) if t.dim() > 1 and t.numel()]
    return Given(containers, before) if before else None


def check_caches(given: Given, output: Any, path: str) -> None:
    """Raise GraftError where what was in a cache before has become more.

    What blocks before this one put there in this forward stays as it is; and in the first of
    several forwards there is nothing yet of this one.
    """
    now = list(tensors_in(given.containers))
    still = {id(t) for t in now}
    handed_on = [t for t in tensors_in(output) if t.dim() == 4]  # beside features, as older ones do
    for t, version in given.before:
        grown = id(t) not in still and _has_grown(t, now)
        if not (grown or _is_written(t, version) or (t.dim() == 4 and _has_grown(t, handed_on))):
            continue
        raise GraftError(
            f"insert(...) at {path or 'the model'}",
            "it was given a cache that already holds keys and values of an earlier step: the "
            "tokens would be put in again at every step, and stay in it.",
            "Run the model with use_cache=False (generate(..., use_cache=False)), or give it all "
            "tokens in one forward.",
        )


def _is_written(t: Tensor, version: int) -> bool:
    """Whether a memory of fixed length was written to."""
    return t.dim() > 2 and _version(t) != version


def _has_grown(t: Tensor, now: list[Tensor]) -> bool:
    """Whether one of the tensors is this one and more along one axis."""
    return any(_longer(t.shape, other.shape) for other in now if other.dtype == t.dtype)


def _longer(old: torch.Size, new: torch.Size) -> bool:
    if len(old) != len(new):
        return False
    steps = [b - a for a, b in zip(old, new, strict=True) if a != b]
    return len(steps) == 1 and steps[0] > 0


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version
