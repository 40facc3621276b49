"""One set: what `parameters` hands out is what files hold, the report counts, and revert restores.

Whatever came after the rules were applied: unfrozen by hand, put in, replaced, re-parametrised.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import surgery
from surgery import adapter, append, at, lora, unfreeze
from surgery.engine import trained
from tests.laws import checks as laws

RULES = [at("first", lora(rank=2)), at("last", unfreeze)]
FREE = RULES[:1]  # no rule for the last layer


class Net(nn.Module):
    """A layer, a place for one more, and a last one; the same numbers each time."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.extra, self.last = nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.extra(self.first(x)))


def data() -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, steps: int = 2) -> nn.Module:
    """Steps in training mode on what `parameters` gives; then eval mode."""
    optimizer = torch.optim.SGD(surgery.parameters(model.train()), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(data()).square().sum().backward()
        optimizer.step()
    return model.eval()


# ways in which something comes to be trained after apply ---------------------------------------


def unfrozen(model: nn.Module) -> None:
    model.last.requires_grad_(True)


def another_last(model: nn.Module) -> None:
    model.last = nn.Linear(8, 5)


def a_norm(model: nn.Module) -> None:
    model.extra = nn.BatchNorm1d(8)


def another_parameter(model: nn.Module) -> None:
    model.last.weight = nn.Parameter(torch.ones(3, 8))


def weight_norm(model: nn.Module) -> None:
    parametrizations.weight_norm(model.last).requires_grad_(True)


def spectral_norm(model: nn.Module) -> None:
    parametrizations.spectral_norm(model.last).requires_grad_(True)


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model.last, "weight", 0.3).requires_grad_(True)


def own_tensor(model: nn.Module) -> None:
    model.register_parameter("scale", nn.Parameter(torch.ones(())))


def an_alias(model: nn.Module) -> None:
    model.again = model.last.requires_grad_(True)


WAYS: list[Callable[[nn.Module], None]] = [
    unfrozen, another_last, a_norm, another_parameter, weight_norm, spectral_norm, pruned,
    own_tensor, an_alias,
]  # fmt: skip
MENDED = {  # what takes it off again, where revert asks for that
    weight_norm: lambda m: nn.utils.parametrize.remove_parametrizations(m.last, "weight"),
    spectral_norm: lambda m: nn.utils.parametrize.remove_parametrizations(m.last, "weight"),
    pruned: lambda m: prune.remove(m.last, "weight"),
}


def operated(rules: list[surgery.Rule], way: Callable[[nn.Module], None]) -> nn.Module:
    model = surgery.apply(Net(), rules)
    way(model)
    return model


