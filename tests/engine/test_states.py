"""What torch's own state_dict and load_state_dict do with a model that is operated, or merged."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import OperationError, append, at, lora, scale_shift
from surgery._preserve import fingerprint
from surgery.spec.snapshot import unchanged
from tests.engine.test_plain import MERGEABLE, vit
from tests.laws.checks import Linears, stir_parts
from tests.methods.test_methods import rules_of
from tests.models import images

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
LORA = at(nn.Linear, lora(rank=2))


def base() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Linears()


def tuned(rules: Any = LORA, seed: int = 1) -> nn.Module:
    model = surgery.apply(base(), rules)
    stir_parts(model, seed)
    return model


def state_of(model: nn.Module) -> Any:
    return copy.deepcopy(model.state_dict())


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


class Outer(nn.Module):
    """A model as the child of another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


# a base checkpoint -------------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
def test_a_base_checkpoint_loads_strictly_and_parts_stay(assign: bool) -> None:
    model, other = tuned(), Linears()
    parts = {k: t.clone() for k, t in surgery.state_dict(model).items()}
    trained = surgery.parameters(model)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(model.one.weight, other.one.weight)
    now = surgery.state_dict(model)
    assert all(torch.equal(now[key], tensor) for key, tensor in parts.items())
    assert all(a is b for a, b in zip(trained, surgery.parameters(model), strict=True))


def test_some_of_the_parts_are_missing_as_ever() -> None:
    state = state_of(tuned())
    key = next(key for key in state if "surgery" in key)
    del state[key]
    with pytest.raises(RuntimeError, match=key):
        tuned().load_state_dict(state)


def test_an_empty_state_of_the_parts_themselves_is_not_taken_for_one() -> None:
    with pytest.raises(RuntimeError, match="Missing"):
        tuned().surgery.load_state_dict({})


@pytest.mark.parametrize("root", [nn.Sequential, nn.DataParallel, Outer])
def test_it_loads_below_and_inside_other_modules(root: Any) -> None:
    def build(model: nn.Module) -> nn.Module:
        return root(model)

    model, other = build(tuned()), build(Linears())
    model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="Missing"):
        model.load_state_dict({k: v for k, v in other.state_dict().items() if "one" not in k})


def test_it_loads_where_the_root_is_a_container() -> None:
    rows = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2)]
    surgery.apply(rows[0], LORA).load_state_dict(rows[1].state_dict())
    assert torch.equal(rows[0][2].weight, rows[1][2].weight)


# states of merged models -------------------------------------------------------------------------


def test_a_merged_state_is_the_bases_and_goes_into_a_plain_model() -> None:
    model = tuned()
    want, plain = model(X), base()
    state = surgery.merge(model).state_dict()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(X), want)


def test_it_goes_into_parts_that_add_nothing_yet() -> None:
    want = tuned()(X)
    state = state_of(surgery.merge(tuned()))
    model = surgery.apply(Linears(), LORA)
    model.load_state_dict(state)
    torch.testing.assert_close(model(X), want)


WAYS = {"as it is": lambda state: state, "through a file": through_a_file}
PLACES = {"alone": lambda model: model, "below": Outer, "in a wrapper": nn.DataParallel}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_it_never_counts_twice(way: Any, place: Any) -> None:
    state = way(state_of(place(surgery.merge(tuned()))))
    model = tuned(seed=2)
    before = fingerprint(model)
    for strict in (True, False):
        with pytest.raises(OperationError, match=r"merged into its weights.*once more \(one, two"):
            place(model).load_state_dict(state, strict=strict)
    unchanged(before, fingerprint(model), "a refused state", but=["random"])
    itself = surgery.merge(model)
    state = state_of(itself)
    with pytest.raises(OperationError, match="merged"):
        surgery.unmerge(itself).load_state_dict(state)


@pytest.mark.parametrize("rules", [LORA, at(nn.Linear, append(scale_shift()))])
def test_a_state_without_marks_may_be_a_merged_one(rules: Any) -> None:
    state = dict(surgery.merge(tuned(rules)).state_dict())
    with pytest.warns(UserWarning, match=r"merged model, they count twice"):
        tuned(rules, seed=2).load_state_dict(state)
    same = {key: value for key, value in tuned(rules).state_dict().items() if "surgery" not in key}
    tuned(rules).load_state_dict(same)  # the base that it has
    tuned(rules).load_state_dict({}, strict=False)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("root", ["a model", "a container"])
def test_parts_do_not_go_into_a_merged_model(strict: bool, root: str) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8)) if root == "a container" else base()
        return surgery.apply(model, LORA)

    state, model = state_of(build()), surgery.merge(build())
    before = fingerprint(model)
    with pytest.raises(OperationError, match=r"(?s)has parts \(.*surgery.*unmerge") as error:
        model.load_state_dict(state, strict=strict)
    assert error.value.remedy
    unchanged(before, fingerprint(model), "a refused state")
    surgery.unmerge(model).load_state_dict(state)


