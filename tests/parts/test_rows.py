"""Rows of a table that are trained alone: new tokens, and a head that is tied to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery import RuleError, at, weight
from surgery.parts import rows
from tests.models import hf_gpt2, words_in


def resized(new: int = 3) -> Any:
    torch.manual_seed(0)
    model: Any = hf_gpt2(layers=2)
    old = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(old + new, mean_resizing=False)
    assert model.lm_head.weight is model.transformer.wte.weight
    return model.eval(), list(range(old, old + new))


RULES = "transformer.wte.weight"


def test_new_tokens_are_trained_and_nothing_else(tmp_path: Path) -> None:
    model, new = resized()
    words = torch.tensor([[1, new[0], 2, new[2]]])
    want = model(words).logits
    before = surgery.fingerprint(model)
    surgery.apply(model, at(weight(RULES), rows(new)), example=words)
    torch.testing.assert_close(model(words).logits, want)
    assert sum(p.numel() for p in surgery.parameters(model)) == 3 * 24
    optimizer = torch.optim.SGD(surgery.parameters(model), lr=0.5)
    loss = model(words, labels=words).loss
    loss.backward()
    optimizer.step()
    assert model(words, labels=words).loss < loss
    plain, _ = resized()
    values = model.surgery.default.get_submodule("transformer/wte/weight/parallel").values
    with torch.no_grad():
        plain.transformer.wte.weight[new] += values
    torch.testing.assert_close(model(words).logits, plain(words).logits)
    surgery.save(model, tmp_path / "a.safetensors")
    again, _ = resized()
    surgery.load(again, tmp_path / "a.safetensors")
    torch.testing.assert_close(again(words).logits, model(words).logits, rtol=0, atol=0)
    surgery.merge(again)
    assert again.lm_head.weight is again.transformer.wte.weight
    torch.testing.assert_close(again(words).logits, plain(words).logits)
    surgery.revert(model)
    assert surgery.fingerprint(model) == before
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_table_alone_where_asked() -> None:
    model, new = resized()
    surgery.apply(model, at(weight(RULES, tied=False), rows(new)))
    with torch.no_grad():
        for p in surgery.parameters(model):
            p.add_(1.0)
    plain, _ = resized()
    embedded = plain.transformer.wte.weight.detach().clone()
    embedded[new] += 1
    words = words_in()
    words[:, 0] = new[1]
    hidden = plain.transformer(inputs_embeds=embedded[words]).last_hidden_state
    torch.testing.assert_close(model(words).logits, hidden @ plain.lm_head.weight.t())


@pytest.mark.parametrize("ids", [[], [1, 1], [-1], [10_000], [1.5]])
def test_rows_that_are_not_there(ids: Any) -> None:
    model, _ = resized()
    with pytest.raises(RuleError, match="each is trained once"):
        surgery.apply(model, at(weight(RULES), rows(ids)))