@pytest.mark.parametrize("rules", [FREE, RULES], ids=["no rule", "a rule"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_handed_out_is_in_the_file(
    way: Callable[[nn.Module], None], rules: list[surgery.Rule], tmp_path: Path
) -> None:
    model = train(operated(rules, way))
    held = [tensor.data_ptr() for tensor in surgery.state_dict(model).values()]
    assert [held.count(p.data_ptr()) for p in surgery.parameters(model)] == [
        1 for _ in surgery.parameters(model)
    ]
    fresh = Net()
    way(fresh)
    surgery.load(fresh, surgery.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(fresh.eval()(data()), model(data()))
    trained_there = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert trained_there == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("way", [another_last, a_norm, weight_norm, spectral_norm, pruned])
def test_a_model_that_was_not_changed_so_has_no_place_for_it(
    way: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    path = surgery.save(train(operated(FREE, way)), tmp_path / "a.safetensors")
    fresh = Net()
    before = surgery.fingerprint(fresh)
    with pytest.raises(surgery.FileError, match=r"base\.(extra|last)\."):
        surgery.load(fresh, path)
    assert surgery.fingerprint(fresh) == before


def test_a_key_that_the_file_does_not_speak_of_is_refused(tmp_path: Path) -> None:
    state = surgery.state_dict(train(operated(FREE, unfrozen)))
    model = surgery.apply(Net(), FREE)
    with pytest.raises(surgery.FileError, match=r"has base\.last\.bias, base\.last\.weight"):
        surgery.load_state_dict(model, state)


def test_frozen_again_it_is_in_the_file(tmp_path: Path) -> None:
    model = train(operated(FREE, unfrozen))
    model.last.requires_grad_(False)
    fresh = surgery.load(Net(), surgery.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(fresh(data()), model(data()))


def test_never_handed_out_it_is_in_the_file(tmp_path: Path) -> None:
    model = operated(FREE, unfrozen)
    with torch.no_grad():
        model.last.weight.add_(1)
    fresh = surgery.load(Net(), surgery.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(fresh(data()), model(data()))


def test_what_is_lazy_is_taken_up_when_it_has_values(tmp_path: Path) -> None:
    model, fresh = operated(FREE, lambda m: setattr(m, "extra", nn.LazyLinear(8))), Net()
    surgery.parameters(model)
    model(data())
    train(model)
    fresh.extra = nn.Linear(8, 8)
    surgery.load(fresh, surgery.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(fresh(data()), model(data()))


def test_looking_takes_nothing_up() -> None:
    model = operated(FREE, unfrozen)
    entries = len(model.surgery.default.journal.entries)
    _ = surgery.state_dict(model), str(surgery.report(model))
    assert len(model.surgery.default.journal.entries) == entries
    surgery.parameters(model)
    taken_up = len(model.surgery.default.journal.entries)
    surgery.parameters(model)
    assert entries < taken_up == len(model.surgery.default.journal.entries)


def test_the_report_names_and_counts_it() -> None:
    model = operated(FREE, unfrozen)
    for _ in range(2):
        told = str(surgery.report(model))
        assert "note: trained without a rule: last.weight, last.bias" in told
        assert "added 32, unfrozen 27: 59 trainable" in told
        train(model)
    model.last.requires_grad_(False)
    assert "added 32, unfrozen 0: 32 trainable" in str(surgery.report(model))


# several operations ----------------------------------------------------------------------------


def test_of_several_operations_each_has_what_came_while_it_was_the_last(tmp_path: Path) -> None:
    model = operated(FREE, unfrozen)
    surgery.apply(model, at("first", append(adapter(rank=2), residual=True)), name="second")
    model.first.bias.requires_grad_(True)
    train(model)
    keys = {name: set(surgery.state_dict(model, name=name)) for name in ("default", "second")}
    assert {"base.last.weight", "base.last.bias"} <= keys["default"]
    assert "base.first.bias" in keys["second"] - keys["default"]
    fresh = Net()
    for name in keys:
        surgery.load(fresh, surgery.save(model, tmp_path / name, name=name), name=name)
    assert torch.equal(fresh(data()), model(data()))
    surgery.revert(model, name="second")
    assert not model.first.bias.requires_grad
    surgery.revert(model)
    assert torch.equal(model(data()), Net()(data()))


# norms that were converted ---------------------------------------------------------------------


def test_a_trained_norm_may_be_converted(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = Net()
        a_norm(model)
        return model

    model = train(surgery.apply(build(), [*RULES, at("extra", unfreeze)]))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    path = surgery.save(model, tmp_path / "a.safetensors")
    assert torch.equal(surgery.load(build().eval(), path)(data()), model(data()))
    surgery.revert(model)
    assert torch.equal(model(data()), build().eval()(data()))


# back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [FREE, RULES], ids=["no rule", "a rule"])
@pytest.mark.parametrize("way", WAYS)
def test_revert_brings_back_what_was_handed_out(
    way: Callable[[nn.Module], None], rules: list[surgery.Rule]
) -> None:
    model, want = operated(rules, way), Net()
    surgery.parameters(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            surgery.revert(model)
        except surgery.OperationError:
            assert rules is RULES
            MENDED[way](model)
            surgery.revert(model)
    flags = {name: p.requires_grad for name, p in want.named_parameters()}
    for name, p in model.named_parameters():
        assert p.requires_grad is flags.get(name, True), name
        if way is not another_parameter or name != "last.weight":
            assert torch.equal(p, start.get(name, p)), name
    new = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - {"first", "last"}
    assert all(any(name in str(each.message) for each in told) for name in new if name), told


def test_revert_warns_of_what_was_never_handed_out() -> None:
    model = operated(FREE, unfrozen)
    with torch.no_grad():
        model.last.weight.add_(1)
    with pytest.warns(UserWarning, match=r"last\.weight, last\.bias: trained without a rule, and"):
        surgery.revert(model)
    assert model.last.weight.requires_grad
    assert not hasattr(model, "surgery")


def test_flags_that_were_off_before_apply_are_off_after_revert() -> None:
    model = Net()
    model.last.requires_grad_(False)
    before = surgery.fingerprint(model)
    surgery.apply(model, FREE)
    for hand_out in (True, False):
        model.last.requires_grad_(True)
        if hand_out:
            train(model)
    surgery.revert(model)
    after = surgery.fingerprint(model)
    assert {k for k in before if before[k] != after[k]} <= {"random numbers of torch"}


def test_revert_warns_of_a_trained_layer_that_was_replaced() -> None:
    model = train(surgery.apply(Net(), RULES))
    model.last = nn.Linear(8, 3).requires_grad_(False)
    with pytest.raises(surgery.OperationError, match="a Linear was replaced"):
        surgery.state_dict(model)
    with pytest.warns(UserWarning, match=r"last\.weight, last\.bias: in modules that were replac"):
        surgery.revert(model)


def test_revert_warns_of_a_flag_that_has_no_tensor_any_more() -> None:
    model = surgery.apply(Net(), FREE)
    weight_norm(model)
    model.last.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"last\.weight: no longer there to be given back"):
        surgery.revert(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_know_it_too(copied: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = operated(FREE, unfrozen)
    surgery.parameters(model)
    clone = train(copied(model))
    fresh = surgery.load(Net(), surgery.save(clone, tmp_path / "a.safetensors"))
    assert torch.equal(fresh(data()), clone(data()))
    assert torch.equal(surgery.revert(clone)(data()), Net()(data()))
    assert torch.equal(surgery.revert(model)(data()), Net()(data()))


def test_disabled_it_answers_as_it_was_handed_out() -> None:
    model = train(operated(FREE, unfrozen))
    tuned = model(data())
    with surgery.disabled(model):
        assert torch.equal(model(data()), Net()(data()))
    assert torch.equal(model(data()), tuned)


def test_disabled_warns_of_what_was_never_handed_out() -> None:
    model = operated(FREE, unfrozen)
    with (
        pytest.warns(UserWarning, match=r"last\.weight, last\.bias were trained") as told,
        surgery.disabled(model),
    ):
        pass
    assert told[0].filename == __file__


def test_nothing_is_by_hand_on_a_model_that_was_not_touched() -> None:
    for rules in ("full", "bitfit", "adapterx_ffn"):
        model = surgery.apply(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), rules)
        assert trained.by_hand(model) == []


def test_a_fault_at_any_line_of_load_leaves_the_model(tmp_path: Path) -> None:
    path = surgery.save(train(operated(RULES, a_norm)), tmp_path / "a.safetensors")
    model = Net()
    a_norm(model)
    model.eval()

    def load() -> None:
        surgery.load(model, path)

    lines = laws.events(load)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surgery.revert(model)  # it was all there when the rules were applied
        laws.faults(model, load, laws.runs(lines))
