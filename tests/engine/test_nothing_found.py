"""Why a rule matched nothing: the cause by name, and a remedy that works."""

from __future__ import annotations

import re

import pytest
import torch
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


# projections of nn.MultiheadAttention


@pytest.mark.parametrize("build", [torchvision_vit, encoder])
@pytest.mark.parametrize(
    "role", [qkv, proj, fused, query, key, value, qkv & inside(block)], ids=str
)
def test_projections_of_torch_attention_are_told_to_be_parameters(build, role):
    error = refused(build(), at(role, LORA))
    assert "nn.MultiheadAttention" in error.fact
    assert "in_proj_weight" in error.fact
    rules = written(error.remedy)
    assert len(rules) == 2
    for rule in rules:
        surgery.apply(build(), eval(rule, WORDS))


def test_with_an_example_the_same_is_told():
    error = refused(encoder(), at(query, LORA), example=torch.randn(2, 5, 24))
    assert "nn.MultiheadAttention" in error.fact


def test_the_named_set_tells_it_too():
    with pytest.raises(MatchError, match=r"nn\.MultiheadAttention"):
        surgery.apply(torchvision_vit(), "lora")


def test_separate_projections_are_all_named():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(24, 3, 48, batch_first=True)
            layer.self_attn = nn.MultiheadAttention(24, 3, kdim=12, vdim=12, batch_first=True)
            self.layers = nn.ModuleList([layer])

    error = refused(Model(), at(qkv, LORA))
    assert "{q_proj_weight,k_proj_weight,v_proj_weight}" in error.remedy
    surgery.apply(Model(), eval(written(error.remedy)[1], WORDS))


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


def test_a_part_at_a_parameter_is_sent_to_its_module():
    error = refused(tiny_vit(), at("blocks.0.attn.qkv.weight", LORA))
    assert 'at("blocks.0.attn.qkv", ...)' in error.remedy
    assert surgery.plan(tiny_vit(), at("blocks.0.attn.qkv", LORA)).added


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
