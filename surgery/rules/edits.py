"""What: edits are values that say how a part is joined to a site, or what is trained there.

A new one: its class and word here, the word in `rules/__init__`; what happens at its `place` in a
forward is in `engine/hooks` (HookedSite.enter, leave), how it merges in `engine/folding` (_with).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from ..errors import RuleError, is_integer
from ..structure.key_width import key_width
from ..structure.layers import Shape, is_token
from ..structure.module_tree import Site
from ..structure.path import Step, match, parse
from .expression import Expression, shown
from .part import Maker, Part, Shared, maker
from .selector import Selector, Where, plain, where


class Edit(Expression):
    """Base of all edits."""


@dataclass(frozen=True, repr=False)
class Token(Expression):
    """Learned tokens of a model, such as a class token: parameters (1, 1, width)."""

    def __repr__(self) -> str:
        return self.word


token = Token()


@dataclass(frozen=True, repr=False)
class Trained(Edit):
    """Says of the parameters of a site that they are trained, or not.

    Called with addresses, it speaks of those parameters alone, by their names from the site on;
    called with `token`, of learned tokens (class tokens), whatever they are called.

    >>> unfreeze("**.bias"), unfreeze(token)
    (unfreeze("**.bias"), unfreeze(token))
    """

    trained: bool
    only: tuple[str | Token, ...] = ()

    @property
    def word(self) -> str:
        return "unfreeze" if self.trained else "freeze"

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        return self.only, {}

    def __repr__(self) -> str:
        return super().__repr__() if self.only else self.word

    def __call__(self, *only: str | Token) -> Trained:
        for name in only:
            if not isinstance(name, Token):
                self._check(name)
        return Trained(self.trained, only)

    def _check(self, name: object) -> None:
        """Raise RuleError unless parameters can have such a name."""
        if not isinstance(name, str):
            raise RuleError(
                f"{self.word}({shown(name)})",
                "parameters are told by an address, from the site on.",
                f'Write {self.word}("**.bias"), for example.',
            )
        if "[" in name or "]" in name:
            raise RuleError(
                f"{self.word}({shown(name)})",
                "a parameter has a name, and no position.",
                f'Give the place to at: at("blocks.[-1]", {self.word}("**.bias")).',
            )
        parse(name)

    def parameters(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """Those of a module, by name, that it speaks of."""
        named = list(module.named_parameters(remove_duplicate=False))
        return [(name, p) for name, p in named if not self.only or self._means(name, p)]

    def _means(self, name: str, p: nn.Parameter) -> bool:
        steps = tuple(Step(step, 0, 1) for step in name.split("."))
        return any(
            is_token(p) if isinstance(meant, Token) else match(meant, steps) is not None
            for meant in self.only
        )


freeze, unfreeze = Trained(False), Trained(True)


@dataclass(frozen=True, repr=False)
class Joined(Edit):
    """Joins a part to a site.

    hears   whose part's answer its part is given, besides what the site has
    """

    place: ClassVar[str]
    can_be_heard: ClassVar[bool] = True  # whether what its part gives can be heard
    part: Maker
    hears: Selector | None = field(default=None, kw_only=True)

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        given, named = super().arguments()
        return given, {**named, **({"hears": plain(self.hears)} if self.hears else {})}

    @property
    def scale(self) -> float | None:
        return None

    def port(self, site: Site) -> Shape:
        """The widths of the part: what it is given, what it must return."""
        return site.shape


@dataclass(frozen=True, repr=False)
class Parallel(Joined):
    place = "beside"
    weight: float = field(default=1.0, kw_only=True)

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        (part, *_), named = super().arguments()
        weight = named.pop("weight", 1.0)
        return (part,), {**({} if weight == 1.0 else {"scale": weight}), **named}

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
    can_be_heard = False


class Attend(Joined):
    """Lets attention attend to more keys and values."""

    place = "attended"
    can_be_heard = False

    def port(self, site: Site) -> Shape:
        return Shape(site.shape.width, key_width(site), site.axis)


@dataclass(frozen=True, repr=False)
class Side(Joined):
    """Runs a part aside, for others to hear."""

    detach: bool = field(default=True, kw_only=True)

    @property
    def place(self) -> str:  # type: ignore[override]
        return "aside" if self.detach else "along"

    def port(self, site: Site) -> Shape:
        return Shape(site.shape.out, site.shape.out, site.exit.axis)


@dataclass(frozen=True, repr=False)
class Insert(Joined):
    """Puts the tokens that a part gives among those of the site."""

    can_be_heard = False
    after: int = field(default=1, kw_only=True)
    keep: bool = field(default=False, kw_only=True)

    @property
    def place(self) -> str:  # type: ignore[override]
        return "into" if self.keep else "among"

    def port(self, site: Site) -> Shape:
        return Shape(site.shape.width, site.shape.width, site.axis)


def parallel(part: Maker, *, scale: float = 1.0, hears: Where | None = None) -> Parallel:
    """Run `part` beside the site, on the site's own input: y = site(x) + scale * part(x).

    hears   a pattern: the part is given, as a second argument, what the part at the last such
            site before this one gave in this forward, features last; so in all edits

    >>> parallel(lambda site: nn.Linear(site.width, site.out), scale=0.1)  # doctest: +ELLIPSIS
    parallel(<<lambda> at ...>, scale=0.1)
    """
    return Parallel(maker(part, "parallel"), weight=float(scale), hears=_heard(hears))


def append(part: Maker, *, residual: bool = False, hears: Where | None = None) -> Append:
    """Run `part` on the site's output: y = part(site(x)).

    With `residual` it is added: y = site(x) + part(site(x)).

    >>> append(lambda site: nn.LayerNorm(site.width))  # doctest: +ELLIPSIS
    append(<<lambda> at ...>)
    """
    return Append(maker(part, "append"), residual=residual, hears=_heard(hears))


def prepend(part: Maker, *, residual: bool = False, hears: Where | None = None) -> Prepend:
    """Run `part` on the site's input: y = site(part(x)).

    With `residual` it is added: y = site(x + part(x)).

    >>> prepend(lambda site: nn.LayerNorm(site.width))  # doctest: +ELLIPSIS
    prepend(<<lambda> at ...>)
    """
    return Prepend(maker(part, "prepend"), residual=residual, hears=_heard(hears))


def side(part: Maker, *, hears: Where | None = None, detach: bool = True) -> Side:
    """Run `part` aside, on the site's output without its gradient: s = part(y, s before).

    The model goes on as it was. What the part gives is heard by the part that runs aside next (the
    first is given None), so that they are a network of their own beside the model (LST, Sung et
    al. 2022), and comes back where an edit hears it: at(head, prepend(part, hears=block)).

    hears   a pattern: others than those that run aside are heard, at such sites
    detach  False: with the gradient of the site's output, where something before it is trained

    >>> side(lambda site: nn.Bilinear(site.out, 8, 8))  # doctest: +ELLIPSIS
    side(<<lambda> at ...>)
    """
    return Side(maker(part, "side"), hears=_heard(hears), detach=detach)


def replace(part: Maker, *, hears: Where | None = None) -> Replace:
    """Run `part` in place of the site's module, which stays where it is, unused, in the base.

    The part is given what the module is given, as it is (features are not moved to the last axis).

    >>> replace(lambda site: nn.Identity())  # doctest: +ELLIPSIS
    replace(<<lambda> at ...>)
    """
    return Replace(maker(part, "replace"), hears=_heard(hears))


def insert(
    part: Maker, *, after: int = 1, hears: Where | None = None, keep: bool = False
) -> Insert:
    """Put the tokens that `part` gives among those that come to the site: [x_1, P, x_2, ...].

    The part is called with the tokens that come, (b, n, width), and gives (b, p, width). They are
    taken out again where features leave the site: at(block, insert(...)) is VPT-deep, whose every
    block has its own, and at(until(block[0], block), insert(...)) is VPT-shallow (Jia et al. 2022).

    after   how many tokens stay before them: 1, the class token
    hears   a pattern: the part is given what another gave, as in `parallel` (Adapter-X's prompts)
    keep    they are not taken out again

    Raises RuleError or GraftError where the model's attention fixes the number of tokens.

    >>> from surgery.parts import prompt
    >>> insert(prompt(tokens=5))
    insert(prompt(tokens=5))
    """
    if not is_integer(after, least=0):
        raise RuleError(
            f"insert(after={after!r})", "it is no number of tokens.", "Give 0, or 1 (class token)."
        )
    return Insert(maker(part, "insert"), after=after, hears=_heard(hears), keep=keep)


def attend(part: Maker, *, hears: Where | None = None) -> Attend:
    """Let attention attend to what `part` gives, too: softmax(q [P_k, K]^T) [P_v, V].

    The part is called with what the site is given and gives keys and values, each (tokens, width),
    of all heads, `site.out` wide. Masks hide none of them and caches hold none, so that positions
    are what they were. Attention is what F.scaled_dot_product_attention or nn.MultiheadAttention
    computes within the site, or softmax of a product, times another, written out; a forward without
    raises GraftError.

    >>> from surgery.parts import prefix
    >>> attend(prefix(tokens=5))
    attend(prefix(tokens=5))
    """
    return Attend(maker(part, "attend"), hears=_heard(hears))


def _heard(pattern: Where | None) -> Selector | None:
    return None if pattern is None else where(pattern)


USUAL: dict[str, Callable[[Maker], Joined]] = {
    "parallel": parallel,
    "append": append,
    "prepend": prepend,
    "insert": insert,
    "side": side,
    "attend": attend,
}


def usual(edit: object) -> object:
    """A part that is mostly joined in one way, joined so; anything else as it is."""
    inner = edit.part if isinstance(edit, Shared) else edit
    word = getattr(inner.build, "edit", None) if isinstance(inner, Part) else None
    return USUAL[word](edit) if word else edit  # type: ignore[arg-type]
