"""Sparse sums against plain PyTorch: weights written by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import surgery
from surgery import at, fc1, qkv
from surgery.errors import OperationError, RuleError
from surgery.methods.sparse_updates import sparse
from surgery.parts.sparse_updates import Sparse
from surgery.parts.sparse_updates import sparse as few
from surgery.training.spt import fill
from tests.methods.reference import (
    BOTH,
    INPUTS,
    agrees,
    by_hand,
    close,
    merges,
    parts,
    starts_as_the_base,
    stirred,
    trains_and_comes_off,
    vit,
    vit_b,
)

RULES = sparse(share=0.1)


def linear_of(plain: nn.Module, key: str) -> Any:
    return plain.get_submodule(key.rpartition("/")[0].replace("/", "."))


def scattered(plain: nn.Module, parts: dict[str, Any]) -> None:
    """Each number added to its weight, one by one."""
    for key, part in parts.items():
        if isinstance(part, Sparse):
            weight = linear_of(plain, key).weight
            columns = weight.shape[1]
            for value, place in zip(part.values.tolist(), part.index.tolist(), strict=True):
                weight[place // columns, place % columns] += value


# the part --------------------------------------------------------------------------------------


@BOTH
def test_a_sparse_sum_is_some_numbers_of_the_weight(backbone: str) -> None:
    agrees(backbone, RULES, scattered)


@BOTH
def test_it_starts_as_the_base_is_trained_comes_off_and_merges(backbone: str) -> None:
    assert starts_as_the_base(backbone, RULES)
    trains_and_comes_off(backbone, RULES)
    merges(backbone, RULES)


def test_positions_are_drawn_by_the_seed_without_replacement() -> None:
    a, b, c = (surgery.apply(vit(), RULES, seed=seed) for seed in (0, 0, 1))
    index = {key: part.index for key, part in parts(a).items()}
    assert len(index) == 12
    for key, drawn in index.items():
        assert drawn.dtype == torch.int64
        assert len(drawn.unique()) == len(drawn) == -(-linear_of(a, key).weight.numel() // 10)
        assert torch.equal(drawn, parts(b)[key].index)
        assert not torch.equal(drawn, parts(c)[key].index)
        assert not parts(a)[key].values.any()
    first, second = (index[f"blocks/{i}/mlp/fc1/parallel"].sort().values for i in (0, 1))
    assert not torch.equal(first, second)
    spread = index["blocks/0/attn/qkv/parallel"].double() / (24 * 72)
    assert 0.4 < spread.mean() < 0.6


def test_counts() -> None:
    big = vit_b()
    each = [-(-768 * out // 100) for out in (2304, 768, 3072, 3072)]
    assert surgery.plan(big, sparse()).trainable == 12 * sum(each) == 849_360
    assert surgery.plan(big, at(qkv, few(entries=500))).trainable == 6_000


def test_fill_sets_the_positions_and_files_and_copies_carry_them(tmp_path: Path) -> None:
    rules = at("blocks.0.attn.qkv", few(entries=3))
    index = torch.tensor([0, 5, 72 * 24 - 1])
    model = stirred("vit", rules)
    assert fill(model, {"blocks.0.attn.qkv": index}) is model
    assert torch.equal(parts(model)["blocks/0/attn/qkv/parallel"].index, index)
    x = INPUTS["vit"]
    with torch.no_grad():
        want = by_hand("vit", model, scattered)(x)
        close(model(x), want)
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        path = surgery.save(model, tmp_path / "few.safetensors")
        assert torch.equal(surgery.load(vit(), path, rules=rules)(x), model(x))
    with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
        assert sorted(file.keys()) == [
            "parts.blocks/0/attn/qkv/parallel.index", "parts.blocks/0/attn/qkv/parallel.values",
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: few(entries=0), r"entries=0.*an integer from 1 up"),
        (lambda: few(entries=1.5), r"entries=1.5.*an integer from 1 up"),
        (lambda: few(entries=24 * 96 + 1), r"entries=2305.*has 2304 numbers"),
        (lambda: few(share=0.0), r"share=0.0.*no share"),
        (lambda: few(share=1.5), r"share=1.5.*no share"),
    ],
)
def test_wrong_numbers_of_entries_are_told(made: Callable[[], Any], told: str) -> None:
    with pytest.raises(RuleError, match=told):
        surgery.apply(vit(), at(fc1, made()))


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([0, 1]),
        torch.tensor([0, 1, 1]),
        torch.tensor([0, 1, 24 * 72]),
        torch.tensor([-1, 0, 1]),
        torch.tensor([0.0, 1.0, 2.0]),
        torch.tensor([[0, 1, 2]]),
    ],
)
def test_wrong_positions_are_told_and_change_nothing(index: Tensor) -> None:
    model = surgery.apply(vit(), at("blocks.0.attn.qkv", few(entries=3)))
    was = parts(model)["blocks/0/attn/qkv/parallel"].index.clone()
    with pytest.raises(RuleError, match=r"not 3 different positions of a weight \(72, 24\)"):
        fill(model, {"blocks.0.attn.qkv": index})
    assert torch.equal(parts(model)["blocks/0/attn/qkv/parallel"].index, was)


def test_fill_finds_sparse_parts_only() -> None:
    model = surgery.apply(vit(), at("blocks.0.attn.qkv", few(entries=3)))
    with pytest.raises(OperationError, match=r"no sparse part is at blocks\.1\.attn\.qkv"):
        fill(model, {"blocks.1.attn.qkv": torch.tensor([0])})
    with pytest.raises(OperationError, match="never operated"):
        fill(vit(), {})
