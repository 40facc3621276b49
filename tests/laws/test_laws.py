"""The laws of DESIGN.md, section 3, and what follows from them, on the engine as it is."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import surgery
from surgery import adapter, append, at, parallel, prepend, replace, unfreeze
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
def test_a_fault_at_any_line_of_apply_with_an_example_changes_nothing() -> None:
    laws.apply_is_all_or_nothing(first=4, proof=True)


def test_a_fault_at_any_line_of_apply_leaves_a_sequential_as_it_was() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    rules = [at("0", parallel(adapter(rank=1))), at("1", unfreeze)]
    laws.apply_is_all_or_nothing(build, rules, first=0, proof=True)


def test_a_fault_while_stacking_leaves_the_earlier_operation() -> None:
    def build() -> nn.Module:
        return surgery.apply(Toy(), laws.FAULTY, name="earlier")

    part = adapter(rank=1)
    rules = [at("bn", append(part)), at("mlp", unfreeze), at("first", append(part))]
    laws.apply_is_all_or_nothing(build, rules, first=0, proof=True)


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
