"""Plans: the integers of the paper, counted without a copy; sharing; heads that fit."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import surgery
from surgery import (
    OperationError,
    RuleError,
    adapter,
    append,
    at,
    attn,
    block,
    ffn,
    freeze,
    head,
    moa,
    nearest,
    norm,
    parallel,
    prepend,
    shared,
    token,
    unfreeze,
)
from tests.models import images, tiny_vit


def on_meta(name: str, **changes) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **changes)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return on_meta("vit_base_patch16_224", num_classes=0)


@pytest.fixture(scope="module")
def swin() -> nn.Module:
    return on_meta("swin_tiny_patch4_window7_224")


# the integers


@pytest.mark.parametrize(
    ("rules", "added", "trainable"),
    [
        (at(ffn, parallel(shared(moa(experts=4, rank=64, heads=3)))), 148_992, 148_992),
        (at(ffn, parallel(moa(experts=4, rank=64, heads=3))), 1_787_904, 1_787_904),
        ("adapterx_ffn", 148_992, 167_424),
        ("adaptformer", 1_189_632, 1_189_632),
        ("adapter", 156_768, 156_768),
        ("full", 0, 85_798_656),
        (at(nearest(norm, before=ffn), unfreeze), 0, 18_432),
        ([at("", unfreeze), at(attn, freeze)], 0, 85_798_656 - 12 * (768 * 4 * 769)),
    ],
    ids=["moa", "unshared", "adapterx_ffn", "adaptformer", "adapter", "full", "norms", "but attn"],
)
def test_parameters_at_vit_base(base, rules, added, trainable):
    made = surgery.plan(base, rules)
    assert (made.added, made.trainable) == (added, trainable)
    assert f"{added:,}" in str(made)
    assert f"{trainable:,} trainable" in str(made)


def test_a_linear_probe_trains_the_head_alone():
    made = surgery.plan(on_meta("vit_base_patch16_224", num_classes=100), "linear_probe")
    assert (made.added, made.trainable) == (0, 76_900)


def test_a_head_is_trained_along_with_any_set():
    model = on_meta("vit_base_patch16_224", num_classes=100)
    assert surgery.plan(model, "adapterx_ffn").trainable == 167_424 + 76_900


def test_the_plan_prints_sites_parts_and_share_of_the_base(base):
    text = str(surgery.plan(base, "adapterx_ffn"))
    assert text.startswith("Plan for VisionTransformer")
    assert "blocks.*.mlp x12" in text
    assert "blocks.*.norm2 x12" in text
    assert "0.20 % of the base's 85,798,656" in text


def test_sites_of_a_plan_come_in_the_order_of_the_walk():
    rules = [at("blocks.[-1].mlp", parallel(adapter())), at(attn, parallel(adapter()))]
    sites = surgery.plan(tiny_vit(depth=2), rules).sites
    assert [s.path for s in sites] == ["blocks.0.attn", "blocks.1.attn", "blocks.1.mlp"]


def test_two_edits_at_one_site_are_one_site_of_the_plan():
    rule = at("head", append(adapter(rank=2)), prepend(adapter(rank=2)))
    made = surgery.plan(tiny_vit(), rule)
    assert len(made.sites) == 1
    assert made.added == (5 * 2 + 2 + 2 * 5 + 5) + (24 * 2 + 2 + 2 * 24 + 24)


# no copy


class RealTensors(TorchDispatchMode):
    """Notes every tensor made off the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Size] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.made += [t.shape for t in tensors if not t.is_meta]
        return out


SETS = ["adapterx_ffn", "adapter", "adaptformer", "linear_probe", "full"]


@pytest.mark.parametrize("rules", SETS)
def test_a_plan_makes_no_tensor_and_touches_none(rules):
    model = tiny_vit()
    before = surgery.fingerprint(model)
    with RealTensors() as real:
        made = surgery.plan(model, rules)
        str(made), repr(made), made.added, made.trainable, made.sites
    assert real.made == []
    assert all(p.is_meta for part in made.parts.values() for p in part.parameters())
    assert surgery.fingerprint(model) == before


def test_apply_does_make_tensors_so_that_the_count_above_means_something():
    with RealTensors() as real:
        surgery.apply(tiny_vit(), "adapterx_ffn")
    assert real.made


# the plan against what is done


@pytest.mark.parametrize("rules", SETS)
def test_the_report_says_what_the_plan_said(rules):
    model = tiny_vit()
    made = surgery.plan(model, rules)
    told, added, trainable = str(made), made.added, made.trainable
    assert made.apply() is model
    assert told.split("\n", 1)[1] == str(surgery.report(model)).split("\n", 1)[1]
    own = sum(p.numel() for p in model.surgery.parameters()) if hasattr(model, "surgery") else 0
    assert own == added
    assert sum(p.numel() for p in surgery.parameters(model)) == trainable


