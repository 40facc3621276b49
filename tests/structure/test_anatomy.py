"""Roles are found by structure: on many families, whatever their attributes are called."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from itertools import product

import pytest
import timm
import torch
from torch import Tensor, nn

import surgery
from surgery import adapter, at, attn, block, ffn, head, nearest, norm, parallel, span, where
from surgery.rules.roles import ROLES
from surgery.structure.anatomy import roles_of
from surgery.structure.module_tree import Site, Tree
from surgery.structure.path import generalise
from tests import models

Found = dict[str, set[str]]


def gated_vit() -> nn.Module:
    from timm.layers import SwiGLU

    return models.tiny_vit(mlp_layer=SwiGLU)


def packed_vit() -> nn.Module:
    from timm.layers import GluMlp

    return models.tiny_vit(mlp_layer=GluMlp)


def scaled_vit() -> nn.Module:
    return models.tiny_vit(init_values=1e-5, qk_norm=True, class_token=False, global_pool="avg")


def norm_first_encoder() -> nn.Module:
    return models.encoder(norm_first=True)


def meta(name: str, **changes) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.device("meta"):
            return timm.create_model(name, **changes)

    build.__name__ = name
    return build


swin = meta("swin_tiny_patch4_window7_224")
convnext = meta("convnext_tiny")
deit = meta("deit3_small_patch16_224")
eva = meta("eva02_tiny_patch14_224")
beit = meta("beit_base_patch16_224")
conv_mlp = meta("convnext_tiny", conv_mlp=True)

# model, address of its blocks, then below a block: attention, FFN, the norm that feeds the FFN
LAYOUTS = [
    (models.tiny_vit, "blocks.*", "attn", "mlp", "norm2"),
    (gated_vit, "blocks.*", "attn", "mlp", "norm2"),
    (packed_vit, "blocks.*", "attn", "mlp", "norm2"),
    (scaled_vit, "blocks.*", "attn", "mlp", "norm2"),
    (deit, "blocks.*", "attn", "mlp", "norm2"),
    (eva, "blocks.*", "attn", "mlp", "norm2"),
    (beit, "blocks.*", "attn", "mlp", "norm2"),
    (swin, "layers.*.blocks.*", "attn", "mlp", "norm2"),
    (convnext, "stages.*.blocks.*", None, "mlp", "norm"),
    (conv_mlp, "stages.*.blocks.*", None, "mlp", "norm"),
    (
        models.torchvision_vit,
        "encoder.layers.encoder_layer_{}",
        "self_attention",
        "mlp",
        "ln_2",
    ),
    (models.hf_vit, "vit.layers.*", "attention", "mlp", "layernorm_after"),
    (
        models.hf_bert,
        "bert.encoder.layer.*",
        "attention",
        "(intermediate.dense to output.dense)",
        "attention.output.LayerNorm",
    ),
    (models.hf_clip_vision, "encoder.layers.*", "self_attn", "mlp", "layer_norm2"),
    (models.hf_gpt2, "transformer.h.*", "attn", "mlp", "ln_2"),
    (models.hf_llama, "model.layers.*", "self_attn", "mlp", "post_attention_layernorm"),
    (models.encoder, "layers.*", "self_attn", "(linear1 to linear2)", None),
    (norm_first_encoder, "layers.*", "self_attn", "(linear1 to linear2)", "norm2"),
]
NAMED = pytest.mark.parametrize(
    ("build", "blocks", "attention", "mlp"),
    [x[:4] for x in LAYOUTS],
    ids=[x[0].__name__ for x in LAYOUTS],
)
BUILDS = [x[0] for x in LAYOUTS]
IDS = pytest.mark.parametrize("build", BUILDS, ids=[build.__name__ for build in BUILDS])


def shapes(sites) -> set[str]:
    """Addresses of sites, with the numbers in torchvision's names left out too."""
    return {generalise(re.sub(r"layer_\d+", "layer_{}", s.path)) for s in sites}


def find(model: nn.Module, pattern) -> list[Site]:
    return list(where(pattern).find(Tree(model)))


@NAMED
def test_blocks_attention_and_ffn_are_where_they_are(build, blocks, attention, mlp):
    tree = Tree(build())
    roles = roles_of(tree)
    assert shapes(roles["block"]) == {blocks}
    assert shapes(roles["ffn"]) == {f"{blocks}.{mlp}"}
    assert shapes(roles["attn"]) == ({f"{blocks}.{attention}"} if attention else set())
    assert len(roles["ffn"]) == len(roles["block"])
    assert len(roles["attn"]) in (0, len(roles["block"]))


