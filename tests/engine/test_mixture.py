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


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=64 * EPS * float(want.detach().abs().max()))


def vit() -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit().double().eval()


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


BESIDE = [
    "lora",
    "adaptformer",
    "adapterx_ffn",
    "ssf",
    "dora",
    "vera",
    "houlsby",
    "oft",
    "prefix_tuning",
    "vpt_deep",
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_gradients_of_parts_are_as_alone(name: str, training: bool) -> None:
    rules = [r for r in rules_of(name) if "unfreeze" not in repr(r)]
    model = operated(vit(), rules).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    weights = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def grads(answer: Tensor) -> list[Tensor]:
        parts = [p for op in model.surgery.operations for p in op.parameters() if p.requires_grad]
        found = torch.autograd.grad((answer * weights).sum(), parts, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parts, found, strict=True)]

    with mixed(model, NAMES):
        got = grads(model(X))
    total = [torch.zeros_like(g) for g in got]
    for i, each in enumerate(NAMES):
        activate(model, each)
        if each is not None:
            answer = torch.zeros_like(weights).index_add(0, torch.tensor([i]), model(X[i : i + 1]))
            total = [t + g for t, g in zip(total, grads(answer), strict=True)]
    assert sum(float(g.abs().sum()) for g in got) > 0
    for a, b in zip(got, total, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * max(1.0, float(b.abs().max())))


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
