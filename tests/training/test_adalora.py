"""AdaLoRA's budget: against peft's allocator, step by step, and its penalty."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import nn

import surgery
from surgery import RuleError
from surgery.training import Budget
from tests.methods.reference import close, parts, vit


class Theirs(nn.Module):
    """The same numbers under peft's names."""

    def __init__(self, mine: list[Any]) -> None:
        super().__init__()
        for i, part in enumerate(mine):
            for name, tensor in (("A", part.A), ("B", part.B), ("E", part.l[:, None])):
                holder = nn.ParameterDict({"default": tensor.detach().clone()})
                self.add_module(f"part{i}_lora_{name}", holder)


def test_the_budget_falls_and_prunes_as_pefts() -> None:
    model = surgery.apply(vit(), surgery.methods.adalora(rank=6))
    mine = list(parts(model).values())
    theirs = Theirs(mine)
    config = peft.AdaLoraConfig(init_r=6, target_r=2, tinit=3, tfinal=4, deltaT=2, total_step=16)
    allocator = RankAllocator(theirs, config, "default")
    budget = Budget(model, rank=2, steps=16, warmup=3, cooldown=4, every=2)
    sizes = []
    for step in range(1, 17):
        torch.manual_seed(step)
        for i, part in enumerate(mine):
            other = dict(theirs.named_parameters())
            for name, p in (("A", part.A), ("B", part.B), ("E", part.l)):
                q = other[f"part{i}_lora_{name}.default"]
                p.grad = torch.randn_like(p)
                q.grad = p.grad.view_as(q).clone()
                with torch.no_grad():
                    p -= 0.1 * p.grad
                    q -= 0.1 * q.grad
        size, _ = allocator.update_and_allocate(theirs, step)
        sizes.append(size)
        assert budget.step() == size
        for i, part in enumerate(mine):
            want = dict(theirs.named_parameters())[f"part{i}_lora_E.default"][:, 0]
            assert torch.equal(part.l, want)
    assert sizes[0] == 6 * len(mine)
    assert sizes[-1] == 2 * len(mine) == sum(int((part.l != 0).sum()) for part in mine)


def test_the_penalty_is_zero_where_the_vectors_are_orthogonal() -> None:
    model = surgery.apply(vit(), surgery.methods.adalora(rank=4))
    eye, far = torch.eye(4, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for part in parts(model).values():
        P, Q = part.B.detach(), part.A.detach()
        far += 0.1 * sum((m - eye).norm() ** 2 for m in (P.t() @ P, Q @ Q.t()))
    close(surgery.penalty(model).detach(), far)
    surgery.penalty(model).backward()
    for part in parts(model).values():
        assert part.l.grad is None
        nn.init.orthogonal_(part.A)
        nn.init.orthogonal_(part.B)
    assert surgery.penalty(model) < 1e-20


def test_a_budget_without_parts_or_time_is_refused() -> None:
    with pytest.raises(RuleError, match="no part is AdaLoRA's"):
        Budget(vit(), rank=2, steps=10)
    with pytest.raises(RuleError, match="no step is left"):
        Budget(surgery.apply(vit(), "adalora"), rank=2, steps=10, warmup=5, cooldown=5)
