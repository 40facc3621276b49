"""Where: patterns are values that select sites of a tree.

A string is an address, a class is `isinstance`, a function of a site is a predicate; `&`, `|` and
`~` combine, `inside`, `holding`, `nearest` and `span` relate.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, TypeAlias

from torch import nn

from . import address
from .errors import RuleError
from .leaf import Shape, is_norm
from .term import Term, show
from .tree import Site, Tree
from .tree import span as make_span

Where: TypeAlias = "Pattern | str | type | UnionType | Callable[[Site], bool]"
Fed: TypeAlias = Callable[[Site, list[Site], bool], "Site | None"]  # or LookupError; see flow.Fed
Found: TypeAlias = dict[Site, dict[str, str]]  # the selected sites, with what each captured


@dataclass(frozen=True, repr=False)
class Pattern(Term):
    """Base of all patterns. `find` selects, a subclass says how by `test` or by `select`.

    >>> from torch import nn
    >>> inside("blocks.[0]") & ~where(nn.Linear)
    inside("blocks.[0]") & ~where(nn.Linear)
    """

    def find(self, tree: Tree) -> Found:
        """The sites of `tree` that this pattern selects, in the order of the walk."""
        if self not in tree.memo:
            tree.memo[self] = self.select(tree)
        found: Found = tree.memo[self]
        return found

    def select(self, tree: Tree) -> Found:
        tested = ((site, self.test(tree, site)) for site in self.candidates(tree))
        return {site: captures for site, captures in tested if captures is not None}

    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        """What the pattern captures at one site (a span too), None where it does not match."""
        return self.find(tree).get(site)

    def candidates(self, tree: Tree) -> list[Site]:
        """The sites among which the pattern selects: those of the tree, and spans it speaks of."""
        return tree.sites

    def __and__(self, other: Where) -> Pattern:
        return Both(self, where(other))

    def __rand__(self, other: Where) -> Pattern:
        return Both(where(other), self)

    def __or__(self, other: Where) -> Pattern:
        return Either(self, where(other))

    def __ror__(self, other: Where) -> Pattern:
        return Either(where(other), self)

    def __invert__(self) -> Pattern:
        return self.pattern if isinstance(self, Other) else Other(self)


def where(what: Where) -> Pattern:
    """Anything that says where, as a pattern: an address, a class or a predicate on a site.

    Raises RuleError where `what` is none of these, or an address that does not parse.

    >>> where("blocks.*.mlp") & where(lambda site: site.width > 64)  # doctest: +ELLIPSIS
    where("blocks.*.mlp") & where(<<lambda> at ...>)
    """
    if isinstance(what, Pattern):
        return what
    if isinstance(what, str):
        address.parse(what)
        return Address(what)
    if isinstance(what, (type, UnionType)):
        return Kind(what)
    if callable(what) and not isinstance(what, (nn.Module, Term)):
        return Predicate(what)
    raise RuleError(
        f"where({type(what).__name__ if isinstance(what, nn.Module) else show(what)})",
        f"{type(what).__name__} says no place.",
        'Give an address ("blocks.*.mlp"), a role (ffn), a class, or a function of a site.',
    )


def plain(pattern: Pattern) -> Any:
    """A pattern as it is written where a pattern is expected: an address as its string."""
    return pattern.what if isinstance(pattern, Address) else pattern


@dataclass(frozen=True, repr=False)
class _Leaf(Pattern):
    what: Any

    @property
    def word(self) -> str:
        return "where"


@dataclass(frozen=True, repr=False)
class Address(_Leaf):
    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        for steps in (site.steps, *site.aliases):
            if (captures := address.match(self.what, steps)) is not None:
                return captures
        return None


@dataclass(frozen=True, repr=False)
class Kind(_Leaf):
    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        return {} if isinstance(site.module, self.what) else None


@dataclass(frozen=True, repr=False)
class Predicate(_Leaf):
    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        return {} if self.what(site) else None


@dataclass(frozen=True, repr=False)
class _Infix(Pattern):
    left: Pattern
    right: Pattern

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


@dataclass(frozen=True, repr=False)
class Both(_Infix):
    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        left = self.left.test(tree, site)
        right = self.right.test(tree, site) if left is not None else None
        return None if left is None or right is None else {**left, **right}


@dataclass(frozen=True, repr=False)
class Either(_Infix):
    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        left = self.left.test(tree, site)
        return left if left is not None else self.right.test(tree, site)


@dataclass(frozen=True, repr=False)
class Other(Pattern):
    pattern: Pattern

    @property
    def word(self) -> str:
        return "~"

    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        return {} if self.pattern.test(tree, site) is None else None

    def candidates(self, tree: Tree) -> list[Site]:
        return list(dict.fromkeys([*tree.sites, *self.pattern.candidates(tree)]))

    def __repr__(self) -> str:
        inner = repr(self.pattern)
        return f"~({inner})" if isinstance(self.pattern, _Infix) else f"~{inner}"


@dataclass(frozen=True, repr=False)
class _Around(Pattern):
    pattern: Pattern

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (plain(self.pattern),), {}


@dataclass(frozen=True, repr=False)
class Inside(_Around):
    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        inner = tree.memo.get((self, "inner"))
        if inner is None:
            inner = tree.memo[self, "inner"] = {
                id(module)
                for found in self.pattern.find(tree)
                for end in (found.entry, found.exit)
                for module in list(end.module.modules())[0 if found.is_span else 1 :]
            }
        return {} if id(site.entry.module) in inner and id(site.exit.module) in inner else None


@dataclass(frozen=True, repr=False)
class Holding(_Around):
    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        if (self, "tops") not in tree.memo:
            tree.memo[self, "tops"] = [
                {id(found.entry.module), id(found.exit.module)} for found in self.pattern.find(tree)
            ]
        below = {id(m) for m in list(site.module.modules())[1:]} if not site.is_span else set()
        return {} if any(top <= below for top in tree.memo[self, "tops"]) else None


@dataclass(frozen=True, repr=False)
class Nearest(Pattern):
    pattern: Pattern
    before: Pattern | None = field(default=None, kw_only=True)
    after: Pattern | None = field(default=None, kw_only=True)

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sides = {"before": self.before, "after": self.after}
        return (plain(self.pattern),), {k: plain(v) for k, v in sides.items() if v is not None}

    def pairs(self, tree: Tree, whole: bool = False) -> list[tuple[Site, Site]]:
        """(nearest, anchor) for every anchor that has one; `whole`: one that a span begins at."""
        anchors = (self.before or self.after or self.pattern).find(tree)
        found = sorted(self.pattern.find(tree), key=lambda site: site.order)
        named = isinstance(self.pattern, Address)
        found = [site for site in found if named or not site.is_folded]
        pairs = ((self._partner(tree, anchor, found, whole), anchor) for anchor in anchors)
        return [(near, anchor) for near, anchor in pairs if near is not None]

    def _partner(self, tree: Tree, anchor: Site, found: list[Site], whole: bool) -> Site | None:
        if self.before is None:
            return _after(anchor, found)
        fed: Fed | None = tree.memo.get("fed")
        if fed:
            with suppress(LookupError):
                return fed(anchor, found, whole)
        return _before(anchor, found, isinstance(self.pattern, Address))

    def select(self, tree: Tree) -> Found:
        near = {site for site, _ in self.pairs(tree)}
        return {site: {} for site in sorted(near, key=lambda site: site.order)}

    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        return self.find(tree).get(site)

    def candidates(self, tree: Tree) -> list[Site]:
        return list(self.find(tree))


@dataclass(frozen=True, repr=False)
class Span(Pattern):
    entry: Pattern
    exit: Pattern

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (plain(self.entry), plain(self.exit)), {}

    def select(self, tree: Tree) -> Found:
        pairs = Nearest(self.entry, before=self.exit).pairs(tree, whole=True)
        near = {anchor: near for near, anchor in pairs}
        anchors = self.exit.find(tree)
        return {_from(near[site], site) if site in near else site: {} for site in anchors}

    def test(self, tree: Tree, site: Site) -> dict[str, str] | None:
        return self.find(tree).get(site)

    def candidates(self, tree: Tree) -> list[Site]:
        return list(self.find(tree))


def inside(pattern: Where) -> Pattern:
    """Every module strictly inside a site that `pattern` selects.

    >>> inside("blocks.[0]")
    inside("blocks.[0]")
    """
    return Inside(where(pattern))


def holding(pattern: Where) -> Pattern:
    """Every module that holds, at any depth, a site that `pattern` selects.

    >>> holding("**.attn")
    holding("**.attn")
    """
    return Holding(where(pattern))


def nearest(pattern: Where, *, before: Where | None = None, after: Where | None = None) -> Pattern:
    """For each site of `before` (or `after`), the one site of `pattern` that comes nearest it.

    Order is that of execution as far as the module tree shows it: where a module has as many
    direct children that match as it has branches with weights (ViT, CLIP, Llama: two norms;
    attention and FFN), the first belongs to the first, and so on, however they are registered.
    Otherwise the last match registered before the anchor is taken; a norm from the anchor's own
    block only. With apply(..., example=x) a forward decides which norm it is: the one whose
    output comes to the anchor's input without a residual sum between, if there is one.

    A batch norm that is one step with the convolution before it counts where an address names it.

    Raises RuleError unless exactly one of `before` and `after` is given.

    >>> nearest("**.norm2", before="**.mlp")
    nearest("**.norm2", before="**.mlp")
    """
    if (before is None) == (after is None):
        raise RuleError(
            f"nearest({show(plain(where(pattern)))}, ...)",
            "it needs an anchor on one side, and one only.",
            "Write nearest(norm, before=ffn) or nearest(norm, after=attn).",
        )
    if before is not None:
        return Nearest(where(pattern), before=where(before))
    return Nearest(where(pattern), after=where(after if after is not None else pattern))


def span(entry: Where, exit: Where) -> Pattern:
    """The stretch from the input of the nearest `entry` before each `exit`, to that one's output.

    A part joined in parallel to `span(norm, ffn)` reads what the norm reads and adds where the
    FFN ends: the place of AdaptFormer (Chen et al. 2022, Eq. 3). An `exit` that has no such
    `entry` is taken alone (a block that norms after its FFN).

    >>> span("**.norm2", "**.mlp")
    span("**.norm2", "**.mlp")
    """
    return Span(where(entry), where(exit))


def _before(anchor: Site, found: list[Site], named: bool) -> Site | None:
    """By registration. A norm of another block feeds this one by way of a residual sum only.

    named  by an address: whoever names a norm means it
    """
    apart = False
    for holder in anchor.entry.above():
        around = _around(anchor, holder, found)
        if apart and not named:
            around = [site for site in around if not is_norm(site.module)]
        direct = [site for site in around if site.parent is holder]
        branches = _branches(anchor, holder, direct)
        if direct and len(direct) == len(branches):
            return direct[next(i for i, branch in enumerate(branches) if _meets(branch, anchor))]
        earlier = [site for site in around if site.order < anchor.order]
        if earlier:
            return _beside(earlier[-1], anchor) or earlier[-1]
        apart = apart or holder.is_element
    return None


def _beside(near: Site, anchor: Site) -> Site | None:
    """Of a list as long as that of the anchor, the one of its number (XLM lists norms and FFNs)."""
    if anchor.is_span or not (near.is_element and anchor.is_element):
        return None
    ours, theirs = (site.parent.children for site in (anchor, near) if site.parent)
    return theirs[anchor.index] if ours is not theirs and len(ours) == len(theirs) else None


def _from(near: Site, anchor: Site) -> Site:
    """The span from `near` to the end of the anchor; features lie in it where the anchor's do."""
    made = make_span(near.entry, anchor.exit)
    if near.width and anchor.out:
        made._shape = Shape(near.width, anchor.out, anchor.axis)
    return made


