"""What is asked wrongly is answered by rule, fact and remedy, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import surgery
from surgery import (
    ConflictError,
    GraftError,
    MatchError,
    OperationError,
    RuleError,
    SurgeryError,
    adapter,
    append,
    at,
    attn,
    ffn,
    freeze,
    head,
    inside,
    moa,
    norm,
    parallel,
    prepend,
    replace,
    shared,
    span,
    unfreeze,
)
from surgery.errors import nearest_names
from tests.models import encoder, images, tiny_vit

small = adapter(rank=2)


def check(error: SurgeryError, rule: str, fact: str, remedy: str) -> None:
    """Each of the three is said, in its own place, with the user's own values."""
    assert rule in error.rule
    assert fact in error.fact
    assert remedy in error.remedy
    assert str(error) == f"{error}"
    for said in (error.rule, error.fact, error.remedy):
        assert said in str(error)
    assert error.fact.endswith((".", "..."))
    assert len(error.remedy) > 10


class Wrong(NamedTuple):
    """Rules no model takes, and what the answer must hold."""

    rules: Callable[[], object]
    error: type[SurgeryError]
    rule: str
    fact: str
    remedy: str


def identity(site: surgery.Site) -> nn.Module:
    return nn.Identity()


WRONG = {
    "unknown rule set": Wrong(
        lambda: "adaptorx_fnn", RuleError, 'rules="adaptorx_fnn"', "no rule set", "adapterx_ffn"
    ),
    "unknown rule set in a list": Wrong(
        lambda: [at(ffn, unfreeze), "linear"], RuleError, '"linear"', "no rule set", "linear_probe"
    ),
    "address without match": Wrong(
        lambda: at("block.*.mlp", unfreeze),
        MatchError,
        "block.*.mlp",
        "matched no module of VisionTransformer",
        "blocks.*.mlp (3)",
    ),
    "role without match": Wrong(
        lambda: at(ffn & nn.Conv1d, unfreeze),
        MatchError,
        "ffn & where(nn.Conv1d)",
        "matched no module of VisionTransformer",
        "ffn (3)",
    ),
    "address without match beside a role": Wrong(
        lambda: at(ffn & inside("stages.[0]"), unfreeze),
        MatchError,
        'ffn & inside("stages.[0]")',
        'says "stages.[0]", which matches no module of VisionTransformer',
        "Nearest addresses: ",
    ),
    "class without match": Wrong(
        lambda: at(nn.Conv1d, unfreeze), MatchError, "nn.Conv1d", "matched no module", "anatomy"
    ),
    "second rule without match": Wrong(
        lambda: [at(ffn, parallel(small)), at("necks", unfreeze)],
        MatchError,
        "necks",
        "matched no module",
        "Nearest addresses: ",
    ),
    "too few": Wrong(
        lambda: at(ffn, parallel(small), times=12),
        MatchError,
        "at(ffn, ...)",
        "matched 3 sites of VisionTransformer, not times=12: blocks.0.mlp",
        "times=3",
    ),
    "too many": Wrong(
        lambda: at("**.norm1", unfreeze, times=1),
        MatchError,
        "**.norm1",
        "matched 3 sites of VisionTransformer, not times=1",
        "times=3",
    ),
    "conflicting replacements": Wrong(
        lambda: [at(ffn, replace(identity)), at("blocks.1.mlp", replace(nn.Identity))],
        ConflictError,
        "blocks.1.mlp",
        "already replaced by at(ffn, replace(",
        "Keep one",
    ),
    "one rule that replaces twice": Wrong(
        lambda: at("head", replace(identity), replace(identity)),
        ConflictError,
        "head",
        "already replaced",
        "Keep one",
    ),
    "replacing a span": Wrong(
        lambda: at(span(norm, ffn), replace(identity)),
        ConflictError,
        "at(span(norm, ffn), ...)",
        "blocks.0.(norm2 to mlp)",
        "Put the rule on the module that holds both",
    ),
    "heads": Wrong(
        lambda: at(ffn, parallel(moa(heads=5))), RuleError, "heads=5", "width 24", "4, 6"
    ),
    "top_k": Wrong(
        lambda: at(ffn, parallel(moa(top_k=2))), RuleError, "top_k=2", "two mixtures", "top_k=1"
    ),
    "by without capture": Wrong(
        lambda: at("blocks.*.mlp", parallel(shared(moa(), by="stage"))),
        RuleError,
        "blocks.*.mlp",
        'by="stage"',
        "{stage}",
    ),
    "a part that makes no module": Wrong(
        lambda: at("head", parallel(lambda site: 3)), RuleError, "head", "int", "nn.Module"
    ),
    "nothing to train": Wrong(
        lambda: at(ffn, freeze), RuleError, "at(ffn, ...)", "nothing would be left", "unfreeze"
    ),
    "no rules": Wrong(list, RuleError, "rules=[]", "no rule", "rules="),
    "empty list in a list": Wrong(lambda: [[]], RuleError, "rules=[]", "no rule", "rules="),
    "empty tuple": Wrong(lambda: (), RuleError, "rules=()", "no rule", "rules="),
    "empty name": Wrong(lambda: "", RuleError, 'rules=""', "no rule set", "adapterx_ffn"),
    "None": Wrong(lambda: None, RuleError, "rules=None", "no rule", "rules="),
    "an edit for a rule": Wrong(
        lambda: parallel(small), RuleError, "parallel(adapter(rank=2))", "no rule", "at(ffn"
    ),
    "a part for a rule": Wrong(lambda: small, RuleError, "adapter(rank=2)", "no rule", "at(ffn"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_wrong_rules_are_told_and_leave_the_model_untouched(case):
    model = tiny_vit()
    rules = case.rules()
    before = surgery.fingerprint(model)
    for call in (surgery.plan, surgery.apply):
        with pytest.raises(case.error) as caught:
            call(model, rules)
        assert type(caught.value) is case.error
        check(caught.value, case.rule, case.fact, case.remedy)
        assert surgery.fingerprint(model) == before


# a place that does not exist, in the form of law 10

LAW_10 = """\
at("blocks.*.feed_forward", ...) matched no module of VisionTransformer.
Nearest addresses: blocks.*.mlp (12), blocks.*.attn (12).
Write at("blocks.*.mlp", ...) or, for any architecture, at(ffn, ...)."""


def test_a_place_that_does_not_exist_is_told_word_for_word_as_in_law_10():
    with pytest.raises(MatchError) as caught:
        surgery.plan(tiny_vit(depth=12), at("blocks.*.feed_forward", unfreeze))
    assert str(caught.value) == LAW_10


def test_nearest_addresses_have_the_form_of_law_10():
    with pytest.raises(MatchError) as caught:
        surgery.plan(tiny_vit(depth=12), at("block.*.mlp", unfreeze))
    first, second, third = str(caught.value).splitlines()
    assert first == 'at("block.*.mlp", ...) matched no module of VisionTransformer.'
    assert second.startswith("Nearest addresses: blocks.*.mlp (12), ")
    assert second.endswith(").")
    assert third == 'Write at("blocks.*.mlp", ...) or, for any architecture, at(ffn, ...).'


def test_the_remedy_of_a_place_that_does_not_exist_works():
    model = tiny_vit()
    with pytest.raises(MatchError) as caught:
        surgery.plan(model, at("blocks.*.atn.qkv", unfreeze))
    address = caught.value.remedy.partition('Write at("')[2].partition('"')[0]
    assert len(surgery.plan(model, at(address, parallel(small))).sites) == 3


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("blocks.12.mlp", "blocks.*.mlp"),
        ("blocks.[12].mlp", "blocks.*.mlp"),
        ("Blocks.*.MLP", "blocks.*.mlp"),
        ("mlp", "blocks.*.mlp"),
        ("**.atn", "blocks.*.attn"),
        ("**.fc3", "blocks.*.mlp.fc1"),
        ("norm3", "norm"),
        ("blocks.*.attention.qkv", "blocks.*.attn.qkv"),
    ],
)
def test_the_address_that_was_meant_comes_first(written, meant):
    with pytest.raises(MatchError) as caught:
        surgery.plan(tiny_vit(), at(written, unfreeze))
    assert caught.value.remedy.startswith(f"Nearest addresses: {meant} (")


