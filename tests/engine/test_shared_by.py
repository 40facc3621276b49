"""Parts shared by attention, where projections of one lie in no place of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import adapter, at, attn, parallel, shared

D = 16


class Slots(nn.Module):
    """Slots gather from tokens, all flat in one module: nothing holds the attention alone."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(4, D))
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        self.gru = nn.GRUCell(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        slots, k, v = self.slots.expand(len(x), -1, -1), self.to_k(x), self.to_v(x)
        weights = (self.to_q(slots) @ k.transpose(1, 2)).softmax(1) + 1e-8
        mixed = (weights / weights.sum(-1, keepdim=True)) @ v
        slots = self.gru(mixed.flatten(0, 1), slots.flatten(0, 1)).unflatten(0, slots.shape[:2])
        return slots + self.mlp(slots)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Slots(), Slots()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


X = torch.randn(2, 6, D)


def test_projections_in_no_attention_share_by_the_module_that_holds_them(tmp_path) -> None:
    model = surgery.apply(Twice().eval(), "arc_att", example=X)
    keys = {key for key in surgery.state_dict(model) if "by=" in key}
    assert {key.partition("by=")[2].partition("/")[0][:3] for key in keys} == {"one", "two"}
    with torch.no_grad():
        for p in model.get_submodule("surgery").parameters():
            p.normal_()
    surgery.save(model, tmp_path / "kept.safetensors")
    fresh = Twice().eval()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "surgery" not in k})
    surgery.load(fresh, tmp_path / "kept.safetensors")
    assert torch.equal(fresh.eval()(X), model.eval()(X))


def test_what_is_no_projection_of_attention_is_still_refused() -> None:
    part = shared(adapter(rank=2), by=attn)
    with pytest.raises(surgery.RuleError, match="lies in no attn"):
        surgery.plan(Slots(), at("mlp.0", parallel(part)), example=X)
