"""Patterns: a boolean algebra of sites, relations between them, and how they print."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery import (
    RuleError,
    adapter,
    append,
    at,
    attn,
    block,
    ffn,
    freeze,
    head,
    holding,
    inside,
    moa,
    nearest,
    norm,
    parallel,
    prepend,
    qkv,
    replace,
    shared,
    span,
    unfreeze,
    where,
)
from surgery.structure.module_tree import Site, Tree
from tests.models import encoder, hf_bert, tiny_vit

NAMES = ["a", "b", "c"]


class Holder(nn.Module):
    """Children by name."""

    def __init__(self, children: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


leaves = st.sampled_from([nn.Identity, nn.ReLU, nn.LayerNorm]).map(
    lambda kind: kind(2) if kind is nn.LayerNorm else kind()
)
modules = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=3).map(Holder),
        st.lists(inner, max_size=3).map(lambda m: nn.Sequential(*m)),
    ),
    max_leaves=8,
)


@st.composite
def aliased(draw):
    """A model in which some module may have a second name."""
    model = Holder({"m": draw(modules), "n": draw(modules)})
    inside_m = list(model.m.modules())
    if draw(st.booleans()):
        model.add_module("again", draw(st.sampled_from(inside_m)))
    return model


simple = st.one_of(
    st.sampled_from(["**", "*", "m.**", "**.a", "**.[0]", "**.[-1]", "*.*", "", "again", "**.{x}"]),
    st.sampled_from([nn.ReLU, nn.Sequential, Holder, nn.ReLU | nn.LayerNorm]),
).map(where)
patterns = st.recursive(
    simple,
    lambda p: st.one_of(
        st.builds(lambda a, b: a & b, p, p),
        st.builds(lambda a, b: a | b, p, p),
        p.map(lambda a: ~a),
        p.map(inside),
        p.map(holding),
        st.builds(lambda a, b: nearest(a, before=b), p, p),
        st.builds(lambda a, b: nearest(a, after=b), p, p),
    ),
    max_leaves=5,
)
few = settings(max_examples=200, deadline=None)


def ids(pattern, tree: Tree) -> set[int]:
    return {id(site.module) for site in where(pattern).find(tree)}


def paths(model: nn.Module, pattern) -> list[str]:
    return [site.path for site in where(pattern).find(Tree(model))]


# algebra


@few
@given(aliased(), patterns, patterns)
def test_and_or_not_are_those_of_sets(model, a, b):
    tree = Tree(model)
    everything = {id(m) for m in model.modules()}
    assert ids("**", tree) == everything
    assert ids(a & b, tree) == ids(a, tree) & ids(b, tree)
    assert ids(a | b, tree) == ids(a, tree) | ids(b, tree)
    assert ids(~a, tree) == everything - ids(a, tree)


@few
@given(aliased(), patterns, patterns)
def test_de_morgan(model, a, b):
    tree = Tree(model)
    assert ids(~(a & b), tree) == ids(~a | ~b, tree)
    assert ids(~(a | b), tree) == ids(~a & ~b, tree)


@few
@given(aliased(), patterns)
def test_sites_come_once_and_in_the_order_of_the_walk(model, pattern):
    found = list(pattern.find(Tree(model)))
    orders = [site.order for site in found]
    assert orders == sorted(orders)
    assert len({id(site.module) for site in found}) == len(found)


@given(patterns)
def test_not_not_is_the_pattern_itself(pattern):
    assert ~~pattern == pattern


@few
@given(aliased(), patterns)
def test_inside_and_holding_mean_strictly_so(model, pattern):
    tree = Tree(model)
    chosen = ids(pattern, tree)
    everything = list(model.modules())

    def strictly_in(outer: nn.Module) -> set[int]:
        return {id(m) for m in outer.modules()} - {id(outer)}

    within = set().union(*(strictly_in(m) for m in everything if id(m) in chosen))
    assert ids(inside(pattern), tree) == within
    assert ids(holding(pattern), tree) == {id(m) for m in everything if strictly_in(m) & chosen}


@few
@given(aliased(), patterns, patterns)
def test_nearest_is_of_the_pattern_and_on_its_side(model, a, b):
    tree = Tree(model)
    assert ids(nearest(a, before=b), tree) <= ids(a, tree)
    assert ids(nearest(a, after=b), tree) <= ids(a, tree)
    assert len(ids(nearest(a, before=b), tree)) <= len(ids(b, tree))
    for site in nearest(a, after=b).find(tree):
        assert any(anchor.end <= site.order for anchor in b.find(tree))


# what a pattern may be


def test_a_module_under_two_names_is_one_site_under_either():
    model = nn.Module()
    model.first = nn.Sequential(nn.Linear(2, 2))
    model.second = model.first
    (by_first,) = where("first.0").find(Tree(model))
    (by_second,) = where("second.0").find(Tree(model))
    assert by_first.module is by_second.module is model.first[0]
    assert by_second.path == "first.0"
    assert paths(model, "*") == ["first"]
    assert paths(model, "{first,second}.0") == ["first.0"]
    assert paths(model, where("first") & where("second")) == ["first"]


def test_captures_come_from_the_name_that_matched():
    model = nn.Module()
    model.first = nn.Linear(2, 2)
    model.second = model.first
    assert list(where("{x}").find(Tree(model)).values()) == [{"x": "first"}]
    (captured,) = where("second").find(Tree(model)).values()
    assert captured == {}


def test_both_sides_of_and_capture():
    tree = Tree(tiny_vit())
    found = (where("{a}.*.mlp") & where("*.{b}.mlp")).find(tree)
    assert list(found.values())[1] == {"a": "blocks", "b": "1"}


def test_a_module_that_holds_itself_is_walked_once():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0]._modules["up"] = model
    assert [site.path for site in Tree(model).sites] == ["", "0"]
    assert paths(model, "0.up") == []


def test_a_class_is_isinstance_and_a_union_is_either():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Bilinear(2, 2, 2), nn.LayerNorm(2))
    assert paths(model, nn.Linear) == ["0"]
    assert paths(model, nn.Linear | nn.LayerNorm) == ["0", "3"]
    assert paths(model, nn.Module) == ["", "0", "1", "2", "3"]


def test_a_predicate_sees_the_site():
    wide = where(nn.Linear) & where(lambda s: s.module.out_features > s.module.in_features)
    assert paths(tiny_vit(depth=1), wide) == ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"]
    assert paths(tiny_vit(), lambda s: s.index == 1 and s.parent.path == "blocks") == ["blocks.1"]
    assert paths(tiny_vit(), lambda s: s.width == 96) == [f"blocks.{i}.mlp.fc2" for i in range(3)]


def test_strings_classes_and_functions_combine_from_the_left():
    model = tiny_vit(depth=1)
    assert paths(model, nn.Linear & inside(attn)) == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    assert paths(model, "head" & where(nn.Linear)) == ["head"]
    assert paths(model, nn.Conv2d | where("head")) == ["patch_embed.proj", "head"]
    assert paths(model, (lambda s: s.path == "head") & where(nn.Linear)) == ["head"]
    assert paths(model, "head" | ffn) == ["blocks.0.mlp", "head"]


@pytest.mark.parametrize("what", [3, None, 1.5, b"blocks", ["blocks"], ("a", "b")])
def test_what_says_no_place_is_a_rule_error(what):
    with pytest.raises(RuleError, match="says no place") as caught:
        at(what, unfreeze)
    assert type(what).__name__ in caught.value.fact


@pytest.mark.parametrize("what", [nn.Linear(2, 2), adapter(rank=2), shared(adapter())])
def test_a_module_or_a_part_says_no_place_though_it_can_be_called(what):
    with pytest.raises(RuleError, match="says no place"):
        at(what, unfreeze)


@pytest.mark.parametrize("sides", [{}, {"before": ffn, "after": ffn}])
def test_nearest_needs_one_anchor(sides):
    with pytest.raises(RuleError, match="one only") as caught:
        nearest(norm, **sides)
    assert "nearest(norm, ...)" in caught.value.rule
    assert "before=ffn" in caught.value.remedy


# relations on real models


def test_inside_and_holding_on_a_vit():
    model = tiny_vit(depth=2)
    assert paths(model, ffn & ~inside("blocks.[0]")) == ["blocks.1.mlp"]
    assert paths(model, block & holding("blocks.1.attn")) == ["blocks.1"]
    assert paths(model, norm & ~inside(block)) == ["norm"]


def test_nearest_norm_goes_with_its_own_branch():
    model = tiny_vit(depth=2)
    assert paths(model, nearest(norm, before=ffn)) == ["blocks.0.norm2", "blocks.1.norm2"]
    assert paths(model, nearest(norm, before=attn)) == ["blocks.0.norm1", "blocks.1.norm1"]
    assert paths(model, nearest(norm, after=attn)) == ["blocks.0.norm2", "blocks.1.norm2"]
    assert paths(model, nearest(norm, after="blocks.1")) == ["norm"]


def test_nearest_holds_where_both_norms_are_registered_last():
    model = tiny_vit(depth=2)
    for each in model.blocks:
        for name in ("norm1", "norm2"):
            each._modules[name] = each._modules.pop(name)
    assert paths(model, nearest(norm, before=ffn)) == ["blocks.0.norm2", "blocks.1.norm2"]
    assert paths(model, nearest(norm, before=attn)) == ["blocks.0.norm1", "blocks.1.norm1"]


def test_nearest_neither_holds_its_anchor_nor_lies_inside_it():
    model = tiny_vit(depth=2)
    assert paths(model, nearest(block, before="blocks.1.mlp")) == ["blocks.0"]
    assert paths(model, nearest(nn.Linear, before="blocks.1.mlp")) == ["blocks.1.attn.proj"]
    assert paths(model, nearest(nn.Linear, after="blocks.0.attn")) == ["blocks.0.mlp.fc1"]


def test_nearest_of_nothing_is_nothing():
    assert paths(tiny_vit(), nearest(nn.Conv3d, before=ffn)) == []
    assert paths(tiny_vit(), nearest(norm, before=nn.Conv3d)) == []


# spans


def test_a_span_runs_from_one_module_to_another():
    (first, *_) = found = list(span(norm, ffn).find(Tree(tiny_vit())))
    assert [s.path for s in found] == [f"blocks.{i}.(norm2 to mlp)" for i in range(3)]
    assert (first.entry.path, first.exit.path) == ("blocks.0.norm2", "blocks.0.mlp")
    assert first.is_span
    assert (first.width, first.out, first.axis) == (24, 24, -1)


def span_paths(pattern) -> list[str]:
    return paths(hf_bert(), pattern)


BERT = [f"bert.encoder.layer.{i}.(intermediate.dense to output.dense)" for i in range(3)]


def test_spans_combine_like_any_site():
    assert span_paths(ffn) == BERT
    assert span_paths(ffn & ~inside("bert.encoder.layer.[0]")) == BERT[1:]
    assert span_paths(ffn & inside("bert.encoder.layer.[-1]")) == BERT[2:]
    assert span_paths(ffn & where(lambda s: s.is_span)) == BERT
    assert span_paths(ffn & ffn) == BERT
    assert span_paths(~~ffn) == BERT
    assert span_paths(ffn & ~ffn) == []
    assert span_paths(ffn & ~(ffn & inside("**.layer.1"))) == [BERT[0], BERT[2]]


def test_not_of_spans_keeps_every_module():
    model = hf_bert()
    assert len(paths(model, ~ffn)) == len(list(model.modules()))
    assert set(paths(model, ffn | ~ffn)) == {*paths(model, "**"), *BERT}


def test_spans_and_modules_come_in_the_order_of_the_walk():
    kinds = [s.is_span for s in (ffn | norm).find(Tree(encoder()))]
    sites = list((ffn | norm).find(Tree(encoder())))
    assert kinds.count(True) == 2
    assert [s.order for s in sites] == sorted(s.order for s in sites)


def test_what_lies_inside_a_span():
    model = encoder()
    assert paths(model, nn.Linear & inside(ffn)) == [
        f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)
    ]
    assert paths(model, holding(ffn) & block) == ["layers.0", "layers.1"]


def test_sites_that_grafts_added_are_in_no_tree():
    model = tiny_vit()
    before = paths(model, "**")
    surgery.apply(model, at(ffn, parallel(adapter(rank=2))))
    assert paths(model, "**") == before


# printing

RULES = [
    at("blocks.*.mlp", unfreeze),
    at("", freeze, optional=True),
    at(ffn, parallel(shared(moa(experts=4, rank=64, heads=3)), scale=0.1), times=12),
    at(ffn, parallel(shared(moa(top_k=None), by="stage", name="mine"))),
    at(nearest(norm, before=ffn), unfreeze),
    at(nearest("**.norm", after=attn & where("a.**")), unfreeze),
    at(ffn & ~inside("stages.[0]"), parallel(adapter(rank=8))),
    at(span(norm, "**.mlp"), append(adapter(rank=8, activation=nn.GELU), residual=True)),
    at(nn.Linear & inside(attn) & ~holding(qkv), prepend(adapter(dropout=0.5))),
    at(where(nn.Linear) | (block & head), replace(nn.Identity)),
    at(nn.Linear | nn.Conv2d, unfreeze),
    at(ffn, parallel(adapter(activation=surgery.QuickGELU)), unfreeze),
    at("{a,b}.[-4:].{name}.**", unfreeze),
    at("it's", unfreeze),
]


def evaluated(value: object) -> object:
    return eval(repr(value), {"nn": nn, **vars(surgery)})


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_repr_of_a_rule_evaluates_back_to_it(rule):
    assert evaluated(rule) == rule
    assert repr(evaluated(rule)) == repr(rule)


WORDS = st.sampled_from([ffn, attn, norm, where("a.*"), where(nn.Linear), where(nn.Conv2d)])
written = st.recursive(
    WORDS,
    lambda p: st.one_of(
        st.builds(lambda a, b: a & b, p, p),
        st.builds(lambda a, b: a | b, p, p),
        p.map(lambda a: ~a),
        st.builds(lambda a, b: nearest(a, before=b), p, p),
        st.builds(span, p, p),
        p.map(inside),
        p.map(holding),
    ),
    max_leaves=6,
)


@few
@given(written)
def test_repr_of_a_pattern_evaluates_back_to_it(pattern):
    assert evaluated(pattern) == pattern


@given(aliased(), written)
@few
def test_repr_of_a_pattern_finds_the_same_sites(model, pattern):
    tree = Tree(model)
    assert list(evaluated(pattern).find(tree)) == list(pattern.find(tree))


@pytest.mark.parametrize("name", ["adapterx_ffn", "adapter", "adaptformer", "linear_probe", "full"])
def test_repr_of_a_named_rule_set_evaluates_back_to_it(name):
    rules = surgery.plan(tiny_vit(), name).rules
    assert evaluated(rules) == rules


def test_rules_compare_by_value_and_not_by_identity():
    assert at("a", unfreeze) == at("a", unfreeze)
    assert at("a", unfreeze) != at("a", freeze)
    assert at("a", unfreeze) != at("a", unfreeze, times=1)
    assert parallel(adapter(rank=2)) == parallel(adapter(rank=2))
    assert parallel(adapter(rank=2)) != parallel(adapter(rank=3))
    assert parallel(adapter(), scale=0.1) != parallel(adapter(), scale=0.2)


def test_a_site_prints_its_path_and_kind():
    root, *_, last = Tree(tiny_vit()).sites
    assert repr(root) == "<the model: VisionTransformer>"
    assert repr(last) == "<head: Linear>"
    assert isinstance(last, Site)


def test_a_pattern_is_written_with_the_brackets_that_it_needs():
    a, b, c = (surgery.where(name) for name in "abc")
    written = {
        (a & b) & c: 'where("a") & where("b") & where("c")',
        a & (b & c): 'where("a") & (where("b") & where("c"))',
        a | (b | c): 'where("a") | (where("b") | where("c"))',
        (a | b) & c: '(where("a") | where("b")) & where("c")',
        (a & b) | c: '(where("a") & where("b")) | where("c")',
        ~(a & b): '~(where("a") & where("b"))',
        ~~a: 'where("a")',
    }
    for pattern, text in written.items():
        assert repr(pattern) == text
        assert eval(text, {"where": surgery.where}) == pattern


def test_a_module_is_named_by_its_class_where_a_place_is_expected():
    with pytest.raises(surgery.RuleError, match=r"^where\(Linear\): Linear says no place"):
        surgery.where(nn.Linear(2, 2))
    with pytest.raises(surgery.RuleError, match=r"^where\(3\): int says no place"):
        surgery.where(3)


# some of them ------------------------------------------------------------------------------------


def test_some_are_counted_as_python_counts():
    model = tiny_vit()
    whole = paths(model, ffn)
    for chosen in (slice(1, None), slice(None, -1), slice(None, None, 2), slice(-2, None)):
        assert paths(model, ffn[chosen]) == whole[chosen]
    assert paths(model, ffn[0]) == whole[:1]
    assert paths(model, ffn[-1]) == whole[-1:]
    assert paths(model, ffn[7]) == []
    assert paths(model, ffn[1:] & ~ffn[2:]) == whole[1:2]
    assert paths(model, (~where(nn.Linear))[-3:]) == paths(model, ~where(nn.Linear))[-3:]


@pytest.mark.parametrize("pattern", [ffn[1:], ffn[0], (ffn | attn)[-2:], (~ffn)[::2], ffn[1:][0]])
def test_some_print_as_they_are_written(pattern):
    assert eval(repr(pattern), vars(surgery)) == pattern


@pytest.mark.parametrize("chosen", [slice(None, None, 0), "a", 1.5, True, slice("a", None)])
def test_what_counts_nothing_is_told(chosen):
    with pytest.raises(RuleError, match="this counts no sites"):
        ffn[chosen]


def test_a_pattern_is_no_sequence():
    with pytest.raises(TypeError):
        list(ffn)
    with pytest.raises(TypeError):
        _ = attn in ffn
