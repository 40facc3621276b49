"""Merging puts linear parts into the weights of the base and takes them out, or refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import surgery
from surgery import OperationError, adapter, append, at, parallel, prepend, replace, unfreeze
from surgery._preserve import fingerprint
from surgery.rules.affine import Affine, affine
from surgery.spec.snapshot import gap, unchanged
from tests.laws.checks import Linears


def linear(site):
    return nn.Linear(site.width, site.out)


def unbiased(site):
    return nn.Linear(site.width, site.out, bias=False)


def stack(site):
    return nn.Sequential(nn.Linear(site.width, 3), nn.Linear(3, site.out, bias=False))


class LowRank(nn.Module):
    """A part of one's own that says how it is linear."""

    def __init__(self, site):
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, site.width))
        self.up = nn.Parameter(torch.randn(site.out, 2))

    def forward(self, x):
        return x @ self.down.T @ self.up.T

    def affine(self):
        return self.up @ self.down, None


EDITS = {
    "parallel": [parallel(linear)],
    "scaled": [parallel(linear, scale=-0.3)],
    "append": [append(linear)],
    "append residual": [append(linear, residual=True)],
    "prepend": [prepend(linear)],
    "prepend residual": [prepend(linear, residual=True)],
    "a row": [parallel(stack)],
    "of one's own": [parallel(LowRank, scale=2.0)],
    "in place of it": [replace(linear)],
    "in rule order": [
        parallel(linear), prepend(linear), append(unbiased), parallel(unbiased, scale=0.5),
        prepend(unbiased, residual=True), append(linear, residual=True),
    ],
    "around what is in place of it": [replace(linear), append(linear), parallel(linear)],
    "trained too": [unfreeze, parallel(linear)],
}  # fmt: skip


def operated(*edits, model=None, where="one"):
    model = (model or Linears()).double()
    return surgery.apply(model, at(where, *edits))


@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
def test_merged_it_answers_as_before_and_no_part_runs(edits):
    model, x = operated(*edits), torch.randn(5, 8, dtype=torch.float64)
    before, want = fingerprint(model), model(x)
    keys = [key for key in model.state_dict() if "surgery" not in key]
    parts, ran = list(model.surgery.default.children()), []
    hooks = [part.register_forward_hook(lambda *_: ran.append(1)) for part in parts]
    surgery.merge(model)
    assert gap(model(x), want) <= 16
    assert not ran
    for hook in hooks:
        hook.remove()
    assert [key for key in model.state_dict() if "surgery" not in key] == keys
    surgery.unmerge(model)
    unchanged(before, fingerprint(model), "merge and unmerge", but=("random", "attributes"))
    assert torch.equal(model(x), want)


def test_two_operations_merge_as_one():
    model, x = operated(parallel(linear)), torch.randn(5, 8, dtype=torch.float64)
    surgery.apply(model, at(nn.Linear, append(linear)), name="second")
    want = model(x)
    surgery.merge(model)
    assert gap(model(x), want) <= 16
    assert torch.equal(surgery.unmerge(model)(x), want)


def test_revert_of_a_merged_model_is_the_base_to_the_bit():
    base = Linears().double()
    before = {k: t.clone() for k, t in base.state_dict().items()}
    model = operated(parallel(linear), unfreeze, model=base)
    surgery.revert(surgery.merge(model))
    assert {k: torch.equal(t, before[k]) for k, t in model.state_dict().items()} == dict.fromkeys(
        before, True
    )


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_merged_model_unmerges(way):
    model = surgery.apply(Linears(), at("one", parallel(linear_part)))
    x = torch.randn(2, 8)
    want = model(x)
    copied = way(surgery.merge(model))
    assert torch.equal(surgery.unmerge(copied)(x), want)
    assert not torch.equal(model.one.weight, copied.one.weight)


def linear_part(site):
    return nn.Linear(site.width, site.out)


def tied():
    model = Linears()
    model.two.weight = model.one.weight
    return model


def without_bias():
    model = Linears()
    model.one = nn.Linear(8, 8, bias=False)
    return model


