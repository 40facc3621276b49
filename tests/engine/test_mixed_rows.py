"""Rows told by a tensor, tokens of several packed into one row, and training of several at once."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
from tests.models import encoder, hf_gpt2, words_in

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
        (AB, torch.tensor([0.0, 1.0]), "no tensor of int64"),
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


# what a stranger tried ---------------------------------------------------------------------------


def stepped(model: nn.Module, names: list[str], rows: list[int]) -> nn.Module:
    """After one step of training in mixed rows."""
    optimizer = torch.optim.SGD(parameters(model, names), lr=0.05)
    with mixed(model, names, rows=torch.tensor(rows)):
        model(X).square().sum().backward()
    optimizer.step()
    return model


HEADS = [at(qkv, lora(rank=2)), at(head, unfreeze)]


@torch.no_grad()
def test_a_file_goes_into_an_operation_that_has_parameters_of_its_own(tmp_path: Path) -> None:
    with torch.enable_grad():
        model = stepped(operated(vit(), HEADS), AB, [0, 1, 0, 1, -1])
    want = activate(model, "b")(X)
    file = surgery.save(model, tmp_path / "b.safetensors", name="b")
    surgery.swap(model, "a", file)
    assert torch.equal(activate(model, "a")(X), want)
    surgery.load_state_dict(model, surgery.state_dict(model, name="b"), name="a")
    assert torch.equal(activate(model, "a")(X), want)


READERS: dict[str, Any] = {
    "save": lambda m, f: surgery.load(vit(), surgery.save(m, f / "a", name="a"), name="a"),
    "merge": lambda m, f: surgery.merge(m, keep=False),
    "state_dict": lambda m, f: (m.state_dict(), m)[1],
    "report": lambda m, f: (surgery.report(m), m)[1],
}


@pytest.mark.parametrize("reader", READERS)
def test_what_reads_the_model_right_after_a_step_has_it(reader: str, tmp_path: Path) -> None:
    model = stepped(operated(vit(), HEADS, "a"), ["a"], [0, 0, -1, 0, 0])
    twin = copy.deepcopy(model)
    with torch.no_grad():
        want = twin(X)
        found = READERS[reader](model, tmp_path)
        assert torch.equal(found.head.weight, twin.head.weight)
        close(found(X), want, eps=256)


def test_what_would_be_one_tensor_is_not_trained_in_eval_either() -> None:
    model = surgery.train_only(operated(vit(), HEADS), AB).eval()
    with mixed(model, AB, rows=ROWS):
        loss = model(X).square().sum()
        with pytest.raises(OperationError, match=r"trained by \['a', 'b'\], and is one tensor"):
            loss.backward()


@torch.no_grad()
def test_rows_that_numpy_writes_are_read() -> None:
    model, numbers = operated(vit(), HEADS), ROWS.numpy().copy()
    with mixed(model, AB, rows=torch.from_numpy(numbers)):
        model(X)
        numbers[:] = OTHER_ROWS.numpy()
        second = model(X)
    close(second, wanted(model, X, OTHER))


@pytest.mark.parametrize("kind", [torch.uint8, torch.bool, torch.int8, list])
def test_rows_of_other_kinds_are_told(kind: Any) -> None:
    rows = [0, 1, 0, 1, 0]
    given = rows if kind is list else torch.tensor(rows).to(kind)
    with (
        pytest.raises(OperationError, match="no tensor of int64"),
        mixed(operated(vit(), HEADS), AB, rows=given),
    ):
        pass


@torch.no_grad()
def test_rows_that_are_all_of_the_base() -> None:
    model = operated(vit(), HEADS)
    with mixed(model, [None] * 5):
        got = model(X)
    close(got, activate(model, None)(X))


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_norms_that_count_are_told() -> None:
    torch.manual_seed(0)
    model, x = Norms().eval(), torch.randn(4, 8)
    for name in AB:
        activate(model, None) if name == "b" else None
        surgery.apply(model, [at("fc", lora(rank=2)), at("bn", unfreeze)], name=name)
        model.bn.weight.add_(1.0)
    run = torch.compile(model, backend="eager")
    with mixed(model, AB, rows=torch.tensor([0, 1, -1, 0])):
        want = model(x)
        torch.testing.assert_close(run(x), want)
    with (
        mixed(model.train(), AB, rows=torch.tensor([0, 1, -1, 0])),
        pytest.raises(Exception, match="a norm takes the statistics of a batch"),
    ):
        run(x)


def test_who_has_no_rows_is_not_trained() -> None:
    model = surgery.train_only(operated(vit(), HEADS), AB).train()
    parameters(model, AB)
    with mixed(model, AB, rows=torch.zeros(5).long()):
        model(X).sum().backward()
    a, b = model.surgery.operations
    assert all(p.grad is not None for p in a.parameters())
    assert all(p.grad is None for p in b.parameters())
    assert all(own.parameter.grad is None for own in b.own_parameters.values())


def test_two_batches_and_one_backward() -> None:
    model = surgery.train_only(operated(vit(), HEADS), AB).train()
    found = parameters(model, AB)
    loss = torch.zeros((), dtype=torch.float64)
    for rows in (ROWS, OTHER_ROWS):
        with mixed(model, AB, rows=rows):
            loss = loss + model(X).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in found)


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.bn(self.fc(x)))
        return y


COUNTS = [(None, AB), ("b", ["a"]), ("a", ["a"]), ("b", ["b"])]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("active", "trained"), COUNTS)
def test_norms_count_the_rows_of_whom_they_are(
    active: str | None, trained: list[str], apart: bool
) -> None:
    torch.manual_seed(0)
    rules: Any = [at("fc", lora(rank=2)), at("bn", unfreeze)]
    if apart:  # what is replaced runs once for each
        rules = [at("fc", surgery.replace(lambda site: nn.Linear(8, 8))), at("bn", unfreeze)]
    names = ["a"] if apart else AB
    trained = [name for name in trained if name in names] or ["a"]
    model = Norms().train()
    for name in names:
        activate(model, None) if name == "b" else None
        surgery.apply(model, rules, name=name)
    surgery.train_only(activate(model, active if active in names else None), trained)
    parameters(model, names)
    x = 3 * torch.randn(16, 8) + 1
    rest = activate(copy.deepcopy(model), None)(x[12:])
    with torch.no_grad(), mixed(model, [*["a"] * 8, *[names[-1]] * 4, *[None] * 4]):
        y = model(x)
    assert torch.allclose(y[12:], rest)
    for name in names:
        activate(model, name)
        moved = bool(model.bn.running_mean.abs().sum())
        assert moved is (name in trained), name
    activate(model, None)
    assert not model.bn.running_mean.any()
    activate(model, "a")
    surgery.revert(model, name="a")
    model(x)
    assert not model.bn.running_mean.any() or not hasattr(model, "surgery")


def checkpointed(model: nn.Module) -> None:
    """One block runs in a reentrant checkpoint."""
    inner = model.blocks[1].forward
    model.blocks[1].forward = lambda x: checkpoint(inner, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("rules", "put"),
    [
        (HEADS, lambda model: model.set_grad_checkpointing()),
        ("vpt_deep", lambda model: model.set_grad_checkpointing()),
        (HEADS, checkpointed),
        ([at(norm, unfreeze)], checkpointed),
    ],
)
def test_checkpoints_are_refused(rules: Any, put: Any) -> None:
    model = operated(vit(), rules)
    put(model)
    parameters(model, AB)
    with mixed(model, AB, rows=ROWS), pytest.raises(GraftError, match="it runs in a checkpoint"):
        model(X.clone().requires_grad_())


def test_threads_take_turns() -> None:
    model = operated(vit(), HEADS)
    with torch.no_grad(), mixed(model, NAMES):
        want, found = model(X), list[Tensor]()

        def run() -> None:
            with torch.no_grad():
                found.extend(model(X) for _ in range(10))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 40
    assert all(torch.equal(each, want) for each in found)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in "ab")

    def forward(self, x: Tensor) -> Tensor:
        chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            y[chosen == i] = expert(x[chosen == i])
        return y


@torch.no_grad()
def test_how_many_tokens_an_expert_has_is_not_of_rows() -> None:
    torch.manual_seed(0)
    model = operated(Experts().double().eval(), at("experts.*", lora(rank=2)))
    for i in range(20):
        x = torch.randn(5, 4, 8, dtype=torch.float64)
        with mixed(model, NAMES):
            got = model(x)
        close(got, wanted(model, x)) if i < 3 else None
    assert not any(
        any(known.values()) for known in model.surgery.operations[0].rows_proven.values()
    )


@torch.no_grad()
def test_generate_is_given_positions() -> None:
    torch.manual_seed(0)
    model = operated(hf_gpt2().double().eval(), at("**.c_attn", lora(rank=2)))
    ids = words_in(2)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    kinds = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    kinds["eos_token_id"] = None
    want = activate(model, "b").generate(ids, attention_mask=mask, **kinds)[1]
    with mixed(model, ["a", "b"]):
        assert torch.equal(model.generate(ids, attention_mask=mask, **kinds)[1], want)


class Turned(nn.Module):
    """Linears on tokens in other forms."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.fc, self.way = nn.Linear(8, 8), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "flat":
            return self.fc(x.flatten(0, 1)).view_as(x)
        if self.way == "read":
            return torch.nn.functional.linear(x, self.fc.weight, self.fc.bias)
        y: Tensor = self.fc(x.transpose(0, 1)).transpose(0, 1)
        return y


@pytest.mark.parametrize("way", ["flat", "read", "first"])
@torch.no_grad()
def test_tokens_that_lie_otherwise_are_not_packed(way: str) -> None:
    model = operated(Turned(way).double().eval(), at("fc", unfreeze))
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    with (
        mixed(model, AB, rows=torch.tensor([[0] * 6, [1] * 6])),
        pytest.raises(GraftError, match="not the tokens as they lie"),
    ):
        model(x)
