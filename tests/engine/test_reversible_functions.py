"""Blocks inside an autograd.Function, which runs them again on the way back (reversible layers)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import adapter, at, embed, ffn, parallel, unfreeze
from tests.engine.refusals import apply_error
from tests.laws import checks as laws


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: nn.ModuleList) -> Tensor:
        ctx.blocks = blocks
        for each in blocks:
            x = each(x)
        ctx.y = x.detach()
        return ctx.y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        y = ctx.y
        for each in reversed(ctx.blocks):
            y, dy = each.back(y, dy)
        return dy, None


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.f, self.g = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, h), nn.GELU(), nn.Linear(h, width))
            for h in (64, 128)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        a = a + self.f(b)
        return torch.cat([a, b + self.g(a)], -1)

    def back(self, y: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        (a, b), (da, db) = y.chunk(2, -1), dy.chunk(2, -1)
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            g = self.g(a)
            torch.autograd.backward(g, db)
        b, da = b - g.detach(), da + a.grad
        with torch.enable_grad():
            b = b.detach().requires_grad_()
            f = self.f(b)
            torch.autograd.backward(f, da)
        return torch.cat([a.detach() - f.detach(), b.detach()], -1), torch.cat(
            [da, db + b.grad], -1
        )


class Reversible(nn.Module):
    def __init__(self, function: bool = True, head: bool = True) -> None:
        super().__init__()
        self.emb = nn.Linear(8, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(32, 3) if head else nn.Identity()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        x = torch.cat([x, x], -1)
        if self.function:
            x = Reverse.apply(x, self.blocks)
        else:
            for each in self.blocks:
                x = each(x)
        return self.head(x.chunk(2, -1)[1])


X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
UNFROZEN = ["adapterx_ffn", at(embed, unfreeze)]
SAID = "ran inside of Reverse, and nothing that comes into it requires grad"


@pytest.mark.parametrize("head", [True, False])
def test_a_function_that_gets_nothing_that_requires_grad_is_named(head: bool) -> None:
    said = apply_error(Reversible(head=head), at(ffn, parallel(adapter(rank=2))), X)
    assert SAID in said
    assert "at(embed, unfreeze)" in said


def test_without_an_example_the_first_training_forward_names_it() -> None:
    model = surgery.apply(Reversible(), "adapterx_ffn").eval()
    model(X)
    with pytest.raises(surgery.GraftError, match=SAID):
        model.train()(X)
    with torch.no_grad():
        model(X)
    surgery.revert(model)
    surgery.apply(model, UNFROZEN)(X).sum().backward()
    assert all(p.grad is not None for p in surgery.parameters(model))


def test_gradients_that_a_backward_accumulates_are_seen() -> None:
    model, plain = Reversible().eval(), Reversible(function=False).eval()
    surgery.apply(model, UNFROZEN, example=X)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "surgery" not in k})
    surgery.apply(plain, UNFROZEN, example=X)
    plain.surgery.load_state_dict(model.surgery.state_dict())
    for each in (model, plain):
        each(X).square().sum().backward()
    for a, b in zip(surgery.parameters(model), surgery.parameters(plain), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_what_is_there_of_gradients_and_optimisers_is_left_alone() -> None:
    model = Reversible()
    called: list[str] = []
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
        p.register_post_accumulate_grad_hook(lambda p: called.append("stepped"))
    before, had = laws.fingerprint(model), {n: p.grad for n, p in model.named_parameters()}
    surgery.apply(model, UNFROZEN, example=X)
    assert not called
    assert all(p.grad is had[n] for n, p in model.emb.named_parameters("emb"))
    assert all(p.grad is None for n, p in model.surgery.named_parameters())
    surgery.revert(model)
    laws.assert_same(before, laws.fingerprint(model), "a proof by a whole backward")
    model(X).sum().backward()
    assert called


def test_what_no_backward_fills_is_still_missed() -> None:
    model = Reversible()
    model.spare = nn.Linear(8, 32)
    model.forward = lambda x: Reversible.forward(model, x) + model.spare(x).mean().detach()
    said = apply_error(model, [*UNFROZEN, at("spare", unfreeze)], X)
    assert "spare.weight" in said
    assert "moa" not in said
