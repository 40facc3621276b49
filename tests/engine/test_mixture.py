"""One batch, many operations: each row is answered as by its own alone."""

from __future__ import annotations

import copy
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
    parameters,
    qkv,
    train_only,
    unfreeze,
    weight,
)
from surgery.errors import GraftError
from tests.engine.test_activity import ONCE, train
from tests.methods.reference import EPS
from tests.methods.test_methods import SETS, rules_of
from tests.models import encoder, hf_bert, hf_gpt2, hf_llama, images, tiny_vit, words_in

X = images(batch=5).double()
NAMES = ["b", None, "a", "b", "a"]


def operated(model: nn.Module, rules: Any, names: str = "ab") -> nn.Module:
    for seed, name in enumerate(names):
        activate(model, None) if seed else None
        surgery.apply(model, rules, name=name, seed=seed)
        train(model, name, seed)
    return model


def out_of(answer: Any) -> Tensor:
    out: Tensor = answer if isinstance(answer, Tensor) else next(iter(answer.values()))
    return out


def wanted(model: nn.Module, x: Tensor, names: list[str | None] = NAMES) -> Tensor:
    """Each row by itself."""
    rows = []
    for i, name in enumerate(names):
        activate(model, name)
        rows.append(out_of(model(x[i : i + 1])))
    return torch.cat(rows)


def close(got: Tensor, want: Tensor, eps: int = 16) -> None:
    atol = eps * EPS * float(want.detach().abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def vit() -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit().double().eval()


@pytest.mark.filterwarnings("ignore:model.state_dict")  # it is compared, not kept
@pytest.mark.parametrize("name", [name for name in SETS if name not in ONCE])
@torch.no_grad()
def test_rows_are_as_alone(name: str) -> None:
    model = operated(vit(), rules_of(name))
    state = {key: t.clone() for key, t in activate(model, "a").state_dict().items()}
    vars_before = [dict(vars(m)) for m in model.modules()]
    with mixed(model, NAMES):
        got = model(X)
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert [v.keys() for v in vars_before] == [vars(m).keys() for m in model.modules()]
    close(got, wanted(model, X))


@pytest.mark.parametrize("name", [name for name in SETS if name not in ONCE])
def test_gradients_are_as_alone(name: str) -> None:
    """Of parts, and of what each of two unfroze, in one batch that trains both."""
    model = train_only(operated(vit(), rules_of(name)), ["a", "b"])
    parameters(model, ["a", "b"])
    weights = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    done = model.surgery.operations
    parts = [p for op in done for p in op.parameters() if p.requires_grad]
    own = {(op, *at): own.parameter for op in done for at, own in op.own_parameters.items()}

    def grads(answer: Tensor, of: list[nn.Parameter]) -> list[Tensor]:
        found = torch.autograd.grad((answer * weights).sum(), of, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(of, found, strict=True)]

    with mixed(model, NAMES):
        got = grads(model(X), [*parts, *own.values()])
    total = [torch.zeros_like(g) for g in got]
    for i, each in enumerate(NAMES):
        activate(model, each)
        if each is None:
            continue
        answer = torch.zeros_like(weights).index_add(0, torch.tensor([i]), model(X[i : i + 1]))
        mine = [(k, own_) for k, own_ in enumerate(own, len(parts)) if own_[0].name == each]
        shown = [getattr(module, tensor) for _, (_, module, tensor) in mine]
        where = [*range(len(parts)), *(k for k, _ in mine)]
        for k, g in zip(where, grads(answer, [*parts, *shown]), strict=True):
            total[k] = total[k] + g
    largest = max(float(g.abs().max()) for g in total)
    assert largest > 0
    for a, b in zip(got, total, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=16 * EPS * largest)


MODELS: dict[str, Any] = {
    "encoder": (encoder, torch.randn(5, 7, 24).double(), at(ffn, lora(rank=2))),
    "encoder, weights": (encoder, torch.randn(5, 7, 24).double(), at(qkv, lora(rank=2))),
    "bert": (hf_bert, words_in(5), [at(qkv, lora(rank=2)), at(head, unfreeze)]),
    "llama": (hf_llama, words_in(5), at(qkv, lora(rank=2))),
    "tied head": (hf_gpt2, words_in(5), [at(qkv, lora(rank=2)), at(head, unfreeze)]),
    "table": (hf_llama, words_in(5), at(weight("**.embed_tokens.weight"), lora(rank=2))),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_other_models(name: str) -> None:
    build, x, rules = MODELS[name]
    torch.manual_seed(0)
    model = operated(build().double().eval(), rules)
    if hasattr(model, "config"):
        model.config.use_cache = False
    with mixed(model, NAMES):
        got = out_of(model(x))
    close(got, wanted(model, x))


@torch.no_grad()
def test_tokens_on_the_first_axis() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 3, 32, dropout=0.0)
    model = operated(nn.TransformerEncoder(layer, 2).double().eval(), at(ffn, lora(rank=2)))
    for n in (10, 7):  # a multiple of the rows, too
        x = torch.randn(n, 5, 24, dtype=torch.float64)
        with mixed(model, NAMES):
            got = model(x)
        rows = []
        for i, name in enumerate(NAMES):
            activate(model, name)
            rows.append(model(x[:, i : i + 1]))
        close(got, torch.cat(rows, 1))
    with mixed(model, NAMES), pytest.raises(GraftError, match="5 rows are not to be told"):
        model(torch.randn(5, 5, 24, dtype=torch.float64))


@torch.no_grad()
def test_ranks_that_differ_are_padded() -> None:
    model = vit()
    for seed, (name, rank) in enumerate({"a": 2, "b": 5}.items()):
        activate(model, None) if seed else None
        surgery.apply(model, at(qkv, lora(rank=rank)), name=name)
        train(model, name, seed)
    with mixed(model, NAMES):
        got = model(X)
    close(got, wanted(model, X))


@torch.no_grad()
def test_many() -> None:
    names = [f"n{i}" for i in range(12)]
    model = vit()
    for seed, name in enumerate(names):
        surgery.apply(model, at(qkv | ffn, lora(rank=2)), name=name, seed=seed)
        train(model, name, seed)
    x = images(batch=12).double()
    with mixed(model, names):
        got = model(x)
    close(got, wanted(model, x, names))


def test_compiled() -> None:
    model = operated(vit(), at(qkv, lora(rank=2)))
    with torch.no_grad(), mixed(model, NAMES):
        want = model(X)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), want)
        other = ["a", "a", None, "b", "a"]
    with torch.no_grad(), mixed(model, other):
        torch.testing.assert_close(compiled(X), model(X))
    close(compiled(X).detach(), model(X).detach())


