"""Rows told by a tensor, tokens of several packed into one row, and training of several at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import (
    OperationError,
    activate,
    at,
    ffn,
    head,
    lora,
    mixed,
    moa,
    norm,
    parallel,
    parameters,
    prompt,
    qkv,
    scale_shift,
    unfreeze,
)
from surgery.errors import GraftError
from tests.engine.test_activity import ONCE
from tests.engine.test_mixture import NAMES, X, close, operated, vit, wanted
from tests.methods.test_methods import SETS, rules_of
from tests.models import encoder

AB = ["a", "b"]
ROWS = torch.tensor([1, -1, 0, 1, 0])  # as NAMES
OTHER: list[str | None] = [None, "a", "a", "b", None]
OTHER_ROWS = torch.tensor([-1, 0, 0, 1, -1])


@pytest.mark.parametrize("name", [name for name in SETS if name not in ONCE])
@torch.no_grad()
def test_rows_of_a_tensor_are_read_in_each_forward(name: str) -> None:
    model, rows = operated(vit(), rules_of(name)), ROWS.clone()
    with mixed(model, AB, rows=rows):
        first = model(X)
        rows.copy_(OTHER_ROWS)
        second = model(X)
    close(first, wanted(model, X))
    close(second, wanted(model, X, OTHER))


COMPILED = {
    "lora": at(qkv, lora(rank=2)),
    "adapterx_ffn": "adapterx_ffn",
    "unfrozen": [at(norm, unfreeze), at(head, unfreeze)],
    "before and after": at(ffn, surgery.prepend(scale_shift()), surgery.append(scale_shift())),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_compiled_code_reads_rows(name: str) -> None:
    model, rows = operated(vit(), COMPILED[name]), ROWS.clone()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with mixed(model, AB, rows=rows):
        model(X)  # shows that rows stay rows
        first = [run(X), run(X)][-1]  # the second, of a mixture, knows of gates before
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs
        for i in range(8):
            rows.copy_(OTHER_ROWS.roll(i))
            run(X)
        rows.copy_(OTHER_ROWS)
        second = run(X)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    close(first, wanted(model, X))
    close(second, wanted(model, X, OTHER))


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_code_acts_where_rows_were_seen_to_stay_rows() -> None:
    model = operated(vit(), at(qkv, lora(rank=2)))
    run = torch.compile(model, backend="aot_eager")
    with mixed(model, AB, rows=ROWS), pytest.raises(Exception, match="Let one forward run"):
        run(X)


# tokens of several in one row ---------------------------------------------------------------------

PACKED = {
    "lora": at("**.{linear1,linear2}", lora(rank=2)),
    "adapters": at(ffn, parallel(surgery.adapter(rank=4))),
    "mixture": at(ffn, parallel(moa(rank=4, experts=2, heads=2))),
    "norms": [at(norm, unfreeze), at(ffn, surgery.append(scale_shift()))],
}


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_packed_tokens_are_each_of_its_own(name: str) -> None:
    """Three sequences in one row, which the mask keeps apart, are as three rows."""
    torch.manual_seed(0)
    model = operated(encoder().double().eval(), PACKED[name])
    x = torch.randn(1, 12, 24, dtype=torch.float64)
    ends, names = [(0, 5), (5, 8), (8, 12)], ["b", None, "a"]
    whose = torch.tensor([[1] * 5 + [-1] * 3 + [0] * 4])
    of = torch.tensor([0] * 5 + [1] * 3 + [2] * 4)
    with mixed(model, AB, rows=whose):
        got = model(x, mask=of[:, None] != of[None])
    want = []
    for (start, end), each in zip(ends, names, strict=True):
        activate(model, each)
        want.append(model(x[:, start:end], mask=torch.zeros(end - start, end - start).bool()))
    close(got, torch.cat(want, 1))


class Mean(nn.Module):
    """Adds the mean of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.mean(1, keepdim=True).expand_as(x)


@torch.no_grad()
def test_what_looks_at_other_tokens_is_not_packed() -> None:
    x, whose = torch.randn(1, 6, 24, dtype=torch.float64), torch.tensor([[0, 0, 0, 1, 1, 1]])
    model = operated(encoder().double().eval(), at(ffn, parallel(lambda site: Mean())))
    with (
        mixed(model, AB, rows=whose),
        pytest.raises(GraftError, match="Mean makes of a token depends on the others"),
    ):
        model(x)
    model = operated(encoder().double().eval(), at(surgery.block, surgery.insert(prompt(tokens=2))))
    with (
        pytest.raises(OperationError, match="do not act on each token"),
        mixed(model, AB, rows=whose),
    ):
        pass
    model = operated(encoder().double().eval(), PACKED["lora"])
    with mixed(model, AB, rows=whose), pytest.raises(GraftError, match="1 x 6 tokens are not to"):
        model(torch.randn(1, 7, 24, dtype=torch.float64))


