"""Folders of Hugging Face's: what was done to a model comes back with it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery import activate, at, head, lora, qkv, unfreeze
from surgery.errors import FileError
from tests.engine.test_activity import train
from tests.models import hf_bert, hf_gpt2, hf_llama, tiny_vit, words_in

RULES = [at(qkv, lora(rank=2)), at(head, unfreeze)]
X = words_in()


def operated(build: Any, names: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = build().eval()
    base = model(X).logits.detach()
    for seed, name in enumerate(names):
        activate(model, None) if seed else None
        surgery.apply(model, RULES, name=name, seed=seed)
        train(model, name, seed)
    return model, base


@pytest.mark.parametrize("names", ["a", "ab"])
@pytest.mark.parametrize("build", [hf_llama, hf_bert, hf_gpt2])
@torch.no_grad()
def test_base_and_operations_come_back(build: Any, names: str, tmp_path: Path) -> None:
    model, base = operated(build, names)
    activate(model, "a")
    want = model(X).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        surgery.save_pretrained(model, tmp_path)
    assert torch.equal(model(X).logits, want)
    plain = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(plain(X).logits, base)
    again = surgery.from_pretrained(tmp_path).eval()
    assert torch.equal(again(X).logits, want)
    for name in names:
        assert torch.equal(activate(again, name)(X).logits, activate(model, name)(X).logits)
    assert torch.equal(surgery.revert(again)(X).logits, base)


def test_the_base_alone_is_never_taken_for_the_whole(tmp_path: Path) -> None:
    model, _ = operated(hf_llama, "a")
    with pytest.warns(UserWarning, match=r"surgery\.save_pretrained\(model, folder\)"):
        model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.state_dict()
        surgery.merge(model).save_pretrained(tmp_path / "merged")


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no surgery\.json"):
        surgery.from_pretrained(tmp_path)
    (tmp_path / "surgery.json").write_text('{"operations": []}')
    with pytest.raises(FileError, match="names no class of transformers"):
        surgery.from_pretrained(tmp_path)
    with pytest.raises(FileError, match="has no save_pretrained of its own"):
        surgery.save_pretrained(surgery.apply(tiny_vit(), "lora"), tmp_path)
