"""Parts made on meta get, once the base has memory, what apply gives them."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery import OperationError, at, lora, materialise, qkv
from surgery.errors import GraftError
from tests.methods.test_methods import SETS, rules_of
from tests.models import images, tiny_vit


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return tiny_vit()


def filled(model: nn.Module, base: nn.Module) -> nn.Module:
    """With the base's values, where there is memory."""
    assert not model.load_state_dict(base.state_dict(), strict=False).unexpected_keys
    return model


@pytest.mark.parametrize("name", SETS)
def test_to_the_bit_what_apply_gives_in_memory(name: str) -> None:
    torch.manual_seed(0)
    base = tiny_vit()
    want = surgery.apply(copy.deepcopy(base), rules_of(name), seed=3)
    model = surgery.apply(on_meta(), rules_of(name), seed=3).to_empty(device="cpu")
    before = torch.get_rng_state()
    assert materialise(filled(model, base)) is model
    assert torch.equal(before, torch.get_rng_state())
    state = model.state_dict()
    for key, tensor in want.state_dict().items():
        assert torch.equal(state[key], tensor), key
    x = images(batch=2)
    assert torch.equal(model.eval()(x), want.eval()(x))
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in want.parameters()
    ]


def test_parts_that_are_on_meta_still_get_memory() -> None:
    torch.manual_seed(0)
    base, model = tiny_vit(), surgery.apply(on_meta(), "lora", seed=3)
    model.load_state_dict(base.state_dict(), assign=True, strict=False)
    assert any(p.is_meta for p in surgery.parameters(model))
    want = surgery.apply(copy.deepcopy(base), "lora", seed=3).state_dict()
    found = materialise(model).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in want.items())
    assert all(p.requires_grad for p in surgery.parameters(model))


def test_what_was_given_values_keeps_them() -> None:
    torch.manual_seed(0)
    base = tiny_vit()
    trained = surgery.apply(copy.deepcopy(base), "lora", seed=5)
    model = filled(surgery.apply(on_meta(), "lora", seed=3).to_empty(device="cpu"), base)
    surgery.load_state_dict(model, surgery.state_dict(trained))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    assert all(torch.equal(t, before[k]) for k, t in materialise(model).state_dict().items())
    real = surgery.apply(tiny_vit(), "lora")
    before = {k: t.clone() for k, t in real.state_dict().items()}
    assert all(torch.equal(t, before[k]) for k, t in materialise(real).state_dict().items())


def test_several_operations() -> None:
    torch.manual_seed(0)
    base = tiny_vit()

    def operated(model: nn.Module) -> nn.Module:
        surgery.apply(model, at(qkv, lora(rank=2)), name="a", seed=1)
        return surgery.apply(model, "adapterx_ffn", name="b", seed=2)

    want = operated(copy.deepcopy(base)).state_dict()
    model = filled(operated(on_meta()).to_empty(device="cpu"), base)
    found = materialise(model).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in want.items())


def test_refused() -> None:
    calls: list[tuple[Any, str]] = [
        (lambda: surgery.apply(on_meta(), "lora"), "the base is on the meta device still"),
        (lambda: copy.deepcopy(surgery.apply(on_meta(), "lora")).to_empty(device="cpu"), "copied"),
        (tiny_vit, "never operated"),
    ]
    for build, told in calls:
        with pytest.raises(OperationError, match=told):
            materialise(build())
    model = surgery.apply(on_meta(), "lora").to_empty(device="cpu")
    with pytest.raises(GraftError, match=r"surgery\.materialise\(model\)"):
        model(images(batch=1))


def test_shards(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tiny_vit()
    want = surgery.apply(copy.deepcopy(base), "adapterx_ffn", seed=3).state_dict()
    model = surgery.apply(on_meta(), "adapterx_ffn", seed=3)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        for key, tensor in model.state_dict().items():
            if "surgery." not in key:
                tensor.copy_(distribute_tensor(base.state_dict()[key], mesh, tensor.placements))
        materialise(model)
        for key, tensor in model.state_dict().items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            assert torch.equal(whole, want[key]), key
        assert model.eval()(images(batch=1)).isfinite().all()
    finally:
        dist.destroy_process_group()


def test_a_model_of_70_billion_is_planned_and_operated_in_seconds() -> None:
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    start = time.process_time()
    assert surgery.plan(model, "lora").added == 80 * 8 * (2 * 8192 + 2 * (8192 + 1024))
    assert time.process_time() - start < 1
    surgery.apply(model, "lora")
    assert all(p.is_meta for p in model.parameters())
    assert len(surgery.parameters(model)) == 2 * 240 + 1
    surgery.revert(model)
    assert time.process_time() - start < 10