@pytest.mark.parametrize(
    ("names", "rows", "told"),
    [
        (AB, torch.tensor([0, 1, 2]), "rows go from 0 to 2, and there are 2 names"),
        (AB, torch.tensor([0, -2, 1]), "rows go from -2 to 1"),
        (AB, torch.tensor([0.0, 1.0]), "torch.float32"),
        (AB, torch.zeros(2, 2, 2).long(), r"\(2, 2, 2\)"),
        (AB, torch.zeros(2, device="meta").long(), "on meta, and the model on cpu"),
        (["a", None], torch.tensor([0]), "each once"),
        (["a", "a"], torch.tensor([0]), "each once"),
        (["a", "c"], torch.tensor([0]), 'no operation "c"'),
    ],
)
def test_wrong_rows_are_told(names: Any, rows: Tensor, told: str) -> None:
    model = operated(vit(), at(qkv, lora(rank=2)))
    with (
        pytest.raises((OperationError, GraftError), match=told),
        mixed(model, names, rows=rows),
    ):
        model(X[: len(rows)])
    assert torch.equal(model(X), model(X))


# training several at once ------------------------------------------------------------------------


def trained_alone(model: nn.Module, steps: int, weights: Tensor) -> Tensor:
    """What each gives after training by itself, on its own rows."""
    outs = {}
    for name in AB:
        surgery.train_only(activate(model, name), name)
        optimizer = torch.optim.SGD(parameters(model), lr=0.1)
        mine = torch.tensor([each == name for each in NAMES])
        for _ in range(steps):
            optimizer.zero_grad()
            (model(X[mine]) * weights[mine]).sum().backward()
            optimizer.step()
        outs[name] = model(X).detach()
    base = activate(model, None)(X).detach()
    return torch.stack([(base if n is None else outs[n])[i] for i, n in enumerate(NAMES)])


TRAINED = {
    "heads": [at(qkv, lora(rank=2)), at(head, unfreeze)],
    "norms": [at(norm, unfreeze), at(head, unfreeze)],
    "all": at("**", unfreeze),
}


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("name", TRAINED)
def test_what_several_unfroze_is_trained_in_one_batch(name: str, outside: bool) -> None:
    weights = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def built() -> nn.Module:
        model = operated(vit(), TRAINED[name]).train()
        return surgery.train_only(model, AB)

    for each in (model := built()).modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
    want = trained_alone(built(), 3, weights)
    optimizer = torch.optim.SGD(parameters(model, AB), lr=0.1)
    for _ in range(3):
        with mixed(model, NAMES):
            optimizer.zero_grad()
            (model(X) * weights).sum().backward()
            optimizer.step() if not outside else None
        optimizer.step() if outside else None
    assert [op.name for op in model.surgery.operations if op.strength] == ["b"]
    of_b = [i for i, each in enumerate(NAMES) if each == "b"]
    close(model(X)[of_b], want[of_b], eps=64)  # what is active shows at once what it learnt
    with torch.no_grad():
        close(wanted(model, X), want, eps=64)  # after three steps
        surgery.revert(model)
        close(model(X)[1:2], want[1:2])


def test_statistics_are_of_the_rows_of_each() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).train()
    for name in AB:
        activate(model, None) if name == "b" else None
        surgery.apply(model, at("1", unfreeze), name=name)
    x, before = torch.randn(6, 8), model[1].running_mean.clone()
    parameters(model, AB)
    with mixed(model, ["a", "a", "b", "b", None, None]):
        model(x)
    y = model[0](x).detach()
    for name, rows in (("a", y[:2]), ("b", y[2:4])):
        activate(model, name)
        torch.testing.assert_close(model[1].running_mean, 0.9 * before + 0.1 * rows.mean(0))
    activate(model, None)
    assert torch.equal(model[1].running_mean, before)


def test_an_optimizer_must_have_the_parameters_of_each() -> None:
    model = surgery.train_only(operated(vit(), at(head, unfreeze)), AB).train()
    with (
        pytest.raises(OperationError, match=r"parameters\(model, \['a', 'b'\]\)"),
        mixed(model, NAMES),
    ):
        pass
    found = parameters(model, AB)
    assert len(found) == 4
    assert not {*map(id, found)} & {*map(id, model.parameters())}
    with mixed(model, NAMES):
        model(X).sum().backward()
    assert all(p.grad is not None for p in found)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(OperationError, match='no operation "c"'):
        parameters(model, ["c"])
