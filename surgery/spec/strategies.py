"""Strategies for hypothesis: models, parts, rules, patterns and addresses at random, small first."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn

from ..edit import Edit, append, freeze, parallel, prepend, replace, unfreeze
from ..part import Maker, part, shared
from ..parts import adapter, moa
from ..pattern import Pattern, where
from ..relation import holding, inside, nearest
from ..role import ROLES, attn, block, ffn, head, norm
from ..rule import Rule, at
from ..tree import Site, Tree
from .transformer import Row, Transformer

NAMES = ("blocks", "mlp", "attn", "0", "1", "fc1", "norm")


def transformers() -> SearchStrategy[nn.Module]:
    """Small transformers in eval mode and float64, each with `example()`, inputs for it.

    Pre-norm and post-norm, fused and split projections, gated and plain feed-forward networks, in
    a module or spread over the block, features last or after the batch, stages of other widths,
    a block under two names, calls by keyword, tuples and dicts, nn.Sequential roots.

    >>> transformers().filter(lambda model: model.example().dim() == 4).example().first
    True
    """
    flag = st.booleans()
    whole = st.builds(
        Transformer,
        widths=st.sampled_from([(8,), (8, 12), (12, 8, 16)]),
        depth=st.integers(1, 2),
        heads=st.sampled_from([1, 2]),
        act=st.sampled_from([nn.GELU, nn.ReLU, nn.SiLU]),
        seed=st.integers(0, 3),
        **dict.fromkeys(("post", "fused", "gated", "spread", "first"), flag),  # type: ignore[arg-type]
        **dict.fromkeys(("aliased", "weights", "named"), flag),  # type: ignore[arg-type]
    )
    return whole | whole.filter(lambda model: not (model.named or model.again)).map(Row)


@part
def affine(site: Site, bias: bool = True) -> nn.Module:
    """A linear map that does not start as the identity; it can be merged."""
    return nn.Linear(site.width, site.out, bias=bias)


def parts() -> SearchStrategy[Maker]:
    """Parts for a rule: adapters, linear maps and mixtures, one for each site or shared."""
    rank, flag = st.integers(1, 3), st.booleans()
    own = st.one_of(
        st.builds(adapter, rank=rank, activation=st.sampled_from([nn.ReLU, nn.GELU])),
        st.builds(affine, bias=flag),
        mixtures(),
    )
    return st.one_of(own, own.map(shared))


def mixtures() -> SearchStrategy[Maker]:
    """Parts that route."""
    return st.builds(
        moa,
        experts=st.integers(2, 4),
        rank=st.integers(1, 3),
        heads=st.integers(1, 2),
        top_k=st.sampled_from([1, None]),
        fit=st.just(True),
    )


def edits() -> SearchStrategy[Edit]:
    """Edits that suit any site with features."""
    scale = st.sampled_from([1.0, 0.1, 2.0])
    return st.one_of(
        st.builds(lambda part, scale: parallel(part, scale=scale), parts(), scale),
        st.builds(lambda part, residual: append(part, residual=residual), parts(), st.booleans()),
        st.builds(lambda part, residual: prepend(part, residual=residual), parts(), st.booleans()),
        st.just(unfreeze),
    )


def rules() -> SearchStrategy[list[Rule]]:
    """One to three rules, by role, that suit every one of `transformers()`."""
    places = st.sampled_from(
        [ffn, attn, block, norm & inside(block), where(nn.Linear) & inside(attn)]
    )
    joined = st.builds(
        lambda where, *rest: at(where, *rest, optional=True), places, edits(), edits()
    )
    replaced = st.builds(lambda part: at(attn, replace(part)), parts())
    trained = st.sampled_from(
        [at(head, unfreeze), at(nearest(norm, before=ffn), unfreeze, freeze, unfreeze)]
    )
    sure = st.builds(lambda part: at(ffn, parallel(part, scale=0.5)), parts())
    some = st.lists(joined | trained, max_size=2)
    return st.one_of(st.builds(lambda a, more: [a, *more], sure, some), replaced.map(lambda a: [a]))


def addresses(paths: Sequence[str] = ()) -> SearchStrategy[str]:
    """Well-formed addresses; with the paths of a model, many of them match some.

    >>> from surgery.address import parse
    >>> _ = parse(addresses(["blocks.0.mlp"]).example())
    """
    known = st.sampled_from(list(paths) or ["blocks.0.mlp.fc1", "head"]).map(lambda p: p.split("."))
    strange = st.lists(st.sampled_from(NAMES), max_size=4)
    return (known | strange).flatmap(lambda steps: st.tuples(*map(_form, steps))).map(".".join)


def _form(name: str) -> SearchStrategy[str]:
    """A step as it is, or one that may stand for it."""
    bound = st.none() | st.integers(-3, 3)
    slices = st.builds(
        lambda a, b, c: f"[{_n(a)}:{_n(b)}{'' if c is None else f':{c}'}]",
        bound, bound, st.none() | st.sampled_from([-2, -1, 1, 2]),
    )  # fmt: skip
    return st.one_of(
        st.just(name),
        st.sampled_from(["*", "**", "{a}", "{b}", "{%s,other}" % name]),
        st.integers(-3, 3).map(lambda i: f"[{i}]"),
        slices,
    )


def _n(value: int | None) -> str:
    return "" if value is None else str(value)


class ModelStrategies:
    """Strategies bound to one model: what `from_model` returns."""

    def __init__(self, model: nn.Module) -> None:
        self.tree = Tree(model)
        self.paths = [site.path for site in self.tree.sites if site.path]

    def addresses(self) -> SearchStrategy[str]:
        """Addresses, many of which match."""
        return addresses(self.paths)

    def sites(self) -> SearchStrategy[str]:
        """The address of one site."""
        return st.sampled_from([site.path for site in self.tree.sites])

    def patterns(self) -> SearchStrategy[Pattern]:
        """Addresses, roles, classes, and all that combines them."""
        kinds = sorted({type(s.module) for s in self.tree.sites}, key=lambda kind: kind.__name__)
        leaves = st.one_of(
            self.addresses().map(where), st.sampled_from(ROLES), st.sampled_from(kinds).map(where)
        )
        return st.recursive(leaves, _combined, max_leaves=3)

    def rules(self) -> SearchStrategy[list[Rule]]:
        """One or two rules at sites of the model that have a width."""
        wide = [s.path for s in self.tree.sites if s.path and s.shape.width and s.shape.out]
        one = st.builds(lambda path, edit: at(path, edit), st.sampled_from(wide), edits())
        return st.lists(one, min_size=1, max_size=2, unique_by=lambda rule: repr(rule.where))


def _combined(inner: SearchStrategy[Pattern]) -> SearchStrategy[Pattern]:
    return st.one_of(
        st.builds(lambda p, q: p & q, inner, inner),
        st.builds(lambda p, q: p | q, inner, inner),
        inner.map(lambda p: ~p),
        inner.map(inside),
        inner.map(holding),
    )


def from_model(model: nn.Module) -> ModelStrategies:
    """Strategies for one model: `addresses() sites() patterns() rules()`.

    >>> from_model(nn.Sequential(nn.Linear(2, 2))).sites().example() in ("", "0")
    True
    """
    return ModelStrategies(model)
