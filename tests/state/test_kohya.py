"""LoRA files of kohya's scripts and of LyCORIS: as the real library made them, and by formulas."""

from __future__ import annotations

import copy
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery
from surgery import at, lora, unfreeze
from surgery.errors import FileError, SurgeryError
from surgery.state.kohya_original import renamed
from tests.data.lycoris.make import CASES, HERE, fresh
from tests.models import TinyUNet, images

EPS = torch.finfo(torch.float32).eps
ANSWERS = load_file(HERE / "answers.safetensors")
ATTENTION = "down_blocks.0.attentions.0.attn1"


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(images(size=8).to(next(model.parameters()).dtype))


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max()) / torch.finfo(got.dtype).eps


def state_of(model: nn.Module) -> dict[str, object]:
    return {k: v for k, v in surgery.fingerprint(model).items() if not k.startswith("random")}


# by the real library ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_what_lycoris_made_answers_the_same(name: str, tmp_path: Path) -> None:
    model = fresh()
    before = state_of(model)
    assert distance(run(model), ANSWERS[name]) > 1e4
    surgery.load(model, HERE / f"{name}.safetensors")
    assert distance(run(model), ANSWERS[name]) <= 16
    own = surgery.save(model, tmp_path / "own.safetensors")
    assert torch.equal(run(surgery.load(fresh(), own)), run(model))
    assert state_of(surgery.revert(model)) == before


PARTS = {
    "locon": "LoRA", "locon_tucker": "LoRA", "dora": "Magnitude", "loha": "LoHa",
    "loha_tucker": "LoHa", "lokr": "LoKr", "lokr_both": "LoKr", "lokr_whole": "LoKr",
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_what_has_a_part_here_is_that_part_and_trains(name: str) -> None:
    model = surgery.load(fresh(), HERE / f"{name}.safetensors")
    kinds = {type(part).__name__ for part in model.surgery.modules()}
    assert PARTS[name] in kinds
    assert all(not p.requires_grad for p in model.conv_in.parameters())
    model(images(size=8)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in surgery.parameters(model))


# by formulas -----------------------------------------------------------------------------------


def tensors(**others: Any) -> dict[str, Tensor]:
    """LoRA at a linear layer, at a 3x3 and at a 1x1 convolution, as kohya's scripts write them."""
    torch.manual_seed(1)
    q, conv, out = f"lora_unet_{ATTENTION}_to_q".replace(".", "_"), "lora_unet_conv_in", "conv_out"
    return {
        f"{q}.lora_down.weight": torch.randn(2, 8), f"{q}.lora_up.weight": torch.randn(8, 2),
        f"{q}.alpha": torch.tensor(1.0),
        f"{conv}.lora_down.weight": torch.randn(4, 3, 3, 3),
        f"{conv}.lora_up.weight": torch.randn(8, 4, 1, 1), f"{conv}.alpha": torch.tensor(2.0),
        f"lora_unet_{out}.lora_down.weight": torch.randn(3, 8, 1, 1),
        f"lora_unet_{out}.lora_up.weight": torch.randn(4, 3, 1, 1),
        **others,
    }  # fmt: skip


def written(given: dict[str, Tensor], folder: Path, **about: str) -> Path:
    save_file({k: t.contiguous() for k, t in given.items()}, folder / "x.safetensors", about)
    return folder / "x.safetensors"


def by_hand(given: dict[str, Tensor], model: nn.Module) -> nn.Module:
    """W + alpha / rank * up down, for the modules of `tensors`."""
    with torch.no_grad():
        for path in (f"{ATTENTION}.to_q", "conv_in", "conv_out"):
            name, W = f"lora_unet_{path}".replace(".", "_"), model.get_submodule(path).weight
            down, up = given[f"{name}.lora_down.weight"], given[f"{name}.lora_up.weight"]
            scale = float(given.get(f"{name}.alpha", torch.tensor(len(down)))) / len(down)
            W += scale * (up.flatten(1) @ down.flatten(1)).reshape(W.shape)
    return model


def test_kohyas_lora_is_the_product_by_alpha_over_rank(tmp_path: Path) -> None:
    model = surgery.load(fresh(), written(tensors(), tmp_path), name="style")
    assert distance(run(model), run(by_hand(tensors(), fresh()))) <= 16
    assert [operation.name for operation in model.surgery.children()] == ["style"]


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace("lora_unet_", ""),
        lambda key: key.replace("lora_unet_", "lycoris_"),
        lambda key: key.replace("lora_unet_", "lora_transformer_"),
        lambda key: key.replace("lora_unet_", "unet.").replace("lora_down", "lora_A"),
        lambda key: key.replace("lora_down", "lora.down").replace("lora_up", "lora.up"),
        lambda key: key.replace("lora_unet_down_blocks_0_", "unet.down_blocks.0."),
    ],
)
def test_names_that_other_scripts_write_are_the_same(
    change: Callable[[str], str], tmp_path: Path
) -> None:
    whole = {change(key): t for key, t in tensors().items()}
    if any(key.startswith("unet.down") for key in whole):  # all of one model are written alike
        whole = {key.replace("lora_unet_", "unet."): t for key, t in whole.items()}
    model = surgery.load(fresh(), written(whole, tmp_path))
    assert distance(run(model), run(by_hand(tensors(), fresh()))) <= 16