def test_planning_again_says_the_same():
    model = tiny_vit()
    assert str(surgery.plan(model, "adapterx_ffn")) == str(surgery.plan(model, "adapterx_ffn"))


def test_a_plan_can_be_carried_out_once():
    made = surgery.plan(tiny_vit(), "full")
    made.apply()
    with pytest.raises(OperationError, match="operated under that name already"):
        made.apply()


def test_the_last_word_on_training_counts():
    model = tiny_vit()
    each = sum(p.numel() for p in model.head.parameters())
    assert surgery.plan(model, [at("", freeze), at(head, unfreeze)]).trainable == each
    everything = sum(p.numel() for p in model.parameters())
    assert surgery.plan(model, [at("", unfreeze), at(head, freeze)]).trainable == everything - each


# parameters by name


def chosen(model: nn.Module, *rules) -> set[str]:
    unfrozen = surgery.plan(model, list(rules)).unfrozen
    return {name for name, p in model.named_parameters() if id(p) in unfrozen}


def test_parameters_are_chosen_by_their_names_from_the_site_on():
    model = tiny_vit()
    every = {name for name, _ in model.named_parameters()}
    assert chosen(model, at("", unfreeze("**.bias"))) == {n for n in every if n.endswith("bias")}
    assert chosen(model, at("blocks.*", unfreeze("attn.**.weight"))) == {
        n for n in every if ".attn." in n and n.endswith("weight")
    }
    assert chosen(model, at(block[-1], unfreeze("*.{weight,bias}"))) == {
        f"blocks.2.norm{i}.{tensor}" for i in (1, 2) for tensor in ("weight", "bias")
    }
    assert chosen(model, at("", unfreeze(token))) == {"cls_token"}
    assert chosen(model, at("", unfreeze), at("", freeze("**.weight"))) == {
        n for n in every if not n.endswith("weight")
    }


def test_rows_count_what_is_chosen_by_name_once():
    made = surgery.plan(tiny_vit(), [at(head, unfreeze("bias")), at("", unfreeze("**.bias"))])
    rows = made.record["rows"]
    assert rows[0]["unfrozen"] == 5
    assert sum(row["unfrozen"] for row in rows) == made.trainable


@pytest.mark.parametrize(
    ("edit", "fact"),
    [
        (lambda: unfreeze("haed.bias"), 'has no parameter for unfreeze("haed.bias").'),
        (lambda: unfreeze("**.bias", "x"), 'has no parameter for unfreeze("x").'),
        (lambda: unfreeze("blocks.[0].**"), "a parameter has a name, and no position"),
        (lambda: unfreeze(3), "parameters are told by an address"),
        (lambda: freeze("a b"), "is no address step"),
    ],
)
def test_names_that_mean_nothing_are_told(edit, fact):
    with pytest.raises(surgery.SurgeryError) as told:
        surgery.plan(tiny_vit(), [at("", unfreeze), at("", edit())])
    assert fact in str(told.value)


def test_an_optional_rule_may_name_what_is_not_there():
    rules = [at(head, unfreeze), at("blocks.*", unfreeze("x"), optional=True)]
    assert surgery.plan(tiny_vit(), rules).trainable == 125


def test_a_part_that_is_mostly_joined_in_one_way_needs_no_edit():
    assert at(ffn, surgery.lora()) == at(ffn, parallel(surgery.lora()))
    assert at(block, surgery.prompt()) == at(block, surgery.insert(surgery.prompt()))
    assert at(ffn, shared(surgery.scale_shift())) == at(ffn, append(shared(surgery.scale_shift())))
    with pytest.raises(RuleError, match="is no edit"):
        at(ffn, adapter())


# shared parts


def keys(model: nn.Module, *rules) -> set[str]:
    return set(surgery.plan(model, list(rules)).parts)


def test_a_shared_part_is_made_once_for_each_width(swin):
    made = surgery.plan(swin, at(ffn, parallel(shared(adapter(rank=4))), times=12))
    widths = [96, 192, 384, 768]
    assert made.added == sum(2 * 4 * w + 4 + w for w in widths)
    assert set(made.parts) == {f"shared/adapter/{w}" for w in widths}


def test_a_shared_part_by_a_capture_is_made_once_for_each_value():
    rule = at("blocks.{block}.{mlp,attn}", parallel(shared(adapter(rank=2), by="block")), times=6)
    made = surgery.plan(tiny_vit(), rule)
    assert made.added == 3 * (2 * 24 * 2 + 2 + 24)
    assert len(made.parts) == 3


def test_a_shared_part_is_made_once_for_each_dtype_and_device():
    model = tiny_vit()
    model.blocks[1].double()
    rule = at(ffn, parallel(shared(adapter(rank=2))))
    made = surgery.plan(model, rule)
    assert made.added == 2 * (2 * 24 * 2 + 2 + 24)
    made.apply()
    kinds = {p.dtype for p in model.surgery.parameters()}
    assert kinds == {torch.float32, torch.float64}
    with torch.device("meta"):
        model.blocks[2] = tiny_vit().blocks[2]
    assert len(surgery.plan(surgery.revert(model), rule).parts) == 3


