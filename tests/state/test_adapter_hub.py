"""Folders of adapters (adapter-hub): as the real library made them, and answered."""

from __future__ import annotations

import copy
import json
import pickle
import random
import shutil
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery.errors import FileError, SurgeryError
from tests.data.adapters.make import CASES, HERE, WORDS
from tests.data.adapters.make import base as built

EPS = torch.finfo(torch.float32).eps
ANSWERS = load_file(HERE / "answers.safetensors")
REFUSED = {
    "dora": "use_dora=True is not known here", "gated": "use_gating=True is not known here",
    "invertible": "inv_adapter='nice' is not known here",
    "norm_after": "ln_after=True is not known here",
    "odd_sum": "residual_before_ln='post_add' together are not known here",
    "unipelt": "use_gating=True is not known here",
    "prompt": "its architecture is 'prompt_tuning'",
    "loreft": "its architecture is 'reft'", "vera": "vera_d=0.1 is not known here",
}  # fmt: skip
CAUSAL = {"gpt2_prefix", "gpt2_prefix_flat", "llama_prefix_flat"}
READ = [key for key in ANSWERS if key.partition("_")[2] not in REFUSED and key not in CAUSAL]
NAMES = {"adapter.safetensors", "pytorch_adapter.bin"}


@lru_cache
def kept(name: str) -> nn.Module:
    return built(name)


def fresh(name: str) -> Any:
    return copy.deepcopy(kept(name))


def run(model: Any) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(WORDS).logits
    return answer


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max()) / EPS


def state_of(model: nn.Module) -> dict[str, object]:
    return {k: v for k, v in surgery.fingerprint(model).items() if not k.startswith("random")}


def test_every_case_has_a_folder_and_an_answer() -> None:
    wanted = {f"{name}_{case}" for case, (*_, names) in CASES.items() for name in names.split()}
    assert (
        wanted
        == set(ANSWERS)
        == {path.name for path in HERE.iterdir() if path.is_dir()} - {"__pycache__"}
    )


@pytest.mark.parametrize("key", READ)
def test_what_adapters_saved_answers_the_same_here(key: str, tmp_path: Path) -> None:
    name = key.partition("_")[0]
    model = fresh(name)
    before = state_of(model)
    assert distance(run(model), ANSWERS[key]) > 1e4
    assert surgery.load(model, HERE / key, name="task") is model
    assert distance(run(model), ANSWERS[key]) <= 16
    own = surgery.save(model, tmp_path / "own.safetensors", name="task")
    assert torch.equal(run(surgery.load(fresh(name), own, name="task")), run(model))
    assert state_of(surgery.revert(model)) == before


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name(case: str) -> None:
    refused("bert", HERE / f"bert_{case}", REFUSED[case])


@pytest.mark.parametrize("key", sorted(CAUSAL))
def test_prefixes_that_adapters_hides_from_some_queries_are_refused(key: str) -> None:
    refused(key.partition("_")[0], HERE / key, "adapters hides some of a prefix")


def refused(name: str, folder: Path, said: str, **options: Any) -> None:
    model = fresh(name)
    before = state_of(model)
    with pytest.raises(FileError) as error:
        surgery.load(model, folder, **options)
    assert said in str(error.value)
    assert "\n" in str(error.value)
    assert len(str(error.value)) < 2000
    assert state_of(model) == before


def test_what_was_read_trains_and_the_base_does_not() -> None:
    model = surgery.load(fresh("bert"), HERE / "bert_union").train()
    model(WORDS).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in surgery.parameters(model))
    assert all(p.grad is None for p in model.bert.embeddings.parameters())


def test_like_layers_are_one_rule() -> None:
    model = surgery.load(fresh("bert"), HERE / "bert_par")
    (row,) = model.surgery.default.record["rows"]
    assert "bert.encoder.layer.*" in row["rule"]
    assert len(row["paths"]) == 2


# the head, and the model -----------------------------------------------------------------------


def test_a_head_goes_in_with_it_or_is_left_out() -> None:
    whole, without = fresh("bert"), fresh("bert")
    surgery.load(whole, HERE / "bert_lora")
    surgery.load(without, HERE / "bert_lora", head=False)
    assert not torch.equal(whole.classifier.weight, kept("bert").classifier.weight)
    assert torch.equal(without.classifier.weight, kept("bert").classifier.weight)
    assert whole.classifier.weight.requires_grad