def test_an_address_with_no_role_is_offered_none():
    with pytest.raises(MatchError) as caught:
        surgery.plan(tiny_vit(), at("blocks.*.mlp.fc11", unfreeze))
    assert 'Write at("blocks.*.mlp.fc1", ...).' in caught.value.remedy


def test_a_model_with_no_child_still_gets_an_answer():
    with pytest.raises(MatchError, match="matched no module of Linear"):
        surgery.plan(nn.Linear(2, 2), at("blocks.*", unfreeze))


@pytest.mark.parametrize("optional", [True, False])
def test_an_optional_rule_may_match_nothing(optional):
    rules = [at("head", unfreeze), at("nowhere", parallel(small), optional=optional)]
    if optional:
        assert surgery.plan(tiny_vit(), rules).added == 0
    else:
        with pytest.raises(MatchError, match="nowhere"):
            surgery.plan(tiny_vit(), rules)


@pytest.mark.parametrize(
    ("word", "first"),
    [("adapterx-ffn", "adapterx_ffn"), ("linear-probe", "linear_probe"), ("fulll", "full")],
)
def test_nearest_rule_sets_come_first(word, first):
    with pytest.raises(RuleError) as caught:
        surgery.plan(tiny_vit(), word)
    assert caught.value.remedy.startswith(f"Nearest: {first}")


