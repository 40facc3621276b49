"""Places as they are written: what anatomy, plans and reports print is an address."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

import surgery
from surgery import adapter, at, ffn, norm, parallel, shared, span, unfreeze, weight, where
from surgery.rules.roles import ROLES
from surgery.structure.anatomy import roles_of
from surgery.structure.module_tree import Site, Tree
from surgery.structure.path import generalise
from surgery.structure.places import site_at
from surgery.structure.weights import ParameterSite
from tests.laws.test_backbones import BACKBONES
from tests.models import encoder, torchvision_vit

MODELS = {**{name: build for name, (build, _) in BACKBONES.items()}, "torchvision": torchvision_vit}
ADAPTER = parallel(adapter(rank=2))


@cache
def tree(name: str) -> Tree:
    torch.manual_seed(0)
    return Tree(MODELS[name]())


def ends(sites: object) -> list[tuple[Site, Site]]:
    return [(site.entry, site.exit) for site in sites]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", MODELS)
def test_every_address_that_anatomy_prints_is_accepted(name):
    """And selects the sites of the role at that address; each path is found again by itself."""
    for role in ROLES:
        sites = roles_of(tree(name))[role.name]
        for address in {generalise(site.path) for site in sites}:
            same = [site for site in sites if generalise(site.path) == address]
            is_weight = any(isinstance(site, ParameterSite) for site in same)
            pattern = weight(address) if is_weight else where(address)
            assert set(ends(pattern.find(tree(name)))) >= set(ends(same)), address
        assert [site_at(tree(name), site.path) for site in sites] == sites


@pytest.mark.parametrize("name", MODELS)
def test_the_paths_of_a_plan_are_found_again(name):
    for site in span(norm, ffn).find(tree(name)):
        again = site_at(tree(name), site.path)
        assert again is not None
        assert (again.entry, again.exit, again.shape) == (site.entry, site.exit, site.shape)


def test_a_span_by_its_address_is_that_of_the_role():
    by_role = surgery.plan(encoder(), at(ffn, ADAPTER))
    by_name = surgery.plan(encoder(), at("layers.*.(linear1 to linear2)", ADAPTER, times=2))
    assert [site.path for site in by_name.sites] == [site.path for site in by_role.sites]
    assert (by_name.added, list(by_name.parts)) == (by_role.added, list(by_role.parts))


def test_a_span_runs_trains_and_is_saved(tmp_path):
    x = torch.randn(2, 5, 24)
    rule = at("layers.[1].(linear1 to linear2)", ADAPTER)
    torch.manual_seed(0)
    model = surgery.apply(encoder().eval(), rule, example=x)
    for p in surgery.parameters(model):
        nn.init.normal_(p)
    surgery.save(model, tmp_path / "x.safetensors")
    torch.manual_seed(0)
    again = surgery.load(encoder().eval(), tmp_path / "x.safetensors")
    assert torch.equal(again(x), model(x))
    assert eval(repr(rule)) == rule


def test_a_span_captures_and_combines():
    part = parallel(shared(adapter(rank=2), by="i"))
    assert len(surgery.plan(encoder(), at("layers.{i}.(linear1 to linear2)", part)).parts) == 2
    spans = where("layers.*.(linear1 to linear2)")
    assert surgery.plan(encoder(), at(spans & ~where("layers.0.(linear1 to linear2)"), ADAPTER))
    assert len(surgery.plan(encoder(), at(spans | "layers.*.norm1", ADAPTER)).sites) == 4
    assert len(surgery.plan(encoder(), at(spans[-1:], ADAPTER)).sites) == 1
    assert surgery.plan(encoder(), at(spans, unfreeze)).trainable == 2 * (48 * 25 + 24 * 49)


@pytest.mark.parametrize(
    "address", ["layers.*.(linear1 to linear3)", "layers.*.(linear0 to linear2)", "(a to b)"]
)
def test_a_span_without_such_ends_names_the_nearest(address):
    with pytest.raises(surgery.MatchError) as caught:
        surgery.plan(encoder(), at(address, ADAPTER))
    assert "layers.*.(linear1 to linear2) (2)" in caught.value.remedy


@pytest.mark.parametrize(
    "path", ["layers.7", "layers.0.(linear1 to no)", "(a to b)", "()", "a to b"]
)
def test_no_place_is_none(path):
    assert site_at(Tree(encoder()), path) is None


def test_ends_that_are_no_addresses_are_told():
    with pytest.raises(surgery.RuleError, match="no address step"):
        where("layers.*.(linear1* to linear2)")
