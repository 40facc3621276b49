"""KronA, Compacter and KAdaptation against their formulae, written out in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import MatchError, OperationError, RuleError, at, shared
from surgery.methods import kronecker
from surgery.methods.kronecker import compacter_pp
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
    BOTH,
    INPUTS,
    agrees,
    beside,
    blocks,
    close,
    is_one_object,
    is_stored_once,
    merges,
    parts,
    starts_as_the_base,
    stirred,
    trains_and_comes_off,
    uniform,
    vit,
    vit_b,
    wide,
)
from tests.models import hf_vit

S = 0.7  # a scale that is not 1
RULES: dict[str, Any] = {
    "krona": kronecker.krona(scale=S),
    "compacter": kronecker.compacter(rank=8),
    "compacter_pp": compacter_pp(rank=8),
    "kadaptation": kronecker.kadaptation(t=4, scale=S),
}
LINEAR = pytest.mark.parametrize("method", ["krona", "kadaptation"])
SHARED: dict[str, dict[str, list[str]]] = {  # what is stored once, by width
    "compacter": {"shared/phm_rule/0": ["weight"]},
    "kadaptation": {"shared/slow_factors/0": ["a", "b"]},
}
BORROW = {
    "compacter": lambda part: [part.down.rule, part.up.rule],
    "kadaptation": lambda part: [part.slow],
}


def kron_sum(a: Tensor, b: Tensor) -> Tensor:
    """sum_i a_i (x) b_i, of matrices."""
    return sum((torch.kron(x, y) for x, y in zip(a, b, strict=True)), torch.tensor(0.0).to(a))


# --- the formula


def krona_by_hand(plain: Any, parts: Any) -> None:
    for block, part in zip(blocks(plain), beside(parts, "qkv"), strict=True):
        q, _, v = block.attn.qkv.weight.chunk(3)
        q += S * torch.kron(part.a[0], part.b[0])
        v += S * torch.kron(part.a[1], part.b[1])


def kadaptation_by_hand(plain: Any, parts: Any) -> None:
    slow = parts["shared/slow_factors/0"]
    for block, part in zip(blocks(plain), beside(parts, "qkv"), strict=True):
        for i, chunk in enumerate((0, 2)):  # q and v
            slow_a = slow.a[i][:, :, None] * slow.b[i][:, None, :]
            fast = part.u[i][:, :, None] * part.v[i][:, None, :]
            block.attn.qkv.weight.chunk(3)[chunk].add_(S * kron_sum(slow_a, fast))
            block.attn.qkv.bias.chunk(3)[chunk].add_(part.bias)


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


@BOTH
@pytest.mark.parametrize("method", RULES)
def test_it_computes_its_formula(method: str, backbone: str) -> None:
    by_hand = {**globals(), "compacter_pp_by_hand": compacter_by_hand}[f"{method}_by_hand"]
    agrees(backbone, RULES[method], by_hand)


def test_compacter_pp_leaves_attention_alone() -> None:
    keys = parts(surgery.apply(vit(), RULES["compacter_pp"]))
    assert [key for key in keys if "attn" in key] == []


# --- the start


@BOTH
@LINEAR
def test_it_starts_as_the_base(method: str, backbone: str) -> None:
    assert starts_as_the_base(backbone, RULES[method])


@BOTH
def test_compacter_starts_near_the_base_and_not_at_it(backbone: str) -> None:
    model, x = BACKBONES[backbone](), INPUTS[backbone]
    with torch.no_grad():
        base = model(x)
        operated = surgery.apply(model, RULES["compacter"]).eval()(x)
    assert 0 < (operated - base).abs().max() < 1e-5 * base.abs().max()


def test_the_start_of_krona() -> None:
    for part in wide(kronecker.krona()).values():
        assert part.a.shape == (2, 16, 12)
        assert part.b.shape == (2, 12, 16)
        assert not part.a.any()
        uniform(part.b, 16**-0.5)


def test_the_start_of_kadaptation() -> None:
    new = wide(kronecker.kadaptation())
    slow = new.pop("shared/slow_factors/0")
    assert slow.a.shape == slow.b.shape == (2, 32, 32)
    uniform(slow.a, 0.01)
    uniform(slow.b, 0.01)
    for part in new.values():
        assert not part.u.any()
        assert not part.bias.any()
        uniform(part.v, 6**-0.5)
        assert (part.scale, part.drop.p) == (160.0, 0.5)


def test_the_start_of_compacter() -> None:
    new = wide(kronecker.compacter())
    rule = new.pop("shared/phm_rule/0")
    assert rule.weight.shape == (4, 4, 4)
    assert rule.weight.detach().std() == pytest.approx(1e-4, rel=0.4)
    for part in new.values():
        uniform(part.down.s, 2**0.5 * (6 / (48 + 1)) ** 0.5)
        assert part.down.t.shape == part.up.s.shape == (4, 6)
        assert part.down.t.abs().max() <= 2**0.5 * (6 / (6 + 1)) ** 0.5
        uniform(part.up.t, 2**0.5 * (6 / (48 + 1)) ** 0.5)
        assert not part.down.bias.any()
        assert not part.up.bias.any()


# --- training, revert, merge


@BOTH
@pytest.mark.parametrize("method", RULES)
def test_everything_is_trained_and_comes_off(method: str, backbone: str) -> None:
    trains_and_comes_off(backbone, RULES[method])


@BOTH
@LINEAR
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


@pytest.mark.parametrize(
    ("rules", "trained"),
    [
        (kronecker.krona(), 36_864),
        (kronecker.compacter(), 57_088),
        (compacter_pp(), 28_576),
        (kronecker.kadaptation(), 50_176),
    ],
)
def test_the_counts_on_a_vit_b(rules: Any, trained: int) -> None:
    assert surgery.plan(vit_b(), rules).trainable == trained


# --- what is shared


@pytest.mark.parametrize("method", SHARED)
def test_what_is_shared_is_stored_once(method: str, tmp_path: Path) -> None:
    is_stored_once("swin", RULES[method], SHARED[method], tmp_path / "it.safetensors")


@pytest.mark.parametrize("method", SHARED)
def test_who_shares_uses_one_object_in_a_copy_and_after_loading(
    method: str, tmp_path: Path
) -> None:
    path = tmp_path / "it.safetensors"
    is_one_object("swin", RULES[method], SHARED[method], path, BORROW[method])


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
    new = surgery.plan(hf_vit(), rules).parts
    assert len(new) == parts
    at_sites = [part for key, part in new.items() if not key.startswith("shared/")]
    assert all(part.rows == [slice(0, 24)] for part in at_sites)


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


# --- bad input


@LINEAR
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