def test_a_name_like_none_lists_all_that_there_are():
    with pytest.raises(RuleError) as caught:
        surgery.plan(tiny_vit(), "zzz")
    assert caught.value.remedy.startswith("All: adapterx, ")


def test_nearest_names_are_few_and_best_first():
    assert nearest_names("adapter", ["adapt", "adapter", "xyz", "adapters", "adaptor"]) == (
        "adapter, adapters, adaptor"
    )


# rules that are wrong in themselves, before there is a model


@pytest.mark.parametrize(
    ("make", "rule", "fact", "remedy"),
    [
        (lambda: at(ffn), "at(ffn, ...)", "not what", "unfreeze"),
        (lambda: at(ffn, small), "at(ffn, ...)", "adapter(rank=2) is no edit", "parallel(adapter"),
        (lambda: at(ffn, shared(small)), "at(ffn", "no edit", "parallel(shared("),
        (
            lambda: at(ffn, nn.Linear),
            "at(ffn",
            "nn.Linear is no edit",
            "parallel(lambda site: nn.Linear(site.width, site.out))",
        ),
        (lambda: at(ffn, "freeze"), "at(ffn", '"freeze" is no edit', "freeze"),
        (lambda: at(ffn, unfreeze, times=0), "at(ffn", "times=0", "integer"),
        (lambda: at(ffn, unfreeze, times=-1), "at(ffn", "times=-1", "integer"),
        (lambda: at(ffn, unfreeze, times=1.5), "at(ffn", "times=1.5", "integer"),
        (lambda: at(ffn, unfreeze, times=True), "at(ffn", "times=True", "integer"),
        (lambda: at(ffn, unfreeze, times="12"), "at(ffn", "times='12'", "integer"),
        (lambda: parallel(nn.Linear(2, 2)), "parallel(Linear)", "is no part", "lambda site"),
        (lambda: append(nn.Linear(2, 2)), "append(Linear)", "is no part", "append(lambda site"),
        (lambda: prepend(nn.ReLU()), "prepend(ReLU)", "is no part", "prepend(lambda site"),
        (lambda: replace(nn.ReLU()), "replace(ReLU)", "is no part", "replace(lambda site"),
        (lambda: shared(nn.ReLU()), "shared(ReLU)", "is no part", "shared(lambda site"),
        (lambda: parallel(8), "parallel(8)", "int", "lambda site"),
        (lambda: parallel("adapter"), 'parallel("adapter")', "str", "lambda site"),
    ],
)
def test_a_rule_that_makes_no_sense_is_told_where_it_is_written(make, rule, fact, remedy):
    with pytest.raises(RuleError) as caught:
        make()
    check(caught.value, rule, fact, remedy)