def _after(anchor: Site, found: list[Site]) -> Site | None:
    for holder in anchor.exit.above():
        later = [site for site in _around(anchor, holder, found) if site.order >= anchor.end]
        if later:
            return later[0]
    return None


def _around(anchor: Site, holder: Site, found: list[Site]) -> list[Site]:
    """Those of `found` below `holder` that neither hold the anchor nor lie inside it."""
    low = bisect_left(found, holder.order + 1, key=lambda site: site.order)
    high = bisect_left(found, holder.end, key=lambda site: site.order)
    return [site for site in found[low:high] if not _meets(site, anchor)]


def _meets(site: Site, anchor: Site) -> bool:
    return any(site.order < end.end and end.order < site.end for end in (anchor.entry, anchor.exit))


def _branches(anchor: Site, holder: Site, direct: list[Site]) -> list[Site]:
    """The children of `holder` that carry weight matrices; those of the anchor count as one."""
    branches: list[Site] = []
    for child in holder.children:
        own = _meets(child, anchor)
        if child in direct or not (own or _has_matrix(child)):
            continue
        if not (own and branches and _meets(branches[-1], anchor)):
            branches.append(child)
    return branches


def _has_matrix(site: Site) -> bool:
    return any(p.dim() > 1 for p in site.module.parameters())
