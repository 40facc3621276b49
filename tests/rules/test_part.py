"""Parts are made by functions of a site: a class is told so, where it takes none."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import surgery
from surgery import RuleError, append, at, ffn, parallel, prepend, replace, shared
from tests.models import images, tiny_vit

WORDS = {**vars(surgery), "nn": nn}


class OfSite(nn.Module):
    def __init__(self, site: surgery.Site) -> None:
        super().__init__()
        self.linear = nn.Linear(site.width, site.out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class OfWidth(nn.Linear):
    def __init__(self, width: int) -> None:
        super().__init__(width, width)


class OfMore(nn.Linear):
    def __init__(self, in_features: int, out_features: int, twice: int) -> None:
        super().__init__(in_features, twice * out_features)


@pytest.mark.parametrize("word", [append, prepend, parallel, replace, shared])
@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (nn.LayerNorm, "nn.LayerNorm(site.width)"),
        (nn.Linear, "nn.Linear(site.width, site.out)"),
        (nn.GELU, "nn.GELU()"),
        (nn.ReLU, "nn.ReLU()"),  # whose only argument would take anything
        (nn.Sigmoid, "nn.Sigmoid()"),
        (nn.Dropout, "nn.Dropout()"),
        (nn.RMSNorm, "nn.RMSNorm(site.width)"),
    ],
)
def test_a_class_of_torch_is_no_part_and_the_remedy_is(word, kind, call):
    with pytest.raises(RuleError) as caught:
        word(kind)
    remedy = f"{word.__name__}(lambda site: {call})"
    assert caught.value.rule == f"{word.__name__}({surgery.rules.expression.shown(kind)})"
    assert caught.value.remedy == f"Write {remedy}."
    edit = eval(remedy, WORDS)
    assert surgery.plan(tiny_vit(), at(ffn, append(edit) if word is shared else edit)).sites


@pytest.mark.parametrize("wrap", [lambda part: part, shared], ids=["own", "shared"])
def test_a_class_that_takes_a_site_is_a_part(wrap):
    model = surgery.apply(tiny_vit(), at(ffn, append(wrap(OfSite))), example=images())
    assert surgery.parameters(model)


def test_identity_takes_anything():
    assert surgery.apply(tiny_vit(), [at(ffn, replace(nn.Identity)), at("head", surgery.unfreeze)])


@pytest.mark.parametrize(
    ("kind", "call"),
    [(OfWidth, "OfWidth(site.width)"), (OfMore, "OfMore(site.width, site.out, ...)")],
)
def test_a_class_of_numbers_is_told_and_nothing_is_done(kind, call):
    model = tiny_vit()
    before = surgery.fingerprint(model)
    for do in (surgery.plan, surgery.apply):
        with pytest.raises(RuleError, match="was given a site") as caught:
            do(model, at(ffn, append(kind)))
        assert f"append(lambda site: {call})" in caught.value.remedy
        assert isinstance(caught.value.__cause__, TypeError)
    assert surgery.fingerprint(model) == before


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.GELU, OfWidth])
def test_a_class_in_a_partial_is_told_too(kind):
    with pytest.raises(RuleError, match=r"lambda site: \S+\("):
        surgery.plan(tiny_vit(), at(ffn, append(functools.partial(kind))))
    of_site = append(functools.partial(OfSite))
    assert surgery.plan(tiny_vit(), at(ffn, of_site)).added


def test_a_fault_in_a_function_is_its_own():
    def broken(site: surgery.Site) -> nn.Module:
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        surgery.plan(tiny_vit(), at(ffn, append(broken)))