def test_refused() -> None:
    model = operated(vit(), [at(qkv, lora(rank=2)), at(head, unfreeze)])
    with pytest.raises(OperationError, match='no operation "c"'), mixed(model, ["c"]):
        pass
    with mixed(model, NAMES), pytest.raises(GraftError, match="5 rows are not to be told"):
        model(X[:3])
    with (
        pytest.raises(OperationError, match=r"weight of a Linear is trained by"),
        mixed(model.train(), NAMES),
    ):
        pass
    parts = [p for op in model.surgery.operations for p in op.parameters()]
    for p in model.parameters():
        p.requires_grad_(any(p is part for part in parts))
    with mixed(model, NAMES):
        model(X).sum().backward()
    assert all(p.grad is not None for p in parts)


def test_a_loss_is_not_of_rows() -> None:
    model = operated(
        hf_llama().eval(),
        at(qkv, surgery.parts.prefix(tokens=2))
        if False
        else at(surgery.attn, surgery.parts.prefix(tokens=2)),
    )
    x = words_in(5)
    with mixed(model, NAMES), pytest.raises(GraftError, match="not of rows"):
        model(x, labels=x, use_cache=False)


def test_copies_within_are_free_of_it() -> None:
    model = operated(vit(), at(qkv, lora(rank=2)))
    with mixed(model, NAMES):
        pass
    again = copy.deepcopy(model)
    assert torch.equal(again(X), model(X))