REFUSED = {
    "not linear": (Linears, "one", adapter(rank=2), "Adapter is not linear"),
    "no linear": (Linears, "", linear, "Linear stands at a Linears"),
    "a span": (Linears, surgery.span("one", "two"), linear, "a span"),
    "tied": (tied, "one", linear, "used elsewhere"),
    "no bias": (without_bias, "one", linear, "none to fold it into"),
}


@pytest.mark.parametrize(("build", "where", "part", "told"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_merged_is_refused_and_nothing_changes(build, where, part, told):
    model = operated(parallel(part), model=build(), where=where)
    before = fingerprint(model)
    with pytest.raises(OperationError, match=told) as error:
        surgery.merge(model)
    assert error.value.remedy
    unchanged(before, fingerprint(model), "a refused merge")


def test_a_linear_that_says_otherwise_is_no_linear():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    assert affine(Odd(2, 2)) is None
    assert affine(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) is None
    assert affine(nn.Sequential()) is None
    with pytest.raises(OperationError, match="Odd is not linear"):
        surgery.merge(operated(parallel(lambda site: Odd(site.width, site.out))))


CALLS = {
    "merge": surgery.merge,
    "save": lambda model: surgery.save(model, "/nowhere/x.safetensors"),
    "state_dict": surgery.state_dict,
    "parameters": surgery.parameters,
    "apply": lambda model: surgery.apply(model, at("two", unfreeze), name="more"),
    "disabled": lambda model: surgery.disabled(model).__enter__(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_merged_is_first_unmerged(call):
    model = surgery.merge(operated(parallel(linear)))
    before = fingerprint(model)
    with pytest.raises(OperationError, match="unmerge"):
        call(model)
    unchanged(before, fingerprint(model), "a refused call")
    with pytest.raises(OperationError, match="not merged"):
        surgery.unmerge(operated(parallel(linear)))


def test_a_fault_in_the_midst_of_a_merge_changes_nothing(monkeypatch):
    model = operated(parallel(linear), where=nn.Linear)
    before, calls = fingerprint(model), []
    real = torch.Tensor.copy_

    def copy_(self, other, *rest):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, other, *rest)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    with pytest.raises(KeyboardInterrupt):
        surgery.merge(model)
    unchanged(before, fingerprint(model), "a merge that was interrupted")


def test_maps_add_and_follow_one_another():
    generator = torch.Generator().manual_seed(0)
    a, b, k, m = (torch.randn(shape, generator=generator) for shape in ((3, 3), (3, 3), (3,), (3,)))
    x = torch.randn(3, generator=generator)
    for p, q in ((k, m), (None, m), (k, None), (None, None)):
        one, two = Affine(a, p), Affine(b, q)
        f = lambda x, w=a, b=p: w @ x + (0 if b is None else b)  # noqa: E731
        g = lambda x, w=b, b=q: w @ x + (0 if b is None else b)  # noqa: E731
        for got, want in ((one.plus(two), f(x) + g(x)), (two.after(one), g(f(x)))):
            answer = got.weight @ x + (0 if got.bias is None else got.bias)
            torch.testing.assert_close(answer, want)


def test_the_last_of_two_merged_operations_comes_off_alone():
    model, x = operated(parallel(linear)), torch.randn(5, 8, dtype=torch.float64)
    want = model(x)
    surgery.apply(model, at(nn.Linear, append(linear)), name="second")
    surgery.revert(surgery.merge(model), name="second")
    assert torch.equal(model(x), want)


def test_a_merged_model_is_reported():
    assert "added" in str(surgery.report(surgery.merge(operated(parallel(linear)))))


def test_what_is_put_around_a_replaced_linear_by_another_operation_merges():
    model, x = operated(replace(linear)), torch.randn(5, 8, dtype=torch.float64)
    surgery.apply(model, at("one", append(linear)), name="second")
    want = model(x)
    assert gap(surgery.merge(model)(x), want) <= 16


def test_a_forward_of_its_own_is_told_as_such():
    model = operated(parallel(linear))
    model.one.forward = lambda x: x
    with pytest.raises(OperationError, match="a Linear with a forward of its own"):
        surgery.merge(model)
