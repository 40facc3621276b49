"""KronA, Compacter, KAdaptation and FacT against their formulae, written out in plain PyTorch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from torch import Tensor, nn

import surgery
from surgery import MatchError, OperationError, RuleError, at, shared
from surgery.methods import kronecker, tensor_factors
from surgery.methods.kronecker import compacter_pp
from surgery.parts.fact import FacTTK, FacTTT, TTFactors, fact_tk, fact_tt, tk_factors, tt_factors
from surgery.parts.kronecker import (
    KAdaptation,
    KronA,
    PHMLinear,
    compacter,
    kadaptation,
    krona,
    phm_rule,
    slow_factors,
)
from tests.methods.reference import (
    BACKBONES,
    INPUTS,
    agrees,
    blocks,
    close,
    merges,
    parts,
    reverts,
    starts_as_the_base,
    stirred,
    untrained,
    vit,
)
from tests.models import hf_vit, tiny_vit

EVERY = ["vit", "swin"]
S = 0.7  # a scale that is not 1
RULES: dict[str, Any] = {
    "krona": kronecker.krona(scale=S),
    "compacter": kronecker.compacter(rank=8),
    "compacter_pp": compacter_pp(rank=8),
    "kadaptation": kronecker.kadaptation(t=4, scale=S),
    "fact_tt": tensor_factors.fact_tt(rank=4, scale=S),
    "fact_tk": tensor_factors.fact_tk(rank=4, scale=S),
}
LINEAR = ["krona", "kadaptation", "fact_tt", "fact_tk"]
SHARED: dict[str, dict[str, list[str]]] = {  # what is stored once, by width
    "compacter": {"shared/phm_rule/0": ["weight"]},
    "kadaptation": {"shared/slow_factors/0": ["a", "b"]},
    "fact_tt": {f"shared/tt_factors/{d}": ["down", "up"] for d in (24, 48)},
    "fact_tk": {f"shared/tk_factors/{d}": ["down", "up", "core"] for d in (24, 48)},
}
BORROW = {
    "compacter": lambda part: [part.down.rule, part.up.rule],
    "kadaptation": lambda part: [part.slow],
    "fact_tt": lambda part: [part.factors],
    "fact_tk": lambda part: [part.factors],
}


def own(parts: Any, end: str) -> list[Any]:
    """The parts at the sites whose path ends so, block by block."""
    return [part for key, part in parts.items() if key.endswith(f"{end}/parallel")]


def kron_sum(a: Tensor, b: Tensor) -> Tensor:
    """sum_i a_i (x) b_i, of matrices."""
    return sum((torch.kron(x, y) for x, y in zip(a, b, strict=True)), torch.tensor(0.0).to(a))


# --- the formula


def krona_by_hand(plain: Any, parts: Any) -> None:
    for block, part in zip(blocks(plain), own(parts, "qkv"), strict=True):
        q, _, v = block.attn.qkv.weight.chunk(3)
        q += S * torch.kron(part.a[0], part.b[0])
        v += S * torch.kron(part.a[1], part.b[1])


def kadaptation_by_hand(plain: Any, parts: Any) -> None:
    slow = parts["shared/slow_factors/0"]
    for block, part in zip(blocks(plain), own(parts, "qkv"), strict=True):
        for i, chunk in enumerate((0, 2)):  # q and v
            slow_a = slow.a[i][:, :, None] * slow.b[i][:, None, :]
            fast = part.u[i][:, :, None] * part.v[i][:, None, :]
            block.attn.qkv.weight.chunk(3)[chunk].add_(S * kron_sum(slow_a, fast))
            block.attn.qkv.bias.chunk(3)[chunk].add_(part.bias)


def fact_tt_by_hand(plain: Any, parts: Any) -> None:
    fact_by_hand(plain, parts, "tt", lambda part, factors: part.core.flatten(0, 1))


def fact_tk_by_hand(plain: Any, parts: Any) -> None:
    def cores(part: Any, factors: Any) -> list[Tensor]:
        p = part.mixing.flatten(1)  # this site's columns of P
        r, n = p.shape
        return [sum(p[j, k] * factors.core[:, :, j] for j in range(r)) for k in range(n)]

    fact_by_hand(plain, parts, "tk", cores)


def fact_by_hand(plain: Any, parts: Any, form: str, cores: Any) -> None:
    for end in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        for block, part in zip(blocks(plain), own(parts, end.split(".")[1]), strict=True):
            weight = block.get_submodule(end).weight
            d = min(weight.shape)
            factors = parts[f"shared/{form}_factors/{d}"]
            axis = 0 if len(weight) > d else 1  # slices of outputs, of inputs
            slices = weight.split(d, axis)
            for piece, core in zip(slices, cores(part, factors), strict=True):
                piece += S * factors.up @ core @ factors.down


def phm(x: Tensor, layer: Any, rule: Any) -> Tensor:
    fast = layer.s[:, :, None] * layer.t[:, None, :]
    return x @ kron_sum(rule.weight, fast) + layer.bias


def compacter_by_hand(plain: Any, parts: Any) -> None:
    rule = parts["shared/phm_rule/0"]
    for name in ("attn", "mlp"):
        chosen = [part for key, part in parts.items() if key.endswith(f"{name}/append")]
        for block, part in zip(blocks(plain), chosen, strict=bool(chosen)):
            module = getattr(block, name)
            module.forward = serial(module.forward, part, rule)


def serial(forward: Any, part: Any, rule: Any) -> Any:
    def then(*args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = forward(*args, **kwargs)
        h = phm(y, part.down, rule)
        gelu = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        return y + phm(gelu, part.up, rule)

    return then


@pytest.mark.parametrize("backbone", EVERY)
@pytest.mark.parametrize("method", RULES)
def test_it_computes_its_formula(method: str, backbone: str) -> None:
    by_hand = {**globals(), "compacter_pp_by_hand": compacter_by_hand}[f"{method}_by_hand"]
    agrees(backbone, RULES[method], by_hand)


def test_compacter_pp_leaves_attention_alone() -> None:
    keys = parts(surgery.apply(vit(), RULES["compacter_pp"]))
    assert [key for key in keys if "attn" in key] == []


# --- the start


@pytest.mark.parametrize("backbone", EVERY)
@pytest.mark.parametrize("method", LINEAR)
def test_it_starts_as_the_base(method: str, backbone: str) -> None:
    assert starts_as_the_base(backbone, RULES[method])


@pytest.mark.parametrize("backbone", EVERY)
def test_compacter_starts_near_the_base_and_not_at_it(backbone: str) -> None:
    model, x = BACKBONES[backbone](), INPUTS[backbone]
    with torch.no_grad():
        base = model(x)
        operated = surgery.apply(model, RULES["compacter"]).eval()(x)
    assert 0 < (operated - base).abs().max() < 1e-5 * base.abs().max()


def wide(rules: Any) -> dict[str, Any]:
    """Parts at width 192, where enough numbers are drawn to see how."""
    return parts(surgery.apply(tiny_vit(embed_dim=192), rules))


def uniform(tensor: Tensor, bound: float) -> None:
    tensor = tensor.detach()
    assert 0.98 * bound < tensor.abs().max() <= bound
    assert tensor.std() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_the_start_of_krona() -> None:
    for part in wide(kronecker.krona()).values():
        assert part.a.shape == (2, 16, 12)
        assert part.b.shape == (2, 12, 16)
        assert not part.a.any()
        uniform(part.b, 16**-0.5)


def test_the_start_of_kadaptation() -> None:
    made = wide(kronecker.kadaptation())
    slow = made.pop("shared/slow_factors/0")
    assert slow.a.shape == slow.b.shape == (2, 32, 32)
    uniform(slow.a, 0.01)
    uniform(slow.b, 0.01)
    for part in made.values():
        assert not part.u.any()
        assert not part.bias.any()
        uniform(part.v, 6**-0.5)
        assert (part.scale, part.drop.p) == (160.0, 0.5)


def test_the_start_of_compacter() -> None:
    made = wide(kronecker.compacter())
    rule = made.pop("shared/phm_rule/0")
    assert rule.weight.shape == (4, 4, 4)
    assert rule.weight.detach().std() == pytest.approx(1e-4, rel=0.4)
    for part in made.values():
        uniform(part.down.s, 2**0.5 * (6 / (48 + 1)) ** 0.5)
        assert part.down.t.shape == part.up.s.shape == (4, 6)
        assert part.down.t.abs().max() <= 2**0.5 * (6 / (6 + 1)) ** 0.5
        uniform(part.up.t, 2**0.5 * (6 / (48 + 1)) ** 0.5)
        assert not part.down.bias.any()
        assert not part.up.bias.any()


def test_the_start_of_fact_tt() -> None:
    made = wide(tensor_factors.fact_tt())
    factors = made.pop("shared/tt_factors/192")
    assert not factors.up.any()
    uniform(factors.down, 192**-0.5)
    for key, part in made.items():
        uniform(part.core, (64 if "fc2" in key else 16) ** -0.5)
        assert part.drop.p == 0.1


def test_the_start_of_fact_tk() -> None:
    made = wide(tensor_factors.fact_tk())
    factors = made.pop("shared/tk_factors/192")
    assert not factors.up.any()
    uniform(factors.down, 192**-0.5)
    uniform(factors.core, (6 / (2 * 32**2)) ** 0.5)
    uniform(torch.cat([part.mixing.flatten() for part in made.values()]), (6 / (32 + 144)) ** 0.5)


# --- training, revert, merge


@pytest.mark.parametrize("backbone", EVERY)
@pytest.mark.parametrize("method", RULES)
def test_everything_is_trained_and_comes_off(method: str, backbone: str) -> None:
    assert untrained(backbone, RULES[method]) == []
    reverts(backbone, RULES[method])


@pytest.mark.parametrize("backbone", EVERY)
@pytest.mark.parametrize("method", LINEAR)
def test_it_merges(method: str, backbone: str) -> None:
    merges(backbone, RULES[method])


@pytest.mark.parametrize("method", ["compacter", "compacter_pp"])
def test_compacter_does_not_merge(method: str) -> None:
    model = surgery.apply(vit(), RULES[method])
    with pytest.raises(OperationError, match=r"merge\(model\) at blocks\.0\.\w+: Compacter stands"):
        surgery.merge(model)
    model = surgery.apply(vit(), at("blocks.*.mlp.fc2", surgery.append(compacter(rank=8))))
    with pytest.raises(OperationError, match="Compacter is not linear"):
        surgery.merge(model)


# --- counts


@pytest.fixture(scope="module")
def vit_b() -> nn.Module:
    with torch.device("meta"):
        made: nn.Module = timm.create_model("vit_base_patch16_224", num_classes=0)
    return made


@pytest.mark.parametrize(
    ("rules", "trained"),
    [
        (kronecker.krona(), 36_864),
        (kronecker.compacter(), 57_088),
        (compacter_pp(), 28_576),
        (kronecker.kadaptation(), 50_176),
        (tensor_factors.fact_tt(rank=4), 8_448),
        (tensor_factors.fact_tt(rank=8), 21_504),
        (tensor_factors.fact_tt(), 61_440),
        (tensor_factors.fact_tk(rank=8), 13_952),
        (tensor_factors.fact_tk(rank=16), 30_976),
        (tensor_factors.fact_tk(), 86_528),
    ],
)
def test_the_counts_on_a_vit_b(vit_b: nn.Module, rules: Any, trained: int) -> None:
    assert surgery.plan(vit_b, rules).trainable == trained


def test_fact_has_twelve_slices_a_block(vit_b: nn.Module) -> None:
    made = surgery.plan(vit_b, tensor_factors.fact_tk()).parts.values()
    slices = [part.mixing[0].numel() for part in made if isinstance(part, FacTTK)]
    assert sum(slices) == 144


# --- what is shared


@pytest.mark.parametrize("method", SHARED)
def test_what_is_shared_is_stored_once(method: str, tmp_path: Path) -> None:
    model = stirred("swin", RULES[method])
    with safe_open(surgery.save(model, tmp_path / "it.safetensors"), "pt") as file:
        saved = {key: file.get_tensor(key).numel() for key in file.keys()}  # noqa: SIM118
    assert list(saved) == sorted(surgery.state_dict(model))
    assert {key for key in saved if key.startswith("parts.shared/")} == {
        f"parts.{key}.{name}" for key, tensors in SHARED[method].items() for name in tensors
    }
    added = surgery.plan(BACKBONES["swin"](), RULES[method]).added
    assert sum(n for key, n in saved.items() if key.startswith("parts.")) == added


@pytest.mark.parametrize("method", SHARED)
def test_who_shares_uses_one_object_in_a_copy_and_after_loading(
    method: str, tmp_path: Path
) -> None:
    model = stirred("swin", RULES[method])
    path = surgery.save(model, tmp_path / "it.safetensors")
    loaded = surgery.load(BACKBONES["swin"](), path, rules=RULES[method]).eval()
    for each in (model, copy.deepcopy(model), loaded):
        made = parts(each)
        pool = [id(made.pop(key)) for key in SHARED[method]]
        used = [id(core) for part in made.values() for core in BORROW[method](part)]
        assert set(used) == set(pool)
    with torch.no_grad():
        x = INPUTS["swin"]
        assert torch.equal(loaded(x), model(x))


# --- what is particular to each


def test_krona_chooses_factors_near_the_root() -> None:
    model = surgery.plan(nn.Sequential(nn.Linear(48, 24), nn.Linear(7, 7)), at(nn.Linear, krona()))
    first, second = (part for part in model.parts.values() if isinstance(part, KronA))
    assert (first.a.shape, first.b.shape) == ((1, 6, 6), (1, 4, 8))
    assert (second.a.shape, second.b.shape) == ((1, 7, 1), (1, 1, 7))


def test_krona_takes_the_shape_it_is_told() -> None:
    model = surgery.plan(nn.Linear(768, 768), at("", krona(a_out=2, a_in=3)))
    (part,) = model.parts.values()
    assert (part.a.shape, part.b.shape) == ((1, 2, 3), (1, 384, 256))


@pytest.mark.parametrize(("rules", "parts"), [(kronecker.krona(), 9), (RULES["kadaptation"], 10)])
def test_where_q_k_and_v_are_apart_all_three_get_one(rules: Any, parts: int) -> None:
    made = surgery.plan(hf_vit(), rules).parts
    assert len(made) == parts
    owns = [part for key, part in made.items() if not key.startswith("shared/")]
    assert all(part.rows == [slice(0, 24)] for part in owns)


def test_fact_takes_a_slice_for_each_of_q_k_and_v_where_they_are_apart() -> None:
    made = surgery.plan(hf_vit(), tensor_factors.fact_tt(rank=4)).parts
    slices = {key.split("/")[-2]: part.slices for key, part in made.items() if hasattr(part, "out")}
    assert sorted(slices.values()) == [(1, 1)] * 4 + [(1, 4), (4, 1)]


def test_kadaptation_has_slow_factors_of_their_own_for_q_and_v() -> None:
    (part,) = (
        p for key, p in parts(stirred("vit", RULES["kadaptation"])).items() if "/0/attn" in key
    )
    with torch.no_grad():
        before = part.affine()[0].clone()
        part.slow.a[1] += 1.0
        moved = (part.affine()[0] != before).any(1)
    assert moved.tolist() == [False] * 48 + [True] * 24


def test_kadaptation_drops_numbers_of_the_weight() -> None:
    model = surgery.apply(vit(), kronecker.kadaptation(t=4, scale=S, dropout=0.5)).train()
    part = next(p for p in parts(model).values() if isinstance(p, KAdaptation))
    with torch.no_grad():
        part.u.normal_()
        weight, _ = part.affine()
        dropped = part(torch.eye(24, dtype=torch.float64)).t()
    kept = dropped != 0
    assert torch.allclose(dropped[kept], 2 * weight[kept])
    assert 0.3 < kept[:24].double().mean() < 0.7


def test_fact_drops_what_the_cores_give() -> None:
    part = FacTTT(24, 96, TTFactors(24, 4), dropout=0.5).train()
    seen: list[Tensor] = []
    part.drop.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        part(x)
        want = torch.stack([x @ part.factors.down.t() @ core[0].t() for core in part.core], 2)
    torch.testing.assert_close(seen[0], want)


@pytest.mark.parametrize(("width", "out"), [(24, 60), (60, 24), (24, 10), (10, 24), (24, 48)])
def test_fact_cuts_the_slice_that_reaches_over_the_end(width: int, out: int) -> None:
    torch.manual_seed(0)
    d = min(width, out)
    factors = TTFactors(d, 4).double()
    part = FacTTT(width, out, factors).double().eval()
    x = torch.randn(2, 5, width, dtype=torch.float64)
    with torch.no_grad():
        factors.up.normal_()
        whole = torch.cat(
            [torch.cat([factors.up @ c @ factors.down for c in row], 1) for row in part.core]
        )
        want = x @ whole[:out, :width].t()
        close(part(x), want)
        close(x @ part.affine()[0].t(), want)


@pytest.mark.parametrize("ratio", [2.0, 2.5])
@pytest.mark.parametrize("method", ["fact_tt", "fact_tk"])
def test_fact_takes_any_ratio_of_the_ffn(method: str, ratio: float) -> None:
    model = surgery.apply(tiny_vit(mlp_ratio=ratio).double().eval(), RULES[method])
    x = INPUTS["vit"]
    with torch.no_grad():
        for p in surgery.parameters(model):
            p.add_(torch.randn_like(p), alpha=0.1)
        want = model(x)
        close(surgery.merge(model)(x), want)


def test_a_core_that_is_not_shared_belongs_to_its_part() -> None:
    model = surgery.apply(vit(), at("blocks.*.mlp.fc1", fact_tt(tt_factors(rank=4))))
    keys = [key for key in surgery.state_dict(model) if key.endswith("factors.down")]
    assert len(keys) == 3


# --- bad input


@pytest.mark.parametrize("method", ["krona", "kadaptation", "fact_tt", "fact_tk"])
def test_a_model_without_q_k_and_v_is_refused(method: str) -> None:
    plain = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24), nn.Linear(24, 5))
    with pytest.raises(MatchError, match=r"at\(qkv, ...\) matched no module"):
        surgery.apply(plain, RULES[method])


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (at("blocks.*.mlp.fc1", krona(a_out=5)), r"krona\(a_out=5\): the output of 96 features"),
        (at("blocks.*.mlp.fc1", krona(a_in=5)), "Its divisors nearest to 5: 3, 4, 6"),
        (at("blocks.*.mlp.fc1", krona(a_in=0)), r"krona\(a_in=0\): it must be an integer"),
        (at("blocks.*.mlp.fc1", krona(rows="a b c d e")), "which are not 5 equal chunks"),
        (at("blocks.*.attn.qkv", krona(rows="_q _k")), "it names no rows that are changed"),
        (at("blocks.*.attn.qkv", kadaptation()), r"t=32\): the output of 72 features"),
        (
            at("blocks.*.attn.qkv", kadaptation(shared(slow_factors(t=9)))),
            r"t=9\): the input of 24 features does not divide",
        ),
        (at("blocks.*.attn.qkv", kadaptation(shared(slow_factors(t=0)))), r"t=0"),
        (kronecker.compacter(n=5), r"compacter\(n=5\): the width of 24 features"),
        (kronecker.compacter(rank=6), r"compacter\(n=4\): the rank of 6 features"),
        (kronecker.compacter(rank=0), r"compacter\(rank=0\)"),
        (kronecker.compacter(n=-1), r"phm_rule\(n=-1\)"),
        (
            at("blocks.*.mlp", surgery.append(compacter(rule=lambda site: nn.Identity()))),
            "this makes a Identity, and no PHMRule",
        ),
        (tensor_factors.fact_tt(rank=0), r"tt_factors\(rank=0\)"),
        (tensor_factors.fact_tk(rank=0), r"tk_factors\(rank=0\)"),
        (at("blocks.*.mlp.fc1", fact_tk(slices=0)), r"fact_tk\(slices=0\)"),
        (
            at("blocks.*.mlp.fc1", fact_tk(shared(tt_factors()))),
            "this makes a TTFactors, and no TKFactors",
        ),
        (at("blocks.*.mlp.fc1", fact_tk(tk_factors)), "tk_factors is the word, not yet the part"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_said(rule: Any, said: str) -> None:
    with pytest.raises(RuleError, match=said):
        surgery.apply(vit(), rule)


def test_phm_is_a_sum_of_kronecker_products() -> None:
    torch.manual_seed(0)
    rule = phm_rule(n=3, std=1.0)(None)  # type: ignore[arg-type]
    layer = PHMLinear(12, 6, rule).double()  # type: ignore[arg-type]
    x = torch.randn(4, 12, dtype=torch.float64)
    with torch.no_grad():
        close(layer(x), phm(x, layer, rule))
