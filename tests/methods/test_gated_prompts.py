"""LLaMA-Adapter against attention written out head by head."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import surgery
from surgery import OperationError, RuleError, at, attn
from surgery.methods.gated_prompts import llama_adapter
from surgery.parts.gated import gated_prompt
from tests.methods.reference import (
    BOTH,
    INPUTS,
    agrees,
    blocks,
    close,
    parts,
    starts_as_the_base,
    stirred,
    trains_and_comes_off,
    vit,
    vit_b,
)
from tests.models import hf_llama, hf_vit, tiny_vit, torchvision_vit


def heads(attn: Any, x: Tensor, part: Any) -> Tensor:
    """The gated term, one head and one token at a time is one softmax over the prompts."""
    d, c = attn.proj.in_features, attn.proj.in_features // attn.num_heads
    made, of_prompts = attn.qkv(x), attn.qkv(part.prompts)
    out = []
    for h in range(attn.num_heads):
        own = slice(h * c, h * c + c)
        q = made[..., :d][..., own]
        k, v = of_prompts[:, d : 2 * d][:, own], of_prompts[:, 2 * d :][:, own]
        if hasattr(attn, "q_norm"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        scores = (q @ k.T / c**0.5).exp()
        out.append(torch.tanh(part.gate[h]) * (scores / scores.sum(-1, keepdim=True)) @ v)
    return torch.cat(out, -1) @ attn.proj.weight.T


def rewrite(first: int) -> Any:
    def write(plain: nn.Module, held: dict[str, Any]) -> None:
        for block, part in zip(blocks(plain)[first:], held.values(), strict=True):

            def forward(x: Tensor, mask: Any = None, a: Any = block.attn, p: Any = part, **k: Any):
                given = {"mask": mask} if mask is not None else k
                return type(a).forward(a, x, **given) + heads(a, x, p)

            block.attn.forward = forward

    return write


@BOTH
@pytest.mark.parametrize("first", [0, 2])
def test_llama_adapter_is_gated_attention_to_prompts(backbone: str, first: int) -> None:
    agrees(backbone, llama_adapter(tokens=4, first=first), rewrite(first))


def test_norms_of_queries_and_keys_are_respected() -> None:
    torch.manual_seed(0)
    model = tiny_vit(qk_norm=True).double().eval()
    plain = copy.deepcopy(model)
    surgery.apply(model, llama_adapter(first=1))
    with torch.no_grad():
        for p in surgery.parameters(model):
            p.add_(torch.randn_like(p), alpha=0.3)
        rewrite(1)(plain, parts(model))
        plain.head.load_state_dict(model.head.state_dict())
        close(model(INPUTS["vit"]), plain(INPUTS["vit"]))


@BOTH
def test_it_starts_as_the_base_trains_and_comes_off(backbone: str) -> None:
    assert starts_as_the_base(backbone, llama_adapter())
    trains_and_comes_off(backbone, llama_adapter())


def test_prompts_start_normal_and_gates_at_zero() -> None:
    model = surgery.apply(vit(), llama_adapter(tokens=200, first=0))
    for part in parts(model).values():
        assert part.prompts.shape == (200, 24)
        assert 0.95 < part.prompts.std() < 1.05
        assert part.gate.shape == (3,)
        assert not part.gate.any()


def test_counts_and_no_merge() -> None:
    model = vit_b()
    assert surgery.plan(model, llama_adapter()).trainable == 10 * (10 * 768 + 12) == 76_920
    assert surgery.plan(model, llama_adapter(first=0)).trainable == 92_304
    with pytest.raises(OperationError, match="GatedPrompt"):
        surgery.merge(stirred("vit", llama_adapter()))


def test_the_base_attention_is_borrowed_not_owned() -> None:
    model = stirred("vit", llama_adapter(first=0))
    mode = model.blocks[0].attn.proj_drop.training
    keys = surgery.state_dict(model)
    assert {key.rpartition(".")[2] for key in keys if key.startswith("parts.")} == {
        "prompts",
        "gate",
    }
    assert len(list(model.surgery.parameters())) == 6
    assert model.blocks[0].attn.proj_drop.training is mode
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for block, part in zip(again.blocks, parts(again).values(), strict=True):
            assert part.attn is block.attn
        assert torch.equal(again(INPUTS["vit"]), model(INPUTS["vit"]))


def test_what_is_grafted_on_the_projections_is_heard() -> None:
    """Queries of the prompts' scores are those of attention, an adapter on qkv with them."""
    linear = at(surgery.qkv, surgery.parallel(lambda s: nn.Linear(s.width, s.out)))
    model = stirred("vit", [linear, at(attn, gated_prompt())])
    merged = stirred("vit", [linear])
    held = {key: p for key, p in parts(model).items() if "qkv" not in key}
    surgery.load_state_dict(
        merged, {k: t for k, t in surgery.state_dict(model).items() if "qkv" in k}
    )
    surgery.merge(merged)
    merged.head.load_state_dict(model.head.state_dict())
    with torch.no_grad():
        rewrite(0)(merged, held)
        close(model(INPUTS["vit"]), merged(INPUTS["vit"]))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (hf_vit, "no one linear qkv"),
        (hf_llama, "no one linear qkv"),
        (torchvision_vit, "no one linear qkv"),
        (lambda: tiny_vit(scale_attn_norm=True), "norms its output"),
        (lambda: timm.create_model("eva02_tiny_patch14_224"), "qkv|rope"),
        (lambda: timm.create_model("beit_base_patch16_224"), "rel_pos|bias|takes"),
        (lambda: timm.create_model("swinv2_tiny_window8_256"), "scale"),
    ],
)
def test_attention_that_is_made_otherwise_is_refused(build: Any, reason: str) -> None:
    with torch.device("meta"):
        model = build()
    with pytest.raises(RuleError, match=reason):
        surgery.plan(model, llama_adapter())


def test_bad_numbers_are_told() -> None:
    with pytest.raises(RuleError, match="tokens=0"):
        surgery.plan(vit(), llama_adapter(tokens=0))
