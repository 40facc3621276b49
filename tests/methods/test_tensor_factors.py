"""FacT, of two forms, against its formula written out in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import MatchError, RuleError, at, shared
from surgery.methods import tensor_factors
from surgery.parts.fact import FacTTK, FacTTT, TTFactors, fact_tk, fact_tt, tk_factors, tt_factors
from tests.methods.reference import (
    BOTH,
    INPUTS,
    agrees,
    beside,
    blocks,
    close,
    is_one_object,
    is_stored_once,
    merges,
    starts_as_the_base,
    trains_and_comes_off,
    uniform,
    vit,
    vit_b,
    wide,
)
from tests.models import hf_vit, tiny_vit

S = 0.7  # a scale that is not 1
RULES: dict[str, Any] = {
    "fact_tt": tensor_factors.fact_tt(rank=4, scale=S),
    "fact_tk": tensor_factors.fact_tk(rank=4, scale=S),
}
SHARED: dict[str, dict[str, list[str]]] = {  # what is stored once, by width
    "fact_tt": {f"shared/tt_factors/{d}": ["down", "up"] for d in (24, 48)},
    "fact_tk": {f"shared/tk_factors/{d}": ["down", "up", "core"] for d in (24, 48)},
}
EACH = pytest.mark.parametrize("method", RULES)


# --- the formula


def tt_cores(part: Any, factors: Any) -> Tensor:
    cores: Tensor = part.core.flatten(0, 1)
    return cores


def tk_cores(part: Any, factors: Any) -> list[Tensor]:
    p = part.mixing.flatten(1)  # this site's columns of P
    r, n = p.shape
    return [sum(p[j, k] * factors.core[:, :, j] for j in range(r)) for k in range(n)]


def by_hand(form: str, cores: Any) -> Any:
    def rewrite(plain: Any, parts: Any) -> None:
        for end in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            sites = zip(blocks(plain), beside(parts, end.split(".")[1]), strict=True)
            for block, part in sites:
                weight = block.get_submodule(end).weight
                d = min(weight.shape)
                factors = parts[f"shared/{form}_factors/{d}"]
                axis = 0 if len(weight) > d else 1  # slices of outputs, of inputs
                slices = weight.split(d, axis)
                for piece, core in zip(slices, cores(part, factors), strict=True):
                    piece += S * factors.up @ core @ factors.down

    return rewrite


@BOTH
@EACH
def test_it_computes_its_formula(method: str, backbone: str) -> None:
    rewrite = {"fact_tt": by_hand("tt", tt_cores), "fact_tk": by_hand("tk", tk_cores)}[method]
    agrees(backbone, RULES[method], rewrite)


# --- the start


@BOTH
@EACH
def test_it_starts_as_the_base(method: str, backbone: str) -> None:
    assert starts_as_the_base(backbone, RULES[method])


def test_the_start_of_fact_tt() -> None:
    new = wide(tensor_factors.fact_tt())
    factors = new.pop("shared/tt_factors/192")
    assert not factors.up.any()
    uniform(factors.down, 192**-0.5)
    for key, part in new.items():
        uniform(part.core, (64 if "fc2" in key else 16) ** -0.5)
        assert part.drop.p == 0.1


def test_the_start_of_fact_tk() -> None:
    new = wide(tensor_factors.fact_tk())
    factors = new.pop("shared/tk_factors/192")
    assert not factors.up.any()
    uniform(factors.down, 192**-0.5)
    uniform(factors.core, (6 / (2 * 32**2)) ** 0.5)
    uniform(torch.cat([part.mixing.flatten() for part in new.values()]), (6 / (32 + 144)) ** 0.5)


# --- training, revert, merge


@BOTH
@EACH
def test_everything_is_trained_and_comes_off(method: str, backbone: str) -> None:
    trains_and_comes_off(backbone, RULES[method])


@BOTH
@EACH
def test_it_merges(method: str, backbone: str) -> None:
    merges(backbone, RULES[method])


# --- counts


@pytest.mark.parametrize(
    ("rules", "trained"),
    [
        (tensor_factors.fact_tt(rank=4), 8_448),
        (tensor_factors.fact_tt(rank=8), 21_504),
        (tensor_factors.fact_tt(), 61_440),
        (tensor_factors.fact_tk(rank=8), 13_952),
        (tensor_factors.fact_tk(rank=16), 30_976),
        (tensor_factors.fact_tk(), 86_528),
    ],
)
def test_the_counts_on_a_vit_b(rules: Any, trained: int) -> None:
    assert surgery.plan(vit_b(), rules).trainable == trained


def test_fact_has_twelve_slices_a_block() -> None:
    new = surgery.plan(vit_b(), tensor_factors.fact_tk()).parts.values()
    slices = [part.mixing[0].numel() for part in new if isinstance(part, FacTTK)]
    assert sum(slices) == 144


# --- what is shared


@EACH
def test_what_is_shared_is_stored_once(method: str, tmp_path: Path) -> None:
    is_stored_once("swin", RULES[method], SHARED[method], tmp_path / "it.safetensors")


@EACH
def test_who_shares_uses_one_object_in_a_copy_and_after_loading(
    method: str, tmp_path: Path
) -> None:
    path = tmp_path / "it.safetensors"
    is_one_object("swin", RULES[method], SHARED[method], path, lambda part: [part.factors])


# --- what is particular to it


def test_fact_takes_a_slice_for_each_of_q_k_and_v_where_they_are_apart() -> None:
    new = surgery.plan(hf_vit(), tensor_factors.fact_tt(rank=4)).parts
    slices = {key.split("/")[-2]: part.slices for key, part in new.items() if hasattr(part, "out")}
    assert sorted(slices.values()) == [(1, 1)] * 4 + [(1, 4), (4, 1)]


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
@EACH
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


@EACH
def test_a_model_without_q_k_and_v_is_refused(method: str) -> None:
    plain = nn.Sequential(nn.Linear(24, 96), nn.GELU(), nn.Linear(96, 24), nn.Linear(24, 5))
    with pytest.raises(MatchError, match=r"at\(qkv, ...\) matched no module"):
        surgery.apply(plain, RULES[method])


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (tensor_factors.fact_tt(rank=0), r"tt_factors\(rank=0\)"),
        (tensor_factors.fact_tk(rank=0), r"tk_factors\(rank=0\)"),
        (at("blocks.*.mlp.fc1", fact_tk(slices=0)), r"fact_tk\(slices=0\)"),
        (
            at("blocks.*.mlp.fc1", fact_tk(shared(tt_factors()))),
            "this makes a TTFactors, and no TKFactors",
        ),
        (at("blocks.*.mlp.fc1", fact_tk(tk_factors)), "tk_factors is the word, not yet the part"),
    ],
)
def test_a_wrong_value_is_said(rule: Any, said: str) -> None:
    with pytest.raises(RuleError, match=said):
        surgery.apply(vit(), rule)
