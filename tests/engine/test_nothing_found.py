"""Why a rule matched nothing: the cause by name, and a remedy that works."""

from __future__ import annotations

import re

import pytest
from torch import nn

import surgery
from surgery import (
    MatchError,
    adapter,
    at,
    attn,
    block,
    fc1,
    freeze,
    fused,
    head,
    inside,
    key,
    lora,
    parallel,
    proj,
    qkv,
    query,
    unfreeze,
    value,
)
from tests.models import encoder, images, tiny_vit, torchvision_vit

LORA = lora(rank=2)
WORDS = vars(surgery)


def refused(model: nn.Module, *rules: surgery.Rule, example: object = None) -> MatchError:
    before = surgery.fingerprint(model)
    with pytest.raises(MatchError) as caught:
        surgery.apply(model, [*rules], example=example)
    assert surgery.fingerprint(model) == before
    return caught.value


def written(remedy: str) -> list[str]:
    """The rules that a remedy writes out."""
    rules = re.findall(r"at\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", remedy)
    return [rule for rule in rules if "..." not in rule]


# projections of nn.MultiheadAttention: weights that nobody calls


@pytest.mark.parametrize("build", [torchvision_vit, encoder])
@pytest.mark.parametrize(
    "role", [qkv, proj, fused, query, key, value, qkv & inside(block)], ids=str
)
def test_projections_of_torch_attention_are_places(build, role):
    plan = surgery.plan(build(), at(role, LORA))
    assert plan.added
    assert all("proj" in site.path for site in plan.sites)


def test_the_named_set_takes_them():
    assert surgery.plan(torchvision_vit(), "lora").added


def test_beside_what_is_there_a_role_may_come_to_nothing():
    assert surgery.apply(torchvision_vit(), at(qkv | fc1, LORA))


# a parameter's name


@pytest.mark.parametrize(
    ("address", "rule"),
    [
        ("blocks.0.attn.qkv.weight", 'at("blocks.0.attn.qkv", unfreeze("weight"))'),
        ("blocks.*.attn.qkv.weight", 'at("blocks.*.attn.qkv", unfreeze("weight"))'),
        ("blocks.[-1].mlp.fc1.{weight,bias}", 'unfreeze("{weight,bias}"))'),
        ("pos_embed", 'at("", unfreeze("pos_embed"))'),
        ("**.bias", 'at("**", unfreeze("bias"))'),
    ],
)
def test_the_name_of_a_parameter_is_told_to_be_one(address, rule):
    error = refused(tiny_vit(), at(address, unfreeze))
    assert "parameter" in error.fact
    (suggested,) = written(error.remedy)
    assert rule in suggested
    meant = unfreeze(address.replace("[-1]", "2"))
    trained = surgery.plan(tiny_vit(), eval(suggested, WORDS)).trainable
    assert trained == surgery.plan(tiny_vit(), at("", meant)).trainable


def test_a_part_at_a_parameter_is_told_the_word_for_it():
    error = refused(tiny_vit(), at("blocks.0.attn.qkv.weight", LORA))
    assert 'at(weight("blocks.0.attn.qkv.weight"), ...)' in error.remedy
    assert surgery.plan(tiny_vit(), at(surgery.weight("blocks.0.attn.qkv.weight"), LORA)).added


def test_an_address_of_no_parameter_is_told_the_nearest():
    error = refused(tiny_vit(), at(surgery.weight("blocks.*.attn.qkv.weigth"), LORA))
    assert 'at(weight("blocks.*.attn.qkv.weight"), ...)' in error.remedy


def test_frozen_stays_the_word_that_was_written():
    error = refused(tiny_vit(), at(head, unfreeze), at("head.weight", freeze))
    assert 'at("head", freeze("weight"))' in error.remedy


def test_a_parameter_among_other_places_is_told_too():
    error = refused(tiny_vit(), at(fc1 | surgery.where("head.weight"), LORA))
    assert "head.weight is a parameter" in error.fact


def test_a_place_stays_a_place():
    """A module and a parameter of the same end: the address of the module is right."""
    rules = [at("**.qkv", LORA), at(attn, parallel(adapter(rank=2)))]
    assert surgery.apply(tiny_vit(), rules, example=images())