@pytest.mark.parametrize(
    ("build", "blocks", "feeds"),
    [(x[0], x[1], x[4]) for x in LAYOUTS if x[4]],
    ids=[x[0].__name__ for x in LAYOUTS if x[4]],
)
def test_nearest_norm_before_an_ffn_is_the_one_that_feeds_it(build, blocks, feeds):
    tree = Tree(build())
    near = nearest(norm, before=ffn)
    assert shapes(near.find(tree)) == {f"{blocks}.{feeds}"}
    assert len(near.find(tree)) == len(ffn.find(tree))


@IDS
def test_widths_of_an_ffn_are_those_of_its_ends(build):
    for site in find(build(), ffn):
        weights = [p for p in site.entry.module.parameters() if p.dim() > 1]
        assert site.width == site.out
        assert any(site.width in weight.shape for weight in weights)


@pytest.mark.parametrize(
    ("build", "path", "width", "out"),
    [
        (models.tiny_vit, "head", 24, 5),
        (models.torchvision_vit, "heads", 24, 5),
        (models.hf_vit, "classifier", 24, 5),
        (models.hf_bert, "classifier", 24, 5),
        (models.hf_gpt2, "lm_head", 24, 32),
        (models.hf_llama, "lm_head", 24, 32),
        (swin, "head", 768, 1000),
        (convnext, "head", 768, 1000),
    ],
)
def test_the_head_is_what_projects_to_the_classes(build, path, width, out):
    (found,) = find(build(), head)
    assert (found.path, found.width, found.out) == (path, width, out)


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (models.tiny_vit, "patch_embed"),
        (models.torchvision_vit, "conv_proj"),
        (models.hf_vit, "vit.embeddings"),
        (models.hf_bert, "bert.embeddings"),
    ],
)
def test_the_embedding_is_what_takes_the_input(build, path):
    assert [s.path for s in find(build(), surgery.embed)] == [path]


def test_qkv_are_the_projections_before_the_last_of_attention():
    fused = {"blocks.*.attn.qkv"}
    split = {f"vit.layers.*.attention.{name}_proj" for name in "qkv"}
    assert shapes(find(models.tiny_vit(), surgery.qkv)) == fused
    assert shapes(find(models.hf_vit(), surgery.qkv)) == split


def test_norms_are_all_norms_of_a_vit():
    model = models.tiny_vit()
    kinds = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert [s.module for s in find(model, norm)] == kinds


def test_a_model_without_a_head_has_none():
    assert find(models.tiny_vit(num_classes=0), head) == []


def test_a_plain_perceptron_has_no_role_but_that_of_its_parts():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert find(model, ffn | attn | block) == []


@pytest.mark.parametrize(("width", "hidden", "found"), [(16, 64, 1), (16, 4, 0), (16, 15, 0)])
def test_a_pair_of_layers_is_an_ffn_where_it_widens_and_a_bottleneck_is_none(width, hidden, found):
    pair = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
    blocks = nn.Sequential(nn.Sequential(nn.LayerNorm(width), pair))
    assert len(find(blocks, ffn)) == found


@pytest.mark.parametrize(
    ("between", "found"),
    [(nn.GELU(), 1), (nn.AvgPool2d(2), 0), (nn.Conv2d(32, 32, 3, padding=1), 0)],
    ids=["pointwise", "pool", "convolution"],
)
def test_what_mixes_positions_in_between_is_no_ffn(between, found):
    pair = nn.Sequential(nn.Conv2d(8, 32, 1), between, nn.Conv2d(32, 8, 1))
    assert len(find(nn.Sequential(nn.Sequential(nn.BatchNorm2d(8), pair)), ffn)) == found


def test_a_convolution_with_a_wide_kernel_is_no_ffn():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3)))
    assert find(model, ffn) == []


# soundness: a token of the output sees that token of the input, and no other


def mixing(module: nn.Module, width: int) -> Tensor:
    """(i, j) -> whether output token i has any gradient in input token j."""
    x = torch.randn(1, 5, width, requires_grad=True)
    out = module(x)
    y = out if isinstance(out, Tensor) else out[0]
    rows = [torch.autograd.grad(y[0, i].square().sum(), x, retain_graph=True)[0] for i in range(5)]
    return torch.stack(rows)[:, 0].abs().amax(-1) > 0


@pytest.mark.parametrize(
    "build",
    [
        models.tiny_vit,
        gated_vit,
        packed_vit,
        scaled_vit,
        models.torchvision_vit,
        models.hf_vit,
        models.hf_clip_vision,
        models.hf_gpt2,
        models.hf_llama,
    ],
)
def test_an_ffn_mixes_no_tokens(build):
    for site in find(build().eval(), ffn):
        assert torch.equal(mixing(site.module, site.width), torch.eye(5, dtype=torch.bool))


