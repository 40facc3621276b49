"""The journal: every kind of change comes back, last first, and nothing that others did goes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import at, unfreeze
from surgery.engine.journal import Journal
from tests.laws.checks import ADAPTERX
from tests.models import images, tiny_vit


class Hooks:
    """Hooks as methods of a plain object."""

    def before(self, module: nn.Module, args: Any) -> None:
        return None

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        return None


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def changed(root: nn.Sequential, journal: Journal) -> None:
    """One change of every kind."""
    linear, norm = root
    linear.weight.grad = torch.ones(4, 4)
    journal.keep(root, "training")
    journal.keep_value(norm, "running_mean")
    journal.keep_gradient(linear, "weight", linear.weight)
    journal.set(root, "extra", nn.Identity(), table="_modules")
    journal.set(norm, "train", lambda mode=True: norm)
    journal.remove(linear, "in_features")
    journal.train(linear, "bias", linear.bias, False)
    journal.write(linear, "weight", torch.zeros(4, 4))
    journal.overwrite(norm.weight, torch.zeros(4))
    journal.hook(linear, Hooks().before, before=True)
    journal.hook(linear, Hooks().after)
    root.training, linear.weight.grad = False, None
    norm.running_mean = torch.full((4,), 3.0)


def test_every_kind_of_change_comes_back() -> None:
    root, journal = model(), Journal()
    root[0].weight.grad = torch.ones(4, 4)
    before = surgery.fingerprint(root)
    root[0].weight.grad = None
    changed(root, journal)
    assert surgery.fingerprint(root) != before
    journal.undo()
    after = surgery.fingerprint(root)
    differ = {mark for mark in {**before, **after} if before.get(mark) != after.get(mark)}
    differ -= {"0.weight: gradient"}  # another tensor, of the same numbers
    assert differ == {"0: attributes"}  # in another order
    assert sorted(after["0: attributes"]) == sorted(before["0: attributes"])
    assert torch.equal(root[0].weight.grad, torch.ones(4, 4))
    assert journal.entries == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_takes_its_own_way_back_along(copied: Any) -> None:
    root, journal = nn.Linear(2, 2), Journal()
    before = root.weight.detach().clone()
    journal.write(root, "weight", torch.zeros(2, 2))
    other, way = copied((root, journal))
    way.undo()
    assert torch.equal(other.weight, before)
    assert torch.equal(root.weight, torch.zeros(2, 2))


def test_the_last_change_comes_back_first() -> None:
    root, journal = nn.Linear(2, 2), Journal()
    before = root.weight.detach().clone()
    for value in (1.0, 2.0, 3.0):
        journal.write(root, "weight", torch.full((2, 2), value))
    journal.undo()
    assert torch.equal(root.weight, before)


def test_what_others_put_there_since_stays() -> None:
    root, journal = nn.Linear(2, 2), Journal()
    journal.set(root, "forward", root.forward)
    theirs = root.__dict__["forward"] = lambda x: x
    journal.undo()
    assert root.__dict__["forward"] is theirs


def test_a_change_that_was_written_down_and_not_made_comes_back_too() -> None:
    root, journal = nn.Linear(2, 2), Journal()
    journal.set(root, "forward", root.forward)
    del root.__dict__["forward"]  # as if a fault had come between the two
    journal.undo()
    assert "forward" not in vars(root)


def test_only_the_owners_hooks_are_taken_off() -> None:
    root, journal = nn.Linear(2, 2), Journal()
    theirs = root.register_forward_hook(Hooks().after)
    journal.hook(root, Hooks().after)
    journal.undo()
    assert list(root._forward_hooks) == [theirs.id]


def test_a_buffer_that_was_moved_or_cast_keeps_where_it_is() -> None:
    norm, journal = nn.BatchNorm1d(2), Journal()
    journal.keep_value(norm, "running_mean")
    norm.to(torch.float64)
    norm.running_mean.fill_(5)
    journal.undo()
    assert norm.running_mean.dtype == torch.float64
    assert norm.running_mean.tolist() == [0.0, 0.0]


def test_what_had_no_memory_has_no_value_to_come_back() -> None:
    with torch.device("meta"):
        norm = nn.BatchNorm1d(2)
    journal = Journal()
    journal.keep_value(norm, "weight")
    journal.keep_value(norm, "running_mean")
    norm.to_empty(device="cpu")
    with torch.no_grad():
        norm.weight.fill_(2)
    journal.undo()
    assert norm.weight.tolist() == [2.0, 2.0]
    assert not norm.running_mean.is_meta


def resized(operated: nn.Module) -> None:
    operated.head.weight = nn.Parameter(torch.zeros(7, 24))


@pytest.mark.parametrize("merged", [False, True])
def test_revert_looks_at_all_places_before_it_changes_any(merged: bool) -> None:
    rules = [at("head", surgery.lora(rank=2))] if merged else [*ADAPTERX]
    operated = surgery.apply(tiny_vit(), rules)
    if merged:
        surgery.merge(operated)
    resized(operated)
    marks = surgery.fingerprint(operated)
    calls = [surgery.revert, surgery.unmerge] if merged else [surgery.revert]
    for call in calls:
        fact = r"head\.weight is \(7, 24\), and was \(5, 24\)"
        with pytest.raises(surgery.OperationError, match=fact):
            call(operated)
        assert surgery.fingerprint(operated) == marks


def test_nothing_is_in_the_way_of_a_model_that_was_trained() -> None:
    operated = surgery.apply(tiny_vit(), [at("", unfreeze)])
    operated(images()).sum().backward()
    assert [text for o in operated.surgery.children() for text in o.journal.obstacles] == []
