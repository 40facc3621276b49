"""Prompts, against a ViT written out with them; prefixes, against peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.methods.prompts import prefix_tuning, vpt_deep, vpt_shallow
from tests.methods.reference import (
    INPUTS,
    by_hand,
    close,
    parts,
    stirred,
    trains_and_comes_off,
    vit,
)
from tests.models import hf_gpt2, hf_llama, words_in

P = 3


def embedded(model: Any) -> Tensor:
    x: Tensor = model._pos_embed(model.patch_embed(INPUTS["vit"]))
    return x


def head(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model.head(model.norm(x)[:, 0])
    return y


def nothing(plain: nn.Module, parts: Any) -> None:
    """The backbone as it is."""


def prompts(model: nn.Module) -> list[Tensor]:
    return [part.tokens[None].expand(2, -1, -1) for part in parts(model).values()]


def test_vpt_deep_replaces_the_prompts_of_every_block() -> None:
    model = stirred("vit", vpt_deep(tokens=P))
    plain: Any = by_hand("vit", model, nothing)
    with torch.no_grad():
        x = embedded(plain)
        cls, rest = x[:, :1], x[:, 1:]
        for block, new in zip(plain.blocks, prompts(model), strict=True):
            y = block(torch.cat([cls, new, rest], 1))
            cls, rest = y[:, :1], y[:, 1 + P :]
        close(model(INPUTS["vit"]), head(plain, torch.cat([cls, rest], 1)))


def test_vpt_shallow_carries_its_prompts_through_all_blocks() -> None:
    model = stirred("vit", vpt_shallow(tokens=P))
    plain: Any = by_hand("vit", model, nothing)
    (new,) = prompts(model)
    with torch.no_grad():
        x = embedded(plain)
        x = torch.cat([x[:, :1], new, x[:, 1:]], 1)
        for block in plain.blocks:
            x = block(x)
        close(model(INPUTS["vit"]), head(plain, x))


@pytest.mark.parametrize("rules", [vpt_deep(tokens=P), vpt_shallow(tokens=P)])
def test_every_prompt_is_trained_and_comes_off(rules: Any) -> None:
    trains_and_comes_off("vit", rules)


def test_the_start_is_that_of_vpt() -> None:
    model = surgery.apply(vit(), vpt_deep(tokens=100))
    bound = (6 / (24 + 24)) ** 0.5
    for part in parts(model).values():
        assert 0.98 * bound < part.tokens.abs().max() <= bound


def test_dropout_takes_other_numbers_from_each_sample() -> None:
    from surgery.parts import Prompt
    from surgery.parts.elastic import ElasticPrompt

    for part in (Prompt(24, 8, dropout=0.5), ElasticPrompt(24, 8, dropout=0.5)):
        a, b = part.train()(torch.zeros(2, 5, 24))
        assert not torch.equal(a == 0, b == 0)
        a, b = part.eval()(torch.zeros(2, 5, 24))
        assert torch.equal(a, b)


# prefixes, against peft --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("inner", [0, 7])
@pytest.mark.parametrize("build", [hf_llama, hf_gpt2], ids=["llama", "gpt2"])
@torch.no_grad()
def test_prefix_tuning_is_pefts(build: Any, inner: int) -> None:
    """There the prefix is a cache, so that the words' own positions begin behind it."""
    import peft

    torch.manual_seed(0)
    model = build().double().eval()
    words = words_in()
    surgery.apply(model, prefix_tuning(tokens=P, inner=inner))
    additions = parts(model)
    layers = [part for key, part in additions.items() if key.endswith("attend")]
    given: Any = {"num_virtual_tokens": P, "task_type": "CAUSAL_LM"}
    if inner:
        given |= {"prefix_projection": True, "encoder_hidden_size": inner}
    positions = torch.arange(words.shape[1])[None] + P
    got = model(words, position_ids=positions).logits
    surgery.revert(model)
    theirs: Any = peft.get_peft_model(model, peft.PrefixTuningConfig(**given)).double().eval()
    encoder = theirs.prompt_encoder["default"]
    if inner:
        features = next(p for key, p in additions.items() if key.startswith("shared/"))
        encoder.embedding.weight.copy_(features.embedding)
        encoder.transform[0].load_state_dict(features.fc.state_dict())
        encoder.transform[2].weight.copy_(torch.cat([part.up.weight for part in layers]))
        encoder.transform[2].bias.copy_(torch.cat([part.up.bias for part in layers]))
    else:
        encoder.embedding.weight.copy_(torch.cat([part.prefix for part in layers], 1))
    want = theirs(words).logits
    close(got, want)
    assert not torch.equal(want, theirs.get_base_model()(words).logits)
