"""PEFT's folders, both ways, held against the real PEFT: what it saved, and what it loads."""

from __future__ import annotations

import copy
import json
import random
import struct
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
)
from safetensors.torch import load_file, save_file
from torch import nn

import surgery
from surgery import (
    append,
    at,
    load_peft,
    lora,
    methods,
    parallel,
    parts,
    prepend,
    save_peft,
    shared,
    unfreeze,
    weight,
)
from surgery.errors import FileError, OperationError, SurgeryError
from surgery.spec.case import stir
from surgery.state.peft_format import Config, plain_name
from tests.models import encoder, hf_bert, hf_gpt2, hf_llama, hf_vit, images, tiny_vit, words_in

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own: of versions, of embeddings
EPS = torch.finfo(torch.float64).eps
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Experts(nn.Module):
    """Experts in one tensor, as mixtures have them: (experts, out, in), or turned."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.is_transposed = turned
        self.up = nn.Parameter(torch.randn(3, 24, 32) / 5 if turned else torch.randn(3, 32, 24) / 5)
        self.down = nn.Parameter(
            torch.randn(3, 32, 24) / 5 if turned else torch.randn(3, 24, 32) / 5
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return ((x[:, None] @ up).relu() @ down).sum(1)


class Mixed(nn.Module):
    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(24, 24), Experts(turned)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(self.first(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att, self.last = nn.MultiheadAttention(24, 3, batch_first=True), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.att(x, x, x)[0])


class Nested(nn.Module):
    """A name that ends another's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.inner = nn.ModuleDict({name: nn.Linear(24, 24) for name in ("first", "second")})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["first"](self.inner["second"](self.first(x).relu()))


class Kernels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(24, 16, 3, padding=1), nn.Conv1d(16, 24, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x.mT).relu()).mT


BUILD: dict[str, Callable[[], nn.Module]] = {
    "llama": hf_llama, "bert": hf_bert, "gpt2": hf_gpt2, "vit": hf_vit, "timm": tiny_vit,
    "experts": Mixed, "turned": lambda: Mixed(turned=True), "attention": Attention,
    "encoder": encoder, "kernels": Kernels, "nested": Nested,
}  # fmt: skip