def test_a_head_that_the_model_has_not_is_refused_until_it_is_left_out(tmp_path: Path) -> None:
    folder = shutil.copytree(HERE / "bert_lora", tmp_path / "x")
    tensors = {f"heads.task.1.{k}": t for k, t in load_file(folder / HEAD).items()}
    save_file(tensors, folder / HEAD)
    refused("bert", folder, "of its head, is no tensor of this BertForSequenceClassification")
    surgery.load(fresh("bert"), folder, head=False)


HEAD = "model_head.safetensors"


def test_a_model_without_its_head_and_one_in_another_take_the_same_folder() -> None:
    encoder = fresh("bert").bert
    surgery.load(encoder, HERE / "bert_double")
    whole = surgery.load(fresh("bert"), HERE / "bert_double")
    with torch.no_grad():
        assert torch.equal(encoder(WORDS)[0], whole.bert(WORDS)[0])
    outer = nn.ModuleDict({"model": fresh("bert")})
    surgery.load(outer, HERE / "bert_double")
    assert torch.equal(run(outer["model"]), run(whole))


def test_another_model_is_refused() -> None:
    refused("gpt2", HERE / "bert_double", "this GPT2LMHeadModel has no such module")
    refused("llama", HERE / "gpt2_lora", "this LlamaForCausalLM has no such module")
    deeper = copy.deepcopy(kept("bert"))
    deeper.bert.encoder.layer.append(copy.deepcopy(deeper.bert.encoder.layer[0]))
    with pytest.raises(FileError, match=r"and none for bert\.encoder\.layer\.2"):
        surgery.load(deeper, HERE / "bert_double")
    with pytest.raises(FileError, match=r"rules= is of files that surgery\.save wrote"):
        surgery.load(fresh("bert"), HERE / "bert_double", rules="lora")


# what is wrong ---------------------------------------------------------------------------------


def changed(folder: Path, **config: Any) -> Path:
    said = json.loads((folder / "adapter_config.json").read_text())
    said["config"] |= config
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


OPTIONS: dict[str, tuple[str, Any, str]] = {
    "non_linearity": ("double", "nonsense", "no bottleneck that is known here"),
    "cross_adapter": ("double", True, "cross_adapter=True is not known here"),
    "something_new": ("double", 3, "something_new=3 is not known here"),
    "architecture": ("double", "xyz", "its architecture is 'xyz'"),
    "is_parallel": ("double", True, "is not known here"),
    "phm_layer": ("double", True, "no sum of Kronecker products"),
    "original_ln_after": ("double", False, "together are not known here"),
    "scaling": ("double", "learnt", "scaling='learnt' makes no sense"),
    "alpha": ("lora", -1, "alpha=-1 makes no sense"),
    "r": ("lora", 0, "r=0 makes no sense"),
    "attn_matrices": ("lora", 7, "attn_matrices=7 makes no sense"),
}


def test_a_rank_that_is_another_is_refused(tmp_path: Path) -> None:
    folder = changed(shutil.copytree(HERE / "bert_lora", tmp_path / "x"), r=4)
    refused("bert", folder, "has a rank of 2 there, and r=4 is said")


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_is_not_understood_is_refused(option: str, tmp_path: Path) -> None:
    case, value, said = OPTIONS[option]
    folder = shutil.copytree(HERE / f"bert_{case}", tmp_path / "x")
    changed(folder, **{option: value})
    refused("bert", folder, said)


def test_a_layer_that_is_lost_is_missed(tmp_path: Path) -> None:
    folder = shutil.copytree(HERE / "bert_double", tmp_path / "x")
    tensors = load_file(folder / "adapter.safetensors")
    kept_ = {k: t for k, t in tensors.items() if ".layer.0.output." not in k}
    save_file(kept_, folder / "adapter.safetensors")
    refused("bert", folder, "and none for bert.encoder.layer.0.output")
    changed(folder, leave_out=[0])
    some = {k: t for k, t in tensors.items() if ".layer.0." not in k}
    save_file(some, folder / "adapter.safetensors")
    surgery.load(fresh("bert"), folder)


