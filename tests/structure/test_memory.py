"""Which tensors lie over one memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgery.structure.memory import Memory


class Two(nn.Module):
    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a, requires_grad=False), nn.Buffer(b)


FLAT = torch.zeros(64)
APART = {
    "side by side": (FLAT[:32], FLAT[32:]),
    "columns in turn": (FLAT.view(8, 8)[:, ::2], FLAT.view(8, 8)[:, 1::2]),
    "columns of one matrix": (FLAT.view(8, 8)[:, :3], FLAT.view(8, 8)[:, 3:]),
    "empty": (FLAT[:0], FLAT),
    "on meta": (torch.empty(4, device="meta"), torch.empty(4, device="meta")),
    "each its own": (torch.zeros(4), torch.zeros(4)),
}
ONE = {
    "a view": (FLAT, FLAT.view(8, 8)),
    "the last number": (FLAT[:33], FLAT[32:]),
    "transposed": (FLAT.view(8, 8), FLAT.view(8, 8).t()),
    "a column": (FLAT.view(8, 8), FLAT.view(8, 8)[:, 7]),
    "columns that meet": (FLAT.view(8, 8)[:, :4], FLAT.view(8, 8)[:, 3:]),
    "in another dtype": (FLAT, FLAT.view(torch.uint8)[4:8]),
    "spread out": (FLAT, FLAT[5:6].expand(3, 4)),
}


@pytest.mark.parametrize(("a", "b"), APART.values(), ids=APART)
def test_what_lies_apart(a: torch.Tensor, b: torch.Tensor) -> None:
    model = Two(a, b)
    memory = Memory(model)
    assert memory.others(model.a) == memory.others(model.b) == []


@pytest.mark.parametrize(("a", "b"), ONE.values(), ids=ONE)
def test_what_is_one_memory(a: torch.Tensor, b: torch.Tensor) -> None:
    model = Two(a, b)
    memory = Memory(model)
    assert memory.others(model.a) == ["b"]
    assert memory.others(model.b) == ["a"]


def test_one_tensor_has_all_its_names_and_an_alias_of_a_module_adds_none() -> None:
    model = nn.Module()
    model.one, model.two = nn.Linear(2, 2), nn.Linear(2, 2)
    model.again, model.two.weight = model.one, model.one.weight
    memory = Memory(model)
    assert memory.names[id(model.one.weight)] == ["one.weight", "two.weight"]
    assert memory.names[id(model.one.bias)] == ["one.bias"]
