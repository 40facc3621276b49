"""Parameter groups: each trained tensor in one of them, and what it is told of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

import surgery
from surgery.errors import OperationError, RuleError
from tests.methods.test_methods import SETS, rules_of
from tests.models import hf_vit, tiny_vit


def rates(model: nn.Module, **named: Any) -> dict[str, tuple[float, float, str]]:
    """By the name of a parameter: learning rate, decay, and what it is."""
    names = {id(p): name for name, p in model.named_parameters()}
    made = surgery.groups(model, **named)
    return {
        names[id(p)]: (g["lr"], g["weight_decay"], g["name"]) for g in made for p in g["params"]
    }


@pytest.mark.parametrize("name", SETS)
def test_each_trained_tensor_is_in_one_group(name: str) -> None:
    model = surgery.apply(tiny_vit(), rules_of(name))
    made = surgery.groups(model, lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    ids = [id(p) for group in made for p in group["params"]]
    assert sorted(ids) == sorted(map(id, surgery.parameters(model)))
    torch.optim.AdamW(made).step()
    assert str(made).count("\n") == len(made) + 1


def test_full_training_is_what_timm_makes_of_it() -> None:
    model = surgery.apply(tiny_vit(depth=3), "full")
    got = rates(model, lr=1.0, weight_decay=0.05, layer_decay=0.75)
    names = {id(p): name for name, p in model.named_parameters()}
    keeps = model.no_weight_decay()
    for group in param_groups_layer_decay(model, 0.05, keeps, layer_decay=0.75):
        for p in group["params"]:
            name = names[id(p)]
            lr, decay, _ = got.pop(name)
            behind = name.startswith("norm.")  # of the last block in timm, of the head in BEiT
            assert (lr, decay) == (1.0 if behind else group["lr_scale"], group["weight_decay"])
    assert not got


def test_biases_of_experts_and_routers_do_not_decay() -> None:
    model = surgery.apply(tiny_vit(), "adapterx_ffn")
    got = {
        k.rsplit(".", 1)[-1]: v
        for k, v in rates(model, lr=1.0, weight_decay=0.1).items()
        if "moa" in k
    }
    assert got["down_bias"] == got["up_bias"] == (1.0, 0.0, "bias")
    assert got["reduction"] == got["embeddings"] == (1.0, 0.0, "router")
    assert got["down"] == got["up"] == (1.0, 0.1, "weight")


def test_lora_plus_is_the_rate_of_b_alone() -> None:
    got = rates(surgery.apply(tiny_vit(), "lora"), lr=1.0, head_lr=3.0, ratio=16)
    by_letter = {key.rsplit(".", 1)[-1]: lr for key, (lr, _, _) in got.items()}
    assert by_letter == {"A": 1.0, "B": 16.0, "weight": 3.0, "bias": 3.0}


def test_parts_have_the_rate_of_their_block_and_shared_ones_of_the_last() -> None:
    model = surgery.apply(hf_vit(), surgery.methods.lora(rank=2))
    got = {key: lr for key, (lr, _, _) in rates(model, lr=1.0, layer_decay=0.5).items()}
    assert {lr for key, lr in got.items() if "layers/0/" in key} == {0.125}
    assert {lr for key, lr in got.items() if "layers/1/" in key} == {0.25}
    model = surgery.apply(tiny_vit(depth=3), "adapterx_ffn")
    got = {key: lr for key, (lr, _, _) in rates(model, lr=1.0, layer_decay=0.5).items()}
    assert {lr for key, lr in got.items() if "shared" in key} == {0.5}


def test_what_can_not_be_is_refused() -> None:
    model = surgery.apply(tiny_vit(), "lora")
    for named in ({"lr": -1.0}, {"lr": "fast"}, {"lr": 1.0, "ratio": float("nan")}):
        with pytest.raises(RuleError, match="no rate"):
            surgery.groups(model, **named)  # type: ignore[arg-type]
    with pytest.raises(OperationError, match="never operated"):
        surgery.groups(tiny_vit(), lr=1.0)
    plain = surgery.apply(nn.Sequential(nn.Linear(4, 4)), surgery.at("0", surgery.lora(rank=2)))
    with pytest.raises(OperationError, match="no blocks"):
        surgery.groups(plain, lr=1.0, layer_decay=0.5)


class HeadFirst(nn.Module):
    """A head, and a last norm, that are registered before the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 3)
        layers = [nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True) for _ in range(2)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        answer: torch.Tensor = self.out(x.mean(1))
        return answer


def test_a_head_is_what_a_forward_told() -> None:
    model = surgery.apply(HeadFirst(), "lora", example=torch.randn(2, 5, 16))
    got = rates(model, lr=1.0, head_lr=7.0)
    assert got["out.weight"] == (7.0, 0.0, "head weight")


def test_what_stands_from_one_block_to_another_has_the_rate_of_the_last() -> None:
    model = surgery.apply(tiny_vit(depth=3), "adapterx")
    got = {key: lr for key, (lr, _, _) in rates(model, lr=1.0, layer_decay=0.5).items()}
    spans = {key: lr for key, lr in got.items() if "(1 to 2)" in key}
    assert spans
    assert set(spans.values()) == {0.5}
    assert got["cls_token"] == 0.5**4
