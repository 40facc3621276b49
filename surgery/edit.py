"""What: edits are values that say how a part meets a site, or what is trained there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .leaf import Shape
from .part import Maker, maker
from .term import Term
from .tree import Site


class Edit(Term):
    """Base of all edits."""


@dataclass(frozen=True, repr=False)
class Trained(Edit):
    """Says of the parameters of a site that they are trained, or not."""

    trained: bool

    @property
    def word(self) -> str:
        return "unfreeze" if self.trained else "freeze"

    def __repr__(self) -> str:
        return self.word


freeze, unfreeze = Trained(False), Trained(True)


@dataclass(frozen=True, repr=False)
class Joined(Edit):
    """Joins a part to a site."""

    place: ClassVar[str]
    part: Maker

    @property
    def scale(self) -> float | None:
        return None

    def port(self, site: Site) -> Shape:
        """The widths that the part meets: what it is given, what it must return."""
        return site.shape


@dataclass(frozen=True, repr=False)
class Parallel(Joined):
    place = "beside"
    weight: float = field(default=1.0, kw_only=True)

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        return (self.part,), {} if self.weight == 1.0 else {"scale": self.weight}

    @property
    def scale(self) -> float | None:
        return self.weight


@dataclass(frozen=True, repr=False)
class _Serial(Joined):
    residual: bool = field(default=False, kw_only=True)

    @property
    def scale(self) -> float | None:
        return 1.0 if self.residual else None


class Append(_Serial):
    place = "after"

    def port(self, site: Site) -> Shape:
        return Shape(site.shape.out, site.shape.out, site.exit.axis)


class Prepend(_Serial):
    place = "before"

    def port(self, site: Site) -> Shape:
        return Shape(site.shape.width, site.shape.width, site.axis)


class Replace(Joined):
    place = "instead"


def parallel(part: Maker, *, scale: float = 1.0) -> Parallel:
    """Run `part` beside the site, on the site's own input: y = site(x) + scale * part(x).

    >>> parallel(lambda site: nn.Linear(site.width, site.out), scale=0.1)  # doctest: +ELLIPSIS
    parallel(<<lambda> at ...>, scale=0.1)
    """
    return Parallel(maker(part, "parallel"), weight=float(scale))


def append(part: Maker, *, residual: bool = False) -> Append:
    """Run `part` on the site's output: y = part(site(x)).

    With `residual` it is added: y = site(x) + part(site(x)).

    >>> append(lambda site: nn.LayerNorm(site.width))  # doctest: +ELLIPSIS
    append(<<lambda> at ...>)
    """
    return Append(maker(part, "append"), residual=residual)


def prepend(part: Maker, *, residual: bool = False) -> Prepend:
    """Run `part` on the site's input: y = site(part(x)).

    With `residual` it is added: y = site(x + part(x)).

    >>> prepend(lambda site: nn.LayerNorm(site.width))  # doctest: +ELLIPSIS
    prepend(<<lambda> at ...>)
    """
    return Prepend(maker(part, "prepend"), residual=residual)


def replace(part: Maker) -> Replace:
    """Run `part` in place of the site's module, which stays where it is, unused, in the base.

    The part is given what the module is given, as it is (features are not moved to the last axis).

    >>> replace(lambda site: nn.Identity())  # doctest: +ELLIPSIS
    replace(<<lambda> at ...>)
    """
    return Replace(maker(part, "replace"))
