"""A trained tensor that cannot be written back: refused by name, before any change, and mended.

The remedy that the refusal gives is carried out, word by word: then the call works.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune

import surgery
from surgery import at, lora, unfreeze
from tests.laws.checks import Linears, stir

Change = Callable[[nn.Module], object]


def weight_norm(model: nn.Module) -> None:
    parametrizations.weight_norm(model.two)


def spectral_norm(model: nn.Module) -> None:
    parametrizations.spectral_norm(model.two)


def orthogonal(model: nn.Module) -> None:
    parametrizations.orthogonal(model.two)


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model.two, "weight", 0.3)


def older_weight_norm(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils.weight_norm(model.two)


def older_spectral_norm(model: nn.Module) -> None:
    utils.spectral_norm(model.two)


def deleted(model: nn.Module) -> None:
    del model.two.weight


def none(model: nn.Module) -> None:
    model.two.weight = None


# what no call mends: the remedy is in words -----------------------------------------------------


def another_shape(model: nn.Module) -> None:
    model.two.weight = nn.Parameter(torch.ones(9, 8))


def another_kind(model: nn.Module) -> None:
    model.two.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)


def without_memory(model: nn.Module) -> None:
    model.two.weight = nn.Parameter(model.two.weight.detach().to("meta"))


CALLED: dict[Change, str] = {
    weight_norm: "was re-parametrised",
    spectral_norm: "was re-parametrised",
    orthogonal: "was re-parametrised",
    pruned: "was pruned",
    older_weight_norm: "was re-parametrised by weight_norm",
    older_spectral_norm: "was re-parametrised by spectral_norm",
    deleted: "was deleted",
    none: "was deleted",
}
IN_WORDS: dict[Change, str] = {
    another_shape: r"is \(9, 8\), and was \(8, 8\)",
    another_kind: "is torch.int8 now, and was torch.float32",
    without_memory: "has no memory now",
}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Linears()


def operated() -> nn.Module:
    model = surgery.apply(build(), [at("one", lora(rank=2)), at("two", unfreeze)])
    stir(model)
    return model


def entered(model: nn.Module) -> None:
    with surgery.disabled(model):
        raise AssertionError("it was let in")


def refusal(call: Callable[[nn.Module], object], model: nn.Module) -> surgery.OperationError:
    """What a call is refused with, the model untouched, twice the same."""
    before = surgery.fingerprint(model)
    told = []
    for _ in range(2):
        with pytest.raises(surgery.OperationError) as error:
            call(model)
        assert surgery.fingerprint(model) == before
        told.append(error.value)
    assert str(told[0]) == str(told[1])
    return told[0]


@pytest.mark.parametrize("call", [surgery.revert, entered])
@pytest.mark.parametrize("change", [*CALLED, *IN_WORDS])
def test_it_is_refused_by_name_before_any_change(
    change: Change, call: Callable[[nn.Module], object]
) -> None:
    model = operated()
    change(model)
    error = refusal(call, model)
    assert re.search(rf"two\.weight {(CALLED | IN_WORDS)[change]}", error.fact)
    assert error.remedy.endswith(", and call it again.")


def mended(model: nn.Module, error: surgery.OperationError) -> None:
    """Carry a remedy out."""
    exec(error.remedy.removesuffix(", and call it again."), {"model": model, "torch": torch})


@pytest.mark.parametrize("change", CALLED)
def test_its_remedy_works_as_it_is_written(change: Change) -> None:
    model, x = operated(), torch.randn(2, 8)
    change(model)
    mended(model, refusal(surgery.revert, model))
    surgery.revert(model)
    assert torch.equal(model(x), build()(x))


@pytest.mark.parametrize("change", CALLED)
def test_disabled_comes_after_the_remedy_too(change: Change) -> None:
    model, x = operated(), torch.randn(2, 8)
    change(model)
    mended(model, refusal(entered, model))
    tuned = model(x)
    with surgery.disabled(model):
        assert torch.equal(model(x), build()(x))
    assert torch.equal(model(x), tuned)


@pytest.mark.parametrize("change", CALLED)
def test_unmerge_and_revert_of_merged_models_are_refused_too(change: Change) -> None:
    model, x = surgery.apply(build(), at("two", lora(rank=2))), torch.randn(2, 8)
    stir(model)
    tuned = model(x)
    surgery.merge(model)
    change(model)
    assert "two.weight" in str(refusal(surgery.revert, model))
    mended(model, refusal(surgery.unmerge, model))
    model.two.requires_grad_(False)  # as it was: what stands there is another parameter
    surgery.unmerge(model)
    assert torch.equal(model(x), tuned)
    surgery.revert(model)
    assert torch.equal(model(x), build()(x))


def test_other_values_go_through() -> None:
    """Cast, moved, replaced by another tensor of the shape: the value is written there."""
    for change in (
        lambda model: model.to(torch.bfloat16),
        lambda model: setattr(model.two, "weight", nn.Parameter(torch.zeros(8, 8))),
    ):
        model = operated()
        change(model)
        surgery.revert(model)
        assert torch.equal(model.two.weight, build().two.weight.to(model.two.weight))


def test_a_gradient_from_before_follows_a_cast() -> None:
    model = build()
    model(torch.randn(2, 8)).sum().backward()
    want = model.two.weight.grad.to(torch.bfloat16)
    surgery.apply(model, at("two", unfreeze)).to(torch.bfloat16)
    assert torch.equal(surgery.revert(model).two.weight.grad, want)


def test_a_buffer_of_another_shape_and_dtype_comes_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    surgery.apply(model, at("0", unfreeze))
    model[1].running_mean = torch.ones(6, dtype=torch.float64)
    surgery.revert(model)
    assert model[1].running_mean.tolist() == [0.0] * 4


def test_a_shape_that_changes_inside_disabled_is_told_after_it() -> None:
    model = operated()
    with (
        pytest.raises(surgery.OperationError, match=r"at its end.*two\.weight is \(9, 8\)"),
        surgery.disabled(model),
    ):
        another_shape(model)
    assert model.surgery.default.enabled


def test_an_error_inside_disabled_is_not_hidden_by_that() -> None:
    model = operated()

    def failing() -> None:
        with surgery.disabled(model):
            another_shape(model)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        failing()
    assert model.surgery.default.enabled


# tied since --------------------------------------------------------------------------------------


def tie(model: nn.Module) -> None:
    model.two.weight = model.one.weight


def tie_the_other(model: nn.Module) -> None:
    model.one.weight = model.two.weight


@pytest.mark.filterwarnings("ignore:surgery")  # one.weight is trained then, by no rule
@pytest.mark.parametrize("change", [tie, tie_the_other])
@pytest.mark.parametrize("call", ["revert", "disabled"])
def test_a_tensor_that_was_tied_since_is_refused_and_mended(change: Change, call: str) -> None:
    model = surgery.apply(build(), at("two", unfreeze))
    change(model)
    before = model.one.weight.detach().clone()

    def do() -> None:
        if call == "revert":
            surgery.revert(model)
        else:
            with surgery.disabled(model):
                assert torch.equal(model.one.weight, before)
                assert torch.equal(model.two.weight, build().two.weight)

    with pytest.raises(
        surgery.OperationError, match=r"two\.weight is tied to one\.weight now"
    ) as e:
        do()
    assert torch.equal(model.one.weight, before)
    (remedy,) = re.findall(r"own, (model\.get_submodule.*\(\)\)), and call", str(e.value))
    exec(remedy, {"model": model, "torch": torch})
    do()
    assert torch.equal(model.one.weight, before)
    assert call == "disabled" or torch.equal(model.two.weight, build().two.weight)


def test_what_was_tied_before_is_no_obstacle() -> None:
    model = build()
    tie(model)
    surgery.apply(model, at("two", unfreeze))
    with surgery.disabled(model):
        pass
    surgery.revert(model)


def test_what_was_tied_and_is_trained_by_hand_is_no_obstacle() -> None:
    model = build()
    tie(model)
    surgery.apply(model, at("one", lora(rank=1)))
    model.one.weight.requires_grad_(True)
    surgery.parameters(model)
    with surgery.disabled(model):
        pass
    surgery.revert(model)
