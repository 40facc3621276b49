"""The suite on models and rules drawn at random: every property holds of the engine as it is."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery import adapter, at, ffn, parallel
from surgery.spec import PROPERTIES, Absent, Case, addresses, from_model, parts, rules, transformers
from surgery.spec import routing as routing_laws
from surgery.spec.laws import Draw, law
from surgery.spec.strategies import mergeable, mixtures
from surgery.spec.suite import plain_path
from surgery.structure.anatomy import roles_of
from surgery.structure.module_tree import Tree

FEW = {"it_compiles_whole": 2}
UNHEARD = {"no_other_token_is_heard", "weights_are_theirs_outside"}  # of few models: tests/laws
ANY = settings(
    deadline=None,
    database=None,
    derandomize=True,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
    phases=[phase for phase in Phase if phase is not Phase.explain],  # slow, and of `find` unseen
)


def suited(name: str) -> st.SearchStrategy:
    """Rules of which a law has something to say."""
    if PROPERTIES[name] in routing_laws.LAWS:
        return rules(mixtures())
    return mergeable() if name == "merge_is_equivalent" else rules()


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_property_holds_of_any_model_under_any_rules(name, examples):
    spoken = []

    @settings(ANY, max_examples=FEW.get(name, 8) * examples)
    @given(transformers(), suited(name), st.data())
    def test(model, chosen, data):
        case = Case(model, chosen, model.example())
        try:
            with plain_path():
                PROPERTIES[name](case, Draw(data))
            spoken.append(name)
        except Absent:
            pass

    test()
    if name in UNHEARD:
        return
    assert len(spoken) > 1, "it says nothing of nearly all of them"


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_law_is_mathematics_in_one_line(name):
    assert len(law(PROPERTIES[name])) <= 100
    assert law(PROPERTIES[name]).endswith((".", ","))


# strategies


@settings(ANY, max_examples=60)
@given(transformers())
def test_every_drawn_transformer_runs_and_its_roles_are_found(model):
    options = getattr(model, "whole", model).options
    blocks = len(options["widths"]) * options["depth"]
    roles = roles_of(Tree(model))
    assert [len(roles[role]) for role in ("ffn", "attn", "block")] == [blocks] * 3
    answer = model(model.example())
    assert (answer["logits"] if isinstance(answer, dict) else answer).shape == (2, 5)


FORMS = {
    "post-norm": lambda m: m.options["post"],
    "split projections": lambda m: not m.options["fused"],
    "gated": lambda m: m.options["gated"],
    "a span": lambda m: m.options["spread"],
    "features first": lambda m: m.options["first"],
    "stages of other widths": lambda m: len(set(m.options["widths"])) > 1,
    "an alias": lambda m: m.options["aliased"],
    "tuples": lambda m: m.options["weights"],
    "keywords and dicts": lambda m: m.options["named"],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_drawn_and_shrinks_to_little_else(form):
    model = find(transformers(), lambda m: hasattr(m, "options") and FORMS[form](m), settings=ANY)
    assert eval(repr(model), vars(surgery.spec.transformer) | {"nn": nn}).options == model.options
    default = surgery.spec.transformer.Transformer().options
    changed = [name for name, value in model.options.items() if value != default[name]]
    assert len(set(changed) - {"depth", "heads", "fused", "act"}) <= 1, model


def test_a_sequential_root_is_drawn():
    few = settings(ANY, phases=[Phase.generate])
    model = find(transformers(), lambda m: isinstance(m, nn.Sequential), settings=few)
    assert repr(model).startswith("Row(Transformer(")


def test_rules_and_parts_shrink_to_one_small_one():
    assert len(find(rules(), lambda r: True, settings=ANY)) == 1
    assert repr(find(parts(), lambda p: True, settings=ANY)) == "adapter(rank=8)"


@settings(ANY, max_examples=100)
@given(st.data())
def test_addresses_of_a_model_often_match(data):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    address = data.draw(from_model(model).addresses() | addresses())
    surgery.where(address).find(Tree(model))


@settings(ANY, max_examples=20)
@given(transformers().flatmap(lambda m: st.tuples(st.just(m), from_model(m).rules())))
def test_rules_of_a_model_fit_it(drawn):
    model, chosen = drawn
    surgery.apply(model, chosen)
    assert surgery.report(model)


def test_a_mixture_beside_another_counts_in_the_balance_loss_too():
    """Found by the suite: of two routers at one site only the last was counted."""
    model = surgery.spec.transformer.Transformer(depth=1)
    part = surgery.moa(heads=2, rank=2)
    surgery.apply(model, [at(ffn, parallel(part)), at(ffn, parallel(part), parallel(adapter()))])
    model(model.example())
    assert list(surgery.routing(model)) == ["stages.0.0.mlp", "stages.0.0.mlp/2"]
    both = surgery.routing(model).values()
    want = sum(surgery.ops.balance(routing.gates) for routing in both)
    assert surgery.balance_loss(model).item() == pytest.approx(want.item(), rel=1e-12)
