"""The named sets: listed with their sources, and each of them does what its line says."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import surgery
from surgery import MatchError, OperationError, Rule, RuleError, rulesets
from surgery import methods as sets
from surgery.parts import Adapter, DynamicAdapter, MixtureOfAdapters, QuickGELU
from tests.models import hf_vit, images, tiny_vit, torchvision_vit

ALL = [str(row[0]) for row in rulesets().rows]
CLOUDS = {"pointgst", "point_peft"}  # not for images: tests/laws/test_points.py
SETS = [name for name in ALL if name not in CLOUDS]
SMALL = {
    "kadaptation": {"t": 4},
    "mhr": {"heads": 4},
    "mhr_z": {"heads": 4},
    "language_adapter": {"domains": 1},
}  # for such widths
AWAY = {  # from the base at the start, at random or as the paper writes
    "adapter_plus", "adapterx", "adapterx_serial", "arc", "bi_adaptformer", "bi_lora", "compacter",
    "compacter_pp", "dapt", "daptx", "hra", "idpt", "kasa", "loreft", "meft", "mona", "noah", "sct",
    "ssf", "vpt_deep", "vpt_shallow", "prefix_tuning", "fourierft", "vblora", "unilora", "snell",
    "losa", "res_tuning",
}  # fmt: skip
UNREAD = {"dapt", "daptx"}  # the last prompt, by a head that looks at the class token alone
# learn once they are filled with what was trained before
LATER = {"mhr_z", "scalearn", "adapter_fusion"}


def rules_of(name: str) -> list[Rule]:
    made: list[Rule] = getattr(sets, name)(**SMALL.get(name, {}))
    return made


def trained(model: nn.Module) -> set[str]:
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name for name in names if not name.startswith("surgery.")}


def answer(model: nn.Module) -> torch.Tensor:
    out = model(images())
    return out if isinstance(out, torch.Tensor) else out.logits


def test_all_sets_are_listed_with_a_line_and_a_source():
    table = rulesets()
    assert [row[0] for row in table.rows] == ALL
    for _, line, source in table.rows:
        assert line.endswith(".")
        assert source
    assert "Li et al. 2024" in str(table)


def test_a_set_is_a_list_of_rules():
    from surgery.methods import rules_named

    for name in ALL:
        rules = rules_named(name)
        assert rules
        assert all(isinstance(rule, Rule) for rule in rules)
        assert rules_named(name) == rules
        assert len(rules) <= 8, "a few lines"


@pytest.mark.parametrize("build", [tiny_vit, torchvision_vit, hf_vit])
@pytest.mark.parametrize("name", SETS)
def test_every_set_starts_as_it_says_and_reverts(name, build):
    model = build().eval()
    nn.init.normal_(list(model.parameters())[-2])  # of the head, which torchvision starts at zero
    before, mark = answer(model), surgery.fingerprint(model)
    kwargs = {"pixel_values": images()} if build is hf_vit else images()
    try:
        surgery.apply(model, rules_of(name), example=kwargs)
    except (MatchError, RuleError):
        assert (name, build) in REFUSED
    else:
        assert (name, build) not in REFUSED
        if build is torchvision_vit:  # attention there rounds by what is frozen
            if name not in AWAY:
                torch.testing.assert_close(answer(model), before, atol=1e-5, rtol=0)
        else:
            assert torch.equal(answer(model), before) is (name not in AWAY)
        surgery.revert(model)
    assert surgery.fingerprint(model) == mark


APART = {  # dropout on features, which no weight of nn.MultiheadAttention meets; or it is no linear
    "fact_tt", "fact_tk", "bi_lora", "kadaptation", "noah", "llama_adapter",
    "toplora", "molora", "hydralora", "lily", "mlae",
}  # fmt: skip
REFUSED = {
    *((name, torchvision_vit) for name in APART),
    ("meft", hf_vit),  # its blocks are called one by one
    ("llama_adapter", hf_vit),  # no one linear makes q, k and v
}


@pytest.mark.parametrize("name", sorted(set(SETS) - LATER))
def test_every_trainable_parameter_is_reached_by_the_gradient(name):
    model = surgery.apply(tiny_vit(), rules_of(name))
    torch.manual_seed(0)
    for p in [*surgery.parameters(model), *(b for b in model.parameters() if b.dim() == 1)]:
        torch.nn.init.normal_(p, std=0.1)
    for m in model.modules():
        if isinstance(m, DynamicAdapter):  # which, where its scale is 0, adds and learns nothing
            torch.nn.init.ones_(m.scale.bias)
    for _ in range(12):  # what is drawn each time, of ranks or experts, is drawn at last
        loss = answer(model.train()).square().sum()
        (loss + surgery.balance_loss(model)).backward()
    dry = [n for n, p in model.named_parameters() if p.requires_grad and not _given(p)]
    assert [n for n in dry if "norm/insert" not in n] == []
    assert bool(dry) is (name in UNREAD)


def _given(p: nn.Parameter) -> bool:
    return p.grad is not None and bool(p.grad.any())


@pytest.mark.parametrize("name", SETS)
def test_every_set_travels_as_data(name, tmp_path):
    model = surgery.apply(tiny_vit(), rules_of(name))
    names = {**vars(surgery), **vars(surgery.parts), "nn": nn}
    assert all(eval(repr(rule), names) == rule for rule in rules_of(name))
    base = {k: v for k, v in model.state_dict().items() if not k.startswith("surgery.")}
    fresh = tiny_vit()
    fresh.load_state_dict(base)
    again = surgery.load(fresh, surgery.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(answer(again.eval()), answer(model.eval()))


MERGE = {
    "lora", "vera", "tied_lora", "prolora", "dylora", "krona", "kadaptation", "fact_tt", "fact_tk",
    "bi_lora", "poly", "mhr", "mhr_z", "mhr_mu", "ssf", "arc", "arc_att", "repadapter",
    "repadapter_att", "vida", "sparse", "bitfit", "linear_probe", "full", "dora", "pissa", "olora",
    "hira", "rlrr", "loha", "lokr", "miss", "oft", "hra", "ia3", "ln_tuning",
    "mica", "delora", "tinylora", "kasa", "glora", "deft", "peanut",
    "rslora", "lora_fa",
    "hydra", "beft", "fourierft", "waveft", "c3a", "randlora", "vblora", "unilora", "gralora",
    "mlae", "adalora", "snell", "boft", "goft", "psoft", "road",
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_set_merges_or_says_why_not(name):
    model = surgery.apply(tiny_vit().eval(), rules_of(name))
    answers = answer(model)
    if name in MERGE:
        torch.testing.assert_close(answer(surgery.merge(model)), answers)
    else:
        mark = surgery.fingerprint(model)
        with pytest.raises(OperationError, match=r"merge\(model\) at "):
            surgery.merge(model)
        assert surgery.fingerprint(model) == mark


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


def test_rulesets_is_a_function_that_lists_what_methods_exports():
    assert inspect.isfunction(rulesets)
    assert sorted(sets.__all__) == sorted(ALL)
    assert all(inspect.isfunction(getattr(surgery.methods, name)) for name in ALL)


@pytest.mark.parametrize("name", SETS)
def test_every_set_runs_on_the_meta_device(name):
    with torch.device("meta"):
        model = surgery.apply(tiny_vit(), rules_of(name))
        out = model(torch.randn(2, 3, 16, 16))
    assert (out.shape, out.is_meta) == ((2, 5), True)
    surgery.revert(model)
