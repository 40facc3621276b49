"""Over all rule sets: no token hears what the model hides from it, or the rule set is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery._inputs import call
from tests import models

SETS = [str(row[0]) for row in surgery.rulesets().rows]


class CausalAttention(nn.Module):
    """An attention whose causal mask nobody sees: the kernel is told."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None)
        return self.proj(y[:, 0])


class CausalBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.attn = CausalAttention()
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class Causal(nn.Module):
    """Of numbers, not of words: nothing in its structure tells that it is causal."""

    def __init__(self, lowest: float | None = None) -> None:
        super().__init__()
        self.lowest = lowest
        self.embed, self.head = nn.Linear(5, 24), nn.Linear(24, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 24))
        self.blocks = nn.ModuleList(CausalBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.cls_token
        n, bias = x.shape[1], None
        if self.lowest is not None:
            bias = torch.full((n, n), self.lowest).triu(1)
        for block in self.blocks:
            x = block(x, bias)
        return self.head(x)


def gpt2() -> tuple[nn.Module, Any, Any]:
    words = models.words_in(2, 9)
    return models.hf_gpt2(), words, _other(words)


def llama() -> tuple[nn.Module, Any, Any]:
    words = models.words_in(2, 9)
    return models.hf_llama(), words, _other(words)


def causal() -> tuple[nn.Module, Any, Any]:
    x = torch.randn(2, 9, 5)
    return Causal(), x, _other(x)


def biased() -> tuple[nn.Module, Any, Any]:
    x = torch.randn(2, 9, 5)
    return Causal(-torch.inf), x, _other(x)


def lowest() -> tuple[nn.Module, Any, Any]:
    x = torch.randn(2, 9, 5)
    return Causal(torch.finfo(torch.float32).min), x, _other(x)


def bert() -> tuple[nn.Module, Any, Any]:
    words = models.words_in(2, 9)
    mask = torch.tensor([[1] * 8 + [0]] * 2)
    padded = {"input_ids": words, "attention_mask": mask}
    return models.hf_bert().bert, padded, {**padded, "input_ids": _other(words)}


def encoder() -> tuple[nn.Module, Any, Any]:
    x, mask = torch.randn(2, 9, 24), torch.tensor([[False] * 8 + [True]] * 2)
    padded = {"src": x, "src_key_padding_mask": mask}
    return models.encoder(), padded, {**padded, "src": _other(x)}


def causal_encoder() -> tuple[nn.Module, Any, Any]:
    x, mask = torch.randn(2, 9, 24), nn.Transformer.generate_square_subsequent_mask(9)
    return models.encoder(), (x, mask), (_other(x), mask)


def _other(tokens: Tensor) -> Tensor:
    """The same, but for the last token."""
    other = tokens.clone()
    other[:, -1] = (tokens[:, -1] + 1) % 32 if tokens.dim() == 2 else 1 - 1.5 * tokens[:, -1]
    return other


MASKED = [gpt2, llama, causal, biased, lowest, bert, encoder, causal_encoder]


def earlier(model: nn.Module, inputs: Any) -> Tensor:
    """What is given for all tokens but the last."""
    with torch.no_grad():
        answer: Any = call(model, inputs)
    tokens: Tensor = answer if isinstance(answer, Tensor) else answer[0]
    return tokens[:, :-1]


@pytest.mark.parametrize("make", MASKED, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", SETS)
def test_no_token_hears_what_is_hidden_from_it(name: str, make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model, inputs, other = make()
    model.eval()
    assert torch.equal(earlier(model, inputs), earlier(model, other))
    try:
        surgery.apply(model, name, example=inputs if make is causal else None)
        _stir(model)
        a, b = earlier(model, inputs), earlier(model, other)
    except surgery.SurgeryError:
        return
    assert (a - b).abs().max() <= 1e-4 * a.abs().max()


def _stir(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in surgery.parameters(model):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", ["convpass", "convpass_att"])
@pytest.mark.parametrize("make", MASKED, ids=lambda make: make.__name__)
def test_what_mixes_tokens_is_refused_there(name: str, make: Callable[[], Any]) -> None:
    model, inputs, _ = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(surgery.SurgeryError, match=r"lets tokens hear others"):
        surgery.apply(model.eval(), name, example=inputs)
    assert not hasattr(model, "surgery")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("make", [gpt2, llama, bert], ids=lambda make: make.__name__)
def test_words_are_told_from_patches_before_any_forward(make: Callable[[], Any]) -> None:
    model, _, _ = make()
    for call_ in (surgery.plan, surgery.apply):
        with pytest.raises(surgery.RuleError, match=r"those are words \(of .*(wte|embed)"):
            call_(model, "convpass")


def test_prompts_made_of_others_say_so_where_nothing_tells_what_tokens_are() -> None:
    assert "is_causal=True" in str(surgery.plan(Causal(), "adapterx"))
    assert "is_causal=True" not in str(surgery.plan(Causal(), "vpt_shallow"))
    assert "is_causal=True" not in str(surgery.plan(models.tiny_vit(), "adapterx"))
