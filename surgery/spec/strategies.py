"""Strategies for hypothesis: models, parts, rules, patterns, addresses at random, small first."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn

from ..parts import QuickGELU, adapter, frozen, lora, moa, vera
from ..rules.edits import Edit, append, freeze, parallel, prepend, replace, unfreeze
from ..rules.part import Maker, part, shared
from ..rules.relations import holding, inside, nearest
from ..rules.roles import ROLES, attn, block, ffn, head, norm, proj
from ..rules.rule import Rule, at
from ..rules.selector import Selector, where
from ..structure.module_tree import Site, Tree
from ..structure.path import Step
from .transformer import Row, Transformer

NAMES = ("blocks", "mlp", "attn", "0", "1", "fc1", "norm")


def transformers() -> SearchStrategy[nn.Module]:
    """Small transformers in eval mode and float64, each with `example()`, inputs for it.

    Pre-norm and post-norm, fused and split projections, gated and plain feed-forward networks, in
    a module or spread over the block, features last or after the batch, stages of other widths,
    a block under two names, calls by keyword, tuples and dicts, nn.Sequential roots.

    >>> from hypothesis import find
    >>> find(transformers(), lambda model: model.example().dim() == 4).options["first"]
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
        **dict.fromkeys(("post", "fused", "gated", "spread", "first"), flag),
        **dict.fromkeys(("aliased", "weights", "named"), flag),
    )
    return whole | whole.filter(lambda model: not (model.named or model.again)).map(Row)


@part
def affine(site: Site, bias: bool = True) -> nn.Module:
    """A linear map that does not start as the identity; it can be merged."""
    return nn.Linear(site.width, site.out, bias=bias)


@part
def other(site: Site) -> nn.Module:
    """Something to run in place of a site: a linear map along its features, wherever they lie."""
    features_first = site.axis == 1
    linear = nn.Linear(site.width, site.out)
    return nn.Conv2d(site.width, site.out, 1) if features_first else linear


def parts() -> SearchStrategy[Maker]:
    """Parts for a rule: adapters, linear maps, low-rank ones and mixtures, own or shared."""
    smooth = st.sampled_from([nn.GELU, QuickGELU])
    unshared = st.one_of(
        st.builds(adapter, rank=st.integers(1, 3), activation=smooth),
        st.just(adapter(rank=8)),  # of fewer units with ReLU all may be dead
        st.builds(affine, bias=st.booleans()),
        st.builds(lora, rank=st.integers(1, 3)),
        st.integers(1, 3).map(lambda rank: vera(core=shared(frozen(rank=rank)))),  # it borrows
        mixtures(),
    )
    return unshared | unshared.map(shared)


def mixtures() -> SearchStrategy[Maker]:
    """Parts that route."""
    return st.builds(
        moa,
        experts=st.integers(2, 4),
        rank=st.integers(2, 3),  # of 1, embeddings of unit length are +1 or -1: experts tie
        heads=st.integers(1, 2),
        top_k=st.sampled_from([1, None]),
        activation=st.just(nn.GELU),
        fit=st.just(True),
    )


def edits(parts: SearchStrategy[Maker]) -> SearchStrategy[Edit]:
    """Edits that join parts to any site with features, or train it."""
    scale, word = st.sampled_from([1.0, 0.1, 2.0]), st.sampled_from([append, prepend])
    return st.one_of(
        st.builds(lambda part, scale: parallel(part, scale=scale), parts, scale),
        st.builds(lambda word, part: word(part, residual=True), word, parts),
        st.builds(
            lambda word: word(affine()), word
        ),  # one that starts at zero would let nothing by
        st.just(unfreeze),
    )


def rules(of: SearchStrategy[Maker] | None = None) -> SearchStrategy[list[Rule]]:
    """One to three rules, by role, that suit every one of `transformers()`.

    of  the parts to use; None: any of `parts()`

    >>> from hypothesis import find
    >>> find(rules(), lambda drawn: len(drawn) == 1)[0].where
    ffn
    """
    of = parts() if of is None else of
    any_edit = edits(of)
    places = st.sampled_from([ffn, attn, block, norm & inside(block), proj])
    joined = st.builds(
        lambda place, *rest: at(place, *rest, optional=True), places, any_edit, any_edit
    )
    trained = st.sampled_from([at(head, unfreeze), at(nearest(norm, before=ffn), freeze, unfreeze)])
    always = st.builds(lambda part: at(ffn, parallel(part, scale=0.5)), of)
    replaced = at(attn & ~where(_gives_weights), replace(other()), optional=True)
    few, alone = st.lists(joined | trained, max_size=2), st.sampled_from([[], [replaced]])
    more = alone | few  # in what is replaced no part would run
    return st.builds(lambda one, more: [one, *more], always, more)