ORIGINAL = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out",
    "input_blocks_1_0_in_layers_2": "down_blocks_0_resnets_0_conv1",
    "input_blocks_1_1_attn1_to_q": "down_blocks_0_attentions_0_attn1_to_q",
}  # fmt: skip
OF_TWO = {  # of a UNet with two residual layers on the way down
    "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
    "input_blocks_4_0_emb_layers_1": "down_blocks_1_resnets_0_time_emb_proj",
    "input_blocks_8_1_proj_in": "down_blocks_2_attentions_1_proj_in",
    "middle_block_0_out_layers_3": "mid_block_resnets_0_conv2",
    "middle_block_1_transformer_blocks_9_ff_net_2":
        "mid_block_attentions_0_transformer_blocks_9_ff_net_2",
    "middle_block_2_in_layers_2": "mid_block_resnets_1_conv1",
    "output_blocks_2_2_conv": "up_blocks_0_upsamplers_0_conv",
    "output_blocks_3_1_proj_out": "up_blocks_1_attentions_0_proj_out",
    "output_blocks_8_0_skip_connection": "up_blocks_2_resnets_2_conv_shortcut",
    "label_emb_0_2": "add_embedding_linear_2", "time_embed_0": "time_embedding_linear_1",
    "something_else": "something_else", "input_blocks_x": "input_blocks_x",
    "middle_block_1_0_x": "middle_block_1_0_x",
}  # fmt: skip


def test_names_of_the_first_unet_are_those_of_diffusers() -> None:
    depth = [f"down_blocks_0_resnets_{i}_conv1" for i in range(2)]
    assert {name: renamed(depth)(name) for name in OF_TWO} == OF_TWO


def test_a_file_of_the_first_unets_names_is_read(tmp_path: Path) -> None:
    given = tensors()
    for old, new in ORIGINAL.items():
        given = {key.replace(f"unet_{new}.", f"unet_{old}."): t for key, t in given.items()}
    assert any("input_blocks_1_1" in key for key in given)
    model = surgery.load(fresh(), written(given, tmp_path))
    assert distance(run(model), run(by_hand(tensors(), fresh()))) <= 16


def test_no_alpha_or_one_of_0_is_the_rank_and_a_negative_one_takes_away(tmp_path: Path) -> None:
    given = tensors()
    for key in [key for key in given if key.endswith("alpha")]:
        given[key] = torch.tensor(0.0)
    plain = {key: t for key, t in given.items() if not key.endswith("alpha")}
    model = surgery.load(fresh(), written(given, tmp_path))
    assert distance(run(model), run(by_hand(plain, fresh()))) <= 16
    given = {k: -2 * t if k.endswith("alpha") else t for k, t in tensors().items()}
    model = surgery.load(fresh(), written(given, tmp_path))
    assert distance(run(model), run(by_hand(given, fresh()))) <= 16


def test_a_bias_and_a_difference_are_added(tmp_path: Path) -> None:
    given = tensors(**{
        "lora_unet_conv_in.diff_b": torch.ones(8),
        "lora_unet_down_blocks_0_resnets_0_norm1.w_norm": torch.full((8,), 0.5),
        "lora_unet_down_blocks_0_resnets_0_norm1.b_norm": torch.full((8,), 0.25),
    })  # fmt: skip
    want = by_hand(given, fresh())
    with torch.no_grad():
        want.conv_in.bias += 1
        want.down_blocks[0]["resnets"][0].norm1.weight += 0.5
        want.down_blocks[0]["resnets"][0].norm1.bias += 0.25
    model = surgery.load(fresh(), written(given, tmp_path))
    assert distance(run(model), run(want)) <= 16