def test_train_only_is_as_it_was() -> None:
    model = train_only(operated(vit(), at(qkv, lora(rank=2))), "a")
    asks = [p.requires_grad for p in model.parameters()]
    with mixed(model, NAMES):
        assert asks == [p.requires_grad for p in model.parameters()]
    assert [op.strength for op in model.surgery.operations] == [0.0, 1.0]


# what is proven, and what runs once for each ------------------------------------------------------


class Reads(nn.Module):
    """Reads a weight as it stands beside calling what has it; positions of its own; two views."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.table, self.pos = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.mix, self.out, self.way = nn.Linear(8, 8), nn.Linear(8, 8), way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "tied":
            return torch.nn.functional.linear(self.table(x), self.table.weight)
        if self.way == "read":
            return torch.nn.functional.linear(x, self.mix.weight, self.mix.bias)
        if self.way == "positions":
            rows = torch.eye(8, dtype=x.dtype)[torch.arange(x.shape[1]) % 8]
            return self.out(x + self.pos(rows))
        if self.way == "views":
            both = self.mix(torch.cat([x, x.flip(-1)]))
            return self.out(both[: len(x)] + both[len(x) :])
        if self.way == "tokens first":
            return self.out(self.mix(x.transpose(0, 1)).transpose(0, 1))
        return self.out(self.mix(x))


WAYS: dict[str, tuple[Any, bool | None]] = {
    "tied": (at("table", unfreeze), None),
    "read": (at("mix", unfreeze), False),
    "positions": ([at("pos", lora(rank=2)), at("out", unfreeze)], False),
    "views": ([at("mix", lora(rank=2)), at("out", unfreeze)], False),
    "tokens first": ([at("mix", lora(rank=2)), at("out", unfreeze)], False),
    "plain": ([at("mix", lora(rank=2)), at("out", unfreeze)], True),
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_rows_are_proven_or_the_model_runs_once_for_each(way: str) -> None:
    rules, proven = WAYS[way]
    torch.manual_seed(0)
    model = operated(Reads(way).double().eval(), rules)
    words = torch.randint(0, 11, (5, 10), generator=torch.Generator().manual_seed(0))
    x = words if way == "tied" else torch.randn(5, 10, 8, dtype=torch.float64)
    with mixed(model, NAMES):
        got = model(x)
    close(got, wanted(model, x))
    shown = model.surgery.operations[0].rows_proven.values()
    assert [all(known.values()) for known in shown] == ([] if proven is None else [proven])


@torch.no_grad()
def test_samples_that_are_alike_prove_nothing() -> None:
    model = operated(Reads("plain").double().eval(), WAYS["plain"][0])
    x = torch.ones(5, 10, 8, dtype=torch.float64)
    with mixed(model, NAMES):
        got = model(x)
    close(got, wanted(model, x))
    assert not any(model.surgery.operations[0].rows_proven.values())


@pytest.mark.parametrize("where", ["**.norm1", "**.linear1", "**.out_proj", "**.self_attn"])
@torch.no_grad()
def test_fused_layers_meet_rows_too(where: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    model = operated(model, at(where, unfreeze))
    x = torch.randn(5, 7, 24, dtype=torch.float64)
    with mixed(model, NAMES):
        got = model(x)
    close(got, wanted(model, x))


@torch.no_grad()
def test_tables_that_cannot_act_on_what_they_give() -> None:
    model = nn.Sequential(nn.Embedding(11, 8, sparse=True), nn.Linear(8, 4)).double().eval()
    model = operated(model, at(weight("0.weight"), lora(rank=2)))
    x = torch.randint(0, 11, (5, 3))
    with mixed(model, NAMES):
        got = model(x)
    close(got, wanted(model, x))


@torch.no_grad()
def test_once_for_each_where_tokens_are_first() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 3, 32, dropout=0.0)
    model = operated(nn.TransformerEncoder(layer, 2).double().eval(), at(qkv, lora(rank=2)))
    x = torch.randn(7, 5, 24, dtype=torch.float64)
    rows = []
    for i, name in enumerate(NAMES):
        activate(model, name)
        rows.append(model(x[:, i : i + 1]))
    with mixed(model, NAMES):
        close(model(x), torch.cat(rows, 1))
        for wrong in (torch.randn(5, 5, 24), torch.randn(7, 1, 24), torch.randn(7, 10, 24)):
            with pytest.raises(GraftError, match="5 rows are not to be told"):
                model(wrong.double())


def test_statistics_are_none_of_the_base() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).train()
    mark = surgery.fingerprint(model)
    for name in "ab":
        surgery.apply(model, at("0", lora(rank=2)), name=name)
    with torch.no_grad(), mixed(model, NAMES):
        model(torch.randn(5, 8))
    surgery.revert(model)
    now = surgery.fingerprint(model)
    assert all(now[key] == value for key, value in mark.items() if "random" not in key)


def test_nothing_else_happens_inside() -> None:
    model = operated(vit(), at(qkv, lora(rank=2)))
    calls: list[Any] = [
        lambda: activate(model, "a"),
        lambda: train_only(model, "a"),
        lambda: surgery.merge(model),
        lambda: surgery.revert(model),
        lambda: surgery.state_dict(model, name="a"),
        lambda: copy.deepcopy(model),
        lambda: mixed(model, NAMES).__enter__(),
        lambda: surgery.disabled(model).__enter__(),
        lambda: surgery.apply(model, "lora", name="c"),
    ]
    with mixed(model, NAMES):
        for call in calls:
            with pytest.raises(OperationError, match="inside mixed"):
                call()


class Few(nn.Module):
    """A table that it reads again, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.idle = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, words: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.mix(self.table(words)), self.table.weight)


