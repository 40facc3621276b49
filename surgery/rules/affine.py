"""A part as weight and bias, where it is linear: what can be merged into the base."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

from torch import Tensor, nn


class Affine(NamedTuple):
    """The map x -> weight x + bias: weight (out, in), or (out,) where it only scales each feature;
    bias (out,), or None for zero. Of a stack of experts all of them have a first axis more."""

    weight: Tensor
    bias: Tensor | None

    def after(self, first: Affine) -> Affine:
        """This map of what `first` gives."""
        a, b, bias = self.weight, first.weight, self.bias
        if first.bias is not None:
            moved = a * first.bias if a.dim() == 1 else (a @ first.bias[..., None])[..., 0]
            bias = moved if bias is None else moved + bias
        if a.dim() == b.dim() > 1:
            return Affine(a @ b, bias)
        scaled = (
            a[..., None] * b if a.dim() < b.dim() else a * (b if a.dim() == 1 else b[..., None, :])
        )
        return Affine(scaled, bias)

    def plus(self, other: Affine) -> Affine:
        """The sum of two maps of one input."""
        a, b = self.weight, other.weight
        if a.dim() != b.dim():
            most = max(a.dim(), b.dim())
            a, b = (w if w.dim() == most else w.diag_embed() for w in (a, b))
        if self.bias is None or other.bias is None:
            return Affine(a + b, self.bias if other.bias is None else other.bias)
        return Affine(a + b, self.bias + other.bias)

    def times(self, scale: float) -> Affine:
        """The map, scaled."""
        return Affine(self.weight * scale, None if self.bias is None else self.bias * scale)


def affine(part: nn.Module) -> Affine | None:
    """A part as weight and bias; None where it is not linear, or does not say how.

    A part of one's own says so by a method `affine()` that returns (weight, bias or None).

    >>> affine(nn.Linear(2, 3, bias=False)).weight.shape
    torch.Size([3, 2])
    """
    forward = type(part).forward
    if isinstance(part, nn.Linear) and forward is nn.Linear.forward:
        return Affine(part.weight, part.bias)
    if isinstance(part, nn.Sequential) and forward is nn.Sequential.forward:
        maps = all_affine(part)
        return reduce(lambda first, then: then.after(first), maps) if maps else None
    method = getattr(part, "affine", None)
    given = method() if callable(method) else None
    return None if given is None else Affine(*given)


def factors(part: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Down (rank, width) and up (out, rank), whose product is a part's weight; None where it has no
    such two, by a method `maps()`.

    >>> factors(nn.Linear(2, 3)) is None
    True
    """
    method = getattr(part, "maps", None)
    return method() if callable(method) else None


def all_affine(parts: Iterable[nn.Module]) -> list[Affine] | None:
    """Each of some parts as weight and bias; None where one of them is not linear."""
    maps = [affine(part) for part in parts]
    known = [map for map in maps if map is not None]
    return known if len(known) == len(maps) else None


def joined(
    map: Affine, part: Affine, place: str, scale: float | None, strength: float = 1.0
) -> Affine:
    """The map of a place with one more part there, around what came before.

    place     "before", "after", "beside" or "instead"; scale: None where it replaces
    strength  how much of the change is made

    >>> import torch
    >>> one = Affine(torch.ones(2, 2), None)
    >>> joined(one, one, "beside", 0.5).weight[0]
    tensor([1.5000, 1.5000])
    """
    if strength != 1 and scale is None:
        whole = joined(map, part, place, scale)
        return map.times(1 - strength).plus(whole.times(strength))
    scale = scale if scale is None else scale * strength
    if place == "instead":
        return part
    if place == "beside":
        return map.plus(part.times(scale if scale is not None else 1.0))
    through = part.after(map) if place == "after" else map.after(part)
    if scale is None:
        return through
    if place == "after":
        return map.plus(through.times(scale))
    return map.plus(_without_bias(through, map).times(scale))


def _without_bias(through: Affine, map: Affine) -> Affine:
    """f(x + p(x)) = f(x) + W p(x): the bias of f counts once."""
    if map.bias is None or through.bias is None:
        return through
    return Affine(through.weight, through.bias - map.bias)
