"""Where: patterns are values that select sites of a tree.

A string is an address, a class is `isinstance`, a function of a site is a predicate; `&`, `|` and
`~` combine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Any, TypeAlias

from torch import nn

from ..errors import RuleError
from ..structure import path
from ..structure.module_tree import Site, Tree
from ..structure.places import spans_at
from ..structure.weights import ParameterSite
from .expression import Expression, shown

Where: TypeAlias = "Selector | str | type | UnionType | Callable[[Site], bool]"
Selected: TypeAlias = dict[Site, dict[str, str]]  # the selected sites, with what each captured


class Selector(Expression):
    """Base of all patterns. `find` selects, a subclass says how by `test` or by `select`.

    >>> from torch import nn
    >>> where("blocks.*") & ~where(nn.Linear)
    where("blocks.*") & ~where(nn.Linear)
    """

    def find(self, tree: Tree) -> Selected:
        """The sites of `tree` that this pattern selects, in the order of the walk."""
        if self not in tree.memo:
            tree.memo[self] = self.select(tree)
        selected: Selected = tree.memo[self]
        return selected

    def select(self, tree: Tree) -> Selected:
        tested = ((site, self.test(tree, site)) for site in self.candidates(tree))
        return {site: captures for site, captures in tested if captures is not None}

    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        """What the pattern captures at one site (a span too), None where it does not match."""
        return self.find(tree).get(site)

    def candidates(self, tree: Tree) -> list[Site]:
        """The sites among which the pattern selects: those of the tree, and spans it speaks of."""
        return tree.sites

    def told_by_forward(self, tree: Tree) -> bool:
        """Whether a forward could tell more of it than the modules do: it is what feeds what."""
        return False

    def __and__(self, other: Where) -> Selector:
        return Both(self, where(other))

    def __rand__(self, other: Where) -> Selector:
        return Both(where(other), self)

    def __or__(self, other: Where) -> Selector:
        return Either(self, where(other))

    def __ror__(self, other: Where) -> Selector:
        return Either(where(other), self)

    def __invert__(self) -> Selector:
        return self.pattern if isinstance(self, Other) else Other(self)

    def __getitem__(self, chosen: int | slice) -> Selector:
        """Some of what it selects, counted as Python counts: ffn[-4:], block[0]."""
        bounds: tuple[int | None, ...]
        if isinstance(chosen, slice):
            bounds, counts = (chosen.start, chosen.stop, chosen.step), [int, type(None)]
        else:
            bounds, counts = (chosen,), [int]
        if any(type(bound) not in counts for bound in bounds) or bounds[2:] == (0,):
            raise RuleError(
                f"{self!r}[{chosen!r}]", "this counts no sites.", f"Write {self!r}[0] or [-4:]."
            )
        return Chosen(self, bounds)

    __iter__ = None  # else Python would count on, without end


class Selection(Selector):
    """Base of patterns that select as a whole, by `select`, spans of their own among it."""

    def candidates(self, tree: Tree) -> list[Site]:
        return list(self.find(tree))


@dataclass(frozen=True, repr=False)
class Chosen(Selection):
    """Some of the sites of a pattern, by their number or from, to and step."""

    pattern: Selector
    rest: tuple[int | None, ...]

    @property
    def word(self) -> str:
        return "[]"

    def select(self, tree: Tree) -> Selected:
        items = list(self.pattern.find(tree).items())
        if len(self.rest) > 1:
            return dict(items[slice(*self.rest)])
        index = self.rest[0] or 0
        return dict([items[index]] if -len(items) <= index < len(items) else [])

    def is_beyond(self, tree: Tree) -> bool:
        """Whether it asks for one site by a number that the pattern, which has some, has not."""
        return len(self.rest) == 1 and bool(self.pattern.find(tree)) and not self.find(tree)

    def __repr__(self) -> str:
        bounds = ["" if b is None else str(b) for b in self.rest]
        inner = ":".join(bounds[:2] if bounds[2:] == [""] else bounds)
        loose = isinstance(self.pattern, (_Infix, Other))
        return f"({self.pattern!r})[{inner}]" if loose else f"{self.pattern!r}[{inner}]"


def where(what: Where) -> Selector:
    """Anything that says where, as a pattern: an address, a class or a predicate on a site.

    Raises RuleError where `what` is none of these, or an address that does not parse.

    >>> where("blocks.*.mlp") & where(lambda site: site.width > 64)  # doctest: +ELLIPSIS
    where("blocks.*.mlp") & where(<<lambda> at ...>)
    """
    if isinstance(what, Selector):
        return what
    if isinstance(what, str):
        path.parse(what)
        return SpanAddress(what) if path.split_span(what) else Address(what)
    if isinstance(what, (type, UnionType)):
        return Kind(what)
    if callable(what) and not isinstance(what, (nn.Module, Expression)):
        return Predicate(what)
    raise RuleError(
        f"where({type(what).__name__ if isinstance(what, nn.Module) else shown(what)})",
        f"{type(what).__name__} says no place.",
        'Give an address ("blocks.*.mlp"), a role (ffn), a class, or a function of a site.',
    )


def plain(pattern: Selector) -> Any:
    """A pattern as it is written where a pattern is expected: an address as its string."""
    return pattern.what if isinstance(pattern, Address) else pattern


@dataclass(frozen=True, repr=False)
class _Single(Selector):
    """Base of patterns that look at one site alone: an address, a class, a predicate."""

    what: Any

    @property
    def word(self) -> str:
        return "where"


class Address(_Single):
    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        for steps in (site.steps, *site.aliases):
            if (captures := path.match(self.what, steps)) is not None:
                return captures
        return None


class SpanAddress(Address, Selection):
    """An address of spans: "layers.*.(linear1 to linear2)"."""

    def select(self, tree: Tree) -> Selected:
        holder, entry, exit = path.split_span(self.what) or ("", "", "")
        found = {
            span: {**captures, **inner}
            for site, captures in Address(holder).find(tree).items()
            for span, inner in spans_at(tree, site, entry, exit)
        }
        return dict(sorted(found.items(), key=lambda item: item[0].order))

    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        return self.find(tree).get(site)


class Kind(_Single):
    """A class: of modules, or nn.Parameter of places that are parameters."""

    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        what = site.parameter if isinstance(site, ParameterSite) else site.module
        return {} if isinstance(what, self.what) else None


class Predicate(_Single):
    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        return {} if self.what(site) else None


@dataclass(frozen=True, repr=False)
class _Infix(Selector):
    left: Selector
    right: Selector

    @property
    def word(self) -> str:
        return "&" if isinstance(self, Both) else "|"

    def candidates(self, tree: Tree) -> list[Site]:
        both = dict.fromkeys([*self.left.candidates(tree), *self.right.candidates(tree)])
        return sorted(both, key=lambda site: site.order)

    def __repr__(self) -> str:
        loose = Either if isinstance(self, Both) else Both
        left = f"({self.left!r})" if isinstance(self.left, loose) else repr(self.left)
        right = f"({self.right!r})" if isinstance(self.right, _Infix) else repr(self.right)
        return f"{left} {self.word} {right}"


class Both(_Infix):
    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        left = self.left.test(tree, site)
        right = self.right.test(tree, site) if left is not None else None
        return None if left is None or right is None else {**left, **right}


class Either(_Infix):
    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        left = self.left.test(tree, site)
        return left if left is not None else self.right.test(tree, site)


@dataclass(frozen=True, repr=False)
class Other(Selector):
    pattern: Selector

    @property
    def word(self) -> str:
        return "~"

    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        return {} if self.pattern.test(tree, site) is None else None

    def candidates(self, tree: Tree) -> list[Site]:
        both = dict.fromkeys([*tree.sites, *self.pattern.candidates(tree)])
        return sorted(both, key=lambda site: site.order)

    def __repr__(self) -> str:
        inner = repr(self.pattern)
        return f"~({inner})" if isinstance(self.pattern, _Infix) else f"~{inner}"