WORDS = torch.randint(0, 11, (5, 10), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_part_that_never_runs_is_told_by_its_rows() -> None:
    model = activate(operated(Few().double().eval(), at("idle", lora(rank=2))), None)
    model(WORDS)  # the base answers, and needs no part
    with mixed(model, [None] * 5):
        model(WORDS)
    with mixed(model, NAMES), pytest.raises(GraftError, match="never ran"):
        model(WORDS)


@torch.no_grad()
def test_rows_are_together_whatever_others_that_are_off_have_done() -> None:
    model = operated(Few().double().eval(), at("mix", unfreeze))
    activate(model, None)
    surgery.apply(model, at("table", unfreeze), name="c")
    train(model, "c", 2)
    for acting in (None, "c"):  # which it is not where it acts: rows are without it
        activate(model, acting)
        calls = counted(model.mix)
        with mixed(model, NAMES):
            got = [model(WORDS), model(WORDS)]
        assert len(calls) == (4 if acting is None else 6)  # two show, or each of three runs alone
        close(got[0], want := wanted(model, WORDS))
        close(got[1], want)


def counted(module: nn.Module) -> list[int]:
    """One for each call from now on."""
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@torch.no_grad()
def test_what_was_shown_is_known_of_other_operations() -> None:
    model = operated(Reads("plain").double().eval(), at("out", unfreeze), "abc")
    x, calls = torch.randn(5, 10, 8, dtype=torch.float64), counted(model.mix)
    for names, forwards in ((["a", "b", None, "c", "b"], 3), (["b", "c", "c", None, "b"], 1)):
        with mixed(model, names):
            model(x)
        assert len(calls) == forwards  # two of them show
        calls.clear()
        surgery.revert(model, name="a") if "a" in names else None


@torch.no_grad()
def test_numbers_that_are_not_finite_show_nothing() -> None:
    model = operated(Reads("plain").double().eval(), at("mix", lora(rank=2)))
    x = torch.randn(5, 10, 8, dtype=torch.float64)
    for at_ in (float("nan"), 1e308):
        odd = x.clone()
        odd[0, 0] = at_
        with mixed(model, NAMES):
            got = model(odd)
        assert torch.equal(got[1:].isfinite(), torch.ones(4, 10, 8, dtype=torch.bool))
    with mixed(model, NAMES):
        got = model(x)
    close(got, wanted(model, x))
    shown = model.surgery.operations[0].rows_proven.values()
    assert [all(known.values()) for known in shown] == [True]
