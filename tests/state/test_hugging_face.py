"""Folders of Hugging Face's: what was done to a model comes back with it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

import surgery
from surgery import activate, at, head, lora, qkv, unfreeze
from surgery.errors import FileError
from surgery.state import folders
from tests.engine.test_activity import train
from tests.models import hf_bert, hf_gpt2, hf_llama, words_in

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


def told() -> Any:
    return pytest.warns(UserWarning, match=r"surgery\.save_pretrained\(model, folder\)")


class Mixed(nn.Module, PyTorchModelHubMixin):
    """A model of nobody's library, as the Hub's own mixin saves it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def _trainer(model: Any, folder: Path) -> None:
    settings = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
    Trainer(model=model, args=settings).save_model(str(folder))


SAVERS = {
    "save_pretrained": lambda m, f: m.save_pretrained(f),
    "push_to_hub": lambda m, f: m.push_to_hub("user/name"),
    "Trainer.save_model": _trainer,
    "Accelerator.save_model": lambda m, f: Accelerator(cpu=True).save_model(m, f),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("saver", SAVERS)
def test_the_base_alone_is_never_taken_for_the_whole(
    saver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("hf_api", "create_and_tag_model_card"):
        monkeypatch.setattr(f"transformers.utils.hub.{name}", mock.Mock(), raising=False)
    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", mock.Mock(), raising=False)
    model, _ = operated(hf_llama, "a")
    with told():
        SAVERS[saver](model, tmp_path)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", UserWarning)
        SAVERS[saver](surgery.merge(model), tmp_path / "merged")
    assert not [each for each in heard if "surgery" in str(each.message)]


def test_what_is_read_as_a_whole_is_saved_without_a_word(tmp_path: Path) -> None:
    model, _ = operated(hf_llama, "a")
    want = model(X).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.save(model.state_dict(), tmp_path / "a.pt")
        safetensors.torch.save_model(model, tmp_path / "a.safetensors")
    plain = hf_llama()
    with pytest.raises(RuntimeError, match="surgery"):
        plain.load_state_dict(torch.load(tmp_path / "a.pt"))
    with pytest.raises(RuntimeError, match="surgery"):
        safetensors.torch.load_model(plain, tmp_path / "a.safetensors")
    again = surgery.apply(hf_llama().eval(), RULES, name="a")
    safetensors.torch.load_model(again, tmp_path / "a.safetensors")
    assert torch.equal(again(X).logits, want)


def test_a_state_tells_what_it_has_not_of_operations_that_are_not_active(tmp_path: Path) -> None:
    """torch.save(model.state_dict()) has one head, and each operation has trained its own."""
    model, _ = operated(hf_llama, "ab")
    with pytest.warns(UserWarning, match="not what a made of them, which are not active"):
        torch.save(model.state_dict(), tmp_path / "ab.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        surgery.save(model, tmp_path / "a", name="a")
        surgery.fingerprint(model)
        surgery.save_pretrained(model, tmp_path / "folder")
        copy.deepcopy(model)
        surgery.revert(model, name="a").state_dict()


@torch.no_grad()
def test_any_library_s_own_save_writes_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(3, 8)
    base = model(x)
    surgery.apply(model, [at("first", lora(rank=2)), at("last", unfreeze)])
    for p in surgery.parameters(model):
        nn.init.normal_(p)
    want = model(x)
    with told():
        model.save_pretrained(tmp_path / "told")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        surgery.save_pretrained(model, tmp_path / "a")
    assert torch.equal(model(x), want)
    again = Mixed.from_pretrained(tmp_path / "a", strict=True)
    assert torch.equal(again(x), base)
    assert torch.equal(surgery.load(again, tmp_path / "a")(x), want)
    assert "surgery.load(model, " in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(FileError, match="to name a class of transformers"):
        surgery.from_pretrained(tmp_path / "a")


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no surgery\.json"):
        surgery.from_pretrained(tmp_path)
    (tmp_path / "surgery.json").write_text('{"operations": []}')
    with pytest.raises(FileError, match="no config"):
        surgery.from_pretrained(tmp_path)


@torch.no_grad()
def test_operations_on_top_of_one_another_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf_llama().eval()
    for name in "ab":
        surgery.apply(model, [at(qkv, lora(rank=2)), at(head, unfreeze)], name=name)
        model.lm_head.weight.add_(0.2 * torch.randn_like(model.lm_head.weight))
    surgery.save_pretrained(model, tmp_path)
    again = surgery.from_pretrained(tmp_path).eval()
    for names in ("ab", "b", "a", ""):
        surgery.activate(again, [*names])
        surgery.activate(model, [*names])
        assert torch.equal(again(words_in(2)).logits, model(words_in(2)).logits), names


@torch.no_grad()
def test_a_checkpoint_brings_back_what_stands_on_what(tmp_path: Path) -> None:
    """Into the base, and into a model that has some of it, at rest."""
    torch.manual_seed(0)
    model = hf_llama().eval()
    base, some = copy.deepcopy(model), copy.deepcopy(model)
    for name in "ab":
        surgery.apply(model, [at(qkv, lora(rank=2)), at(head, unfreeze)], name=name)
        model.lm_head.weight.add_(0.2 * torch.randn_like(model.lm_head.weight))
    folders.write(model, tmp_path)
    surgery.load(some, tmp_path, name="a")
    activate(some, None)
    for other in (base, some):
        folders.bring_back(other, tmp_path)
        for names in ("ab", "b", "a", ""):
            activate(other, [*names])
            activate(model, [*names])
            assert torch.equal(other(words_in(2)).logits, model(words_in(2)).logits), names