def test_shared_by_stage_on_swin(swin):
    rule = at("layers.{stage}.blocks.*.mlp", parallel(shared(adapter(rank=4), by="stage")))
    made = surgery.plan(swin, rule)
    assert {key.rpartition("=")[2] for key in made.parts} == {"0", "1", "2", "3"}


def test_sharing_by_a_capture_holds_in_the_applied_model():
    model = tiny_vit()
    part = shared(lambda site: nn.Linear(site.width, site.out), by="i")
    surgery.apply(model, at("blocks.{i}.{attn,mlp}", parallel(part)), example=images())
    assert sum(isinstance(m, nn.Linear) for m in model.surgery.modules()) == 3


def test_rules_that_share_an_equal_part_share_one():
    first = at(attn, parallel(shared(adapter(rank=2))))
    second = at(ffn, parallel(shared(adapter(rank=2))))
    assert len(keys(tiny_vit(), first, second)) == 1


def test_a_name_or_another_argument_tells_shared_parts_apart():
    first = at(attn, parallel(shared(adapter(rank=2))))
    named = at(ffn, parallel(shared(adapter(rank=2), name="other")))
    wider = at(ffn, parallel(shared(adapter(rank=3))))
    assert len(keys(tiny_vit(), first, named)) == 2
    assert len(keys(tiny_vit(), first, wider)) == 2


def test_two_lambdas_are_two_parts_and_one_lambda_is_one():
    def make(site):
        return nn.Linear(site.width, site.out)

    one, other = (lambda s: make(s)), (lambda s: make(s))
    assert len(keys(tiny_vit(), *(at(w, parallel(shared(one))) for w in (attn, ffn)))) == 1
    two = [at(attn, parallel(shared(one))), at(ffn, parallel(shared(other)))]
    assert len(keys(tiny_vit(), *two)) == 2


def test_by_without_a_capture_is_an_error_that_shows_how():
    with pytest.raises(RuleError, match="to go by") as caught:
        surgery.plan(tiny_vit(), at(ffn, parallel(shared(moa(), by="stage"))))
    assert "at(ffn, ...)" in caught.value.rule
    assert "{stage}" in caught.value.fact
    assert "{stage}" in caught.value.remedy


# heads


@pytest.mark.parametrize(("heads", "near"), [(5, "3, 4, 6"), (7, "4, 6, 8"), (100, "16, 24, 48")])
def test_heads_that_do_not_divide_name_the_divisors_that_do(heads, near):
    model = tiny_vit(embed_dim=48)
    with pytest.raises(RuleError) as caught:
        surgery.plan(model, at(ffn, parallel(moa(heads=heads))))
    assert f"heads={heads}" in caught.value.rule
    assert "48" in caught.value.fact
    assert near in caught.value.remedy
    assert "fit=True" in caught.value.remedy


@pytest.mark.parametrize(
    ("width", "heads", "chosen"), [(48, 5, 6), (48, 3, 3), (40, 3, 4), (56, 3, 4), (48, 100, 48)]
)
def test_fit_takes_the_nearest_divisor_and_the_larger_of_two(width, heads, chosen):
    model = tiny_vit(embed_dim=width, num_heads=4)
    made = surgery.plan(model, at(ffn, parallel(shared(moa(heads=heads, fit=True)))))
    (mixture,) = made.parts.values()
    assert mixture.heads == chosen


def test_plan_and_report_say_when_heads_were_fitted():
    model = tiny_vit(embed_dim=40, num_heads=4)
    made = surgery.plan(model, "adapterx_ffn")
    note = "note: 4 heads: the divisor of 40 nearest to 3"
    assert note in str(made)
    made.apply()
    assert note in str(surgery.report(model))


def test_heads_that_divide_need_no_note():
    assert "divisor" not in str(surgery.plan(tiny_vit(), "adapterx_ffn"))


def test_a_site_without_features_is_an_error():
    """A dropout fixes no width: a part made for it would be zero wide."""
    with pytest.raises(RuleError, match=r"drop1?"):
        surgery.plan(tiny_vit(), at("blocks.*.mlp.drop1", parallel(adapter(rank=2))))


@pytest.mark.parametrize("edit", [append, prepend, parallel])
@pytest.mark.parametrize("wrap", [shared, lambda part: part], ids=["shared", "own"])
def test_a_part_that_asks_for_no_width_goes_anywhere(edit, wrap):
    model = tiny_vit()
    rule = at("blocks.*.mlp.drop1", edit(wrap(lambda site: nn.Dropout(0.1))))
    surgery.apply(model, rule, example=images())
    assert len(surgery.plan(tiny_vit(), rule).sites) == 3