def mergeable() -> SearchStrategy[list[Rule]]:
    """Rules with linear parts at linears."""
    flag, word = st.booleans(), st.sampled_from([append, prepend])
    edit = st.one_of(
        st.builds(lambda bias: parallel(affine(bias=bias), scale=0.5), flag),
        st.builds(lambda word, bias, to: word(affine(bias=bias), residual=to), word, flag, flag),
    )
    return st.lists(edit.map(lambda edit: at(nn.Linear, edit)), min_size=1, max_size=3)


def _gives_weights(site: Site) -> bool:
    return bool(getattr(site.module, "weights", False))


def addresses(paths: Sequence[str] = ()) -> SearchStrategy[str]:
    """Well-formed addresses; with the paths of a model, many of them match some.

    >>> from hypothesis import find
    >>> find(addresses(["blocks.0.mlp"]), lambda address: address.startswith("*"))[0]
    '*'
    """
    paths = paths or ["blocks.0.mlp", "head"]
    return _addresses([[Step(name, 0, 2) for name in path.split(".")] for path in paths])


def _addresses(paths: Sequence[Sequence[Step]]) -> SearchStrategy[str]:
    made_up = st.lists(st.sampled_from(NAMES).map(lambda name: Step(name, 1, 3)), max_size=4)
    steps = st.sampled_from(paths) | st.sampled_from(paths) | made_up
    return steps.flatmap(lambda path: st.tuples(*map(_form, path))).map(".".join)


def _form(step: Step) -> SearchStrategy[str]:
    """A step as it is, or one that may stand for it."""
    name, position, siblings = step
    near = st.sampled_from([position, position - siblings]) | st.integers(-3, 3)
    bound = st.none() | near
    slices = st.builds(
        lambda a, b, c: f"[{_bound(a)}:{_bound(b)}{'' if c is None else f':{c}'}]",
        bound, bound, st.none() | st.sampled_from([-2, -1, 1, 2]),
    )  # fmt: skip
    return st.one_of(
        st.just(name),
        st.sampled_from(["*", "**", "{a}", "{b}", f"{{{name},other}}"]),
        near.map(lambda i: f"[{i}]"),
        slices,
    )


def _bound(value: int | None) -> str:
    return "" if value is None else str(value)


class ModelStrategies:
    """Strategies bound to one model: what `from_model` returns."""

    def __init__(self, model: nn.Module) -> None:
        self.tree = Tree(model)

    def addresses(self) -> SearchStrategy[str]:
        """Addresses, many of which match."""
        return _addresses([site.steps for site in self.tree.sites if site.path] or [()])

    def sites(self) -> SearchStrategy[str]:
        """The address of one site."""
        return st.sampled_from([site.path for site in self.tree.sites])

    def patterns(self) -> SearchStrategy[Selector]:
        """Addresses, roles, classes, and all that combines them."""
        types = sorted({type(s.module) for s in self.tree.sites}, key=lambda kind: kind.__name__)
        single = st.one_of(
            self.addresses().map(where), st.sampled_from(ROLES), st.sampled_from(types).map(where)
        )
        return st.recursive(single, _combined, max_leaves=3)

    def rules(self) -> SearchStrategy[list[Rule]]:
        """One or two rules at sites of the model that have a width."""
        wide = [s.path for s in self.tree.sites if s.path and s.shape.width and s.shape.out]
        one = st.builds(lambda path, edit: at(path, edit), st.sampled_from(wide), edits(parts()))
        return st.lists(one, min_size=1, max_size=2, unique_by=lambda rule: repr(rule.where))


def _combined(inner: SearchStrategy[Selector]) -> SearchStrategy[Selector]:
    return st.one_of(
        st.builds(lambda p, q: p & q, inner, inner),
        st.builds(lambda p, q: p | q, inner, inner),
        inner.map(lambda p: ~p),
        inner.map(inside),
        inner.map(holding),
    )


def from_model(model: nn.Module) -> ModelStrategies:
    """Strategies for one model: `addresses() sites() patterns() rules()`.

    >>> from hypothesis import find
    >>> find(from_model(nn.Sequential(nn.Linear(2, 2))).sites(), lambda path: path != "")
    '0'
    """
    return ModelStrategies(model)
