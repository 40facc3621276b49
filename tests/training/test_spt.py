"""SPT: sensitivities measured, a budget allotted, against brute force and weights by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery import at
from surgery.errors import OperationError, RuleError
from surgery.parts.sparse_updates import Sparse
from surgery.parts.sparse_updates import sparse as few
from surgery.training.spt import allot, fill, measure, spt_adapter, spt_lora, spt_rules
from tests.methods.reference import (
    BACKBONES,
    BOTH,
    INPUTS,
    by_hand,
    close,
    starts_as_the_base,
    stirred,
    swin,
    trains_and_comes_off,
    vit,
    vit_b,
)
from tests.methods.test_sparse_updates import RULES, linear_of, scattered
from tests.models import tiny_vit

# sensitivity -----------------------------------------------------------------------------------

LABELS = torch.tensor([1, 3])


def batches(backbone: str = "vit", count: int = 3) -> list[tuple[Tensor, Tensor]]:
    x = INPUTS[backbone]
    return [(x + 0.1 * i, (LABELS + i) % 5) for i in range(count)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@BOTH
def test_scores_are_the_squared_gradients_summed_over_batches(backbone: str) -> None:
    scores = measure(BACKBONES[backbone](), batches(backbone), loss)
    want: dict[str, Tensor] = {}
    for batch in batches(backbone):
        model = BACKBONES[backbone]()
        loss(model, batch).backward()
        for name, p in model.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            want[name] = want.get(name, 0) + grad * grad
    assert list(scores) == list(want)
    for name, score in scores.items():
        close(score, want[name])
        assert not score.requires_grad


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = tiny_vit(proj_drop_rate=0.5).double().train()
    model.blocks[0].eval()
    model.norm.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones(5).double()
    model.register_module("batch_norm", nn.BatchNorm2d(3).double())
    plain = model.forward
    model.forward = lambda x: plain(model.batch_norm(x))  # type: ignore[method-assign,operator]
    mark = surgery.fingerprint(model)
    first = measure(model, batches(), loss)
    assert surgery.fingerprint(model) == mark
    assert torch.equal(model.head.bias.grad, torch.ones(5).double())
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["head.bias"]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["norm.weight"]
    again = measure(model, batches(), loss)
    assert all(torch.equal(first[name], again[name]) for name in first)  # no dropout in it
    assert first["norm.weight"].any()
    with torch.no_grad():
        assert all(torch.equal(v, first[k]) for k, v in measure(model, batches(), loss).items())

    def broken(model: nn.Module, batch: Any) -> Tensor:
        torch.rand(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure(model, batches(), broken)
    assert surgery.fingerprint(model) == mark


def test_measure_says_what_is_wrong() -> None:
    with pytest.raises(RuleError, match="it holds no batch"):
        measure(vit(), [], loss)
    with pytest.raises(RuleError, match=r"it gave \(2, 5\), no scalar"):
        measure(vit(), batches(), lambda m, b: m(b[0]))
    with pytest.raises(RuleError, match="no scalar"):
        measure(vit(), batches(), lambda m, b: loss(m, b).detach())
    with pytest.raises(OperationError, match="has been operated"):
        measure(surgery.apply(vit(), RULES), batches(), loss)


# allotment -------------------------------------------------------------------------------------


def numbers(kind: str | None, rank: int, out: int, width: int) -> int:
    return rank * (out + width) if kind == "lora" else 2 * out * rank + rank + out


def by_brute_force(
    scores: dict[str, Tensor], model: nn.Module, budget: int, kind: str | None, rank: int
) -> tuple[int, dict[str, Any]]:
    """The largest tau that fits, tried one by one, and what it trains: by name of the tensor."""
    pool = {
        name: scores[name]
        for name, p in model.named_parameters()
        if not name.startswith("head")
        and (
            p.dim() == 1 or (p.dim() == 2 and isinstance(model.get_submodule(name[:-7]), nn.Linear))
        )
    }
    names = [name for name, score in pool.items() for _ in range(score.numel())]
    flat = torch.cat([score.flatten() for score in pool.values()])
    order = flat.argsort(descending=True, stable=True).tolist()
    counts = dict.fromkeys(pool, 0)
    best: tuple[int, dict[str, Any]] = 24, {}
    for place in order:
        counts[names[place]] += 1
        spent, chosen = 24, dict[str, Any]()  # the class token
        for name, count in counts.items():
            shape = pool[name].shape
            if len(shape) == 1 and count > shape[0] / 5:
                spent, chosen[name] = spent + shape[0], "whole"
            elif len(shape) == 2 and kind and count >= numbers(kind, rank, *shape) / 10:
                spent, chosen[name] = spent + numbers(kind, rank, *shape), kind
            elif len(shape) == 2 and count:
                spent, chosen[name] = spent + count, count
        if spent > budget:
            break
        best = spent, chosen
    return best


def told(rules: list[surgery.Rule]) -> dict[str, Any]:
    """What rules train, by name of the tensor."""
    found: dict[str, Any] = {}
    for rule in rules:
        path = str(rule.arguments()[0][0]) + "." if rule.arguments()[0][0] else ""
        for edit in rule.rest if path != "head." else ():
            text = repr(edit)
            if text.startswith("unfreeze("):
                found.update(dict.fromkeys((path + each for each in edit.only), "whole"))  # type: ignore[attr-defined]
            elif "sparse" in text:
                found[path + "weight"] = dict(edit.part.named)["entries"]  # type: ignore[attr-defined]
            else:
                found[path + "weight"] = "lora" if "lora" in text else "adapter"
    found.pop("cls_token")
    return found


@pytest.mark.parametrize("kind", ["lora", "adapter", None])
@pytest.mark.parametrize("budget", [24, 40, 150, 700])
def test_as_many_of_the_highest_are_trained_as_fit(kind: str | None, budget: int) -> None:
    model = tiny_vit(depth=1, embed_dim=24, mlp_ratio=2.0)
    generator = torch.Generator().manual_seed(budget)
    scores = {
        name: torch.rand(p.shape, generator=generator) ** (1 + 9 * (i % 4))
        for i, (name, p) in enumerate(model.named_parameters())
    }
    rules, indices = allot(scores, model, budget, kind, rank=1)
    spent, want = by_brute_force(scores, model, budget, kind, rank=1)
    assert told(rules) == want
    assert spt_rules(scores, model, budget, kind, rank=1) == rules
    head = 24 * 5 + 5
    assert surgery.plan(model, rules).trainable - head == spent <= budget
    for path, index in indices.items():
        score = scores[f"{path}.weight"].flatten()
        assert len(index) == want[f"{path}.weight"]
        rest = torch.ones_like(score, dtype=torch.bool).index_fill(0, index, False)
        assert score[index].min() >= score[rest].max()


def test_hand_made_scores_choose_what_they_are_made_for() -> None:
    """LoRA of rank 1 at qkv (72, 24): 96 numbers, so 10 entries; a vector of 24: 5 of them."""
    model = tiny_vit(depth=1)
    scores = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    scores["blocks.0.attn.qkv.weight"].view(-1)[[3, 50, 99]] = torch.tensor([9.0, 8.0, 7.0])
    rules, indices = allot(scores, model, 24 + 3, "lora", rank=1)
    assert list(map(repr, rules)) == [
        'at("", unfreeze("cls_token"))',
        'at("blocks.0.attn.qkv", parallel(sparse(entries=3)))',
        "at(head, unfreeze)",
    ]
    assert {path: index.tolist() for path, index in indices.items()} == {
        "blocks.0.attn.qkv": [3, 50, 99]
    }
    scores["blocks.0.attn.qkv.weight"].view(-1)[:10] = 5.0
    scores["blocks.0.norm1.weight"][:4] = 6.0
    scores["blocks.0.attn.qkv.bias"][:15] = 4.0
    rules, indices = allot(scores, model, 24 + 96 + 72, "lora", rank=1)
    assert list(map(repr, rules)) == [
        'at("", unfreeze("cls_token"))',
        'at("blocks.0.attn.qkv", parallel(lora(rank=1, dropout=0.1)), unfreeze("bias"))',
        "at(head, unfreeze)",
    ]
    assert indices == {}
    adapters, _ = allot(scores, model, 24 + (2 * 72 + 1 + 72) + 72, "adapter", rank=1)
    assert "append(adapter(rank=1, activation=nn.GELU, dropout=0.1), residual=True)" not in repr(
        adapters
    )  # 217 numbers ask for 22 entries, and there are 13
    scores["blocks.0.norm1.weight"][4] = 6.0
    assert "norm1" in repr(allot(scores, model, 24 + 96 + 72 + 24, "lora", rank=1).rules)


@pytest.fixture(scope="module")
def big() -> tuple[nn.Module, dict[str, Tensor]]:
    model = vit_b()
    generator = torch.Generator().manual_seed(0)
    scores = {
        name: torch.rand(p.shape, generator=generator).mul_(1 + (7 * i % 11) / 10)
        for i, (name, p) in enumerate(model.named_parameters())
    }
    return model, scores


@pytest.mark.parametrize(
    ("kind", "budget"),
    [
        *(("lora", budget) for budget in (200_000, 400_000, 600_000, 800_000, 1_000_000)),
        ("adapter", 400_000),
        ("adapter", 1_000_000),
        (None, 200_000),
    ],
)
def test_a_budget_is_never_exceeded_and_hardly_missed(
    big: tuple[nn.Module, dict[str, Tensor]], kind: str | None, budget: int
) -> None:
    model, scores = big
    rules, indices = allot(scores, model, budget, kind)
    trained = surgery.plan(model, rules).trainable
    largest = {"lora": 8 * (768 + 3072), "adapter": 17 * 3072 + 8, None: 3072}[kind]
    assert budget - largest < trained <= budget
    assert all(len(index) == len(index.unique()) for index in indices.values())
    assert repr(rules[0]) == 'at("", unfreeze("cls_token"))'


def test_allot_says_what_is_wrong() -> None:
    model = tiny_vit()
    scores = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(RuleError, match="24 numbers of class tokens are trained anyway"):
        allot(scores, model, 23)
    with pytest.raises(RuleError, match=r"budget=0.*an integer from 1 up"):
        allot(scores, model, 0)
    with pytest.raises(RuleError, match=r"kind='prompt'"):
        allot(scores, model, 100, "prompt")
    with pytest.raises(RuleError, match=r"alpha=0\.5"):
        allot(scores, model, 100, alpha=0.5)
    with pytest.raises(RuleError, match=r"they tell nothing of blocks\.0\.norm1\.weight \(24,\)\."):
        allot({k: v for k, v in scores.items() if k != "blocks.0.norm1.weight"}, model, 100)
    with pytest.raises(RuleError, match=r"qkv\.weight \(72, 24\), but \(3,\)"):
        allot({**scores, "blocks.0.attn.qkv.weight": torch.rand(3)}, model, 100)
    with pytest.raises(RuleError, match="not all finite"):
        allot({**scores, "blocks.0.attn.qkv.weight": torch.full((72, 24), torch.nan)}, model, 100)
    with pytest.raises(OperationError, match="has been operated"):
        allot(scores, surgery.apply(tiny_vit(), "adapter"), 100)


# SPT -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_spt_lora_agrees_with_weights_written_by_hand(backbone: str) -> None:
    rules, indices = spt_lora(BACKBONES[backbone](), batches(backbone), loss, 800, rank=1)
    kinds = {kind for kind in ("lora", "sparse", "unfreeze(") if kind in repr(rules)}
    assert kinds == {"lora", "sparse", "unfreeze("}
    model = fill(stirred(backbone, rules), indices)

    def rewrite(plain: nn.Module, parts: dict[str, Any]) -> None:
        scattered(plain, parts)
        for key, part in parts.items():
            if not isinstance(part, Sparse):
                linear_of(plain, key).weight += part.B[0] @ part.A[0]

    x = INPUTS[backbone]
    with torch.no_grad():
        want = by_hand(backbone, model, rewrite)(x)
        close(model(x), want)
        assert (want - by_hand(backbone, model, lambda *_: None)(x)).abs().max() > 1e-3
        merged = surgery.merge(model)
        close(merged(x), want)
        close(surgery.unmerge(merged)(x), want)


def test_spt_adapter_agrees_with_layers_written_by_hand_and_does_not_merge() -> None:
    rules, indices = spt_adapter(vit(), batches(), loss, 800, rank=1)
    assert "adapter" in repr(rules)
    assert "sparse" in repr(rules)
    model = fill(stirred("vit", rules), indices)

    def rewrite(plain: nn.Module, parts: dict[str, Any]) -> None:
        scattered(plain, parts)
        for key, part in parts.items():
            if isinstance(part, Sparse):
                continue
            linear = linear_of(plain, key)

            def forward(x: Tensor, linear: Any = linear, a: Any = part) -> Tensor:
                y = F.linear(x, linear.weight, linear.bias)
                hidden = F.gelu(y @ a.down.weight.T + a.down.bias)
                return y + hidden @ a.up.weight.T + a.up.bias

            linear.forward = forward

    with torch.no_grad():
        want = by_hand("vit", model, rewrite)(INPUTS["vit"])
        close(model(INPUTS["vit"]), want)
    with pytest.raises(OperationError, match="Adapter is not linear"):
        surgery.merge(model)


@pytest.mark.parametrize("spt", [spt_lora, spt_adapter])
def test_spt_starts_as_the_base_is_trained_and_comes_off(spt: Any) -> None:
    rules, indices = spt(vit(), batches(), loss, 2500, rank=1)
    assert starts_as_the_base("vit", rules)
    trains_and_comes_off("vit", rules)
    made = surgery.apply(vit(), rules, example=INPUTS["vit"])
    assert sum(p.numel() for p in surgery.parameters(fill(made, indices))) <= 2500 + 24 * 5 + 5


def test_spt_works_where_there_is_no_class_token() -> None:
    rules, _ = spt_lora(swin(), batches("swin"), loss, 3000, rank=1)
    assert "token" not in repr(rules)
    assert surgery.plan(swin(), rules).trainable <= 3000 + 48 * 5 + 5


def test_spt_goes_to_a_file_and_back(tmp_path: Path) -> None:
    rules, indices = spt_lora(vit(), batches(), loss, 800, rank=1)
    assert indices
    model = fill(stirred("vit", rules), indices)
    path = surgery.save(model, tmp_path / "spt.safetensors")
    again = surgery.load(vit(), path, rules=rules)
    with torch.no_grad():
        assert torch.equal(again(INPUTS["vit"]), model(INPUTS["vit"]))


def test_positions_are_filled_in_all_or_none() -> None:
    from surgery.training.spt import fill

    model = surgery.apply(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), at("*", few(entries=2)))
    mark = surgery.fingerprint(model)
    with pytest.raises(RuleError):
        fill(model, {"0": torch.tensor([0, 5]), "1": torch.tensor([0, 9])})
    assert surgery.fingerprint(model) == mark
