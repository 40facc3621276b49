"""States put together: averages, moving averages, ensembles, a state swapped in for a while."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import surgery
from surgery import FileError, RuleError
from surgery.methods.many_adapters import lae
from surgery.state.averaging import accumulate, average, ensemble, swapped
from tests.methods.reference import (
    close,
    stirred,
    vit,
)
from tests.methods.test_many_adapters import PLAIN, X, random


def test_the_average_is_the_weighted_mean() -> None:
    model = stirred("vit", PLAIN)
    states = [random(model, seed) for seed in range(3)]
    mean = average(states, [1, 2, 5])
    for key, tensor in mean.items():
        close(tensor, (states[0][key] + 2 * states[1][key] + 5 * states[2][key]) / 8)
    plain = average(states)
    for key, tensor in plain.items():
        close(tensor, sum(state[key] for state in states) / 3)
        assert all(tensor.data_ptr() != state[key].data_ptr() for state in states)


def test_accumulation_is_a_moving_average_and_the_head_is_the_online_one() -> None:
    model = surgery.apply(vit(), lae())
    offline, online = random(model, 1), random(model, 2)
    new = accumulate(offline, online, decay=0.9)
    assert set(new) == set(online)
    for key, tensor in new.items():
        want = online[key] if key.startswith("base.") else 0.9 * offline[key] + 0.1 * online[key]
        close(tensor, want)
    assert {key for key in new if key.startswith("base.")} == {"base.head.weight", "base.head.bias"}


def test_numbers_that_have_no_mean_must_agree() -> None:
    a, b = {"n": torch.tensor(1)}, {"n": torch.tensor(2)}
    assert average([a, a])["n"] == 1
    with pytest.raises(FileError, match="int64 has no mean"):
        average([a, b])


def test_half_precision_is_averaged_finely() -> None:
    states = [{"a": torch.tensor([x]).bfloat16()} for x in (256.0, *[0.75] * 7)]
    mean = average(states)["a"]  # 32 + 0.09375 is 32 in bfloat16, seven times
    assert (mean.dtype, mean.item()) == (torch.bfloat16, 32.75)


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, -1.0], []])
def test_weights_that_do_not_fit_are_told(weights: list[float]) -> None:
    with pytest.raises(RuleError, match="no weighted mean"):
        average([{"a": torch.ones(1)}] * 2, weights)


@pytest.mark.parametrize("decay", [-0.1, 1.5, True, "x"])
def test_a_decay_is_a_share(decay: Any) -> None:
    with pytest.raises(RuleError, match="from 0 to 1"):
        accumulate({}, {}, decay)


def test_states_of_other_models_are_told() -> None:
    one = {"a": torch.ones(2)}
    for other in ({"b": torch.ones(2)}, {"a": torch.ones(3)}, {"a": torch.ones(2).double()}):
        with pytest.raises(FileError):
            average([one, other])


def test_a_swapped_state_comes_back_after_an_error_too() -> None:
    model = stirred("vit", lae())
    model.norm.register_buffer("seen", torch.zeros(()))
    own, other = average([surgery.state_dict(model)]), random(model, 3)
    want = model(X)
    with pytest.raises(ZeroDivisionError), swapped(model, other):  # noqa: PT012
        assert all(torch.equal(t, other[k]) for k, t in surgery.state_dict(model).items())
        assert not torch.equal(model(X), want)
        model.norm.seen += 1
        raise ZeroDivisionError
    assert all(torch.equal(t, own[k]) for k, t in surgery.state_dict(model).items())
    assert model.norm.seen == 0
    assert torch.equal(model(X), want)
    with pytest.raises(FileError), swapped(model, {}):
        pass


def test_the_ensemble_takes_the_largest_probability() -> None:
    model = stirred("vit", lae())
    states = [surgery.state_dict(model), random(model, 3), random(model, 4)]
    have, want = ensemble(model, states, X), []
    for state in average([states[0]]), *states[1:]:
        surgery.load_state_dict(model, state)
        want.append(model(X).softmax(-1))
    assert torch.equal(have, torch.stack(want).amax(0))
    assert not any(torch.equal(have, each) for each in want)


def test_an_ensemble_that_fails_leaves_the_model_as_it_was() -> None:
    model = stirred("vit", lae())
    own = average([surgery.state_dict(model)])
    with pytest.raises(RuntimeError):
        ensemble(model, [random(model, 3)], torch.zeros(1, 4, 16, 16).double())
    with pytest.raises(RuleError):
        ensemble(model, [], X)
    assert all(torch.equal(t, own[k]) for k, t in surgery.state_dict(model).items())
