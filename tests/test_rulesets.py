"""The named sets: listed with their sources, and each of them does what its line says."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import surgery
from surgery import Rule, rulesets
from surgery import rulesets as listed
from surgery.parts import Adapter, MixtureOfAdapters, QuickGELU
from tests.models import hf_vit, images, tiny_vit, torchvision_vit

SETS = ["adapterx_ffn", "adapter", "adaptformer", "linear_probe", "full"]


def trained(model: nn.Module) -> set[str]:
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name for name in names if not name.startswith("surgery.")}


def answer(model: nn.Module) -> torch.Tensor:
    out = model(images())
    return out if isinstance(out, torch.Tensor) else out.logits


def test_all_sets_are_listed_with_a_line_and_a_source():
    table = rulesets()
    assert [row[0] for row in table.rows] == SETS
    for _, line, source in table.rows:
        assert line.endswith(".")
        assert source
    assert "Li et al. 2024" in str(table)


def test_a_set_is_a_list_of_rules():
    from surgery.rulesets import named

    for name in SETS:
        rules = named(name)
        assert rules
        assert all(isinstance(rule, Rule) for rule in rules)
        assert named(name) == rules


@pytest.mark.parametrize("build", [tiny_vit, torchvision_vit, hf_vit])
@pytest.mark.parametrize("name", SETS)
def test_every_set_starts_as_the_model_and_reverts_to_it(name, build):
    model = build().eval()
    before, mark = answer(model), surgery.fingerprint(model)
    kwargs = {"pixel_values": images()} if build is hf_vit else images()
    surgery.apply(model, name, example=kwargs)
    assert torch.equal(answer(model), before)
    assert surgery.fingerprint(surgery.revert(model)) == mark


@pytest.mark.parametrize("name", SETS)
def test_every_trainable_parameter_is_reached_by_the_gradient(name):
    model = surgery.apply(tiny_vit(), name)
    for p in model.surgery.parameters():
        torch.nn.init.normal_(p, std=0.1)
    loss = answer(model).square().sum()
    if name == "adapterx_ffn":
        loss = loss + surgery.balance_loss(model)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in surgery.parameters(model))


HEAD = {"head.weight", "head.bias"}
NORMS = {f"blocks.{i}.norm2.{tensor}" for i in range(3) for tensor in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "unfrozen"),
    [
        ("adapterx_ffn", HEAD | NORMS),
        ("adapter", HEAD),
        ("adaptformer", HEAD),
        ("linear_probe", HEAD),
        ("full", {name for name, _ in tiny_vit().named_parameters()}),
    ],
)
def test_just_what_a_set_says_is_trained(name, unfrozen):
    assert trained(surgery.apply(tiny_vit(), name)) == unfrozen


def parts(name: str, kind: type[nn.Module]) -> list[nn.Module]:
    model = surgery.apply(tiny_vit(), name)
    return [m for m in model.surgery.modules() if isinstance(m, kind)]


def holds(part: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in part.modules())


def test_adapterx_has_one_mixture_as_in_the_paper():
    (mixture,) = parts("adapterx_ffn", MixtureOfAdapters)
    assert mixture.down.shape == (4, 64, 24 // 3)
    assert (mixture.heads, mixture.top_k) == (3, 1)
    assert holds(mixture, nn.ReLU)
    assert [m.p for m in mixture.modules() if isinstance(m, nn.Dropout)] == [0.1]


def test_adapter_and_adaptformer_are_as_in_their_papers():
    serial, beside = parts("adapter", Adapter), parts("adaptformer", Adapter)
    assert [a.down.weight.shape for a in serial] == [(8, 24)] * 3
    assert [a.down.weight.shape for a in beside] == [(64, 24)] * 3
    assert all(holds(a, QuickGELU) for a in serial)
    assert all(holds(a, nn.ReLU) for a in beside)


def filled(name: str) -> nn.Module:
    torch.manual_seed(3)
    model = surgery.apply(tiny_vit(depth=1), name).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.surgery.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def by_hand(name: str) -> torch.Tensor:
    """The block of AdaptFormer, NOAH's adapter and Adapter-X written out."""
    model = filled(name)
    (part,) = [m for m in model.surgery.modules() if isinstance(m, (Adapter, MixtureOfAdapters))]
    with surgery.disabled(model), torch.no_grad():
        block = model.blocks[0]
        u = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images()))))
        u = u + block.attn(block.norm1(u))
        z = block.norm2(u)
        if name == "adapter":
            y = block.mlp(z)
            y = u + y + part(y)
        elif name == "adaptformer":
            y = u + block.mlp(z) + 0.1 * part(u)
        else:
            y = u + block.mlp(z) + 0.1 * part(z).output
        return model.forward_head(model.norm(y))


@pytest.mark.parametrize("name", ["adapter", "adaptformer", "adapterx_ffn"])
def test_a_set_computes_the_equation_of_its_paper(name):
    with torch.no_grad():
        torch.testing.assert_close(answer(filled(name)), by_hand(name))


@pytest.mark.parametrize("name", ["adapter", "adaptformer", "adapterx_ffn"])
def test_the_equations_above_are_not_those_of_the_base(name):
    model = filled(name)
    with torch.no_grad():
        changed = answer(model)
        with surgery.disabled(model):
            assert (answer(model) - changed).abs().max() > 1e-3


def test_rulesets_is_the_function_and_its_module_stays_reachable():
    assert listed is rulesets
    assert inspect.isfunction(rulesets)
    assert sorted(__import__("surgery.rulesets", fromlist=["x"]).__all__) == sorted(SETS)
