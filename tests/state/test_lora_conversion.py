"""Any mergeable operation as LoRA: the same model, as near as a rank allows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import adapter, as_lora, at, fc2, ffn, lora, parallel, qkv, scale_shift
from surgery.errors import OperationError, RuleError
from surgery.spec.case import stir
from tests.engine.test_states import MERGEABLE
from tests.engine.test_uncalled_weights import beit
from tests.methods.test_methods import rules_of
from tests.models import encoder, hf_gpt2, images, tiny_vit, words_in

X = images().double()


def vit() -> Any:
    torch.manual_seed(0)
    return tiny_vit(depth=2).double().eval()


def operated(rules: Any, model: Any = None, **named: Any) -> Any:
    model = surgery.apply(vit() if model is None else model, rules, **named)
    stir(model, 1)
    return model


@pytest.mark.parametrize("name", MERGEABLE)
def test_at_full_rank_it_is_the_same_model(name: str) -> None:
    base = vit()
    before = surgery.fingerprint(base)
    model = operated(rules_of(name), base)
    with torch.no_grad():
        want = model(X)
    table = as_lora(model, share=1.0)
    with torch.no_grad():
        torch.testing.assert_close(model(X), want, rtol=1e-9, atol=1e-9)
    assert all(row[3] < 1e-6 for row in table.rows)
    kinds = {type(part).__name__ for part in model.surgery.default.children()}
    assert kinds <= {"LoRA"}
    surgery.revert(model)
    assert surgery.fingerprint(model) == before


def test_the_error_is_that_of_the_best_of_its_rank() -> None:
    base, errors = vit(), []
    model = operated(at(qkv, surgery.parts.loha(rank=3)), base)
    changes = [p.delta() for p in model.surgery.default.children()]
    for rank in (1, 2, 4, 8):
        twin = copy.deepcopy(model)
        table = as_lora(twin, rank=rank)
        for change, row in zip(changes, table.rows, strict=True):
            S = torch.linalg.svdvals(change)
            best = (S[rank:].norm() / S.norm()).item()
            assert row[3] == pytest.approx(best, rel=1e-2, abs=1e-6)
            assert row[2] == rank
        errors.append(max(row[3] for row in table.rows))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1


def test_a_share_is_kept_with_the_least_rank() -> None:
    model = operated(at(qkv, surgery.parts.loha(rank=3)))
    changes = [p.delta() for p in model.surgery.default.children()]
    for change, row in zip(changes, as_lora(model, share=0.9).rows, strict=True):
        squares = torch.linalg.svdvals(change).square().cumsum(0)
        least = int((squares < 0.9 * squares[-1]).sum()) + 1
        assert row[2] == least


def test_it_is_saved_and_merged_as_any_lora(tmp_path: Path) -> None:
    model = operated("hira")
    as_lora(model, share=1.0)
    want = model(X)
    surgery.save(model, tmp_path / "a.safetensors")
    again = surgery.load(vit(), tmp_path / "a.safetensors")
    torch.testing.assert_close(again(X), want)
    torch.testing.assert_close(surgery.merge(model)(X), want)


def test_biases_and_norms_are_unfrozen_and_exact() -> None:
    model = operated(
        [at(fc2, surgery.append(scale_shift())), at("norm", surgery.append(scale_shift()))]
    )
    want = model(X)
    as_lora(model, share=1.0)
    torch.testing.assert_close(model(X), want)
    named = {k for k, p in model.named_parameters() if p.requires_grad and "surgery" not in k}
    assert named == {"blocks.0.mlp.fc2.bias", "blocks.1.mlp.fc2.bias", "norm.weight", "norm.bias"}


def test_weights_that_are_turned_or_not_called() -> None:
    gpt2 = hf_gpt2(layers=2).double().eval()
    model = operated(at(qkv, surgery.parts.hira(rank=2)), gpt2)
    want = model(words_in()).logits
    as_lora(model, share=1.0)
    torch.testing.assert_close(model(words_in()).logits, want)
    x = torch.randn(2, 5, 24).double()
    model = operated("oft", encoder().double().eval())
    want = model(x)
    as_lora(model, share=1.0)
    torch.testing.assert_close(model(x), want)
    torch.manual_seed(0)
    picture = torch.randn(2, 3, 32, 32).double()
    model = operated("oft", beit().double().eval(), example=picture)
    want = model(picture)
    as_lora(model, share=1.0, example=picture)
    torch.testing.assert_close(model(picture), want)


@pytest.mark.parametrize(
    "named", [{}, {"share": "a"}, {"rank": 0}, {"rank": 2, "share": 0.5}, {"share": 2.0}]
)
def test_one_number_says_how_much(named: Any) -> None:
    with pytest.raises(RuleError, match="one of both"):
        as_lora(operated("lora"), **named)


def test_what_cannot_be_is_refused_and_the_model_as_it_was() -> None:
    for model in (
        operated(at(ffn, parallel(adapter(rank=2)))),
        surgery.apply(operated("lora"), at(qkv, lora(rank=2)), name="more"),
        surgery.merge(operated("lora")),
    ):
        before = surgery.fingerprint(model)
        with pytest.raises(OperationError):
            as_lora(model, rank=2)
        assert surgery.fingerprint(model) == before
    with pytest.raises(OperationError, match="never operated"):
        as_lora(nn.Linear(2, 2), rank=1)


def test_what_was_trained_beside_stays_as_trained() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    rules = [at("0", lora(rank=2)), at("0", surgery.unfreeze("bias")), at("1", surgery.unfreeze)]
    surgery.apply(model, [*rules, at("2", lora(rank=2))])
    with torch.no_grad():
        model[0].bias.fill_(7.0)
        for p in model.surgery.parameters():
            p.normal_()
    for _ in range(5):
        model(torch.randn(16, 8))
    model.eval()
    x = torch.randn(4, 8)
    want = model(x)
    as_lora(model, rank=2)
    assert not model.training
    torch.testing.assert_close(model(x), want)
    trained = {k for k, p in model.named_parameters() if p.requires_grad and "surgery" not in k}
    assert trained == {"0.bias", "1.weight", "1.bias"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.a = nn.Embedding(10, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.e.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.head(self.a(self.e(words)))
        return answer


@pytest.mark.parametrize("name", ["e.weight", "head.weight"])
def test_a_tied_weight_is_changed_once(name: str) -> None:
    words = torch.arange(6)[None]
    model = operated(at(surgery.weight(name), surgery.parts.rows([1, 2])), Tied())
    want = model(words)
    assert len(as_lora(model, rank=16).rows) == 1
    torch.testing.assert_close(model(words), want)


def test_a_turned_weight_is_taken_as_it_stands_where_it_is_the_place() -> None:
    from transformers.pytorch_utils import Conv1D

    layers = nn.Sequential(Conv1D(16, 16), nn.Tanh(), Conv1D(24, 16)).double()
    loha = surgery.parts.loha(rank=1)
    model = operated([at(surgery.weight("0.weight"), loha), at("2", loha)], layers)
    x = torch.randn(2, 5, 16).double()
    want = model(x)
    as_lora(model, rank=16)
    torch.testing.assert_close(model(x), want)


def test_where_it_fails_the_operation_is_as_it_was() -> None:
    model = operated(at("0", surgery.parts.loha(rank=1)), nn.Sequential(nn.Linear(8, 8)))
    wrong = torch.randn(2, 3)
    before = surgery.fingerprint(model)
    with pytest.raises(Exception, match=r"shapes|mat1"):
        as_lora(model, rank=1, example=wrong)
    assert surgery.fingerprint(model) == before
    picture = torch.randn(2, 3, 32, 32)
    model = operated("oft", beit(), example=picture)
    with pytest.raises(OperationError, match="example=inputs"):
        as_lora(model, rank=1)