def test_what_was_loaded_into_a_merged_model_is_not_undone_by_unmerge() -> None:
    model, other = surgery.merge(tuned()), Linears()
    model.load_state_dict(state_of(model))
    surgery.merge(surgery.unmerge(model))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(X), other(X))
    before = fingerprint(model)
    for call in (surgery.unmerge, surgery.revert):
        with pytest.raises(OperationError, match=r"as it was merged: one\.weight.*loaded since"):
            call(model)
    unchanged(before, fingerprint(model), "a refused call")
    surgery.merge(model, keep=False)
    assert torch.equal(model(X), other(X))


@pytest.mark.parametrize("name", MERGEABLE)
def test_states_of_every_rule_set_give_their_own_answers_or_are_refused(name: str) -> None:
    """From merged to operated, from operated to merged, and to parts that have just been made."""

    def build(merged: bool, seed: int | None) -> nn.Module:
        model = surgery.apply(vit(), rules_of(name))
        if seed is not None:
            stir_parts(model, seed)
        return surgery.merge(model) if merged else model

    for merged, seed in ((False, 2), (True, 2), (False, None)):
        source = build(not merged, 1)
        state, want = state_of(source), source(images())
        model = build(merged, seed)
        try:
            model.load_state_dict(state)
        except OperationError as error:
            assert "merge" in str(error)  # noqa: PT017
        else:
            torch.testing.assert_close(model(images()), want)


COPIES = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]


@pytest.mark.parametrize("way", COPIES)
def test_copies_ask_for_themselves(way: Any) -> None:
    model = tuned()
    copied, state = surgery.merge(way(model)), state_of(model)
    with pytest.raises(OperationError, match="unmerge"):
        copied.load_state_dict(state)
    model.load_state_dict(state)
    surgery.revert(model)
    surgery.revert(copied)
    for reverted in (model, copied):
        assert not any(hooks for name, hooks in vars(reverted).items() if "_hooks" in name)


# inside disabled ---------------------------------------------------------------------------------


INSIDE = {
    "state_dict": lambda model: model.state_dict(),
    "load_state_dict": lambda model: model.load_state_dict({}, strict=False),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "of the whole": lambda model: Outer(model).state_dict(),
}


@pytest.mark.parametrize("call", INSIDE.values(), ids=INSIDE)
def test_inside_disabled_there_are_no_states_and_no_copies(call: Any) -> None:
    model = tuned()
    with surgery.disabled(model), pytest.raises(OperationError, match="inside disabled"):
        call(model)
    call(model)


# what is kept of the base, to be brought back ----------------------------------------------------


class Counted(nn.Module):
    """With a head, to be unfrozen, and a buffer that a forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.first(x)))
        return out


def counted(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Counted()
        model.norm.running_mean.normal_()
        return model.eval()


UNFROZEN = [at("first", lora(rank=2)), at("head", surgery.unfreeze)]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("rules", [UNFROZEN, UNFROZEN[1]], ids=["parts", "no parts"])
def test_the_base_that_is_loaded_is_what_answers_and_comes_back(rules: Any, assign: bool) -> None:
    model, want = surgery.apply(counted(0), rules), counted(1)(X)
    model.load_state_dict(counted(1).state_dict(), assign=assign)
    with surgery.disabled(model):
        assert torch.equal(model(X), want)
    model.head.weight.data.zero_()
    with surgery.disabled(model):
        assert torch.equal(model(X), want)
    assert torch.equal(surgery.revert(model)(X), want)


@pytest.mark.parametrize("rules", [UNFROZEN, UNFROZEN[1]], ids=["parts", "no parts"])
def test_a_checkpoint_of_training_leaves_the_base_what_it_was(rules: Any) -> None:
    trained = surgery.apply(counted(0), rules)
    for parameter in surgery.parameters(trained):
        parameter.data.normal_()
    model = surgery.apply(counted(0), rules)
    model.load_state_dict(through_a_file(trained.state_dict()))
    assert torch.equal(model(X), trained(X))
    assert torch.equal(surgery.revert(model)(X), counted(0)(X))


def test_a_base_in_another_dtype_and_of_other_shapes_is_kept_as_it_is_taken() -> None:
    model, other = surgery.apply(counted(0), UNFROZEN), counted(1)
    kept = model.head.bias.detach().clone()
    state = {**other.double().state_dict(), "head.bias": torch.ones(3)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state)
    model.head.bias.data.zero_()
    surgery.revert(model)
    assert torch.equal(model.head.weight, other.float().head.weight)
    assert model.head.weight.dtype is torch.float32
    assert torch.equal(model.head.bias, kept)