def test_a_wrong_argument_of_a_part_is_pythons_own_error_where_it_is_written():
    with pytest.raises(TypeError, match="ranks"):
        adapter(ranks=3)


# a model that is not as the call needs it


@pytest.mark.parametrize("name", ["default", "mine"])
def test_operating_twice_is_an_error_that_shows_the_way(name):
    model = surgery.apply(tiny_vit(), at(ffn, parallel(small)), name=name)
    before = surgery.fingerprint(model)
    with pytest.raises(OperationError) as caught:
        surgery.apply(model, "adapterx_ffn", name=name)
    check(caught.value, f'name="{name}"', "at(ffn, parallel(adapter(rank=2)))", "revert(model)")
    assert "VisionTransformer" in caught.value.fact
    assert surgery.fingerprint(model) == before


@pytest.mark.parametrize("name", ["", "a.b", "forward", "train", "state_dict"])
def test_a_name_that_cannot_name_an_operation(name):
    model = tiny_vit()
    before = surgery.fingerprint(model)
    with pytest.raises(OperationError) as caught:
        surgery.apply(model, "full", name=name)
    check(caught.value, f'name="{name}"', "cannot name", "plain word")
    assert surgery.fingerprint(model) == before


@pytest.mark.parametrize("name", ["record", "grafts", "undo", "steps", "surgery", "module"])
def test_an_operation_may_have_any_other_plain_name(name):
    model = tiny_vit()
    before = surgery.fingerprint(model)
    surgery.apply(model, at(ffn, parallel(small)), name=name, example=images())
    assert surgery.fingerprint(surgery.revert(model, name=name)) == before


def test_an_attribute_called_surgery_is_kept():
    model = tiny_vit()
    model.surgery = nn.Linear(2, 2)
    before = surgery.fingerprint(model)
    with pytest.raises(OperationError) as caught:
        surgery.apply(model, "full")
    check(caught.value, "VisionTransformer", "attribute surgery", "Rename")
    assert surgery.fingerprint(model) == before


NEEDS_OPERATED = {
    "revert(model)": surgery.revert,
    "report(model)": surgery.report,
    "parameters(model)": surgery.parameters,
    "balance_loss(model)": surgery.balance_loss,
    "routing(model)": surgery.routing,
    "disabled(model)": lambda model: surgery.disabled(model).__enter__(),
}


@pytest.mark.parametrize("call", NEEDS_OPERATED)
def test_what_needs_an_operation_says_so(call):
    model = tiny_vit()
    before = surgery.fingerprint(model)
    with pytest.raises(OperationError) as caught:
        NEEDS_OPERATED[call](model)
    check(caught.value, call, "this VisionTransformer was never operated", "apply(model, rules)")
    assert surgery.fingerprint(model) == before


def test_reverting_twice_is_reverting_what_was_never_operated():
    model = surgery.revert(surgery.apply(tiny_vit(), "adapterx_ffn"))
    with pytest.raises(OperationError, match="never operated"):
        surgery.revert(model)