@lru_cache(maxsize=32)
def base(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILD[name]().double().eval()


def fresh(name: str) -> nn.Module:
    return copy.deepcopy(base(name))


def run(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        if name in ("llama", "bert", "gpt2"):
            return model(input_ids=words_in()).logits
        if name == "vit":
            return model(pixel_values=images().double()).logits
        if name == "timm":
            return model(images().double())
        generator = torch.Generator().manual_seed(3)
        return model(torch.randn(2, 5, 24, generator=generator, dtype=torch.float64))


def state_of(model: nn.Module) -> dict[str, object]:
    """All that a model is, but for random numbers, which PEFT draws."""
    return {k: v for k, v in surgery.fingerprint(model).items() if not k.startswith("random")}


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max()) / EPS


def made(name: str, config: Any, seed: int, folder: Path) -> torch.Tensor:
    """PEFT's answer; its folder written. All that it trains is stirred."""
    config = config() if callable(config) else copy.deepcopy(config)
    model = peft.get_peft_model(fresh(name), config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    want = run(model, name)
    model.save_pretrained(folder)
    return want


def of_peft(name: str, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = PeftModel.from_pretrained(fresh(name), folder, autocast_adapter_dtype=False)
    return model.double().eval()


QV = ["q_proj", "v_proj"]
CASES: dict[str, Any] = {
    "lora": ("llama", LoraConfig(target_modules=QV)),
    "lora bert": ("bert", LoraConfig(target_modules=["query", "dense"], r=3, lora_alpha=7)),
    "lora gpt2": ("gpt2", LoraConfig(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "lora vit": ("vit", LoraConfig(target_modules=["q_proj", "fc2", "projection"])),
    "lora timm": ("timm", LoraConfig(target_modules=["qkv", "proj", "fc1"])),
    "rslora": ("llama", LoraConfig(target_modules=QV, use_rslora=True, r=3)),
    "dora": ("llama", LoraConfig(target_modules=QV, use_dora=True, r=3)),
    "dora gpt2": ("gpt2", LoraConfig(target_modules=["c_attn", "c_proj"], use_dora=True)),
    "dora conv": ("timm", LoraConfig(target_modules=["qkv", "proj"], use_dora=True)),
    "dora bert": ("bert", LoraConfig(target_modules=["query", "value"], use_dora=True)),
    "ranks": ("llama", LoraConfig(
        target_modules=QV, use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 3, "v_proj": 2},
        alpha_pattern={"^model.layers.0.*v_proj": 5, "k_proj": 2})),
    "regex": ("llama", LoraConfig(target_modules=r".*\.(0|2)\..*(up|down)_proj")),
    "all-linear": ("llama", LoraConfig(target_modules="all-linear")),
    "one layer": ("llama", LoraConfig(target_modules=QV, layers_to_transform=1)),
    "some layers": ("llama", LoraConfig(
        target_modules=QV, layers_to_transform=[0, 2], layers_pattern="layers")),
    "timm layers": ("timm", LoraConfig(
        target_modules=["fc1"], layers_to_transform=[2], layers_pattern=["h", "blocks"])),
    "excluded": ("llama", LoraConfig(target_modules=QV, exclude_modules=r".*\.1\..*")),
    "excluded names": ("llama", LoraConfig(
        target_modules=QV, exclude_modules=["layers.0.self_attn.q_proj", "proj"])),
    "words": ("llama", LoraConfig(target_modules=["embed_tokens", "q_proj"])),
    "words gpt2": ("gpt2", LoraConfig(target_modules=["wte", "c_attn"], r=2)),
    "rows of words": ("llama", LoraConfig(target_modules=QV, trainable_token_indices=[1, 5])),
    "rows by name": ("llama", LoraConfig(
        target_modules=QV, trainable_token_indices={"embed_tokens": [0, 31]})),
    "saved": ("llama", LoraConfig(target_modules=QV, modules_to_save=["norm", "lm_head"])),
    "saved head": ("timm", LoraConfig(target_modules=["qkv"], modules_to_save=["head"])),
    "bias all": ("bert", LoraConfig(target_modules=["query", "dense"], bias="all")),
    "bias only": ("bert", LoraConfig(target_modules=["output.dense"], bias="lora_only")),
    "bias saved": ("bert", LoraConfig(
        target_modules=["output.dense"], bias="all", modules_to_save=["classifier", "pooler"])),
    "parameters": ("experts", LoraConfig(
        target_modules=["first"], target_parameters=["experts.up"])),
    "two parameters": ("experts", LoraConfig(
        target_modules=[], target_parameters=["experts.up", "experts.down"], r=2)),
    "turned parameters": ("turned", LoraConfig(
        target_modules=[], target_parameters=["experts.up", "down"], rank_pattern={"up": 3})),
    "a matrix": ("timm", LoraConfig(target_modules=["fc1"], target_parameters=["qkv.weight"])),
    "attention": ("attention", LoraConfig(target_modules=["att", "last"], r=4, lora_alpha=2)),
    "encoder": ("encoder", LoraConfig(target_modules=["self_attn", "linear2"])),
    "conv1d": ("kernels", LoraConfig(target_modules=["one", "two"], r=4)),
    "dora conv1d": ("kernels", LoraConfig(target_modules=["one"], r=4, use_dora=True)),
    "ia3": ("llama", IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3 gpt2": ("gpt2", IA3Config(
        target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "ia3 regex": ("bert", IA3Config(
        target_modules=r".*(key|value|output\.dense)",
        feedforward_modules=r".*layer\.\d\.output\.dense")),
    "ia3 conv": ("timm", IA3Config(target_modules=["patch_embed.proj"], feedforward_modules=[])),
    "ia3 conv in": ("timm", IA3Config(
        target_modules=["proj"], feedforward_modules=["proj"], modules_to_save=["head"])),
    "oft": ("llama", OFTConfig(target_modules=QV, oft_block_size=4)),
    "oft three": ("bert", OFTConfig(
        target_modules=["query"], oft_block_size=8, num_cayley_neumann_terms=3, bias="oft_only")),
    "oft exact": ("timm", OFTConfig(
        target_modules=["qkv", "fc2"], r=4, oft_block_size=0, use_cayley_neumann=False)),
    "oft one block": ("llama", OFTConfig(
        target_modules=["up_proj", "down_proj"], r=4, oft_block_size=0, block_share=True,
        num_cayley_neumann_terms=7)),
    "oft bent": ("llama", OFTConfig(target_modules=QV, oft_block_size=5)),
    "vera": ("llama", VeraConfig(target_modules=["q_proj", "up_proj", "down_proj"], r=5)),
    "vera gpt2": ("gpt2", VeraConfig(target_modules=["c_attn"], r=5)),
    "vera drawn": ("timm", lambda: VeraConfig(
        target_modules=["qkv", "fc2"], r=5, save_projection=False, projection_prng_key=9)),
    "loha": ("llama", LoHaConfig(target_modules=QV, r=3, alpha=5)),
    "loha ranks": ("bert", LoHaConfig(
        target_modules=["query", "dense"], rank_pattern={"query": 2}, alpha_pattern={"dense": 3})),
    "loha conv": ("timm", LoHaConfig(target_modules=["proj"], r=3)),
    "loha conv1d": ("kernels", LoHaConfig(target_modules=["two"], use_effective_conv2d=True)),
    "lokr": ("llama", LoKrConfig(target_modules=["q_proj", "up_proj"], r=2, alpha=5)),
    "lokr factor": ("bert", LoKrConfig(target_modules=["key", "dense"], r=1, decompose_factor=4)),
    "lokr whole": ("vit", LoKrConfig(target_modules=["fc1", "fc2"], r=16)),
    "lokr both": ("timm", LoKrConfig(target_modules=["fc1"], r=1, decompose_both=True)),
    "lokr conv": ("timm", LoKrConfig(target_modules=["proj"], r=1, rank_pattern={"attn.proj": 2})),
    "lokr conv whole": ("timm", LoKrConfig(target_modules=["proj"], r=40)),
    "ln": ("llama", LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "ln bert": ("bert", LNTuningConfig(
        target_modules=["LayerNorm"], modules_to_save=["classifier"])),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_what_peft_saved_answers_the_same_here_and_back_there(
    case: str, seed: int, tmp_path: Path
) -> None:
    name, config = CASES[case]
    want = made(name, config, seed, tmp_path / "theirs")
    assert distance(run(base(name), name), want) > 1e6
    model = fresh(name)
    before = state_of(model)
    assert load_peft(model, tmp_path / "theirs") is model
    assert distance(run(model, name), want) <= 16
    folder = save_peft(model, tmp_path / "ours")
    assert distance(run(of_peft(name, folder), name), want) <= 16
    assert distance(run(load_peft(fresh(name), folder), name), want) <= 16
    assert state_of(surgery.revert(model)) == before


# what is made here -----------------------------------------------------------------------------

RULES: dict[str, tuple[str, Any]] = {
    **{
        f"{rules} {name}": (name, getattr(methods, rules)())
        for name in ("llama", "bert", "vit", "timm")
        for rules in ("lora", "dora", "loha", "lokr", "oft", "ia3", "ln_tuning", "tied_lora")
    },
    **{f"{rules} gpt2": ("gpt2", getattr(methods, rules)()) for rules in ("lora", "dora", "ia3")},
    "vera": ("llama", methods.vera(rank=8)),
    "lora of torch's attention": ("encoder", methods.lora()[:1]),
    "rows of torch's attention": ("encoder", at(
        weight("**.in_proj_weight", rows=(0, 24)), lora(rank=2))),
    "out of torch's attention": ("attention", at(weight("**.out_proj.weight"), lora(rank=2))),
    "scaled": ("timm", at(nn.Linear, parallel(lora(rank=2, root=True), scale=0.3))),
    "negative": ("timm", at("**.qkv", parallel(lora(rank=2), scale=-0.3))),
    "ranks": ("timm", [
        at("**.qkv", lora(rank=2, rows="q _k v")), at("**.fc1", lora(rank=4, alpha=3)),
        at(weight("patch_embed.proj.weight"), lora(rank=3)), at("head", unfreeze)]),
    "two at once": ("timm", [at("**.qkv", lora(rank=2)), at("**.qkv", lora(rank=3, alpha=1))]),
    "at a weight": ("timm", at(weight("**.fc2.weight"), lora(rank=2))),
    "at a turned weight": ("gpt2", at(weight("**.{c_attn,c_fc}.weight"), lora(rank=2, alpha=1))),
    "words": ("gpt2", at(weight("**.wte.weight", tied=False), lora(rank=3))),
    "rows of words": ("llama", [
        at("**.q_proj", lora(rank=2)),
        at(weight("**.embed_tokens.weight"), parts.rows(ids=[1, 3]))]),
    "experts": ("experts", at(weight("experts.{up,down}"), lora(rank=2, alpha=1))),
    "turned experts": ("turned", at(weight("experts.down"), lora(rank=2))),
    "bias": ("timm", [at("**.qkv", lora(rank=2), unfreeze("bias"))]),
    "bias of others": ("timm", [
        at("**.qkv", lora(rank=2)), at("**.{fc1,norm1}", unfreeze("bias"))]),
    "bitfit": ("timm", at("**", unfreeze("**.bias"))),
    "names that end others": ("llama", [
        at("model.norm", unfreeze), at("lm_head", lora(rank=2)),
        at("model.layers.0.mlp.up_proj", lora(rank=2))]),
    "ranks of names": ("nested", [
        at("first", lora(rank=2)), at("inner.*", lora(rank=3, alpha=2))]),
    "whole": ("timm", at("**.qkv", parts.lokr(rank=2, whole=True))),
    "both": ("timm", at("**.qkv", parts.lokr(rank=2, both=True))),
    "blocks": ("timm", at("**.fc1", parallel(parts.lokr(rank=1, blocks=(8, 4)), scale=-2.0))),
    "series": ("timm", at("**.{qkv,fc1}", parts.oft(size=4, terms=5))),
    "one block": ("timm", at("**.{qkv,fc2}", parts.oft(size=4, one_block=True))),
    "ia3": ("timm", [
        at("**.qkv", append(parts.rescale(rows="_q k v"))),
        at("**.fc2", prepend(parts.rescale()))]),
    "sizes": ("timm", at("**.{qkv,fc1,fc2}", parts.vera(core=shared(parts.frozen(rank=5))))),
    "vera scaled": ("llama", at("**.{q_proj,up_proj}", parallel(
        parts.vera(core=shared(parts.frozen(rank=4))), scale=0.3))),
    "loha scaled": ("timm", at(nn.Linear, parallel(parts.loha(rank=3, alpha=2), scale=0.1))),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", RULES)
def test_what_is_saved_here_answers_the_same_there(case: str, seed: int, tmp_path: Path) -> None:
    name, rules = RULES[case]
    model = surgery.apply(fresh(name), rules, seed=seed)
    stir(model, seed)
    want = run(model.eval(), name)
    assert distance(run(base(name), name), want) > 1e6
    folder = save_peft(model, tmp_path / "ours", base_model_name_or_path="some/base")
    assert json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] == "some/base"
    assert distance(run(of_peft(name, folder), name), want) <= 16
    assert distance(run(load_peft(fresh(name), folder), name), want) <= 16


REFUSED: dict[str, tuple[str, Any, str]] = {
    "adapter": ("timm", methods.adapter(), "Adapter at blocks.0"),
    "prolora": ("timm", methods.prolora(), "PRoLoRA at blocks.0.attn.qkv"),
    "krona": ("timm", at("**.qkv", parts.krona()), "KronA at blocks.0.attn.qkv"),
    "rows": ("timm", methods.vera(), "vectors for several rows"),
    "kinds": ("timm", [at("**.qkv", lora()), at("**.fc1", parts.loha())], "LORA and LOHA"),
    "tied": ("gpt2", at(weight("**.wte.weight"), lora()), "modules share this weight"),
    "token": ("timm", at("", unfreeze("cls_token")), "cls_token is trained"),
    "weight": ("timm", at("**.qkv", lora(), unfreeze), "qkv.weight is trained"),
    "ia3 bias": ("timm", at("**.qkv", parts.rescale(), unfreeze("bias")), "a trained bias"),
    "conv1d": ("gpt2", at("**.c_attn", parts.loha()), "LOHA does not fit"),
    "attention": ("encoder", methods.loha()[:1], "LOHA does not fit"),
    "residual": ("timm", at("**.qkv", append(parts.rescale(), residual=True)), "it is added"),
    "after": ("timm", at("**.attn.proj", append(lora())), "LoRA at blocks.0.attn.proj"),
    "three terms": ("timm", at("**.qkv", parts.oft(terms=3)), "one form"),
    "some lengths": ("timm", [*methods.dora()[:1], at("**.fc1", lora())], "DoRA's lengths"),
    "sizes": ("timm", [at("**.qkv", parts.oft(size=4)), at("**.fc2", parts.oft(size=6))], "OFT"),
    "blocks": ("timm", at("**.fc1", parts.lokr(blocks=(2, 12))), "other blocks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_has_no_place_for_is_named_and_nothing_written(case: str, tmp_path: Path) -> None:
    name, rules, said = REFUSED[case]
    model = surgery.apply(fresh(name), rules)
    before = surgery.fingerprint(model)
    with pytest.raises(FileError, match=said.replace(".", r"\.")):
        save_peft(model, tmp_path / "ours")
    assert not list(tmp_path.iterdir())
    assert surgery.fingerprint(model) == before


def test_as_lora_is_the_remedy(tmp_path: Path) -> None:
    model = surgery.apply(fresh("timm"), methods.prolora())
    stir(model, 0)
    surgery.as_lora(model, share=1.0)
    folder = save_peft(model, tmp_path / "ours")
    assert distance(run(of_peft("timm", folder), "timm"), run(model, "timm")) <= 16


def test_a_model_never_operated_and_one_without_values_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(OperationError, match="never operated"):
        save_peft(fresh("timm"), tmp_path / "ours")
    with torch.device("meta"):
        bare = surgery.apply(tiny_vit(), at("**.qkv", lora()))
    with pytest.raises(SurgeryError, match="meta"):
        save_peft(bare, tmp_path / "ours")
    with pytest.raises(FileError, match="no folder"):
        save_peft(surgery.apply(fresh("timm"), at("**.qkv", lora())), tmp_path / "a" / "b")


def test_a_folder_is_written_over_and_takes_no_other_file_with_it(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    for rank in (2, 3):
        model = surgery.apply(fresh("timm"), at("**.qkv", lora(rank=rank)))
        stir(model, rank)
        save_peft(model, tmp_path)
        assert distance(run(of_peft("timm", tmp_path), "timm"), run(model, "timm")) <= 16
    assert sorted(f.name for f in tmp_path.iterdir()) == ["README.md", CONFIG, TENSORS]


OWN = ["lora", "dora gpt2", "words", "rows of words", "two parameters", "attention", "ia3 conv",
       "oft one block", "vera", "loha", "lokr both", "lokr whole", "ln", "bias saved"]  # fmt: skip


@pytest.mark.parametrize("case", OWN)
def test_what_was_loaded_is_kept_by_surgerys_own_files(case: str, tmp_path: Path) -> None:
    name, config = CASES[case]
    made(name, config, 0, tmp_path / "theirs")
    model = load_peft(fresh(name), tmp_path / "theirs")
    again = surgery.load(fresh(name), surgery.save(model, tmp_path / "own.safetensors"))
    assert torch.equal(run(again, name), run(model, name))


def test_what_was_loaded_trains(tmp_path: Path) -> None:
    made("llama", CASES["lora"][1], 0, tmp_path / "theirs")
    model = load_peft(fresh("llama"), tmp_path / "theirs").train()
    assert len(model.surgery.default.record["rows"]) == 2  # like places are one address
    model(input_ids=words_in()).logits.square().mean().backward()
    assert all(p.grad is not None for p in surgery.parameters(model))


# names -----------------------------------------------------------------------------------------


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / TENSORS)
    save_file({change(key): tensor for key, tensor in tensors.items()}, folder / TENSORS)


@pytest.mark.parametrize(
    "change",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace("base_model.model.", ""),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.replace("layers.1.", "layers.1._orig_mod."),
        lambda key: key.replace("base_model.model.", "base_model.model._fsdp_wrapped_module."),
    ],
)
def test_names_of_wrappers_and_of_the_adapter_are_understood(
    change: Callable[[str], str], tmp_path: Path
) -> None:
    want = made("llama", CASES["lora"][1], 0, tmp_path)
    renamed(tmp_path, change)
    assert distance(run(load_peft(fresh("llama"), tmp_path), "llama"), want) <= 16


def test_a_models_own_names_are_no_wrappers() -> None:
    assert (
        plain_name("base_model.model.module.x.lora_A.weight", {"module"})
        == "module.x.lora_A.weight"
    )
    assert plain_name("module.x.lora_A.weight", {"module"}) == "module.x.lora_A.weight"
    assert plain_name("module.x.lora_A.weight", {"x"}) == "x.lora_A.weight"
    assert plain_name("x.default.lora_A.default.weight", {"x"}) == "x.default.lora_A.weight"
    assert plain_name("x.lora_embedding_A.default", {"x"}) == "x.lora_embedding_A"


def test_two_names_of_one_tensor_are_refused(tmp_path: Path) -> None:
    made("llama", CASES["lora"][1], 0, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    key = next(iter(tensors))
    save_file({**tensors, f"module.{key}": tensors[key].clone()}, tmp_path / TENSORS)
    refused(tmp_path, "llama", "which are one to this model")


# what is refused -------------------------------------------------------------------------------


def refused(folder: Path, name: str, said: str = "") -> None:
    """It is an error of ours, and the model is what it was."""
    model = fresh(name)
    before = state_of(model)
    with pytest.raises(SurgeryError) as error:
        load_peft(model, folder)
    assert said in str(error.value)
    assert "\n" in str(error.value)
    assert len(str(error.value)) < 2000
    assert state_of(model) == before


OPTIONS: dict[str, tuple[str, Any, str]] = {
    "init_lora_weights": ("lora", "pissa_niter_16", "init_lora_weights='pissa_niter_16'"),
    "lora_bias": ("lora", True, "it lacks"),
    "alora_invocation_tokens": ("lora", [1, 2], "alora_invocation_tokens=[1, 2]"),
    "use_qalora": ("lora", True, "use_qalora=True"),
    "layer_replication": ("lora", [[0, 2], [1, 3]], "layer_replication"),
    "arrow_config": ("lora", {"top_k": 2}, "arrow_config"),
    "megatron_config": ("lora", {"a": 1}, "megatron_config"),
    "ensure_weight_tying": ("lora", True, "ensure_weight_tying"),
    "use_something_new": ("lora", True, "use_something_new=True"),
    "coft": ("oft", True, "coft=True"),
    "num_cayley_neumann_terms": ("oft", 2, "num_cayley_neumann_terms=2"),
    "r": ("lora", 0, "must be an integer from 1 up"),
    "lora_alpha": ("lora", float("nan"), "lora_alpha=nan"),
    "rank_pattern": ("lora", {"q_proj": 2**60}, "rank_pattern"),
    "peft_type": ("lora", "PROMPT_TUNING", "its peft_type is 'PROMPT_TUNING'"),
    "target_modules": ("lora", "(a+)+", "may take for ever"),
    "exclude_modules": ("lora", "(", "is no regular expression"),
    "layers_pattern": ("one layer", "(a|a)*", "may take for ever"),
    "modules_to_save": ("lora", ["norm"], "it lacks"),
    "use_dora": ("lora", True, "it lacks"),
    "bias": ("bias only", "none", "gives no place for"),
    "feedforward_modules": ("ia3", [], "in this model"),
    "alpha_pattern": ("lora", {"(.*)(.*)(.*)(.*)(.*)(.*)(.*)#": 2}, "may take for ever"),
    "trainable_token_indices": ("rows of words", [1, 99], "rows 0 to 31"),
    "target_parameters": ("two parameters", ["experts.up"], "gives no place for"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_is_not_understood_is_refused_by_name(option: str, tmp_path: Path) -> None:
    case, value, said = OPTIONS[option]
    name, config = CASES[case]
    made(name, config, 0, tmp_path)
    told = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**told, option: value}))
    refused(tmp_path, name, said)


@pytest.mark.parametrize("loops", [".*" * 6, "(.*?)" * 6, "[^x]*" * 6, r"\w+" * 6, ".+?.*" * 3])
def test_loops_are_weighed_by_the_path_that_they_meet(loops: str) -> None:
    """Six of them try 300 million ways to divide 75 letters, and nothing can stop that."""
    config = Config("load", {"peft_type": "LORA", "target_modules": f"{loops}#"})
    assert not config.names("target_modules", "a" * 15)
    with pytest.raises(FileError, match="may take for ever"):
        config.names("target_modules", "a" * 75)
    said = {"target_modules": r".*\.layers\.(\d+)\.[^.]+\.(q|k|v)_proj\d*", "peft_type": "LORA"}
    path = f"model.{'language_model.' * 4}layers.11.self_attn.q_proj"
    assert Config("load", said).names("target_modules", path)


def test_what_fits_another_model_is_refused(tmp_path: Path) -> None:
    made("llama", CASES["lora"][1], 0, tmp_path)
    refused(tmp_path, "bert", "mean no layer")
    deeper = hf_llama(layers=4).double()
    with pytest.raises(FileError, match="it lacks"):
        load_peft(deeper, tmp_path)
    shallow = hf_llama(layers=2).double()
    with pytest.raises(FileError, match="gives no place for"):
        load_peft(shallow, tmp_path)
    operated = load_peft(fresh("llama"), tmp_path)
    with pytest.raises(OperationError, match="operated under that name already"):
        load_peft(operated, tmp_path)
    load_peft(operated, tmp_path, name="second")


def test_pickled_tensors_are_refused_with_the_remedy(tmp_path: Path) -> None:
    made("llama", CASES["lora"][1], 0, tmp_path)
    (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    refused(tmp_path, "llama", "a pickle may run code")
    refused(tmp_path / "no such", "llama", "there is no adapter_config.json")


def test_a_base_that_had_other_words_is_refused(tmp_path: Path) -> None:
    made("llama", CASES["words"][1], 0, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    key = next(key for key in tensors if key.endswith("base_layer.weight"))
    tensors[key] += 1.0
    save_file(tensors, tmp_path / TENSORS)
    refused(tmp_path, "llama", "is another than this model's")


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    made("llama", CASES["lora"][1], 0, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    key = next(iter(tensors))
    save_file({**tensors, key: tensors[key].int()}, tmp_path / TENSORS)
    refused(tmp_path, "llama", "is of I32, which holds no weights")


def test_a_layer_and_its_parameter_by_name_are_refused(tmp_path: Path) -> None:
    made("timm", CASES["a matrix"][1], 0, tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text())
    said["target_parameters"] = ["fc1.weight"]
    (tmp_path / CONFIG).write_text(json.dumps(said))
    refused(tmp_path, "timm", "by name, too")


def test_rows_of_words_that_are_not_there_are_refused(tmp_path: Path) -> None:
    made("llama", CASES["lora"][1], 0, tmp_path)
    said = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**said, "trainable_token_indices": [1]}))
    refused(tmp_path, "llama", "no tensor for its trainable_token_indices")


def test_a_layer_of_several_names_is_refused(tmp_path: Path) -> None:
    def build() -> nn.Module:
        layer = nn.Linear(24, 24)
        return nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(24, 24)})

    torch.manual_seed(0)
    peft.get_peft_model(build(), LoraConfig(target_modules=["a", "c"])).save_pretrained(tmp_path)
    with pytest.raises(FileError, match="a has several names"):
        load_peft(build(), tmp_path)
    with pytest.raises(FileError, match="a has several names"):
        save_peft(surgery.apply(build(), at("a", lora())), tmp_path)


def test_torchs_attention_does_not_run_its_projection(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["out_proj", "last"])
    made("attention", config, 0, tmp_path)
    refused(tmp_path, "attention", "inside torch's attention, where PEFT's layers do nothing")


def test_what_is_tied_here_must_be_the_same_in_the_file(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["c_attn"], modules_to_save=["wte", "lm_head"])
    made("gpt2", config, 0, tmp_path)
    refused(tmp_path, "gpt2", "differ, and are one in this model")
    made("gpt2", LoraConfig(target_modules=["c_attn"], modules_to_save=["lm_head"]), 0, tmp_path)
    refused(tmp_path, "gpt2", "tied to transformer.wte.weight")


class Inner(nn.Module):
    """A module that has a parameter of its own, which is meant, and layers that are, too."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.first, self.last = nn.Parameter(torch.randn(8, 8)), *twice(nn.Linear, 8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.first(x) @ self.own)
        return y


def twice(make: Callable[..., nn.Module], *given: int) -> tuple[nn.Module, nn.Module]:
    return make(*given), make(*given)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@torch.no_grad()
def test_layers_inside_of_what_peft_wraps_for_a_parameter(bias: Any, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"a": Inner(), "b": Inner()}).double()

    def run(model: nn.Module) -> torch.Tensor:
        parts: Any = model
        return torch.cat([parts["a"](x), parts["b"](x)])

    config = LoraConfig(r=2, target_modules=["first"], target_parameters=["a.own"], bias=bias)
    theirs: Any = peft.get_peft_model(build(), config, autocast_adapter_dtype=False).eval()
    for p in theirs.parameters():
        p.add_(0.05 * torch.randn_like(p)) if p.requires_grad else None
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(3, 8).double()
    model = load_peft(build(), tmp_path / "theirs")
    assert distance(run(model), run(theirs.base_model.model)) <= 16
    save_peft(model, tmp_path / "ours")
    kept = {"autocast_adapter_dtype": False}
    again: Any = PeftModel.from_pretrained(build(), tmp_path / "ours", **kept).eval()
    assert distance(run(again.base_model.model), run(model)) <= 16


def test_an_error_while_it_is_filled_undoes_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made("timm", CASES["saved head"][1], 0, tmp_path)
    from surgery.state import peft_layers

    done: list[object] = []

    def put(entry: Any, value: torch.Tensor) -> None:
        done.append(entry)
        if len(done) == 6:
            raise MemoryError
        entry.view.copy_(value.reshape(entry.view.shape))

    monkeypatch.setattr(peft_layers.Entry, "put", put)
    model = fresh("timm")
    before = state_of(model)
    with pytest.raises(MemoryError):
        load_peft(model, tmp_path)
    assert state_of(model) == before
    assert len(done) == 6


# files that mean harm --------------------------------------------------------------------------

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**70, -(2**70), 1.5, float("nan"), float("inf"), "", "x",
    "a" * 10**5, "(" * 500, "(.*)*", "[", "\\", "*", "{1,", ".", "all-linear", [], [[]], [None],
    ["q_proj", 3], {}, {"a": {}}, {"q_proj": "8"}, {"(": 8}, {"q_proj": 10**9}, [[[[[]]]]],
]  # fmt: skip


def mutated(folder: Path, seed: int) -> None:
    """One of many ways to be wrong, or odd."""
    rng = random.Random(seed)
    config, tensors = folder / CONFIG, folder / TENSORS
    way = seed % 8
    if way < 4:
        said = json.loads(config.read_text())
        for _ in range(rng.randint(1, 2)):
            said[rng.choice([*said, "new_option", "r", "target_modules"])] = rng.choice(VALUES)
        config.write_text(json.dumps(said))
    elif way == 4:
        data = bytearray(config.read_bytes())
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        config.write_bytes(data if rng.random() < 0.7 else b"[" * 10**5)
    elif way == 5:
        data = bytearray(tensors.read_bytes())
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
        tensors.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
    elif way == 6:
        held = load_file(tensors)
        key = rng.choice(sorted(held))
        value = held.pop(key)
        odd = [
            value.flatten(),
            value[:0],
            value.int(),
            value[None],
            value.repeat(2, 1),
            value.bool(),
        ]
        held[rng.choice([key, f"{key}.x", "", "." * 99, "../" + key, "module." + key])] = (
            rng.choice(odd).contiguous()
        )
        save_file(held, tensors)
    else:
        (length,) = struct.unpack("<Q", tensors.read_bytes()[:8])
        header = json.loads(tensors.read_bytes()[8 : 8 + length])
        key = rng.choice([k for k in header if k != "__metadata__"])
        change = [
            ("shape", [2**40, 2**40]),
            ("shape", [-1]),
            ("dtype", "F8_E4M3"),
            ("shape", [0, 2**62]),
        ]
        name, value = rng.choice(change)
        header[key][name] = value
        if rng.random() < 0.5:
            header[key]["data_offsets"] = [0, rng.choice([0, 2**60])]
        text = json.dumps(header).encode()
        body = tensors.read_bytes()[8 + length :]
        tensors.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, dict[str, bytes]]]:
    found = []
    for case in (
        "lora",
        "dora gpt2",
        "ranks",
        "ia3 gpt2",
        "oft",
        "vera",
        "loha",
        "lokr both",
        "ln",
    ):
        name, config = CASES[case]
        folder = tmp_path_factory.mktemp("corpus")
        made(name, config, 0, folder)
        found.append((name, {f: (folder / f).read_bytes() for f in (CONFIG, TENSORS)}))
    return found


@pytest.mark.parametrize("part", range(8))
def test_mutated_folders_are_loaded_or_refused_and_never_half(
    part: int, corpus: list[tuple[str, dict[str, bytes]]], tmp_path: Path
) -> None:
    outcomes = {"loaded": 0, "refused": 0}
    for seed in range(part * 40, part * 40 + 40):
        name, files = corpus[seed % len(corpus)]
        for file, data in files.items():
            (tmp_path / file).write_bytes(data)
        mutated(tmp_path, seed)
        model = base(name)
        before = state_of(model)
        said = ""
        try:
            surgery.revert(load_peft(model, tmp_path))
        except SurgeryError as error:
            said = str(error)
        outcomes["refused" if said else "loaded"] += 1
        assert not said or ("\n" in said and 20 < len(said) < 3000), seed
        assert state_of(model) == before, seed
    assert outcomes["refused"] >= 20, outcomes
