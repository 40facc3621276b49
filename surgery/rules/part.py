"""A part before there is a site: what will be built at each, or once for many (`shared`)."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Concatenate, Generic, ParamSpec, TypeGuard, TypeVar

from torch import nn

from ..errors import RuleError
from ..structure.module_tree import Site
from .expression import Expression, shown

P = ParamSpec("P")
Kind = TypeVar("Kind", bound=Callable[..., nn.Module])
Maker = Callable[[Site], nn.Module]


@dataclass(frozen=True, repr=False)
class Part(Expression):
    """A builder with all its arguments: call it with a site and it makes the module for it."""

    build: Callable[..., nn.Module]
    named: tuple[tuple[str, Any], ...]

    @property
    def word(self) -> str:
        return self.build.__name__

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        known = inspect.signature(self.build).parameters
        return (), {name: value for name, value in self.named if value != known[name].default}

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
        for name, value in bound.arguments.items():
            if self.__signature__.parameters[name].annotation in ("float", float):
                self._check_number(name, value)
        return Part(self._build, tuple(bound.arguments.items()))

    def _check_number(self, name: str, value: object) -> None:
        if not isinstance(value, Real) or isinstance(value, bool):
            call = f"{self.__name__}({name}={value!r})"
            raise RuleError(call, "it must be a number.", "Give one.")


def usually(edit: str) -> Callable[[Kind], Kind]:
    """Say how a part is mostly joined, so that `at(where, part())` is enough: "parallel", ..."""

    def mark(build: Kind) -> Kind:
        build.edit = edit  # type: ignore[attr-defined]
        return build

    return mark


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
class Shared(Expression):
    """What `shared` makes: a site borrows the part that a plan has; without a plan it makes one."""

    part: Maker
    by: str | Expression | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)

    def __call__(self, site: Site) -> nn.Module:
        return self.part(site) if site.borrow is None else site.borrow(self, site)


def shared(part: Maker, *, by: str | Expression | None = None, name: str | None = None) -> Shared:
    """Make `part` once and join it to every site: once per width and device.

    Another part may borrow it, as an argument: `arc(basis=shared(...))`.

    by      the name of a `{capture}` in the rule's address: once per captured value too; or a
            pattern (attn, block): once for each of its sites that is the site or holds it
    name    tells apart two shared parts that are otherwise written the same; rules that share an
            equal `shared(...)` share one part

    Raises RuleError where `part` is not callable.

    >>> shared(nn.Identity)
    shared(nn.Identity)
    """
    return Shared(maker(part, "shared"), by=by, name=name)


def is_torch_layer(value: object) -> TypeGuard[type]:
    """Whether it is a class of torch's own, made of numbers; nn.Identity takes anything."""
    of_torch = isinstance(value, type) and value.__module__.startswith("torch.nn.")
    return of_torch and value is not nn.Identity


def call_of(kind: type) -> str:
    """How a class is called with the widths of a site, as far as the names of its arguments tell.

    >>> call_of(nn.LayerNorm), call_of(nn.Linear), call_of(nn.GroupNorm), call_of(nn.GELU)
    ('nn.LayerNorm(site.width)', 'nn.Linear(site.width, site.out)', \
'nn.GroupNorm(..., site.width)', 'nn.GELU()')
    """
    known = inspect.signature(kind).parameters.values()
    packs = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in known if p.kind not in packs and p.default is p.empty]
    given = ["site.width"] if len(needed) == 1 else map(_width_called, needed)
    return f"{shown(kind)}({', '.join(given)})"


def _width_called(name: str) -> str:
    if name.startswith("out"):
        return "site.out"
    return "site.width" if re.match("in_|num_(features|channels)|.*dim$|width", name) else "..."


def maker(value: Maker, word: str) -> Maker:
    """`value`, if it can make a part. Raises RuleError otherwise."""
    if isinstance(value, _Word):
        raise RuleError(
            f"{word}({value.__name__})",
            f"{value.__name__} is the word, not yet the part.",
            f"Call it: {word}({value.__name__}()).",
        )
    made_by = value.func if isinstance(value, functools.partial) else value
    if is_torch_layer(made_by):
        raise RuleError(
            f"{word}({shown(value)})",
            f"a part is made by a function of the site, and {shown(made_by)}(site) is no layer.",
            f"Write {word}(lambda site: {call_of(made_by)}).",
        )
    makes_no_part = isinstance(value, Expression) and not isinstance(value, (Part, Shared))
    is_module = isinstance(value, nn.Module)  # which may be called, but not with a site
    if is_module or makes_no_part or not callable(value):
        kind = type(value).__name__
        raise RuleError(
            f"{word}({kind if is_module else shown(value)})",
            f"this {kind} is no part: a part is made for each site, by a function of the site.",
            f"Write {word}(lambda site: YourModule(site.width)).",
        )
    return value