@pytest.mark.parametrize("build", [models.tiny_vit, models.hf_vit])
def test_attention_mixes_all_tokens(build):
    for site in find(build().eval(), attn):
        assert mixing(site.module, site.width).all()


class Between(nn.Module):
    """A block from what its FFN's entry is given to what its exit gives."""

    def __init__(self, site: Site, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.entry, self.exit, self.act = site.entry.module, site.exit.module, between

    def forward(self, x: Tensor) -> Tensor:
        return self.exit(self.act(self.entry(x)))


@pytest.mark.parametrize("build", [models.hf_bert, models.encoder])
def test_a_split_ffn_runs_up_and_down_again(build):
    for site in find(build(), ffn):
        assert site.is_span
        assert site.entry.out == site.exit.width > site.width == site.out
        path = Between(site, nn.functional.gelu)
        assert torch.equal(mixing(path, site.width), torch.eye(5, dtype=torch.bool))


# names mean nothing


def renamed(model: nn.Module) -> nn.Module:
    """The same modules under other names, in the same order."""
    for i, module in enumerate(list(model.modules())):
        children = list(module._modules.values())
        module._modules.clear()
        letters = ("".join(pair) for pair in product(string.ascii_letters, repeat=2))
        module._modules.update({f"{next(letters)}{i}": child for child in children})
    return model


def spots(model: nn.Module) -> dict[str, list[tuple[int, int]]]:
    roles = roles_of(Tree(model))
    return {
        name: [(id(s.entry.module), id(s.exit.module)) for s in sites]
        for name, sites in roles.items()
    }


@IDS
def test_roles_survive_the_renaming_of_every_attribute(build):
    model = build()
    before = spots(model)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()} - {""}
    assert spots(renamed(model)) == before
    assert not names & {name.rpartition(".")[2] for name, _ in model.named_modules()}


@IDS
def test_nearest_norm_survives_the_renaming_of_every_attribute(build):
    model = build()
    before = [id(s.module) for s in find(model, nearest(norm, before=ffn))]
    assert [id(s.module) for s in find(renamed(model), nearest(norm, before=ffn))] == before


@IDS
def test_roles_are_the_same_inside_a_larger_model(build):
    model = build()
    before = spots(model)
    outer = nn.Module()
    outer.inner = model
    assert {name: spots(outer)[name] for name in ("block", "ffn", "attn")} == {
        name: before[name] for name in ("block", "ffn", "attn")
    }


def test_finding_roles_changes_nothing():
    model = models.tiny_vit()
    before = surgery.fingerprint(model)
    roles_of(Tree(model))
    print(surgery.anatomy(model))
    assert surgery.fingerprint(model) == before


# what is grafted at a role runs


def inputs(build: Callable[[], nn.Module]) -> object:
    if build in (models.hf_bert, models.hf_gpt2, models.hf_llama):
        return {"input_ids": models.words_in()}
    if build in (models.encoder, norm_first_encoder):
        return torch.randn(2, 5, 24)
    return models.images()


RUN = [build for build in BUILDS if build not in (swin, convnext, conv_mlp, deit, eva, beit)]
POST_NORM = (models.encoder,)  # no module tells which of its norms runs before the FFN


@pytest.mark.parametrize("build", RUN)
@pytest.mark.parametrize("role", [ffn, attn, block], ids=repr)
def test_what_is_grafted_at_a_role_runs(build, role):
    check_that_grafts_run(build, role)


@pytest.mark.parametrize("build", [build for build in RUN if build not in POST_NORM])
def test_what_is_grafted_from_the_norm_to_the_end_of_the_ffn_runs(build):
    check_that_grafts_run(build, span(norm, ffn))


def check_that_grafts_run(build, place) -> None:
    model = build()
    count = len(find(model, place))
    rule = at(place, parallel(adapter(rank=2)), times=count)
    surgery.apply(model, rule, example=inputs(build))
    assert len(surgery.parameters(model)) == 4 * count > 0


def test_every_role_has_a_word_of_the_public_screen():
    assert [getattr(surgery, role.name) for role in ROLES] == list(ROLES)


def test_attention_has_the_width_of_its_projections_not_of_a_norm_per_head():
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(**models.hf_sizes(), vocab_size=32, head_dim=12, num_key_value_heads=3)
    model = Qwen3Model(config)
    assert {site.shape for site in roles_of(Tree(model))["attn"]} == {(24, 24, -1)}