def test_reverting_under_a_wrong_name_lists_the_names():
    model = tiny_vit()
    surgery.apply(model, at(ffn, parallel(small)), name="one")
    surgery.apply(model, at(attn, parallel(small)), name="two")
    before = surgery.fingerprint(model)
    for name in ("onE", "three"):
        with pytest.raises(OperationError) as caught:
            surgery.revert(model, name=name)
        check(caught.value, f'name="{name}"', "one, two", "apply(..., name=)")
        assert surgery.fingerprint(model) == before


@pytest.mark.parametrize("model", ["vit", None, 3, nn.Linear, {}])
def test_what_is_no_model_is_told(model):
    for call in (surgery.apply, surgery.plan):
        with pytest.raises(OperationError) as caught:
            call(model, "full")
        check(caught.value, type(model).__name__, "no model", "torch.nn.Module")


@pytest.mark.parametrize("call", [surgery.revert, surgery.report, surgery.parameters])
def test_what_is_no_model_is_told_by_every_call(call):
    with pytest.raises(OperationError, match="no model"):
        call("vit")


def test_anatomy_of_what_is_no_model_is_told():
    with pytest.raises(OperationError, match="no model"):
        surgery.anatomy("vit")


# wrappers


@pytest.fixture
def lonely_group(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def check_wrapper(wrapper: nn.Module, inner: nn.Module, attribute: str) -> None:
    before = surgery.fingerprint(inner)
    for call in (surgery.apply, surgery.plan):
        with pytest.raises(OperationError) as caught:
            call(wrapper, "adapterx_ffn")
        check(caught.value, type(wrapper).__name__, "wrapper", f".{attribute}")
    surgery.apply(getattr(wrapper, attribute), "adapterx_ffn")
    for call in (surgery.revert, surgery.report, surgery.balance_loss, surgery.parameters):
        with pytest.raises(OperationError) as caught:
            call(wrapper)
        check(caught.value, type(wrapper).__name__, "wrapper", f".{attribute}")
    surgery.revert(getattr(wrapper, attribute))
    assert surgery.fingerprint(inner) == before


def test_data_parallel_is_a_wrapper():
    model = tiny_vit()
    check_wrapper(nn.DataParallel(model), model, "module")


@pytest.mark.usefixtures("lonely_group")
def test_distributed_data_parallel_is_a_wrapper():
    model = tiny_vit()
    wrapper = nn.parallel.DistributedDataParallel(model)
    for given, rule, word in (
        (wrapper, "DistributedDataParallel", ".module"),
        (model, "apply(", "wrap what comes back"),
    ):
        with pytest.raises(OperationError) as caught:  # it reduces what it knew when it was made
            surgery.apply(given, "adapterx_ffn")
        check(
            caught.value, rule, "wrapper" if given is wrapper else "DistributedDataParallel", word
        )


def test_a_compiled_model_is_a_wrapper():
    model = tiny_vit()
    check_wrapper(torch.compile(model), model, "_orig_mod")


def test_a_weight_average_is_a_wrapper():
    wrapper = torch.optim.swa_utils.AveragedModel(tiny_vit())
    with pytest.raises(OperationError) as caught:
        surgery.apply(wrapper, "adapterx_ffn")
    check(caught.value, "AveragedModel", "wrapper", ".module")


def test_a_model_of_ones_own_that_holds_another_as_module_is_no_wrapper():
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = tiny_vit()

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    model = surgery.apply(Mine(), "adapterx_ffn", example=images())
    assert surgery.parameters(model)


# parts that do not fit, and sites that never run


class Answers(nn.Module):
    """Gives what `answer` makes of its input."""

    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.answer = answer
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> object:
        return self.answer(x)


UNFIT = {
    "(2, 5, 23) float32": lambda x: x[..., :-1],
    "(2, 5) float32": lambda x: x.mean(-1),
    "(1, 5, 24) float32": lambda x: x[:1],  # would broadcast silently
    "(2, 5, 24) float64": lambda x: x.double(),
    "(2, 5, 24) int64": lambda x: x.long(),
    "(2, 5, 24) complex64": lambda x: x + 0j,
    "a tuple": lambda x: (x, x),
    "a NoneType": lambda x: None,
}


@pytest.mark.parametrize("edit", [parallel, append, prepend])
@pytest.mark.parametrize("got", UNFIT)
def test_a_part_that_does_not_fit_is_named_at_the_first_forward(got, edit):
    model = tiny_vit(dynamic_img_size=False)
    before = surgery.fingerprint(model)
    surgery.apply(model, at("blocks.1.mlp", edit(lambda site: Answers(UNFIT[got]))))
    with pytest.raises(GraftError) as caught:
        model(images())
    check(caught.value, "Answers at blocks.1.mlp", f"it returned {got}", "site.out")
    assert "(2, 5, 24) float32" in caught.value.fact
    assert surgery.fingerprint(surgery.revert(model)) == before


@pytest.mark.parametrize("got", UNFIT)
def test_a_part_that_does_not_fit_the_example_leaves_the_model_untouched(got):
    model = tiny_vit()
    before = surgery.fingerprint(model)
    with pytest.raises(GraftError, match="it returned"):
        surgery.apply(
            model,
            at("blocks.1.mlp", parallel(lambda site: Answers(UNFIT[got]))),
            example=images(),
        )
    assert surgery.fingerprint(model) == before


def test_a_replacement_of_another_shape_fails_with_the_model_untouched():
    model = tiny_vit()
    before = surgery.fingerprint(model)
    rule = at("blocks.1.mlp", replace(lambda site: nn.Linear(24, 7)))
    with pytest.raises(RuntimeError):
        surgery.apply(model, rule, example=images())
    assert surgery.fingerprint(model) == before


class Skips(nn.Module):
    """Has two layers and calls one; reads the weight of a third."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.read = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.used(x), self.read.weight)


def check_idle(caught: pytest.ExceptionInfo[GraftError]) -> None:
    check(
        caught.value,
        'at("{used,idle,read}", parallel(adapter(rank=2)))',
        "2 of 3 sites (idle, read) never ran in a whole forward",
        "module that is called",
    )


def test_a_site_that_never_runs_is_an_error_at_the_example():
    model = Skips()
    before = surgery.fingerprint(model)
    with pytest.raises(GraftError) as caught:
        surgery.apply(model, at("{used,idle,read}", parallel(small)), example=torch.ones(1, 4))
    check_idle(caught)
    assert surgery.fingerprint(model) == before


@pytest.mark.parametrize("edit", [parallel, append, prepend, replace])
def test_a_site_that_never_runs_is_an_error_at_every_forward(edit):
    model = Skips()
    before = surgery.fingerprint(model)
    surgery.apply(model, at("idle", edit(lambda site: nn.Linear(4, 4))))
    for _ in range(2):
        with pytest.raises(GraftError, match=r"sites \(idle\) never ran in a whole forward"):
            model(torch.ones(1, 4))
    assert surgery.fingerprint(surgery.revert(model)) == before


def test_all_idle_sites_of_both_kinds_are_counted():
    model = Skips()
    surgery.apply(model, at("{used,idle,read}", parallel(small)))
    with pytest.raises(GraftError) as caught:
        model(torch.ones(1, 4))
    check_idle(caught)


def test_out_proj_of_torchs_attention_is_an_error_and_not_silence():
    rule = at("**.out_proj", parallel(small))
    with pytest.raises(RuleError, match=r"reads the weight of layers\.0\..* without calling it"):
        surgery.apply(encoder(), rule)


def test_a_span_whose_end_runs_before_its_start_is_an_error_of_ours():
    """Post-norm: norm2 runs after the FFN, and no module says so."""
    model = encoder()
    before = surgery.fingerprint(model)
    rule = at(span("**.norm2", "**.linear2"), parallel(small))
    for name in ("linear1", "linear2"):  # so that norm2 is registered before the FFN
        for layer in model.layers:
            layer._modules[name] = layer._modules.pop(name)
    with pytest.raises(GraftError) as caught:
        surgery.apply(model, rule, example=torch.ones(1, 5, 24))
    assert "layers.0" in str(caught.value)
    for layer in model.layers:
        assert not layer.linear2._forward_hooks
    assert not hasattr(model, "surgery")
    assert before.keys() == surgery.fingerprint(model).keys()


def test_an_example_the_model_refuses_leaves_it_untouched():
    model = tiny_vit()
    before = surgery.fingerprint(model)
    with pytest.raises((AssertionError, ValueError), match=r"shape|size|unpack"):
        surgery.apply(model, "adapterx_ffn", example=torch.ones(1, 7))
    assert surgery.fingerprint(model) == before


def test_a_site_that_takes_no_tensor_is_an_error_that_names_it():
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Counts()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.first(3)

    class Counts(nn.Module):
        def forward(self, n: int) -> int:
            return n

    with pytest.raises(GraftError) as caught:
        surgery.apply(
            Takes(), at("first", append(lambda site: nn.Linear(1, 1))), example=torch.ones(1)
        )
    check(caught.value, "first", "no tensor", "tensors")


def test_balance_loss_before_any_forward_is_an_error():
    model = surgery.apply(tiny_vit(), "adapterx_ffn")
    for call in (surgery.balance_loss, surgery.routing):
        with pytest.raises(GraftError) as caught:
            call(model)
        check(caught.value, f"{call.__name__}(model)", "blocks.0.mlp has not run", "forward first")


def test_the_forward_of_the_example_is_not_taken_for_one_of_the_users():
    model = surgery.apply(tiny_vit(), "adapterx_ffn", example=images())
    for call in (surgery.balance_loss, surgery.routing):
        with pytest.raises(GraftError, match="forward first"):
            call(model)


# the errors themselves


def test_every_error_is_a_surgery_error_and_nothing_else():
    kinds = [getattr(surgery, name) for name in surgery.__all__ if name.endswith("Error")]
    assert len(kinds) == 7
    assert all(issubclass(kind, SurgeryError) for kind in kinds)
    assert not issubclass(SurgeryError, (ValueError, TypeError, KeyError))


def test_an_error_survives_pickling():
    import pickle

    error = MatchError("at(x)", "it matched nothing.", "Write y.")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (MatchError, str(error))


def test_a_head_that_is_missing_names_the_roles_that_are_there():
    with pytest.raises(MatchError) as caught:
        surgery.plan(tiny_vit(num_classes=0), "linear_probe")
    check(caught.value, "at(head, ...)", "VisionTransformer", "ffn (3)")
    assert "head" not in caught.value.remedy
    assert surgery.plan(tiny_vit(), at(head, unfreeze)).trainable == 24 * 5 + 5


def test_what_is_printed_obeys_nobody_and_is_short() -> None:
    """Names and rules of a file are in errors: a terminal would do what they say."""
    error = SurgeryError("at(\x1b[2J)", "a\u202eb\0\ud800 " + "c" * 10**6, "One line.\nTwo.")
    text = str(error)
    assert text.replace("\n", "").isprintable()
    assert text.startswith(r"at(\x1b[2J): a\u202eb\x00\ud800 ccc")
    assert text.endswith("... (1,000,006 characters)\nOne line.\nTwo.")
    assert len(text) < 2000
    assert error.fact.endswith("ccc")
    assert str(SurgeryError("", "é ü 漢字 \U0001f4a5", "x")) == "é ü 漢字 \U0001f4a5\nx"


@pytest.mark.parametrize("value", ["1", None, True, [1.0], torch.nn.ReLU()])
def test_a_number_of_a_part_is_a_number(value: object) -> None:
    with pytest.raises(RuleError, match="it must be a number"):
        surgery.parts.repadapter(scale=value)
    surgery.parts.repadapter(scale=2)
    surgery.parts.repadapter(scale=0.5)