def test_a_projection_that_attention_does_not_call_is_changed_at_its_weight(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    merged = copy.deepcopy(attention)
    given = {f"lora_te_att_out_proj.{k}": torch.randn_like(t) for k, t in PAIR.items()}
    down, up = given.values()
    with torch.no_grad():
        merged.out_proj.weight += up @ down
    model = nn.ModuleDict({"att": attention})
    surgery.load(model, written(given, tmp_path))
    torch.testing.assert_close(attention(x, x, x)[0], merged(x, x, x)[0])


def test_a_base_that_is_operated_already_is_changed_from_what_it_was(tmp_path: Path) -> None:
    given = {"lora_unet_conv_in.diff": torch.ones(8, 3, 3, 3)}
    model = surgery.apply(fresh(), at("conv_in", unfreeze), name="first")
    with torch.no_grad():
        model.conv_in.weight += 5
    surgery.load(model, written(given, tmp_path), name="second")
    surgery.activate(model, "second")
    torch.testing.assert_close(model.conv_in.weight, fresh().conv_in.weight + 1)


def test_half_precision_is_computed_wide(tmp_path: Path) -> None:
    model = surgery.load(fresh().bfloat16(), HERE / "loha_dora.safetensors")
    assert model.conv_in.weight.dtype == torch.bfloat16
    want = surgery.load(fresh(), HERE / "loha_dora.safetensors")
    torch.testing.assert_close(
        model.conv_in.weight.float(), want.conv_in.weight, rtol=2**-7, atol=2**-7
    )


# with what PEFT says of it, as diffusers writes it ---------------------------------------------

CONFIGS: dict[str, dict[str, Any]] = {
    "scaled": {"r": 2, "lora_alpha": 6, "rank_pattern": {"to_v": 3}},
    "rs": {"use_rslora": True, "lora_alpha": 3, "alpha_pattern": {"to_q": 1}},
    "dora": {"use_dora": True, "r": 2},
    "bias": {"lora_bias": True, "r": 2, "target_modules": ["to_out.0", "conv_in"]},
}


def by_diffusers(
    options: dict[str, Any], folder: Path, word: str = "unet.", **more: Any
) -> tuple[Path, Tensor]:
    """A file named as diffusers does (of a pipeline, or of one model), and PEFT's answer."""
    config = peft.LoraConfig(**{"target_modules": ["to_q", "to_v", "conv1"], **options})
    model = peft.get_peft_model(fresh(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    names = {"base_model.model.": word, ".lora_A.": ".lora.down.", ".lora_B.w": ".lora.up.w"}
    given = {}
    for key, tensor in peft.get_peft_model_state_dict(model).items():
        for old, new in names.items():
            key = key.replace(old, new)
        given[key] = tensor
    said = {f"{word}{k}": v for k, v in config.to_dict().items() if not isinstance(v, set)}
    said |= {f"{word}target_modules": sorted(config.target_modules), **more}
    text = json.dumps(said, default=lambda value: getattr(value, "value", str(value)))
    return written(given, folder, lora_adapter_metadata=text), run(model)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("case", CONFIGS)
def test_what_peft_says_in_a_file_of_diffusers_is_heard(case: str, tmp_path: Path) -> None:
    for word in ("unet.", ""):
        path, want = by_diffusers(CONFIGS[case], tmp_path, word)
        assert distance(run(surgery.load(fresh(), path)), want) <= 16


def test_what_it_says_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path, _ = by_diffusers({"r": 2}, tmp_path, **{"unet.something_new": 3})
    refused(fresh(), path, "something_new=3 is an option that is not known here")
    refused(fresh(), written(tensors(), tmp_path, lora_adapter_metadata="["), "is damaged")


# several models in a file ----------------------------------------------------------------------


class Encoder(nn.Module):
    """As the text encoders of transformers: up to version 4, all of it is in a `text_model`."""

    def __init__(self, width: int = 8, layers: int = 1, level: bool = False) -> None:
        super().__init__()
        blocks = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(width, width)})] * 0)
        for _ in range(layers):
            blocks.append(nn.ModuleDict({"q_proj": nn.Linear(width, width)}))
        inner = nn.ModuleDict({"layers": blocks})
        if level:
            self.text_model = inner
        else:
            self.layers = blocks

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.text_model["layers"] if hasattr(self, "text_model") else self.layers
        for block in blocks:
            x = block["q_proj"](x)
        return x


