"""A corpus of folders that PEFT makes with its odd options: read with its answers, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import IA3Config as IA3
from peft import LNTuningConfig as LN
from peft import LoHaConfig as LoHa
from peft import LoKrConfig as LoKr
from peft import LoraConfig as Lora
from peft import OFTConfig as OFT
from peft import TrainableTokensConfig as Tokens
from peft import VeraConfig as Vera
from torch import nn

import surgery
from surgery import append, at, load_peft, lora, parts, save_peft, unfreeze, weight
from surgery.errors import FileError
from surgery.spec.case import stir
from tests.models import hf_llama, tiny_vit, words_in
from tests.state import test_peft_format as known
from tests.state.test_peft_format import QV, base, distance, fresh, made, of_peft, state_of

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


class Convs(nn.Module):
    """A convolution of each kind, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.point, self.same = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, (3, 5), padding="same")
        self.cube, self.up = nn.Conv3d(1, 1, 3, padding=1), nn.ConvTranspose2d(8, 8, 2)
        self.norm, self.last = nn.BatchNorm2d(8), nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.pad(x, (0, 0, 0, 11))[:, None, :, :16].expand(-1, 3, -1, -1)
        for layer in (self.stem, self.grouped, self.dilated, self.reflect, self.point, self.same):
            x = layer(x)
        return self.last(self.up(self.norm(self.cube(x[:, None])[:, 0])).mean((2, 3)))


class Tables(nn.Module):
    """Tables of words with options."""

    def __init__(self) -> None:
        super().__init__()
        self.padded, self.short = (
            nn.Embedding(16, 24, padding_idx=0),
            nn.Embedding(16, 24, max_norm=1.0),
        )
        self.last = nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = (x[..., 0] * 7).long() % 16
        return self.last(self.padded(words) + self.short(words))


