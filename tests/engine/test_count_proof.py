"""`b, n, d = x.shape` before a loop over blocks that nobody calls: n in the loop, and behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.errors import GraftError
from tests.engine.test_uncalled_blocks import (
    WIDTH,
    Called,
    Model,
    Uncalled,
    assert_alike,
    grads,
    inputs,
    plain,
)  # fmt: skip
from tests.laws import checks as laws
from tests.laws.checks import raised


class Counting(Model):
    """n is read before the loop where nobody calls blocks, and else in each."""

    def run(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        for e in self.layers:
            if isinstance(e, Called):
                x = e(x, lambda e, x: self.loop(e, x, x.shape[1]))
            else:
                x = self.loop(e, x, n)
        return self.behind(x, n)

    def loop(self, e: Any, x: Tensor, n: int) -> Tensor:
        return plain(e, x)

    def behind(self, x: Tensor, n: int) -> Tensor:
        return x


class Masked(Counting):
    """A mask made of n, by an attention that is given the number."""

    def loop(self, e: Any, x: Tensor, n: int) -> Tensor:
        keep = torch.ones(n, n, dtype=torch.bool).tril()
        x = x + e[0](x, keep.logical_not() * -1e4)
        return x + e[1](x)  # type: ignore[no-any-return]


class Flat(Counting):
    """As `rearrange(x, "b n d -> (b n) d")` and back."""

    def loop(self, e: Any, x: Tensor, n: int) -> Tensor:
        x = x + e[0](x)
        return x + e[1](x.reshape(-1, WIDTH)).reshape(-1, n, WIDTH)  # type: ignore[no-any-return]


class Mean(Counting):
    def loop(self, e: Any, x: Tensor, n: int) -> Tensor:
        x = x + e[0](x) * (6 / n)
        return x + e[1](x)  # type: ignore[no-any-return]


class Last(Counting):
    def loop(self, e: Any, x: Tensor, n: int) -> Tensor:
        x = x + e[0](x)
        return x + e[1](x + x[:, n - 1 : n])  # type: ignore[no-any-return]


class Sum(Counting):
    def behind(self, x: Tensor, n: int) -> Tensor:
        return x.sum(1) / n


class Scaled(Counting):
    def behind(self, x: Tensor, n: int) -> Tensor:
        return x * float(n) ** 0.5


class Padded(Counting):
    def behind(self, x: Tensor, n: int) -> Tensor:
        return F.pad(x, (0, 0, 0, 20 - n)).flatten(1)[:, :WIDTH] + 20 - n


class Both(Mean):
    def behind(self, x: Tensor, n: int) -> Tensor:
        return x.sum(1) / n


RULES = ["vpt_deep", "vpt_shallow"]
INSIDE, BEHIND = [Flat, Mean, Last], [Sum, Scaled, Padded, Both]


def made(build: type[Counting], kind: type[Uncalled] = Uncalled) -> nn.Module:
    torch.manual_seed(0)
    return build(kind).eval()


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("build", INSIDE, ids=lambda b: b.__name__)
def test_a_number_that_is_used_in_the_loop_is_that_of_all(
    build: type[Counting], rules: str
) -> None:
    model, want = made(build), made(build, Called)
    for each in (model, want):
        surgery.apply(each, rules, example=inputs())
        laws.stir_parts(each)
    assert_alike(grads(model), grads(want))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("build", BEHIND, ids=lambda b: b.__name__)
def test_a_number_that_is_used_behind_the_loop_is_refused(
    build: type[Counting], rules: str
) -> None:
    model = made(build)
    before = laws.fingerprint(model)
    told = raised(GraftError, lambda: surgery.apply(model, rules, example=inputs()))
    assert "reads how many tokens there are, with those inserted" in str(told)
    laws.assert_same(before, laws.fingerprint(model), "a refusal")


def test_a_mask_made_of_it_is_refused_as_any_mask() -> None:
    model = made(Masked)
    told = raised(surgery.SurgeryError, lambda: surgery.apply(model, "vpt_deep", example=inputs()))
    assert "made for 6 tokens" in str(told)


def test_blocks_that_are_called_leave_the_number_alone() -> None:
    model = made(Sum, Called)
    surgery.apply(model, "vpt_shallow", example=inputs())
    answer = model(inputs())
    with surgery.disabled(model), torch.no_grad():
        base = model(inputs())
    assert not torch.equal(answer, base)


def test_nothing_of_the_proof_is_left() -> None:
    model = made(Mean)
    surgery.apply(model, "vpt_deep", example=inputs())
    (operation,) = model.get_submodule("surgery").operations
    for hooked in operation.hooked_sites:
        assert not hooked.tokens.doubles
        assert not any(end.miscounts or end.replay for end in hooked.ends)