def opt() -> nn.Module:
    from transformers import OPTConfig, OPTModel

    names = {"ffn_dim": 64, "word_embed_proj_dim": 24, "max_position_embeddings": 32}
    config = {k: v for k, v in models.hf_sizes().items() if k != "intermediate_size"}
    return OPTModel(OPTConfig(**config, **names, vocab_size=32)).eval()


def test_projections_that_follow_one_another_are_one_branch():
    """OPT registers attention, its norm, fc1, fc2 and their norm, in this order."""
    norms = {s.path for s in nearest(norm, before=attn).find(Tree(opt()))}
    assert norms == {f"decoder.layers.{i}.self_attn_layer_norm" for i in range(3)}


def test_what_takes_coordinates_is_no_projection_of_features():
    with torch.device("meta"):
        tree = Tree(timm.create_model("swinv2_tiny_window8_256"))
    roles = roles_of(tree)
    assert {generalise(s.path) for s in roles["qkv"]} == {"layers.*.blocks.*.attn.qkv"}
    assert {s.shape[:2] for s in roles["attn"]} == {(d, d) for d in (96, 192, 384, 768)}
    assert {s.shape[:2] for s in roles["block"]} == {(d, d) for d in (96, 192, 384, 768)}


@pytest.mark.parametrize(
    ("build", "final"),
    [
        (models.tiny_vit, ["norm"]),
        (models.hf_llama, ["model.norm"]),
        (models.hf_clip_vision, ["post_layernorm"]),
        (opt, ["decoder.final_layer_norm"]),
        (models.hf_bert, []),
        (swin, ["norm"]),
    ],
)
def test_anatomy_names_the_norm_of_the_output(build, final):
    rows = surgery.anatomy(build()).rows
    assert [row[1] for row in rows if row[0] == "norm" and row[-1] == "output"] == final


def test_anatomy_says_which_norm_feeds_what_and_how_it_knows():
    lines = str(surgery.anatomy(models.encoder())).splitlines()
    assert lines[-1] == "what feeds what: by order; anatomy(model, example) runs a forward to see"
    model = models.encoder().eval()
    lines = str(surgery.anatomy(model, torch.randn(2, 5, 24))).splitlines()
    feeds = [(line.split()[1], line.split()[-1]) for line in lines if line.startswith("norm")]
    assert ("layers.*.norm1", "ffn") in feeds
    assert ("layers.0.norm2", "attn") in feeds or ("layers.*.norm2", "attn") in feeds  # of the next
    assert lines[-1] == "what feeds what: by a forward"


def test_the_output_projection_is_told_by_its_width_wherever_it_is_registered():
    from transformers import Phi3Config, Phi3Model

    roles = roles_of(
        Tree(Phi3Model(Phi3Config(**models.hf_sizes(), vocab_size=32, pad_token_id=0)))
    )
    assert {generalise(s.path) for s in roles["proj"]} == {"layers.*.self_attn.o_proj"}
    assert {generalise(s.path) for s in roles["qkv"]} == {"layers.*.self_attn.qkv_proj"}


class Grouped(nn.Module):
    """Attention whose one projection makes more of queries than of keys and values."""

    def __init__(self, keys: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 24 + 2 * keys)
        self.proj = nn.Linear(24, 24)


@pytest.mark.parametrize(("keys", "whole"), [(24, True), (12, False), (48, False)])
def test_fused_is_what_makes_a_third_of_each(keys: int, whole: bool) -> None:
    model = models.tiny_vit()
    for one in model.blocks:
        one.attn = Grouped(keys)
    roles = roles_of(Tree(model))
    assert len(roles["qkv"]) == 3
    assert [s.path for s in roles["fused"]] == [f"blocks.{i}.attn.qkv" for i in range(3) if whole]


def test_the_layers_of_feed_forward_networks() -> None:
    roles = roles_of(Tree(models.tiny_vit()))
    assert [s.path for s in roles["fc1"]] == [f"blocks.{i}.mlp.fc1" for i in range(3)]
    assert [s.path for s in roles["fc2"]] == [f"blocks.{i}.mlp.fc2" for i in range(3)]
    gated = roles_of(Tree(models.hf_llama()))
    names = [s.path.rpartition(".")[2] for s in gated["fc1"]]
    assert names == ["gate_proj", "up_proj"] * 3
    assert {s.path.rpartition(".")[2] for s in gated["fc2"]} == {"down_proj"}
    split = roles_of(Tree(models.encoder()))
    assert [s.path for s in split["fc1"]] == ["layers.0.linear1", "layers.1.linear1"]
    assert [s.path for s in split["fc2"]] == ["layers.0.linear2", "layers.1.linear2"]
