"""A part as a value: what will be built at a site, before there is a site."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, TypeVar

from torch import Tensor, nn

from .errors import RuleError
from .term import Term, show
from .tree import Site

P = ParamSpec("P")
Kind = TypeVar("Kind", bound=Callable[..., nn.Module])
Core = TypeVar("Core", bound=nn.Module)
Maker = Callable[[Site], nn.Module]


@dataclass(frozen=True, repr=False)
class Part(Term):
    """A builder with all its arguments: call it with a site and it makes the module for it."""

    build: Callable[..., nn.Module]
    named: tuple[tuple[str, Any], ...]

    @property
    def word(self) -> str:
        return self.build.__name__

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        known = inspect.signature(self.build).parameters
        return (), {k: v for k, v in self.named if v != known[k].default}

    def everything(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), dict(self.named)

    def __call__(self, site: Site) -> nn.Module:
        return self.build(site, **dict(self.named))


class _Word(Generic[P]):
    """The public face of a builder: called without the site, it gives a `Part`."""

    def __init__(self, build: Callable[Concatenate[Site, P], nn.Module]) -> None:
        functools.update_wrapper(self, build)
        self.__name__ = build.__name__
        self._build = build
        parameters = list(inspect.signature(build).parameters.values())[1:]
        self.__signature__ = inspect.Signature(parameters, return_annotation="Part")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Part:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        return Part(self._build, tuple(bound.arguments.items()))


def usually(edit: str) -> Callable[[Kind], Kind]:
    """Say how a part is mostly joined, so that `at(where, part())` is enough: "parallel", ..."""

    def say(build: Kind) -> Kind:
        build.edit = edit  # type: ignore[attr-defined]
        return build

    return say


def part(build: Callable[Concatenate[Site, P], nn.Module]) -> _Word[P]:
    """Make a builder `(site, ...) -> nn.Module` into a word for rules.

    The builder's first argument is the site; `site.width` is the number of features that the part
    is given, `site.out` the number it must return, always on the last axis. What the word returns
    prints as it was written and compares by value. A lambda does as well where that is not needed.

    >>> @part
    ... def gate(site, bias=True):
    ...     return nn.Linear(site.width, site.out, bias=bias)
    >>> gate(bias=False)
    gate(bias=False)
    """
    return _Word(build)


@dataclass(frozen=True, repr=False)
class Shared(Term):
    part: Maker
    by: str | Term | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)

    def __call__(self, site: Site) -> nn.Module:
        return self.part(site) if site.lender is None else site.lender(self, site)


def shared(part: Maker, *, by: str | Term | None = None, name: str | None = None) -> Shared:
    """Make `part` once and join it to every site: once per width and device.

    It may be an argument of another part too, which then is lent it: `arc(basis=shared(...))`.

    by      the name of a `{capture}` in the rule's address: once per captured value too; or a
            pattern (attn, block): once for each of its sites that is the site or holds it
    name    tells apart two shared parts that are otherwise written the same; rules that share an
            equal `shared(...)` share one part

    Raises RuleError where `part` is not callable.

    >>> shared(nn.Identity)
    shared(nn.Identity)
    """
    return Shared(maker(part, "shared"), by=by, name=name)


def maker(value: Maker, word: str) -> Maker:
    """`value`, if it can make a part. Raises RuleError otherwise."""
    if isinstance(value, _Word):
        raise RuleError(
            f"{word}({value.__name__})",
            f"{value.__name__} is the word, not yet the part.",
            f"Call it: {word}({value.__name__}()).",
        )
    other = isinstance(value, Term) and not isinstance(value, (Part, Shared))
    if isinstance(value, nn.Module) or not callable(value) or other:
        kind = type(value).__name__
        raise RuleError(
            f"{word}({kind if isinstance(value, nn.Module) else show(value)})",
            f"this {kind} is no part: a part is made for each site, by a function of the site.",
            f"Write {word}(lambda site: YourModule(site.width)).",
        )
    return value


class Affine(NamedTuple):
    """The map x -> weight x + bias: weight (out, in), or (out,) where it only scales each feature;
    bias (out,), or None for zero."""

    weight: Tensor
    bias: Tensor | None

    def after(self, first: Affine) -> Affine:
        """This map of what `first` gives."""
        a, b, bias = self.weight, first.weight, self.bias
        if first.bias is not None:
            moved = a * first.bias if a.dim() == 1 else a @ first.bias
            bias = moved if bias is None else moved + bias
        if a.dim() == b.dim() == 2:
            return Affine(a @ b, bias)
        return Affine(a[:, None] * b if a.dim() < b.dim() else a * b, bias)

    def plus(self, other: Affine) -> Affine:
        """The sum of two maps of one input."""
        a, b = self.weight, other.weight
        if a.dim() != b.dim():
            a, b = (w if w.dim() == 2 else w.diag() for w in (a, b))
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
        maps = [affine(each) for each in part]
        known = [each for each in maps if each is not None]
        return (
            reduce(lambda first, then: then.after(first), known)
            if known and len(known) == len(maps)
            else None
        )
    told = getattr(part, "affine", None)
    return Affine(*told()) if callable(told) else None


def positive(rule: str, **values: object) -> None:
    """Raise RuleError unless every value is an integer from 1 up.

    >>> positive("adapter", rank=8)
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise RuleError(
                f"{rule}({name}={value!r})", "it must be an integer from 1 up.", "Give one."
            )


def lent(word: str, name: str, make: Maker, site: Site, kind: type[Core]) -> Core:
    """What a part is lent for a site. Raises RuleError where it is of another kind."""
    core = maker(make, word)(site)
    if isinstance(core, kind):
        return core
    raise RuleError(
        f"{word}({name}={show(make)})",
        f"this makes a {type(core).__name__}, and no {kind.__name__}.",
        f"Leave out {name}, or see help({word}) for what makes one.",
    )


def divisors(size: int) -> list[int]:
    """All divisors of a number of features, from 1 up.

    >>> divisors(6)
    [1, 2, 3, 6]
    """
    return [n for n in range(1, size + 1) if size % n == 0] or [1]


def fitted(size: int, n: int) -> int:
    """The divisor of a number of features nearest to n; of two equally near, the larger.

    >>> fitted(768, 5)
    6
    """
    return min(divisors(size), key=lambda d: (abs(d - n), -d))


def near_divisors(size: int, n: int) -> str:
    """The three divisors nearest to a number, in words.

    >>> near_divisors(768, 5)
    '3, 4, 6'
    """
    return ", ".join(map(str, sorted(sorted(divisors(size), key=lambda d: (abs(d - n), d))[:3])))
