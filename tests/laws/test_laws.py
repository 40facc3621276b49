"""The laws of DESIGN.md, section 3, and what follows from them, on the engine as it is."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import surgery
from surgery import adapter, append, at, ffn, norm, parallel, prepend, replace, shared, unfreeze
from surgery.spec.parameters import pickled
from surgery.structure.module_tree import Tree
from tests import models
from tests.laws import checks as laws
from tests.laws.checks import Linears, Toy, plain, raised


@pytest.mark.parametrize("check", laws.CHECKS.values(), ids=laws.CHECKS)
def test_the_engine_keeps_the_law(check: Callable[[], object]) -> None:
    check()


# 1, 2: matching --------------------------------------------------------------------------------


@pytest.mark.parametrize("root", [nn.Sequential, nn.ModuleList])
def test_grafts_are_invisible_in_a_container_root(root: Callable[..., nn.Module]) -> None:
    layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
    model = root(*layers) if root is nn.Sequential else root(layers)
    before = [s.path for s in Tree(model).sites]
    surgery.apply(model, at(nn.Linear, parallel(plain)))
    assert [s.path for s in Tree(model).sites] == before


def test_the_example_of_the_design_says_what_the_design_says() -> None:
    rule = at("blocks.*.feed_forward", unfreeze)
    told = str(raised(surgery.MatchError, lambda: surgery.apply(models.tiny_vit(), rule)))
    assert "matched no module of VisionTransformer" in told
    assert "blocks.*.mlp (3)" in told
    assert "at(ffn, ...)" in told


def test_optional_excuses_no_match_but_not_wrong_times() -> None:
    model = Linears()
    surgery.apply(model, [at("three", unfreeze, optional=True), at("one", unfreeze)])
    surgery.revert(model)
    rule = at(nn.Linear, unfreeze, times=3, optional=True)
    raised(surgery.MatchError, lambda: surgery.apply(model, rule))


# 3: conflicts and order ------------------------------------------------------------------------


@pytest.mark.parametrize("words", laws.ORDERS, ids="-".join)
def test_edits_at_one_site_act_in_rule_order(words: tuple[str, ...]) -> None:
    got, want = laws.composed(*words)
    assert torch.equal(got, want)


def test_replace_is_the_innermost_whatever_its_place_in_the_rules() -> None:
    for order in (1, -1):
        model, x = Linears(), torch.randn(2, 8)
        edits = [at("one", replace(plain)), at("one", append(plain))][::order]
        surgery.apply(model, edits)
        room = model.surgery.default
        new, after = room.get_submodule("one/replace"), room.get_submodule("one/append")
        assert torch.equal(model(x), model.two(torch.relu(after(new(x)))))


def test_nested_sites_nest() -> None:
    model, x = Linears().double(), torch.randn(2, 8, dtype=torch.float64)
    base = copy.deepcopy(model)
    rules = [at("", parallel(plain)), at(surgery.span("one", "two"), append(plain))]
    surgery.apply(model, [*rules, at("one", append(plain)), at("two", prepend(plain))])
    room = model.surgery.default
    names = ("model/parallel", "(one to two)/append", "one/append", "two/prepend")
    whole, stretch, first, second = map(room.get_submodule, names)
    inner = stretch(base.two(second(torch.relu(first(base.one(x))))))
    assert torch.equal(model(x), inner + whole(x))


def test_parallel_to_a_span_reads_its_entry_and_adds_at_its_exit() -> None:
    model, x = Linears().double(), torch.randn(2, 8, dtype=torch.float64)
    base = copy.deepcopy(model)
    surgery.apply(model, at(surgery.span("one", "two"), prepend(plain), parallel(plain, scale=0.5)))
    room = model.surgery.default
    pre, beside = (room.get_submodule(f"(one to two)/{w}") for w in ("prepend", "parallel"))
    want = torch.add(base(pre(x)), beside(x), alpha=0.5)
    assert torch.equal(model(x), want)


def test_a_replaced_module_is_skipped_and_stays_in_the_base() -> None:
    model, calls = Linears(), list[int]()
    keys = list(model.state_dict())
    model.one.forward = lambda x: calls.append(1) or x  # type: ignore[func-returns-value]
    surgery.apply(model, at("one", replace(plain)))
    x = torch.randn(2, 8)
    new = model.surgery.default.get_submodule("one/replace")
    assert torch.equal(model(x), model.two(torch.relu(new(x))))
    assert calls == []
    assert [k for k in model.state_dict() if "surgery." not in k] == keys
    surgery.revert(model)
    model(x)
    assert calls == [1]


# 4: all or nothing -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fault_at_every_step_of_apply_with_an_example_changes_nothing() -> None:
    laws.apply_is_all_or_nothing(every=True, proof=True)


def test_a_fault_at_any_line_of_apply_leaves_a_sequential_as_it_was() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    rules = [at("0", parallel(adapter(rank=1))), at("1", unfreeze)]
    laws.apply_is_all_or_nothing(build, rules, proof=True)


def test_a_fault_while_stacking_leaves_the_earlier_operation() -> None:
    def build() -> nn.Module:
        return surgery.apply(Toy(), laws.FAULTY, name="earlier")

    part = adapter(rank=1)
    rules = [at("bn", append(part)), at("mlp", unfreeze), at("first", append(part))]
    laws.apply_is_all_or_nothing(build, rules, proof=True)


def test_a_failing_part_draws_no_random_numbers() -> None:
    def fails(site: surgery.Site) -> nn.Module:
        random.random(), np.random.rand(), torch.rand(1)
        raise laws.Fault

    model = Linears()
    before = laws.fingerprint(model)
    raised(laws.Fault, lambda: surgery.apply(model, at("two", append(fails))))
    laws.assert_same(before, laws.fingerprint(model), "a failing part")


def test_a_forward_that_fails_in_the_example_changes_nothing() -> None:
    model, x = Toy(), torch.randn(2, 9)
    before = laws.fingerprint(model)
    raised(RuntimeError, lambda: surgery.apply(model, laws.FAULTY, example=x))
    laws.assert_same(before, laws.fingerprint(model), "a failing example")


# 5: the base -----------------------------------------------------------------------------------


def test_a_base_checkpoint_loads_into_a_vit_and_a_sequential() -> None:
    laws.base_checkpoint_loads(models.tiny_vit, "adapterx_ffn")
    rules = at(nn.Linear, parallel(plain))
    laws.base_checkpoint_loads(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()), rules)


def test_aliased_sites_are_joined_once_and_run_each_time() -> None:
    laws.aliased_sites_are_joined_once()
    laws.every_call_under_an_alias_is_hooked()


def test_tied_weights_stay_tied_and_train_together() -> None:
    model, x = Toy(), torch.randn(6, 8)
    surgery.apply(model, at("mlp.0", unfreeze))
    assert model.mlp[2].weight.requires_grad
    laws.train(model, x)
    assert model.mlp[0].weight is model.mlp[2].weight
    clone = copy.deepcopy(model)
    assert clone.mlp[0].weight is clone.mlp[2].weight
    surgery.revert(model)
    assert model.mlp[0].weight is model.mlp[2].weight


def test_containers_keep_their_length_order_and_keys() -> None:
    laws.containers_stay_containers()


# 6: idle sites ---------------------------------------------------------------------------------


def test_an_idle_span_is_an_error() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.live, self.dead = Linears(), Linears()

        def forward(self, x: Tensor) -> Tensor:
            return self.live(x)

    model, x = Unused(), torch.randn(2, 8)
    rule = at(surgery.span("**.one", "**.two"), parallel(plain), times=2)
    told = str(raised(surgery.GraftError, lambda: surgery.apply(model, rule, example=x)))
    assert "dead.(one to two)" in told


@pytest.mark.parametrize("fullgraph", [True, False])
def test_an_idle_site_is_no_silence_in_a_compiled_model_either(fullgraph: bool) -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 8)
    model = surgery.apply(laws.Skipping(), at(nn.Linear, parallel(plain)))
    compiled = torch.compile(model, fullgraph=fullgraph, backend="eager")
    with pytest.warns(UserWarning, match=r"1 of 2 sites \(unused\) were not seen to run"):
        compiled(x)
    told = raised(
        surgery.GraftError,
        lambda: surgery.apply(model, at(nn.Linear, parallel(plain)), name="again", example=x),
    )
    assert "1 of 2 sites (unused) never ran" in str(told)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, tracing
@pytest.mark.filterwarnings("ignore:.*were not seen to run")
@pytest.mark.parametrize("example", [True, False])
def test_blocks_that_are_compiled_one_by_one_are_no_idle_sites(example: bool) -> None:
    def frames(model: nn.Module) -> int:
        torch._dynamo.reset()
        counter = CompileCounter()
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True)
        model(x)
        return counter.frame_count

    model, x = models.tiny_vit(depth=4).eval(), models.images()
    base = frames(copy.deepcopy(model))
    alike = surgery.apply(copy.deepcopy(model), "adapterx_ffn")
    surgery.apply(model, "adapterx_ffn", example=x if example else None)
    laws.stir(alike)
    laws.stir(model)
    assert frames(model) <= base + 1, "compiled anew for each block"
    assert torch.allclose(model(x), alike(x), atol=1e-6)


def test_a_span_whose_exit_runs_without_its_entry_is_a_graft_error() -> None:
    class Odd(Linears):
        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.two(self.one(x)))

    model = surgery.apply(Odd(), at(surgery.span("one", "two"), parallel(plain)))
    raised(surgery.GraftError, lambda: model(torch.randn(2, 8)))


# 7: identity -----------------------------------------------------------------------------------


def convnext(conv_mlp: bool) -> nn.Module:
    from timm.models.convnext import ConvNeXt

    dims = (12, 12, 24, 24)
    return ConvNeXt(num_classes=5, depths=(1, 1, 1, 1), dims=dims, conv_mlp=conv_mlp)


def torchvision_vit() -> nn.Module:
    """With a head that is not zero, as it is made, and frozen.

    nn.MultiheadAttention gives other bits once its parameters are frozen, without any surgery.
    """
    model = models.torchvision_vit()
    nn.init.normal_(model.heads.head.weight)
    return model.requires_grad_(False)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "timm": (models.tiny_vit, models.images()),
    "torchvision": (torchvision_vit, models.images()),
    "huggingface": (models.hf_vit, models.images()),
    "b h w c": (lambda: convnext(False), models.images(size=32)),
    "b c h w": (lambda: convnext(True), models.images(size=32)),
}


@pytest.mark.parametrize("rules", ["adapterx_ffn", "adapter", "adaptformer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_is_the_identity_bitwise(family: str, rules: str) -> None:
    build, x = FAMILIES[family]
    laws.starts_as_the_identity(build, x, rules)


# 8: revert -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rules", ["adapterx_ffn", "full"])
def test_revert_is_bitwise_on(family: str, rules: str) -> None:
    build, x = FAMILIES[family]

    def without_wrapping() -> nn.Module:
        model = build()
        if family == "huggingface":
            model.register_forward_hook(lambda m, args, out: out.logits)
        return model

    laws.revert_is_bitwise(without_wrapping, x, rules)


@pytest.mark.parametrize("via", [laws.copied, pickled])
def test_revert_is_bitwise_in_a_copy(via: Callable[[nn.Module], nn.Module]) -> None:
    laws.revert_is_bitwise(via=via)


def test_revert_of_a_copy_leaves_the_original_operated() -> None:
    model = surgery.apply(models.tiny_vit(), laws.ADAPTERX)
    laws.stir(model)
    want = laws.outcome(model, models.images())
    clone = surgery.revert(copy.deepcopy(model))
    assert torch.equal(laws.outcome(model, models.images()), want)
    assert not hasattr(clone, "surgery")


def test_revert_after_a_caught_failure_in_forward_is_bitwise() -> None:
    model, x = Linears(), torch.randn(2, 8)
    before = laws.fingerprint(model)
    surgery.apply(model, at(surgery.span("one", "two"), parallel(lambda s: nn.Linear(8, 9))))
    told = str(raised(surgery.GraftError, lambda: model(x)))
    assert "(2, 9)" in told
    assert "(2, 8)" in told
    surgery.revert(model)
    laws.assert_same(before, laws.fingerprint(model), "revert")


class Cached(nn.Module):
    """Keeps a table that grows with the length of its input, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.register_buffer("table", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) < len(x):
            self.table = torch.ones(len(x))
        return self.one(x) * self.table[: len(x), None]


