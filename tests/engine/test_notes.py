"""Notes of plans and reports: there where there is something to say, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery import adapter, at, block, ffn, freeze, head, lora, parallel, prompt, unfreeze
from tests.models import encoder, hf_bert, hf_gpt2, hf_llama, images, tiny_vit

ADAPTER = at(ffn, parallel(adapter(rank=2)))
FROZEN = "note: the head stays frozen (head): at(head, unfreeze) trains it"


def test_a_head_that_stays_frozen_is_told():
    model = tiny_vit()
    assert FROZEN in str(surgery.plan(model, ADAPTER))
    assert FROZEN in str(surgery.report(surgery.apply(model, ADAPTER, example=images())))
    assert "stays" not in str(surgery.plan(tiny_vit(), [ADAPTER, at(head, unfreeze)]))


@pytest.mark.parametrize(
    "rule",
    [
        at(head, unfreeze),
        at(head, freeze),
        at("", freeze("head.*")),
        at("head", unfreeze("bias")),
        at(head, parallel(lora(rank=2))),
        at(nn.Linear, lora(rank=2)),
        at("", unfreeze),
    ],
    ids=repr,
)
def test_whoever_speaks_of_the_head_is_told_nothing(rule):
    assert "head stays" not in str(surgery.plan(tiny_vit(), [ADAPTER, rule]))


@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny_vit(num_classes=0),
        encoder,
        hf_gpt2,  # a head of words, which comes as it was trained
        hf_llama,
        lambda: nn.Sequential(encoder(), nn.LayerNorm(24)),
    ],
    ids=["none", "encoder", "gpt2", "llama", "norm"],
)
def test_a_model_without_a_head_of_its_own_has_no_such_note(build):
    assert "stays frozen" not in str(surgery.plan(build(), ADAPTER))


def test_the_head_of_a_classifier_of_words_is_told():
    assert "classifier" in str(surgery.plan(hf_bert(), ADAPTER))


def test_rules_that_add_no_part_are_left_alone():
    assert "head stays" not in str(surgery.plan(tiny_vit(), at("blocks.*.norm1", unfreeze)))


def test_a_head_that_an_earlier_operation_trains_is_no_matter():
    model = surgery.apply(tiny_vit(), at(head, unfreeze), name="first")
    assert "head stays" not in str(surgery.plan(model, ADAPTER, name="second"))


def test_a_note_runs_no_forward():
    """Where nothing asked what feeds what, the example is for the proof alone."""
    calls: list[int] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())  # no feed-forward network by structure
    model.register_forward_hook(lambda *_: calls.append(1))
    rule = at("0", parallel(lambda site: nn.Linear(site.width, site.out)))
    assert "forward" not in str(surgery.plan(model, rule, example=torch.zeros(1, 4)))
    assert not calls


class Towers(nn.Module):
    """Two lists of blocks: one of pictures, one of words."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = encoder(), encoder()
        self.head = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.one(x).mean(1) + self.two(x).mean(1))


@pytest.mark.parametrize("told", [True, False], ids=["example", "without"])
def test_a_tower_that_is_given_no_token_is_told(told: bool) -> None:
    x = torch.randn(2, 6, 24) if told else None
    text = str(surgery.plan(Towers().eval(), "vpt_shallow", example=x))
    assert "note: at(until(block[0], block), ...) puts no token in at two.layers.* x2" in text
    for rules in ("vpt_deep", "adapterx", at(block, prompt()), at(ffn, parallel(adapter()))):
        assert "puts no token" not in str(surgery.plan(Towers().eval(), rules, example=x))
    for rules in ("vpt_shallow", at(block[1:], prompt()), at("layers.0", prompt())):
        assert "puts no token" not in str(surgery.plan(encoder(), rules, example=x))
