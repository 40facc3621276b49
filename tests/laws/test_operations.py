"""What follows from the laws for seeds, sharing, stacked operations, `disabled` and freezing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import adapter, append, at, ffn, norm, parallel, prepend, replace, shared, unfreeze
from surgery.spec.parameters import pickled
from tests import models
from tests.laws import checks as laws
from tests.laws.checks import Linears, Toy, plain, raised

# seeds, sharing, stacking ----------------------------------------------------------------------


def test_rules_with_disjoint_sites_commute_bitwise() -> None:
    laws.disjoint_rules_commute()


def test_the_same_seed_gives_the_same_parts_whatever_came_before() -> None:
    states = []
    for seed, draws in ((0, 0), (0, 5), (1, 0)):
        model = Linears()
        torch.rand(draws)
        surgery.apply(model, at(nn.Linear, parallel(plain)), seed=seed)
        states.append(surgery.state_dict(model))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not any(torch.equal(states[0][k], states[2][k]) for k in states[0])


def test_unshared_parts_at_two_sites_start_differently() -> None:
    model = surgery.apply(Linears(), at(nn.Linear, parallel(plain)))
    one, two = (model.surgery.default.get_submodule(f"{p}/parallel") for p in ("one", "two"))
    assert not torch.equal(one.weight, two.weight)


def test_a_shared_part_is_stored_once() -> None:
    laws.shared_part_is_stored_once()


def test_sharing_by_a_capture_makes_one_part_a_captured_value() -> None:
    model = nn.ModuleDict({"a": Linears(), "b": Linears()})
    rule = at("{stage}.*", parallel(shared(plain, by="stage")), times=4)
    surgery.apply(model, rule)
    assert len(surgery.parameters(model)) == 4


def test_shared_parts_of_two_widths_are_two() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 4))
    made = surgery.plan(model, at(nn.Linear, parallel(shared(adapter(rank=2)))))
    assert len(made.sites) == 4
    assert len(made.parts) == 3


def test_stacked_operations_compose_and_come_off_one_by_one() -> None:
    model, x = Toy().eval(), torch.randn(4, 8)
    snaps, outs = [laws.fingerprint(model)], [laws.outcome(model, x)]
    for i, rules in enumerate((laws.FAULTY, [at("mlp", parallel(plain), unfreeze)])):
        surgery.apply(model, rules, name=f"op{i}")
        laws.stir(model)
        outs.append(laws.outcome(model, x))
    told = str(raised(surgery.OperationError, lambda: surgery.revert(model, name="op2")))
    assert "op0, op1" in told
    surgery.revert(model, name="op1")
    assert hasattr(model, "surgery")
    surgery.revert(model, name="op0")
    laws.assert_same(snaps[0], laws.fingerprint(model), "two reverts")
    assert torch.equal(laws.outcome(model, x), outs[0])


def test_reverting_all_at_once_is_reverting_one_by_one() -> None:
    model, x = Toy(), torch.randn(4, 8)
    before = laws.fingerprint(model)
    for i in range(3):
        surgery.apply(model, [at("bn", unfreeze), at("mlp", append(plain))], name=f"op{i}")
        laws.train(model, x)
    surgery.revert(model)
    after = laws.fingerprint(model)
    laws.assert_same(before, after, "revert", but=["random"])


@pytest.mark.parametrize("words", [("prepend", "parallel"), ("prepend", "prepend")], ids="-".join)
def test_a_later_operation_wraps_what_the_earlier_made_of_the_site(words: tuple[str, ...]) -> None:
    edits = {"parallel": parallel, "prepend": prepend}
    model, x = Linears().double(), torch.randn(2, 8, dtype=torch.float64)
    base = copy.deepcopy(model.one)
    for i, word in enumerate(words):
        surgery.apply(model, at("one", edits[word](plain)), name=f"op{i}", seed=i)
    room = model.surgery
    parts = [getattr(room, f"op{i}").get_submodule(f"one/{w}") for i, w in enumerate(words)]
    want = laws._by_hand(base, list(zip(words, parts, strict=True)))(x)
    assert torch.equal(model(x), model.two(torch.relu(want)))


def test_a_later_operation_keeps_training_what_an_earlier_one_unfroze() -> None:
    model = surgery.apply(Toy(), at("bn", unfreeze), name="earlier")
    surgery.apply(model, at("mlp", parallel(plain)), name="later")
    assert model.bn.weight.requires_grad
    surgery.revert(model, name="later")
    assert model.bn.weight.requires_grad
    assert not model.first.weight.requires_grad


# disabled, freeze, surroundings ----------------------------------------------------------------


def test_disabled_gives_the_base_with_its_norms_as_they_were() -> None:
    laws.disabled_is_the_base()


def test_disabled_may_be_nested() -> None:
    laws.disabled_may_be_nested()


def test_disabled_ends_with_an_error_too() -> None:
    model, x = surgery.apply(Linears(), at("one", append(plain))), torch.randn(2, 8)
    want = laws.outcome(model, x)
    with pytest.raises(laws.Fault), surgery.disabled(model):
        raise laws.Fault
    assert torch.equal(laws.outcome(model, x), want)


def test_disabled_refuses_the_gradient_of_a_forward_through_trained_norms() -> None:
    model, x = Toy(), torch.randn(6, 8)
    surgery.apply(model, laws.FAULTY)
    laws.train(model, x)
    loss = model(x).square().sum()
    with surgery.disabled(model), pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


def test_disabled_works_on_a_replaced_module_and_a_prepended_span() -> None:
    model, x = Linears(), torch.randn(2, 8)
    base = copy.deepcopy(model)
    rules = [at("one", replace(plain)), at(surgery.span("one", "two"), prepend(plain))]
    surgery.apply(model, rules)
    with surgery.disabled(model):
        assert torch.equal(model(x), base(x))
    assert not torch.equal(model(x), base(x))


def test_of_freeze_and_unfreeze_the_last_word_counts() -> None:
    laws.the_last_word_counts()


def test_what_no_rule_mentions_is_frozen() -> None:
    model = surgery.apply(models.tiny_vit(), laws.ADAPTERX)
    free = {k for k, p in model.named_parameters() if p.requires_grad and "surgery." not in k}
    norms = {f"blocks.{i}.norm2.{n}" for i in range(3) for n in ("weight", "bias")}
    assert free == norms | {"head.weight", "head.bias"}
    assert {id(p) for p in surgery.parameters(model)} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def test_frozen_bytes_do_not_change_in_training() -> None:
    model, x = surgery.apply(models.tiny_vit(), laws.ADAPTERX), models.images()
    frozen = {k: p.detach().clone() for k, p in model.named_parameters() if not p.requires_grad}
    laws.train(model, x)
    named = dict(model.named_parameters())
    assert all(torch.equal(named[k], v) and named[k].grad is None for k, v in frozen.items())


def test_parts_have_the_device_dtype_and_mode_of_their_site() -> None:
    laws.parts_are_like_their_site()


def test_parts_of_a_meta_model_are_on_meta() -> None:
    with torch.device("meta"):
        model = models.tiny_vit()
    surgery.apply(model, "adapterx_ffn")
    assert all(p.is_meta for p in model.parameters())
    surgery.revert(model)
    assert not hasattr(model, "surgery")


def test_a_part_of_another_dtype_is_named_at_the_first_forward() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.half()

    model = surgery.apply(Linears(), at("one", append(lambda site: Half())))
    told = str(raised(surgery.GraftError, lambda: model(torch.randn(2, 8))))
    assert "float16" in told
    assert "float32" in told
    assert "one" in told


def test_copies_run_their_own_parts() -> None:
    laws.copies_are_independent(laws.copied)
    laws.copies_are_independent(pickled)


def test_the_plan_of_vit_b_counts_what_the_paper_counts() -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert surgery.plan(model, "adapterx_ffn").added == 148_992
    assert surgery.plan(model, "adapterx_ffn").trainable == 167_424
    assert surgery.plan(model, "adaptformer").added == 1_189_632
    unshared = at(ffn, parallel(surgery.moa()), times=12)
    assert surgery.plan(model, unshared).added == 1_787_904
    assert len(surgery.plan(model, at(norm, unfreeze, times=25)).sites) == 0


def test_what_is_optional_is_given_by_name_and_seeds_start_at_zero() -> None:
    rule, states = at("one", parallel(plain)), []
    for named in ({}, {"seed": 0}, {"seed": 1}, {"seed": -1}):
        states.append(surgery.state_dict(surgery.apply(Linears(), rule, **named)))
    key = "parts.one/parallel.weight"
    same = [torch.equal(states[0][key], state[key]) for state in states]
    assert same == [True, True, False, False]
    with pytest.raises(TypeError):
        surgery.apply(Linears(), rule, torch.randn(2, 8))
    with pytest.raises(TypeError):
        surgery.revert(surgery.apply(Linears(), rule), "default")
