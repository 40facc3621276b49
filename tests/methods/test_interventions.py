"""LoReFT against its formula, over all tokens and over some."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import RuleError, at, block, qkv
from surgery.methods.interventions import loreft
from surgery.parts import loreft as part
from surgery.parts.interventions import LoReFT
from tests.methods.reference import (
    BOTH,
    agrees,
    blocks,
    close,
    starts_as_the_base,
    trains_and_comes_off,
    vit,
    vit_b,
)


def orthonormal(rows: Tensor) -> Tensor:
    """Gram and Schmidt's."""
    done: list[Tensor] = []
    for row in rows:
        for other in done:
            row = row - (row @ other) * other
        done.append(row / row.norm())
    return torch.stack(done)


def moved(p: Any, h: Tensor) -> Tensor:
    R = orthonormal(p.R)
    close(R @ R.t(), torch.eye(len(R), dtype=R.dtype))
    return h + (h @ p.W.t() + p.b - h @ R.t()) @ R


def rewritten(first: int, last: int, n: int) -> Any:
    some = [i for i in range(n) if i < first or i >= n - last]

    def rewrite(plain: nn.Module, parts: dict[str, Any]) -> None:
        assert len(parts) == len(blocks(plain))
        for one, p in zip(blocks(plain), parts.values(), strict=True):
            after(one, p)

    def after(one: Any, p: Any) -> None:
        own = one.forward

        def forward(*given: Any, **named: Any) -> Tensor:
            h: Tensor = own(*given, **named)
            if not some:
                return moved(p, h)
            h = h.clone()
            h[:, some] = moved(p, h[:, some])
            return h

        one.forward = forward

    return rewrite


@BOTH
def test_all_tokens_are_moved_in_the_subspace(backbone: str) -> None:
    agrees(backbone, loreft(rank=3), rewritten(0, 0, 0), eps=64)


@pytest.mark.parametrize(("first", "last"), [(1, None), (2, 1), (None, 2), (4, 4)])
def test_some_tokens_are(first: int | None, last: int | None) -> None:
    agrees("vit", loreft(3, first, last), rewritten(first or 0, last or 0, 5), eps=64)


@BOTH
def test_it_starts_at_random_trains_and_comes_off(backbone: str) -> None:
    assert not starts_as_the_base(backbone, loreft(rank=3))
    trains_and_comes_off(backbone, loreft(rank=3))
    p = LoReFT(64, 4)
    assert torch.allclose(p.rows(), p.R, atol=1e-6)


def test_it_trains_as_much_of_a_vit_b_as_its_formula_says() -> None:
    assert surgery.plan(vit_b(), loreft()).trainable == 12 * (2 * 4 * 768 + 4)


def test_what_cannot_be_is_told() -> None:
    for rules, told in (
        (at(qkv, surgery.parallel(part())), "24 features to return 72"),
        (at(block, part(rank=25)), "25 directions"),
        (at(block, part(first=-1)), r"loreft\(first=-1\)"),
    ):
        with pytest.raises(RuleError, match=told):
            surgery.plan(vit(), rules)
    with pytest.raises(surgery.GraftError, match="are no tokens"):
        LoReFT(8, 2, first=1)(torch.randn(5, 8))
