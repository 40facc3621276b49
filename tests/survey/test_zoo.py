"""Roles on a sample of other people's models: counts, names, soundness, what a forward says."""

from __future__ import annotations

import random

import pytest
import timm
import torch
from torch import nn

import surgery
from surgery import ffn, key, query, value
from surgery.engine.planning import plan
from surgery.rules.selector import where
from surgery.structure.anatomy import roles_of
from surgery.structure.ffn_traced import traced_ffns
from surgery.structure.module_tree import Tree
from surgery.structure.trace import trace
from surgery.survey import zoo
from tests.structure.test_anatomy import Between, mixing, renamed, spots

# small ones of text, speech, pictures, proteins, both; split, gated, experts
TYPES = [
    "t5", "opt", "distilbert", "deberta-v2", "mixtral", "qwen2_moe", "granitemoe", "phi3",
    "whisper", "hubert", "dinov2", "siglip", "esm", "xlm",
]  # fmt: skip


@pytest.fixture(scope="module", params=TYPES)
def tiny(request):
    torch.manual_seed(0)
    return zoo.tiny(request.param)


def test_a_token_sees_itself_alone(tiny):
    model = tiny[0].eval()
    for site in where(ffn).find(Tree(model)):
        path = Between(site, nn.functional.gelu) if site.is_span else site.module
        assert torch.equal(mixing(path, site.width), torch.eye(5, dtype=torch.bool)), site


def test_structure_and_a_forward_find_the_same(tiny):
    """The one reads modules, the other what feeds what: neither knows of the other."""
    model, inputs = tiny
    static = {path for s in roles_of(Tree(model))["ffn"] for path in (s.entry.path, s.exit.path)}
    traced = [feed for feed in traced_ffns(trace(model, inputs)) if feed.kind == "ffn"]
    assert traced
    for feed in traced:
        ends = (feed.entry.split("*")[0].rstrip("."), feed.exit.split("*")[0].rstrip("."))
        for end in ends:
            assert any(end == p or end.startswith(f"{p}.") for p in static), (feed, static)


def test_names_mean_nothing(tiny):
    model = tiny[0]
    before, names = spots(model), [(m, dict(m._modules)) for m in model.modules()]
    try:
        assert spots(renamed(model)) == before
    finally:
        for module, children in names:
            module._modules.clear()
            module._modules.update(children)


def test_a_forward_proves_the_operation(tiny):
    model, inputs = tiny
    before = surgery.fingerprint(model)
    surgery.apply(model, "adapterx_ffn", example=inputs)
    surgery.revert(model)
    surgery.apply(model, "adaptformer", example=inputs)
    surgery.revert(model)
    after = surgery.fingerprint(model)
    assert [mark for mark in before if before[mark] != after.get(mark)] == []


@pytest.mark.parametrize("name", ["t5", "opt", "whisper", "esm"])
def test_queries_keys_and_values_are_those_that_the_authors_call_so(name):
    model, inputs = zoo.tiny(name)
    for role, letter in ((query, "q"), (key, "k"), (value, "v")):
        sites = plan(model, surgery.at(role, surgery.unfreeze), example=inputs).matches[0][1]
        assert {site.path.rpartition(".")[2][0] for site in sites} == {letter}


SAMPLE = random.Random(0).sample(timm.list_models(), 40)


@pytest.mark.parametrize("name", SAMPLE)
def test_names_mean_nothing_in_timm(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    before = spots(model)
    assert spots(renamed(model)) == before