def test_revert_puts_back_a_buffer_that_was_replaced() -> None:
    model = Cached()
    before = laws.shape_of(model)
    surgery.apply(model, at("one", append(plain)))
    model(torch.randn(5, 8))
    surgery.revert(model)
    laws.assert_same(before, laws.shape_of(model), "revert")


# 9: purity -------------------------------------------------------------------------------------


# 10: errors ------------------------------------------------------------------------------------


def test_operating_twice_names_the_earlier_rule_and_changes_nothing() -> None:
    model = surgery.apply(Linears(), at("one", parallel(plain)))
    before = laws.fingerprint(model)
    told = str(
        raised(surgery.OperationError, lambda: surgery.apply(model, at("two", parallel(plain))))
    )
    assert "by at(" in told
    assert "one" in told
    laws.assert_same(before, laws.fingerprint(model), "a second apply")


# calls and outputs -----------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def _shapes_of_output(y: Tensor) -> dict[str, Any]:
    return {
        "tuple": (y, "kept"),
        "list": [y, 3],
        "dict": {"hidden": y, "more": None},
        "nested": ((y,), {"a": 1}),
        "namedtuple": Pair(y, torch.ones(1)),
    }


class Speaking(nn.Module):
    """A linear that answers in some nest of containers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = nn.Linear(8, 8), kind

    def forward(self, *, hidden: Tensor, mask: Tensor | None = None) -> Any:
        return _shapes_of_output(self.inner(hidden))[self.kind]


class Asking(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = Speaking(kind)

    def forward(self, x: Tensor) -> Any:
        return self.layer(mask=None, hidden=x)


@pytest.mark.parametrize("kind", _shapes_of_output(torch.ones(1)))
def test_keyword_calls_and_nested_outputs_keep_their_form(kind: str) -> None:
    model, x = Asking(kind), torch.randn(2, 8)
    base = copy.deepcopy(model)
    surgery.apply(model, at("layer", prepend(plain), append(plain), parallel(plain)))
    parts = [model.surgery.default.get_submodule(f"layer/{w}") for w in ("prepend", "append")]
    beside = model.surgery.default.get_submodule("layer/parallel")
    got, was = model(x), base(x)
    leaf, spec = torch.utils._pytree.tree_flatten(got)
    old, old_spec = torch.utils._pytree.tree_flatten(was)
    assert spec == old_spec
    assert torch.equal(leaf[0], parts[1](base.layer.inner(parts[0](x))) + beside(x))
    assert all(a == b for a, b in zip(leaf[1:], old[1:], strict=True))


def test_a_model_output_of_transformers_keeps_its_class() -> None:
    model = models.hf_vit()
    kind = type(model(models.images()))
    surgery.apply(model, at("", append(plain)))
    out = model(models.images())
    assert type(out) is kind
    assert out.logits.shape == (2, 5)


@dataclass
class Opaque:
    hidden: Tensor


def test_an_output_that_cannot_be_opened_is_refused_by_name() -> None:
    class Wrapping(Linears):
        def forward(self, x: Tensor) -> Any:
            return Opaque(super().forward(x))

    model = surgery.apply(nn.Sequential(Wrapping()), at("0", append(plain)))
    assert "graft at 0" in str(raised(surgery.GraftError, lambda: model(torch.randn(2, 8))))


def test_a_module_called_twice_runs_its_part_twice() -> None:
    class Twice(Linears):
        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.one(x))

    model, x = Twice().double(), torch.randn(2, 8, dtype=torch.float64)
    surgery.apply(model, at("one", prepend(plain), parallel(plain)))
    base, room = copy.deepcopy(model), model.surgery.default
    pre, beside = room.get_submodule("one/prepend"), room.get_submodule("one/parallel")
    surgery.revert(base)

    def once(x: Tensor) -> Tensor:
        return base.one(pre(x)) + beside(x)

    assert torch.equal(model(x), once(once(x)))


def test_user_hooks_fire_once_each_in_their_old_order_before_grafts() -> None:
    laws.user_hooks_come_first()


def test_a_hook_added_after_apply_survives_revert() -> None:
    model, told = Linears(), list[str]()
    surgery.apply(model, at("one", append(plain)))
    model.one.register_forward_hook(lambda *_: told.append("later"))
    surgery.revert(model)
    model(torch.randn(2, 8))
    assert told == ["later"]
    assert len(model.one._forward_hooks) == 1


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
    told = str(raised(surgery.OperationError, lambda: surgery.revert(model, name="op0")))
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