def of_encoder(word: str, width: int = 8, layers: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {
        f"lora_{word}_text_model_layers_{i}_q_proj.{name}": tensor
        for i in range(layers)
        for name, tensor in (("lora_down.weight", torch.randn(2, width)),
                             ("lora_up.weight", torch.randn(width, 2)))
    }  # fmt: skip


@pytest.mark.parametrize("level", [True, False])
def test_a_model_takes_what_is_its_own_and_the_rest_is_told(level: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder, path = Encoder(level=level), written(tensors(**of_encoder("te")), tmp_path)
    with pytest.warns(UserWarning, match=r"modules more than this TinyUNet's \(1 for te\)"):
        model = surgery.load(fresh(), path)
    assert distance(run(model), run(by_hand(tensors(), fresh()))) <= 16
    before = encoder(torch.ones(1, 8))
    with pytest.warns(UserWarning, match=r"more than this Encoder's \(3 for unet\)"):
        surgery.load(encoder, path)
    assert not torch.equal(encoder(torch.ones(1, 8)), before)


def test_of_two_encoders_each_takes_its_own_by_its_size(tmp_path: Path) -> None:
    path = written({**of_encoder("te1"), **of_encoder("te2", 12, 2)}, tmp_path)
    for encoder in (Encoder(), Encoder(12, 2)):
        with pytest.warns(UserWarning, match="modules more"):
            surgery.load(encoder, path)
        assert len(encoder.surgery.default.hooked_sites) == len(encoder.layers)


def test_what_fits_alike_is_refused_until_the_model_is_named(tmp_path: Path) -> None:
    path = written({**of_encoder("te1"), **of_encoder("te2")}, tmp_path)
    with pytest.raises(FileError, match="for te1 and for te2 fits this Encoder alike"):
        surgery.load(Encoder(), path)
    encoder = Encoder(level=True)
    with pytest.warns(UserWarning, match="1 for te2"):
        surgery.load(nn.ModuleDict({"te1": encoder}), path)
    whole = nn.ModuleDict({"te1": Encoder(level=True), "te2": Encoder(level=True)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surgery.load(whole, path)
    assert len(whole.surgery.default.hooked_sites) == 2


def test_what_is_left_of_one_model_is_no_other_models(tmp_path: Path) -> None:
    """Words that a model's own names begin with tell no models."""

    def build(depth: int) -> nn.ModuleDict:
        layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(depth)])
        return nn.ModuleDict({"transformer": layers, "last": nn.Linear(8, 8)})

    names = ["transformer_0", "transformer_1", "last"]
    given = {f"lycoris_{name}.{k}": t.clone() for name in names for k, t in PAIR.items()}
    path = written(given, tmp_path)
    assert len(surgery.load(build(2), path).surgery.default.hooked_sites) == 3
    refused(build(1), path, "it has lycoris_transformer_1, and this ModuleDict")


# what is refused -------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_b = nn.ModuleDict({"c": nn.Linear(8, 8)})
        self.a = nn.ModuleDict({"b_c": nn.Linear(8, 8)})
        self.tied, self.reflect = nn.Linear(8, 8), nn.Conv2d(3, 8, 3, padding_mode="reflect")
        self.other, self.table = nn.Linear(8, 8), nn.Embedding(8, 8)
        self.plain = nn.Linear(8, 8)
        self.other.weight = self.tied.weight


PAIR = {"lora_down.weight": torch.ones(2, 8), "lora_up.weight": torch.ones(8, 2)}
HADA = {f"hada_w{i}_{j}": torch.ones(8, 8) for i in (1, 2) for j in "ab"}
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "unknown tensor": ({"lora_unet_x.lora_down.weight": torch.ones(2, 8),
                        "lora_unet_x.magic": torch.ones(1)}, "lora_unet_x.magic is no tensor"),
    "unknown module": ({f"lora_unet_x.{k}": t for k, t in PAIR.items()}, "it has lora_unet_x"),
    "half": ({"lora_unet_table.lora_down.weight": torch.ones(2, 8)}, "together mean nothing here"),
    "ambiguous": ({f"lora_unet_a_b_c.{k}": t for k, t in PAIR.items()}, "may be a_b.c or a.b_c"),
    "tied": ({f"lora_unet_tied.{k}": t for k, t in PAIR.items()}, "tied and other are one, or"),
    "table": ({f"lora_unet_table.{k}": t for k, t in PAIR.items()}, "table is a Embedding"),
    "padding": ({"lora_unet_reflect.diff": torch.ones(8, 3, 3, 3)}, "pads by reflect"),
    "kinds": ({f"lora_unet_plain.{k}": t for k, t in (PAIR | HADA).items()}, "mean nothing here"),
    "alpha": ({"lora_unet_table.alpha": torch.ones(1), **{
        f"lora_unet_plain.{k}": t for k, t in PAIR.items()}}, "table has alpha there, and"),
    "twice": ({f"lora_unet_reflect.{k}": t for k, t in PAIR.items()}
              | {"lora_unet_reflect.lora_A.weight": torch.ones(2, 8)}, "which are one"),
    "shape": ({"lora_unet_plain.lora_down.weight": torch.ones(2, 5),
               "lora_unet_plain.lora_up.weight": torch.ones(8, 2)}, "and (2, 8) in this model"),
    "size": ({"lora_unet_plain.lora_down.weight": torch.ones(2, 8),
              "lora_unet_plain.lora_up.weight": torch.ones(9, 2)}, "modules of other sizes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_by_name(case: str, tmp_path: Path) -> None:
    given, said = REFUSED[case]
    refused(Odd(), written(given, tmp_path), said)


SHAPES: dict[str, tuple[dict[str, Tensor], str]] = {
    "down": ({"lora_down.weight": torch.ones(2, 5, 3, 3)}, "and (2, 3, 3, 3) in this model"),
    "integers": ({"lora_up.weight": torch.ones(8, 4).int()}, "is of I32"),
    "alpha": ({"alpha": torch.tensor(float("nan"))}, "no number that makes sense"),
    "large alpha": ({"alpha": torch.tensor(1e30)}, "no number that makes sense"),
    "alphas": ({"alpha": torch.ones(3)}, "no number that makes sense"),
    "bias": ({"diff_b": torch.ones(3)}, "cannot become"),
    "lengths": ({"dora_scale": torch.ones(5, 5)}, "cannot become"),
    "middle": ({"lora_mid.weight": torch.ones(3, 2, 3, 3)}, "in this model"),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_do_not_fit_are_refused_with_both(case: str, tmp_path: Path) -> None:
    changes, said = SHAPES[case]
    given = tensors(**{f"lora_unet_conv_in.{name}": t for name, t in changes.items()})
    refused(fresh(), written(given, tmp_path), said)


def refused(model: nn.Module, path: Path, said: str) -> None:
    before = state_of(model)
    with pytest.raises(FileError) as error:
        surgery.load(model, path)
    assert said in str(error.value)
    assert "\n" in str(error.value)
    assert len(str(error.value)) < 2000
    assert state_of(model) == before


def test_what_has_no_bias_gets_none(tmp_path: Path) -> None:
    name = f"lora_unet_{ATTENTION}_to_q".replace(".", "_")
    given = tensors(**{f"{name}.diff_b": torch.ones(8)})
    refused(fresh(), written(given, tmp_path), "to_q has no bias")


def test_options_of_our_own_files_are_refused_for_others(tmp_path: Path) -> None:
    path = written(tensors(), tmp_path)
    for options in ({"rules": [at("conv_in", lora())]}, {"head": False}, {"verify": True}):
        with pytest.raises(FileError, match=f"{next(iter(options))}= is of files that surgery"):
            surgery.load(fresh(), path, **options)


def test_a_plain_checkpoint_is_none_of_these(tmp_path: Path) -> None:
    refused(fresh(), written(fresh().state_dict(), tmp_path), "was not written by surgery.save")
    (tmp_path / "folder").mkdir()
    refused(fresh(), tmp_path / "folder", "it is a folder")


@pytest.mark.parametrize("seed", range(120))
def test_damaged_files_are_loaded_or_refused_and_never_half(seed: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = sorted(CASES)
    path = tmp_path / "x.safetensors"
    given = load_file(HERE / f"{names[seed % len(names)]}.safetensors")

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    key = sorted(given)[pick(len(given))]
    value = given.pop(key)
    odd = [
        value.flatten(), value[..., :0] if value.dim() else value[None][:0], value.int(),
        value[None], value * float("nan"), value.double() * 1e300, torch.ones(3, 1, 2),
    ]  # fmt: skip
    tails = [
        "",
        ".x",
        ".alpha",
        ".lora_mid.weight",
        ".hada_t1",
        ".diff_b",
        ".dora_scale",
        ".weight",
    ]
    name = key if pick(2) else key.rpartition(".")[0] + tails[pick(len(tails))]
    if pick(4):
        given[name] = odd[pick(len(odd))].contiguous()
    save_file(given, path)
    if seed % 5 == 0:
        data = bytearray(path.read_bytes())
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header[key if key in header else next(iter(header))] = {
            "dtype": "F32", "shape": [[2**40, 2**40], [-1], [0, 2**62], ["a"]][pick(4)],
            "data_offsets": [0, 0]}  # fmt: skip
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data[8 + length :]))
    model = fresh()
    before, said = state_of(model), ""
    try:
        surgery.revert(surgery.load(model, path))
    except SurgeryError as error:
        said = str(error)
    assert not said or ("\n" in said and len(said) < 3000)
    assert state_of(model) == before


def test_the_unet_of_these_tests_is_what_the_files_were_made_of() -> None:
    assert isinstance(fresh(), TinyUNet)