def test_a_tensor_that_is_not_known_or_lost_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(HERE / "bert_double", tmp_path / "x")
    tensors = load_file(folder / "adapter.safetensors")
    key = next(key for key in tensors if key.endswith("up.weight"))
    for odd in ("bert.magic.task.x", key.replace("task", "other"), f"{key}.more"):
        save_file({**tensors, odd: torch.ones(1)}, folder / "adapter.safetensors")
        refused("bert", folder, odd.rpartition(".adapters")[0] if ".more" in odd else odd)
    save_file({k: t for k, t in tensors.items() if k != key}, folder / "adapter.safetensors")
    refused("bert", folder, "it lacks")
    save_file({**tensors, key: tensors[key].mT.contiguous()}, folder / "adapter.safetensors")
    refused("bert", folder, "in this model")


def test_factors_that_make_no_matrix_are_an_error_of_the_file(tmp_path: Path) -> None:
    folder = shutil.copytree(HERE / "gpt2_compacter_pp", tmp_path / "x")
    held = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    name = next(name for name in held if name.endswith("phm_rule_left"))
    torch.save({**held, name: held[name][:0].clone()}, folder / "pytorch_adapter.bin")
    refused("gpt2", folder, "it makes no part here (RuntimeError")


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("it ran",)


def test_a_pickle_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(HERE / "bert_seq_bn", tmp_path / "x")
    torch.save({"x": Harm()}, folder / "pytorch_adapter.bin")
    refused("bert", folder, "no whole file of tensors alone")
    (folder / "pytorch_adapter.bin").write_bytes(pickle.dumps({"x": Harm()}))
    refused("bert", folder, "no whole file of tensors alone")
    torch.save([torch.ones(1)], folder / "pytorch_adapter.bin")
    refused("bert", folder, "more than tensors by their names")
    assert "it ran" not in capsys.readouterr().out
    (folder / "pytorch_adapter.bin").unlink()
    refused("bert", folder, "there is neither adapter.safetensors nor pytorch_adapter.bin")


def test_a_pickle_is_not_unpacked(tmp_path: Path) -> None:
    folder = shutil.copytree(HERE / "bert_seq_bn", tmp_path / "x")
    path = folder / "pytorch_adapter.bin"
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    refused("bert", folder, "is packed, to what size nobody knows")


VALUES: list[Any] = [None, True, False, 0, -1, 2**40, 1.5, float("nan"), "", "x", "learned", [],
                     [[]], {}, {"a": 1}, [0, 1], ["q"], "a" * 10**5]  # fmt: skip


@pytest.mark.parametrize("seed", range(80))
def test_damaged_folders_are_loaded_or_refused_and_never_half(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    key = sorted(READ)[seed % len(READ)]
    folder = shutil.copytree(HERE / key, tmp_path / "x")
    said = json.loads((folder / "adapter_config.json").read_text())
    way = rng.randrange(4)
    if way == 0:
        said["config"][rng.choice([*said["config"], "architecture"])] = rng.choice(VALUES)
    elif way == 1:
        said[rng.choice(["config", "name", "model_type"])] = rng.choice(VALUES)
    (folder / "adapter_config.json").write_text(json.dumps(said))
    file = next(path for path in folder.iterdir() if path.name in NAMES)
    if way == 2:
        data = bytearray(file.read_bytes())
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
    elif way == 3:
        safe = file.suffix == ".safetensors"
        held = load_file(file) if safe else torch.load(file, weights_only=True)
        name = rng.choice(sorted(held))
        value = held.pop(name)
        odd = [value.flatten(), value[:0], value.int(), value[None], value.bool(), value[0]]
        held[rng.choice([name, f"{name}.x", "x", "." * 9])] = rng.choice(odd).contiguous()
        save_file(held, file) if safe else torch.save(held, file)
    model = fresh(key.partition("_")[0])
    before, told = state_of(model), ""
    try:
        surgery.revert(surgery.load(model, folder))
    except SurgeryError as error:
        told = str(error)
    assert not told or ("\n" in told and len(told) < 3000)
    assert state_of(model) == before
