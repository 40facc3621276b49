"""Frozen norms keep the statistics that they have; those that are trained go on counting."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import adapter, append, at, freeze, unfreeze
from surgery.spec import check

FREEZE = at("1", append(adapter(rank=2), residual=True))


class Net(nn.Sequential):
    """A batch norm with parameters, one without below a linear of its own, an instance norm."""

    def __init__(self) -> None:
        inner = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False))
        kept = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        super().__init__(nn.BatchNorm1d(6), nn.Linear(6, 6), inner, nn.Unflatten(0, (2, -1)), kept)


def data(seed: int = 0) -> Tensor:
    return 3 + torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "num" in k}


def moved(model: nn.Module) -> set[str]:
    """The norms whose statistics a forward in training changes."""
    before = statistics(model)
    model.train()(data())
    now = statistics(model)
    return {k.rpartition(".")[0] for k in before if not torch.equal(before[k], now[k])}


NORMS = {"0", "2.1", "4"}


@pytest.mark.parametrize(
    ("rules", "live"),
    [
        ([FREEZE], set()),
        ([FREEZE, at("0", unfreeze)], {"0"}),
        ([FREEZE, at("0", unfreeze("bias"))], {"0"}),
        ([FREEZE, at("2", unfreeze)], {"2.1"}),
        ([FREEZE, at("", unfreeze)], NORMS),
        ([FREEZE, at("", unfreeze), at("4", freeze)], {"0", "2.1"}),
    ],
    ids=["none", "one", "its bias", "around it", "all", "all but one"],
)
def test_what_is_frozen_stays(rules: list[surgery.Rule], live: set[str]) -> None:
    model = Net()
    assert moved(model) == NORMS
    surgery.apply(model, rules)
    assert {path for path in NORMS if model.get_submodule(path).training} == live
    assert moved(model) == live
    assert moved(model.eval().train()) == live


def test_a_model_in_eval_stays_there() -> None:
    model = surgery.apply(Net().eval(), [FREEZE, at("0", unfreeze)])
    assert not any(
        m.training for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)
    )
    assert moved(model) == {"0"}


def test_plan_and_report_say_so() -> None:
    note = "frozen norms keep their running statistics, in eval mode in training too: * x2\n"
    rules = [FREEZE, at("2", unfreeze)]
    model = Net()
    assert note in str(surgery.plan(model, rules))
    assert note in str(surgery.report(surgery.apply(model, rules)))
    everything = surgery.apply(Net(), [FREEZE, at("", unfreeze)])
    assert "statistics" not in str(surgery.report(everything))


def test_revert_and_faults_give_it_back() -> None:
    model = Net()
    before = surgery.fingerprint(model)
    surgery.revert(surgery.apply(model, FREEZE))
    assert surgery.fingerprint(model) == before
    assert moved(model) == NORMS
    before = surgery.fingerprint(model)

    def fails(site: surgery.Site) -> nn.Module:
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        surgery.apply(model, at("1", append(fails)))
    assert surgery.fingerprint(model) == before


def test_the_second_operation_has_the_last_word() -> None:
    model = surgery.apply(Net(), FREEZE, name="first")
    surgery.apply(model, at("0", unfreeze), name="second")
    assert moved(model) == {"0"}
    surgery.revert(model, name="second")
    assert moved(model) == set()
    surgery.revert(model)
    assert moved(model) == NORMS


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_their_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = surgery.apply(Net(), FREEZE)
    other = copied(model)
    assert moved(other) == set()
    assert other.get_submodule("0").train() is other.get_submodule("0")
    surgery.revert(model)
    assert moved(model) == NORMS
    assert moved(other) == set()


def test_a_file_reproduces(tmp_path: Path) -> None:
    model = surgery.apply(Net(), [FREEZE, at("0", unfreeze)])
    fresh = copy.deepcopy(surgery.revert(copy.deepcopy(model)))
    optimizer = torch.optim.SGD(surgery.parameters(model), lr=0.1)
    for seed in range(3):
        model.train()(data(seed)).square().mean().backward()
        optimizer.step()
    file = surgery.save(model, tmp_path / "tuned.safetensors")
    again = surgery.load(fresh, file)
    assert torch.equal(again.eval()(data(9)), model.eval()(data(9)))


def test_a_norm_without_parameters_goes_with_all_around_it() -> None:
    """Not with any one of them: the nearest that holds parameters may be the whole model."""
    plain = nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 6), nn.Linear(6, 2))
    assert moved(surgery.apply(copy.deepcopy(plain), at("2", unfreeze))) == set()
    assert moved(surgery.apply(copy.deepcopy(plain), at("", unfreeze))) == {"0"}
    alone = nn.Sequential(nn.BatchNorm1d(6, affine=False))
    surgery.apply(alone, at("0", append(adapter(rank=2), residual=True)))
    assert moved(alone) == set()


def test_what_a_norm_holds_still_hears_of_train_and_eval() -> None:
    """timm's norms hold an activation and a dropout; the model may itself be a norm."""

    class Dropping(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(6)
            self.drop = nn.Dropout(0.5)

    model = surgery.apply(nn.Sequential(Dropping(), nn.Linear(6, 6)), at("1", unfreeze))
    for mode in (True, False):
        model.train(mode)
        assert (model[0].training, model[0].drop.training) == (False, mode)
    root = surgery.apply(Dropping(), at("", append(lambda site: nn.Linear(6, 6))))
    assert {m.training for m in root.eval().surgery.modules()} == {False}
    for module in model.modules():
        module.training = True  # as some do
    assert not model.train()[0].training


def test_statistics_are_not_reset_where_they_could_not_be_counted_again() -> None:
    model = surgery.apply(Net(), [FREEZE, at("4", unfreeze)])
    model.train()(data())
    before = statistics(model)
    torch.optim.swa_utils.update_bn([data(1)], model)
    assert all(torch.equal(v, before[k]) for k, v in statistics(model).items() if k[0] != "4")
    surgery.revert(model)
    model[0].reset_running_stats()
    assert not model[0].running_mean.any()


def test_a_norm_that_was_converted_is_told_before_anything_is_lost() -> None:
    model = surgery.apply(Net(), [FREEZE, at("0", unfreeze)])
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.raises(surgery.OperationError, match=r"BatchNorm1d was replaced.*\nConvert"):
        surgery.state_dict(converted)
    first = nn.SyncBatchNorm.convert_sync_batchnorm(Net())
    surgery.state_dict(surgery.apply(first, [FREEZE, at("0", unfreeze)]))


def test_disabled_leaves_statistics_alone() -> None:
    model = surgery.apply(Net(), [FREEZE, at("0", unfreeze)]).train()
    for _ in range(2):
        before = statistics(model)
        with surgery.disabled(model):
            model(data())
        assert all(torch.equal(v, before[k]) for k, v in statistics(model).items())
        model(data())


@pytest.mark.parametrize("mode", [True, False])
def test_the_laws_hold(mode: bool) -> None:
    check(Net().train(mode), FREEZE, data(), examples=1).raise_broken()


def test_a_law_sees_statistics_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.engine.planning.guard", lambda *given: None)
    told = check(Net(), FREEZE, data(), examples=1, only=["freezing_is_exact"])
    assert "training moved statistics of BatchNorm1d" in str(told)


@pytest.mark.filterwarnings("ignore:model.state_dict")  # it is compared, not kept
def test_norms_count_where_what_is_active_trains_them() -> None:
    model = Net()
    base = surgery.fingerprint(model)
    surgery.apply(model, [FREEZE, at("0", unfreeze)], name="a")
    assert moved(model) == {"0"}
    surgery.activate(model, None)
    assert moved(model) == set()
    surgery.apply(model, [FREEZE, at("2", unfreeze)], name="b")
    assert moved(model) == {"2.1"}
    surgery.activate(model, "a")
    assert moved(model) == {"0"}
    surgery.activate(model.eval(), ["a", "b"])
    assert moved(model) == {"0", "2.1"}
    surgery.train_only(model, "b")
    assert moved(model) == {"2.1"}
    surgery.revert(model, name="a")
    assert moved(model) == {"2.1"}
    again = copy.deepcopy(model)
    assert moved(surgery.activate(again, None)) == set()
    assert moved(model) == {"2.1"}
    surgery.revert(model)
    now = surgery.fingerprint(model.train())
    assert all(now[key] == value for key, value in base.items() if "random" not in key)