class Patches(nn.Module):
    """Large patches: 16 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit(patch_size=16, img_size=32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vit(nn.functional.pad(x[:, None], (0, 8, 0, 27)).expand(-1, 3, -1, -1))


known.BUILD |= {"convs": Convs, "tables": Tables, "patches": Patches}
MLP = ["up_proj", "down_proj"]
READ: dict[str, tuple[str, Callable[[], Any]]] = {
    # how it starts, where no weight of the base is another for it
    **{f"start {how}": ("llama", lambda how=how: Lora(target_modules=QV, init_lora_weights=how))
       for how in ("gaussian", "orthogonal", "eva", False)},
    "start of words": ("llama", lambda: Lora(
        target_modules=["embed_tokens"], init_lora_weights="pissa", lora_alpha=3)),
    # what is added to all that a layer gives
    "lora_bias": ("bert", lambda: Lora(target_modules=["query", "dense"], lora_bias=True, r=3)),
    "lora_bias, no bias": ("llama", lambda: Lora(
        target_modules=QV, lora_bias=True, use_rslora=True)),
    "lora_bias gpt2": ("gpt2", lambda: Lora(
        target_modules=["c_attn", "c_proj"], lora_bias=True, fan_in_fan_out=True, lora_alpha=5)),
    "lora_bias of kernels": ("convs", lambda: Lora(
        target_modules=["stem", "last"], lora_bias=True, alpha_pattern={"stem": -2})),
    "bias and lora_bias": ("bert", lambda: Lora(
        target_modules=["query"], lora_bias=True, bias="lora_only")),
    # scales
    "alpha of a half": ("llama", lambda: Lora(target_modules=QV, lora_alpha=2.5)),
    "alpha below 0": ("llama", lambda: Lora(
        target_modules=QV, lora_alpha=-4, alpha_pattern={"v_proj": 3}, lora_dropout=0.1)),
    "ranks of layers": ("llama", lambda: Lora(
        target_modules=QV, rank_pattern={r"layers\.(0|2)\.self_attn\.q_proj": 3, ".*v_proj": 2},
        alpha_pattern={r".*\.1\..*q_proj": 64, "self_attn.v_proj": 1})),
    "dora rs": ("bert", lambda: Lora(
        target_modules=["query"], use_dora=True, use_rslora=True, rank_pattern={"layer.0.*": 3})),
    # where
    "no layers": ("llama", lambda: Lora(target_modules=QV, layers_to_transform=[])),
    "layer 0": ("llama", lambda: Lora(target_modules=QV, layers_to_transform=0)),
    "empty pattern": ("llama", lambda: Lora(
        target_modules=QV, layers_to_transform=[0, 2], layers_pattern="")),
    "pattern": ("llama", lambda: Lora(
        target_modules=QV, layers_to_transform=[1], layers_pattern="la.*s")),
    "all but": ("llama", lambda: Lora(target_modules="all-linear", exclude_modules=r".*mlp.*")),
    "regex but": ("llama", lambda: Lora(
        target_modules=r".*proj", exclude_modules=["o_proj", "layers.0.mlp.up_proj"])),
    "whole name": ("llama", lambda: Lora(target_modules=["model.layers.0.self_attn.q_proj"])),
    "by itself": ("gpt2", lambda: Lora()),
    "all of gpt2": ("gpt2", lambda: Lora(target_modules="all-linear")),
    "all of bert": ("bert", lambda: Lora(target_modules="all-linear", task_type="SEQ_CLS")),
    "all of timm": ("timm", lambda: Lora(target_modules="all-linear")),
    "all of convs": ("convs", lambda: Lora(target_modules="all-linear")),
    # saved beside
    "head by task": ("bert", lambda: Lora(target_modules=["query"], task_type="SEQ_CLS")),
    "blocks": ("llama", lambda: Lora(target_modules=QV, modules_to_save=["mlp"])),
    "words saved": ("llama", lambda: Lora(target_modules=QV, modules_to_save=["embed_tokens"])),
    "all biases": ("timm", lambda: Lora(
        target_modules=["qkv"], modules_to_save=["norm", "head"], bias="all")),
    "biases in attention": ("attention", lambda: Lora(target_modules=["att"], bias="all")),
    # rows of words
    "rows": ("llama", lambda: Tokens(token_indices=[1, 3])),
    "rows tied": ("gpt2", lambda: Tokens(token_indices=[0, 7, 2])),
    "rows of a head": ("llama", lambda: Tokens(token_indices=[1, 3], target_modules=["lm_head"])),
    "rows of two": ("gpt2", lambda: Lora(
        target_modules=["c_attn"], trainable_token_indices={"wte": [3, 4], "wpe": [0]})),
    "rows of both": ("llama", lambda: Lora(
        target_modules=QV, trainable_token_indices={"embed_tokens": [3, 4], "lm_head": [1]})),
    # kernels
    **{f"lora {at}": ("convs", lambda at=at: Lora(target_modules=[at, "last"]))
       for at in ("stem", "point", "same", "cube")},
    **{f"dora {at}": ("convs", lambda at=at: Lora(target_modules=[at, "last"], use_dora=True))
       for at in ("stem", "point", "same", "cube")},
    **{f"ia3 {at}": ("convs", lambda at=at: IA3(
        target_modules=[at, "last"], feedforward_modules=[at]))
       for at in ("stem", "grouped", "dilated", "reflect", "cube")},
    **{f"loha {at} {eff}": ("convs", lambda at=at, eff=eff: LoHa(
        target_modules=[at, "last"], r=3, use_effective_conv2d=eff))
       for at in ("stem", "grouped", "dilated", "point", "same") for eff in (False, True)},
    **{f"lokr {at} {eff}": ("convs", lambda at=at, eff=eff: LoKr(
        target_modules=[at, "last"], r=1, use_effective_conv2d=eff))
       for at in ("stem", "grouped", "dilated", "point", "same") for eff in (False, True)},
    "large patches": ("patches", lambda: Lora(target_modules=["proj", "qkv"])),
    "large patches, dora": ("patches", lambda: Lora(target_modules=["proj"], use_dora=True)),
    # words
    "words padded": ("tables", lambda: Lora(target_modules=["padded", "last"])),
    "tied words": ("gpt2", lambda: Lora(target_modules=["wte", "c_attn"])),
    "tied head": ("gpt2", lambda: Lora(target_modules=["lm_head"])),
    # parameters
    "part of a name": ("experts", lambda: Lora(target_modules=[], target_parameters=["up"])),
    "ranks of parameters": ("experts", lambda: Lora(
        target_modules=[], target_parameters=["experts.up", "experts.down"],
        rank_pattern={"experts.up": 3}, alpha_pattern={"experts.down": 3})),
    # the other kinds
    "ia3 by itself": ("bert", lambda: IA3()),
    "ia3 gpt2 by itself": ("gpt2", lambda: IA3(fan_in_fan_out=True)),
    "ia3 started": ("bert", lambda: IA3(
        target_modules=["query"], feedforward_modules=[], init_ia3_weights=False)),
    "oft four": ("llama", lambda: OFT(
        target_modules=QV, oft_block_size=4, num_cayley_neumann_terms=4, module_dropout=0.3)),
    "oft biases": ("timm", lambda: OFT(target_modules=["qkv"], bias="all", oft_block_size=4)),
    "vera of a layer": ("llama", lambda: Vera(
        target_modules=QV, d_initial=0.3, layers_to_transform=[1])),
    "vera biases": ("timm", lambda: Vera(target_modules=["qkv"], bias="all")),
    "loha dropped": ("llama", lambda: LoHa(
        target_modules=QV, rank_dropout=0.3, module_dropout=0.2, init_weights=False)),
    "lokr of lycoris": ("llama", lambda: LoKr(target_modules=QV, init_weights="lycoris", r=2)),
    "lokr scaled": ("llama", lambda: LoKr(
        target_modules=QV, rank_dropout_scale=True, r=2, decompose_factor=3, alpha=3)),
    "lokr ranks": ("llama", lambda: LoKr(
        target_modules=[*QV, *MLP], r=2, rank_pattern={"up_proj": 1}, alpha_pattern={"q_proj": 7})),
    "lokr both": ("llama", lambda: LoKr(
        target_modules=[*QV, *MLP], r=1, decompose_both=True, decompose_factor=8)),
    "ln by itself": ("llama", lambda: LN()),
    "ln of others": ("timm", lambda: LN(target_modules=["norm1", "qkv"])),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_it_answers_as_peft_and_goes_back(case: str, tmp_path: Path) -> None:
    name, config = READ[case]
    want = made(name, config, 0, tmp_path / "theirs")
    assert distance(known.run(base(name), name), want) > 1e6
    model = fresh(name)
    before = state_of(model)
    load_peft(model, tmp_path / "theirs")
    assert distance(known.run(model, name), want) <= 16
    folder = save_peft(model, tmp_path / "ours")
    assert distance(known.run(of_peft(name, folder), name), want) <= 16
    own = surgery.save(model, tmp_path / "own.safetensors")
    assert torch.equal(known.run(surgery.load(fresh(name), own), name), known.run(model, name))
    assert state_of(surgery.revert(model)) == before


def test_what_is_saved_whole_is_whole_whatever_else_acts(tmp_path: Path) -> None:
    config = Lora(target_modules=["qkv"], modules_to_save=["head"])
    want = made("timm", config, 0, tmp_path)
    model = surgery.apply(fresh("timm"), at("head", unfreeze), name="first")
    with torch.no_grad():
        model.head.weight += 5
    load_peft(model, tmp_path, name="second")
    surgery.activate(model, "second")
    assert distance(known.run(model, "timm"), want) <= 16
    surgery.activate(model, "first")
    torch.testing.assert_close(model.head.weight, base("timm").head.weight + 5)


def configs(name: str) -> Any:
    return getattr(__import__("peft.tuners.lora.config", fromlist=[name]), name)


REFUSED: dict[str, tuple[str, Callable[[], Any], str]] = {
    "lora_ga": ("llama", lambda: Lora(target_modules=QV, init_lora_weights="lora_ga"),
                "init_lora_weights='lora_ga'"),
    **{f"lora {at}": ("convs", lambda at=at: Lora(target_modules=[at, "last"]), said)
       for at, said in (("grouped", "in groups, or dilated"), ("reflect", "pads by reflect"))},
    **{f"{kind.__name__} reflect": ("convs", lambda kind=kind: kind(target_modules=["reflect"]),
                                    "pads by reflect") for kind in (LoHa, LoKr)},
    **{f"oft {at}": ("convs", lambda at=at: OFT(target_modules=[at], oft_block_size=3, r=0),
                     f"{at} is a Conv2d, which OFT does not fit") for at in ("stem", "point")},
    "words shortened": ("tables", lambda: Lora(target_modules=["short"]), "shortens its words"),
    "dora of words": ("llama", lambda: Lora(target_modules=["embed_tokens"], use_dora=True),
                      "a table of words"),
    "dora below 0": ("llama", lambda: Lora(target_modules=QV, use_dora=True, lora_alpha=-4),
                     "of a negative alpha"),
    "coft": ("llama", lambda: OFT(target_modules=QV, oft_block_size=4, coft=True, eps=0.3),
             "coft=True"),
    "oft two": ("llama", lambda: OFT(
        target_modules=QV, oft_block_size=4, num_cayley_neumann_terms=2), "terms=2"),
    "alpha 0": ("llama", lambda: Lora(target_modules=QV, alpha_pattern={"v_proj": 0}),
                "alpha_pattern"),
    "attention's own": ("attention", lambda: Lora(target_modules="all-linear"),
                        "inside torch's attention"),
    "replication": ("llama", lambda: Lora(target_modules=QV, layer_replication=[[0, 2], [1, 3]]),
                    "layer_replication"),
    "qalora": ("llama", lambda: Lora(target_modules=QV, use_qalora=True, qalora_group_size=4),
               "use_qalora=True"),
    "tying": ("gpt2", lambda: Lora(target_modules=["wte"], ensure_weight_tying=True),
              "ensure_weight_tying=True"),
    "bdlora": ("llama", lambda: Lora(
        target_modules=["q_proj", "o_proj"], use_bdlora=configs("BdLoraConfig")(
            target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2)),
        "use_bdlora"),
    "kasa": ("llama", lambda: Lora(target_modules=QV, kasa_config=configs("KasaConfig")()),
             "kasa_config"),
    "velora": ("llama", lambda: Lora(
        target_modules=QV, velora_config=configs("VeloraConfig")(num_groups=4)), "velora_config"),
    "monteclora": ("llama", lambda: Lora(
        target_modules=QV, monteclora_config=configs("MontecloraConfig")()), "monteclora_config"),
    **{kind: ("llama", lambda kind=kind, more=more: getattr(peft, f"{kind}Config")(
        target_modules=QV, **more), "its peft_type is")
       for kind, more in (("AdaLora", {"total_step": 9}), ("BOFT", {"boft_block_size": 4}),
                          ("HRA", {}), ("FourierFT", {"n_frequency": 8}), ("RandLora", {}),
                          ("C3A", {"block_size": 8}), ("Miss", {"r": 8}))},
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, config, said = REFUSED[case]
    made(name, config, 0, tmp_path)
    known.refused(tmp_path, name, said)


def test_activated_lora_and_prompts_are_refused(tmp_path: Path) -> None:
    for kind, more in (("Lora", {"target_modules": QV, "alora_invocation_tokens": [3, 4]}),
                       ("PromptTuning", {"num_virtual_tokens": 2}),
                       ("PrefixTuning", {"num_virtual_tokens": 2}),
                       ("PromptEncoder", {"num_virtual_tokens": 2})):  # fmt: skip
        config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **more)
        peft.get_peft_model(fresh("llama"), config).save_pretrained(tmp_path / kind)
        said = "alora_invocation_tokens" if kind == "Lora" else "its peft_type is"
        known.refused(tmp_path / kind, "llama", said)


# starts that PEFT takes from the base: in float32, as it computes them -------------------------


def single() -> nn.Module:
    torch.manual_seed(0)
    return hf_llama().eval()


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=words_in()).logits
    return logits


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max()) / torch.finfo(torch.float32).eps


PRINCIPAL: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa scaled": {"init_lora_weights": "pissa", "lora_alpha": 3, "rank_pattern": {"v_proj": 3}},
    "pissa rs": {"init_lora_weights": "pissa", "lora_alpha": 3, "use_rslora": True},
    "pissa of all": {"init_lora_weights": "pissa", "r": 64},
    "mica": {"init_lora_weights": "mica", "r": 3},
    "olora": {"init_lora_weights": "olora"},
    "olora rs": {"init_lora_weights": "olora", "lora_alpha": 3, "use_rslora": True, "r": 3},
}


@pytest.mark.parametrize("case", PRINCIPAL)
def test_what_peft_takes_from_the_base_is_taken_from_what_is_added(
    case: str, tmp_path: Path
) -> None:
    model = peft.get_peft_model(single(), Lora(target_modules=QV, **PRINCIPAL[case])).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    want = answer(model)
    model.save_pretrained(tmp_path / "theirs")
    if case != "pissa of all":  # which PEFT does not load again
        again = peft.PeftModel.from_pretrained(single(), tmp_path / "theirs")
        assert apart(answer(again), want) == 0
    assert apart(answer(single()), want) > 1e4
    ours = single()
    before = state_of(ours)
    load_peft(ours, tmp_path / "theirs")
    assert apart(answer(ours), want) <= 16
    folder = save_peft(ours, tmp_path / "ours")  # as LoRA of twice the rank
    again = peft.PeftModel.from_pretrained(single(), folder).eval()
    assert apart(answer(again), want) <= 16
    assert state_of(surgery.revert(ours)) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "init_lora_weights='pissa' at"),
        ({"init_lora_weights": "olora", "lora_alpha": -1}, "init_lora_weights='olora' at"),
    ],
)
def test_what_else_peft_takes_from_the_base_is_refused(
    more: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = peft.get_peft_model(single(), Lora(target_modules=QV, **more))
    model.save_pretrained(tmp_path)
    ours = single()
    before = state_of(ours)
    with pytest.raises(FileError) as error:
        load_peft(ours, tmp_path)
    assert said in str(error.value)
    assert state_of(ours) == before


def test_a_start_that_peft_has_turned_into_a_plain_lora_is_one(tmp_path: Path) -> None:
    model = peft.get_peft_model(single(), Lora(target_modules=QV, init_lora_weights="pissa")).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    want = answer(model)
    model.save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    assert apart(answer(load_peft(single(), tmp_path / "theirs")), want) <= 64


# what is written ---------------------------------------------------------------------------------

WRITTEN: dict[str, tuple[str, Any]] = {
    "a shift beside": ("timm", [
        at("**.qkv", lora(rank=2, alpha=3)), at("blocks.0.attn.qkv", append(parts.shift()))]),
    "a shift of a kernel": ("timm", [
        at(weight("patch_embed.proj.weight"), lora(rank=2)),
        at("patch_embed.proj", append(parts.shift()))]),
    "pissa": ("timm", at("**.qkv", parts.pissa(rank=3))),
    "olora": ("gpt2", at("**.c_attn", parts.olora(rank=3, alpha=5))),
    "rows alone": ("llama", at(weight("**.embed_tokens.weight"), parts.rows(ids=[1, 3]))),
    "rows of a head": ("timm", [
        at("**.qkv", lora()), at(weight("head.weight"), parts.rows(ids=[1, 3]))]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written_answers_the_same_there(case: str, tmp_path: Path) -> None:
    name, rules = WRITTEN[case]
    model = surgery.apply(fresh(name), rules)
    stir(model, 0)
    want = known.run(model.eval(), name)
    assert distance(known.run(base(name), name), want) > 1e6
    folder = save_peft(model, tmp_path / "ours")
    assert distance(known.run(of_peft(name, folder), name), want) <= 32
    assert distance(known.run(load_peft(fresh(name), folder), name), want) <= 32


KEPT: dict[str, tuple[str, Any, str]] = {
    "a shift alone": ("timm", at("**.qkv", append(parts.shift())), "PEFT has it beside a LoRA"),
    "a shift and lengths": ("timm", [
        *surgery.methods.dora()[:1],
        at("blocks.0.attn.qkv", append(parts.shift()))], "DoRA's lengths"),
    "rows that differ": ("gpt2", [
        at(weight("**.wte.weight"), parts.rows(ids=[1])),
        at(weight("**.wpe.weight"), parts.rows(ids=[2]))], "the same rows of all tables"),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_what_peft_has_no_place_for_is_named(case: str, tmp_path: Path) -> None:
    name, rules, said = KEPT[case]
    model = surgery.apply(fresh(name), rules)
    with pytest.raises(FileError, match=said):
        save_peft(model, tmp_path / "ours")
    assert not list(tmp_path.iterdir())


def test_a_module_whose_name_ends_one_of_pefts_own_is_not_saved(tmp_path: Path) -> None:
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "out": nn.Linear(8, 8)})
    surgery.apply(model, [at("first", lora()), at("out", unfreeze)])
    with pytest.raises(FileError, match="PEFT would take its own lora_dropout for it"):
        save_peft(model, tmp_path / "ours")
