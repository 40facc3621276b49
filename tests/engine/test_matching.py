"""Every name that a rule writes out is of some module; the one that is not is told by its name."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import surgery
from surgery import (
    MatchError,
    adapter,
    append,
    at,
    attn,
    block,
    fc1,
    ffn,
    freeze,
    head,
    holding,
    insert,
    inside,
    lora,
    nearest,
    norm,
    parallel,
    prompt,
    shared,
    span,
    unfreeze,
    until,
    where,
)
from surgery.engine.matching import check_written
from surgery.methods import rules_named
from surgery.parts import frozen, vera
from surgery.rules.walk import selectors_in
from surgery.structure.module_tree import Tree
from tests.laws.test_backbones import BACKBONES, SETS
from tests.models import tiny_vit

ADD = append(adapter(rank=2), residual=True)
LORA = lora(rank=2)
BEYOND = where("blocks.{0,77}")
SLIPS = {
    "braces": (at("blocks.*.{attn,mlpp}", ADD), "blocks.*.mlpp"),
    "numbers in braces": (at("blocks.{1,99}.mlp", ADD), "blocks.99.mlp"),
    "two braces": (at("blocks.{0,1}.mlp.{fc1,fc3}", LORA), "blocks.{0,1}.mlp.fc3"),
    "or": (at(fc1 | where("blocks.*.mlpp"), LORA), "blocks.*.mlpp"),
    "and": (at(fc1 & where("block.*.mlp.fc1"), LORA), "block.*.mlp.fc1"),
    "not": (at(fc1 & ~inside("blocks.77"), LORA), "blocks.77"),
    "position": (at(fc1 & ~inside("blocks.[77]"), LORA), "blocks.[77]"),
    "negative position": (at(fc1 | where("blocks.[-9].mlp"), LORA), "blocks.[-9].mlp"),
    "counted": (at(fc1[0] | fc1[3], LORA), "fc1[3]"),
    "counted alone": (at(block[77], ADD), "block[77]"),
    "inside braces": (at(fc1 & inside("{blocks,stages}.*"), LORA), "stages.*"),
    "holding": (at(block & holding("**.fc3") | ffn, ADD), "**.fc3"),
    "nearest": (at(nearest("**.{norm2,norm3}", before=ffn), unfreeze), "**.norm3"),
    "anchor": (at(ffn | nearest(norm, before="**.mlpp"), unfreeze), "**.mlpp"),
    "after": (at(nearest(norm, after="blocks.{0,9}.attn"), unfreeze), "blocks.9.attn"),
    "span": (at(span("**.{norm2,normm}", ffn), parallel(adapter(rank=2))), "**.normm"),
    "until": (at(until("blocks.0", "blocks.{1,7}"), insert(prompt(tokens=2))), "blocks.7"),
    "ends of a span": (at("blocks.*.({norm2,normm} to mlp)", ADD), "blocks.*.(normm to mlp)"),
    "slice of a slip": (at(fc1 | where("blocs.[-2:].mlp"), LORA), "blocs.[-2:].mlp"),
    "shared by": (at(ffn, parallel(shared(adapter(rank=2), by=block | BEYOND))), "blocks.77"),
    "hears": (at(block[1:], insert(prompt(tokens=2), hears=ffn | BEYOND)), "blocks.77"),
    "borrowed": (at(ffn, parallel(vera(core=shared(frozen(), by=BEYOND | block)))), "blocks.77"),
    "parameter": (at(head, unfreeze("**.biass")), "**.biass"),
    "parameter in braces": (at("", unfreeze("**.{bias,biass}")), "**.biass"),
    "frozen parameter": (at(head, unfreeze, freeze("{weight,weigth}")), "weigth"),
}


@pytest.mark.parametrize(("rule", "slip"), SLIPS.values(), ids=SLIPS)
def test_a_name_of_nothing_is_told_and_nothing_is_done(rule, slip):
    model = tiny_vit()
    before = surgery.fingerprint(model)
    rules = [at(ffn, parallel(adapter(rank=2))), rule]
    for call in (surgery.plan, surgery.apply):
        with pytest.raises(MatchError) as caught:
            call(model, rules)
        assert slip in caught.value.fact
        assert caught.value.remedy
    assert surgery.fingerprint(model) == before


@pytest.mark.parametrize(("rule", "slip"), SLIPS.values(), ids=SLIPS)
def test_an_optional_rule_may_name_what_is_not_there(rule, slip):
    """As far as places go: what then cannot be built is another matter."""
    optional = at(rule.where, *rule.rest, optional=True)
    said = None
    try:
        surgery.plan(tiny_vit(), [at(head, unfreeze), optional])
    except surgery.SurgeryError as error:
        said = error
    assert not isinstance(said, MatchError)


@pytest.mark.parametrize(
    "rule",
    [
        at("blocks.*.mlp.{fc1,fc2}", LORA),
        at(fc1 & ~inside("blocks.0"), LORA),
        at(fc1 & ~inside("head"), LORA),  # there, though it excludes nothing
        at(fc1 & inside("blocks.[-2:]"), LORA),
        at(fc1 & ~inside("blocks.[12:]"), LORA),  # of deeper models
        at(fc1 & ~inside(block[12:]), LORA),
        at(fc1 | where(nn.Conv3d), LORA),
        at(fc1 | where(lambda site: False), LORA),
        at("**.{attn,mlp}", ADD),
        at("blocks.{i}.{attn,mlp}", ADD),
        at("", unfreeze("**.{weight,bias}")),
    ],
    ids=repr,
)
def test_what_is_no_slip_goes_as_ever(rule):
    assert surgery.parameters(surgery.apply(tiny_vit(), rule))


def test_the_nearest_address_is_offered_and_works():
    with pytest.raises(MatchError, match=r"Nearest addresses: blocks\.\*\.mlp \(3\)"):
        surgery.plan(tiny_vit(), at("blocks.*.{attn,mlpp}", ADD))
    assert len(surgery.plan(tiny_vit(), at("blocks.*.{attn,mlp}", ADD)).sites) == 6


@cache
def tree(backbone: str) -> Tree:
    torch.manual_seed(0)
    return Tree(BACKBONES[backbone][0]())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_rule_set_of_ours_names_what_is_not_there(backbone):
    for name in {*SETS} - {"pointgst", "point_peft"}:  # they name what Point-MAE has
        for rule in rules_named(name):
            check_written(rule, tree(backbone))


PATHS = [site.path for site in Tree(tiny_vit()).sites if site.path]


@given(st.data(), st.sampled_from(PATHS), st.sampled_from("xyz"))
def test_one_misspelt_step_among_right_ones_is_named(data, path, letter):
    """Wherever it stands: in braces, beside a role, in an exclusion."""
    steps = path.split(".")
    i = data.draw(st.integers(0, len(steps) - 1))
    slip = letter + steps[i] + letter
    wrong = ".".join((*steps[:i], slip, *steps[i + 1 :]))
    both = ".".join((*steps[:i], f"{{{steps[i]},{slip}}}", *steps[i + 1 :]))
    assume(wrong not in PATHS)
    where_ = data.draw(
        st.sampled_from([where(both), ffn | where(wrong), attn & ~where(wrong), ~inside(both)])
    )
    with pytest.raises(MatchError) as caught:
        surgery.plan(tiny_vit(), [at(where_, unfreeze)])
    assert wrong in caught.value.fact


def test_the_walk_meets_every_selector_of_a_rule():
    rule = at(
        nearest(norm, before=where("a") & ~inside("b")),
        parallel(vera(core=shared(frozen(), by=where("c")))),
        insert(prompt(), hears=ffn[1:]),
    )
    met = {repr(selector) for selector in selectors_in(rule)}
    assert {'where("a")', 'where("b")', 'where("c")', "ffn[1:]", "ffn", "norm"} <= met
