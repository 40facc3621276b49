"""Updates made of the base weight, against matrices written out by hand and against peft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import RuleError, at, qkv
from surgery.methods import made_of_weights as sets
from surgery.parts import made_of_weights as family
from surgery.parts.base_weight import BaseWeight
from tests.methods.reference import (
    BOTH,
    agrees,
    blocks,
    close,
    merges,
    parts,
    starts_as_the_base,
    stirred,
    trains_and_comes_off,
    vit,
    vit_b,
)
from tests.methods.test_weight_updates import adapted, layer, taken

Weighed = Callable[[Any, nn.Linear], tuple[Tensor, Tensor]]


def of_mica(p: Any, f: nn.Linear) -> tuple[Tensor, Tensor]:
    U = torch.linalg.svd(f.weight, full_matrices=False)[0]
    return f.weight + U[:, -3:] @ p.A, f.bias


def of_delora(p: Any, f: nn.Linear) -> tuple[Tensor, Tensor]:
    W = f.weight

    def bounded(A: Tensor, B: Tensor, bound: Tensor) -> Tensor:
        sums = [torch.outer(B[:, i] / B[:, i].norm(), A[i] / A[i].norm()) for i in range(len(A))]
        return bound / len(A) * sum(sums) @ W.norm(dim=0).diag()

    return W + bounded(p.A, p.B, p.bound) - bounded(p.A0, p.B0, p.bound0), f.bias


def of_tinylora(p: Any, f: nn.Linear) -> tuple[Tensor, Tensor]:
    U, S, V = torch.linalg.svd(f.weight, full_matrices=False)
    R = sum(v * P for v, P in zip(p.vector.v, p.P, strict=True))
    return f.weight + U[:, :2] @ S[:2].diag() @ R @ V[:2], f.bias


def of_kasa(p: Any, f: nn.Linear) -> tuple[Tensor, Tensor]:
    U, S, V = torch.linalg.svd(f.weight, full_matrices=False)
    return U[:, :-3] @ S[:-3].diag() @ V[:-3] + p.B @ p.s.diag() @ p.A, f.bias


def of_glora(p: Any, f: nn.Linear) -> tuple[Tensor, Tensor]:
    A, B = p.A_up @ p.A_down, p.B_up @ p.B_down
    return f.weight * (1 + A) + B, f.bias * (1 + p.D) + p.E + f.weight @ p.C


def of_deft(p: Any, f: nn.Linear) -> tuple[Tensor, Tensor]:
    R = p.dR + p.P0.clamp(min=0).t() @ f.weight
    eye = torch.eye(len(f.weight), dtype=f.weight.dtype)
    return (eye - p.P @ p.P.clamp(min=0).t()) @ f.weight + p.P @ R, f.bias


def of_orthogonal_deft(p: Any, f: nn.Linear) -> tuple[Tensor, Tensor]:
    Q = torch.linalg.qr(p.P)[0]
    R = p.dR + torch.linalg.qr(p.P0)[0].t() @ f.weight
    eye = torch.eye(len(f.weight), dtype=f.weight.dtype)
    close(Q.t() @ Q, torch.eye(3, dtype=Q.dtype))
    return (eye - Q @ Q.t()) @ f.weight + Q @ R, f.bias


def of_peanut(p: Any, f: nn.Linear) -> tuple[Tensor, Tensor]:
    first, second, third, fourth = p.layers
    h = torch.relu(f.weight.t() @ p.A.t())
    one = torch.relu(h @ first.t())
    two = torch.relu(one @ second.t())
    two = torch.relu(two @ third.t()) + one
    two = torch.relu(two @ fourth.t()) + h
    return f.weight + (two @ p.B.t()).t(), f.bias


CASES: dict[str, tuple[list[Any], Weighed]] = {
    "mica": (sets.mica(rank=3), of_mica),
    "delora": (sets.delora(rank=3, bound=2.0), of_delora),
    "tinylora": (sets.tinylora(size=5), of_tinylora),
    "kasa": (sets.kasa(rank=3), of_kasa),
    "glora": (sets.glora(rank=3), of_glora),
    "deft": (sets.deft(rank=3), of_deft),
    "orthogonal deft": (sets.deft(rank=3, orthogonal=True), of_orthogonal_deft),
    "peanut": (sets.peanut(rank=3, depth=2), of_peanut),
}
EVERY = {"tinylora", "glora"}  # linear, four a block
ROUNDED = {"mica", "kasa", "tinylora", "orthogonal deft"}  # singular vectors, bases


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_the_weight_is_that_of_its_formula(case: str, backbone: str) -> None:
    rules, weighed = CASES[case]

    def rewrite(plain: nn.Module, parts: dict[str, nn.Module]) -> None:
        own = {k: p for k, p in parts.items() if not k.startswith("shared/")}
        assert len(own) == len(blocks(plain)) * (4 if case in EVERY else 1)
        for key, p in own.items():
            linear: Any = plain.get_submodule(key.removesuffix("/parallel").replace("/", "."))
            weight, bias = weighed(p, linear)
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)

    agrees(backbone, rules, rewrite, eps=64 if case in ROUNDED else 16)


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_it_starts_as_it_says_trains_merges_and_comes_off(case: str, backbone: str) -> None:
    rules = CASES[case][0]
    assert starts_as_the_base(backbone, rules) is (case != "kasa")
    trains_and_comes_off(backbone, rules, steps=3)
    merges(backbone, rules)


@pytest.mark.parametrize(
    ("rules", "count"),
    [
        (sets.mica(), 12 * 8 * 768),
        (sets.delora(), 294_912 + 12),
        (sets.tinylora(), 13),
        (sets.kasa(), 294_912 + 12 * 8),
        (sets.glora(), 12 * (8 * (4 * 768 + 2304 + 2 * 3072 + 768)
                             + 3 * 768 + 3072 + 2 * (2304 + 768 + 3072 + 768))),
        (sets.deft(), 294_912),
        (sets.peanut(), 12 * 2 * 8 * 2304),
    ],
    ids=lambda value: value if isinstance(value, int) else "",
)  # fmt: skip
def test_it_trains_as_much_of_a_vit_b_as_its_formula_says(rules: Any, count: int) -> None:
    assert surgery.plan(vit_b(), rules).trainable == count


def test_delora_stays_as_near_to_the_weight_as_its_bound_says() -> None:
    for p in parts(stirred("vit", sets.delora(rank=3, bound=0.5))).values():
        down, up = p._factors(100 * p.A, p.B, p.bound)
        assert (up @ down).norm() <= p.bound.abs() * p.weight().norm()


def test_the_penalty_of_kasa_is_that_of_the_paper() -> None:
    model = stirred("vit", sets.kasa(rank=3))
    total = sum(p.penalty() for p in parts(model).values())
    close(surgery.penalty(model), total)
    for p in parts(model).values():
        eye = torch.eye(3, dtype=torch.float64)
        want = 1e-4 * (p.s**2).sum() + 1e-3 * (
            ((p.B.t() @ p.B - eye) ** 2).sum().sqrt() + ((p.A @ p.A.t() - eye) ** 2).sum().sqrt()
        )
        close(p.penalty(), want)


def test_numbers_of_tinylora_are_shared_or_its_own() -> None:
    own = family.tinylora(vector=family.tiny_vector(size=3))
    assert surgery.plan(vit(), at(qkv, own)).trainable == 9
    assert surgery.plan(vit(), at(qkv, family.tinylora())).trainable == 13


def test_without_a_bias_glora_has_nothing_for_it() -> None:
    model = nn.Sequential(nn.Linear(8, 6, bias=False))
    assert surgery.plan(model, at("0", family.glora(rank=2))).trainable == 2 * 2 * 14


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (family.kasa(rank=24), "24 singular values, of which none would be left"),
        (family.peanut(depth=-1), "no number of layers"),
        (family.tinylora(vector=family.mica()), "no TinyVector"),
    ],
)
def test_what_cannot_be_is_told(part: Any, told: str) -> None:
    with pytest.raises(RuleError, match=told):
        surgery.plan(vit(), at(qkv, part))


# against peft ------------------------------------------------------------------------------------


def reads(linear: nn.Linear) -> BaseWeight:
    return BaseWeight(linear, "weight")


def mica_of(theirs: Any, f: nn.Linear) -> Any:
    part = family.MiCA(theirs.lora_B["default"].weight, 12)
    U = torch.linalg.svd(f.weight, full_matrices=False)[0][:, -3:]
    assert torch.allclose(U.float(), part.B.float(), atol=1e-6)
    return taken(part, A=theirs.lora_A["default"].weight)


def delora_of(theirs: Any, f: nn.Linear) -> Any:
    return taken(
        family.DeLoRA(reads(f), 12, 8, 3).double(),
        A=theirs.delora_A["default"], B=theirs.delora_B["default"],
        bound=theirs.delora_lambda["default"][0], B0=torch.zeros(8, 3),
    )  # fmt: skip


def tinylora_of(theirs: Any, f: nn.Linear) -> Any:
    vector = taken(family.TinyVector(5).double(), v=theirs.tinylora_v["default"]["0"])
    A, B = theirs.tinylora_A["default"], theirs.tinylora_B["default"]
    part = family.TinyLoRA(A, B, vector).double()
    U, S, V = torch.linalg.svd(f.weight, full_matrices=False)
    assert torch.allclose(U[:, :2] @ S[:2].diag() @ V[:2], B.double() @ A.double(), atol=1e-5)
    return taken(part, P=theirs.tinylora_P["default"])


def kasa_of(theirs: Any, f: nn.Linear) -> Any:
    U, S, V = torch.linalg.svd(f.weight, full_matrices=False)
    part = family.KaSA(V[-3:], U[:, -3:] * S[-3:], 2.0).double()
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    return taken(part, A=A, B=B, s=theirs.lora_diag["default"])


def glora_of(theirs: Any, f: nn.Linear) -> Any:
    paths = {name: getattr(theirs, f"glora_{name}")["default"] for name in "ABCDE"}
    return taken(
        family.GLoRA(reads(f), 12, 8, 3).double(),
        A_up=paths["A"].Xd, A_down=paths["A"].Xu, B_up=paths["B"].Xd, B_down=paths["B"].Xu,
        C=paths["C"].X[:, 0], D=paths["D"].X, E=paths["E"].X,
    )  # fmt: skip


def deft_of(theirs: Any, f: nn.Linear) -> Any:
    part = family.DEFT(reads(f), 3, theirs.deft_decomposition["default"] == "qr")
    P = theirs.deft_P["default"]
    part = taken(part.double(), P=P, P0=P)
    begun = part._bases(part.P0)[1].t() @ f.weight
    return taken(part, dR=theirs.deft_R["default"] - begun)


def peanut_of(theirs: Any, f: nn.Linear) -> Any:
    part = family.PEANuT(reads(f), 8, 3, depth=2).double()
    square = [*theirs.peanut_encoders["default"], *theirs.peanut_decoders["default"]]
    with torch.no_grad():
        for mine, layer in zip(part.layers, square, strict=True):
            mine.copy_(layer.weight)
    return taken(part, A=theirs.peanut_A["default"].weight, B=theirs.peanut_B["default"].weight)


PEFT: dict[str, tuple[Callable[[Any], Any], Callable[[Any, nn.Linear], Any]]] = {
    "mica": (
        lambda peft: peft.LoraConfig(
            r=3, lora_alpha=3, init_lora_weights="mica", target_modules=["0"]
        ),
        mica_of,
    ),
    "delora": (lambda peft: peft.DeloraConfig(r=3, target_modules=["0"]), delora_of),
    "tinylora": (lambda peft: peft.TinyLoraConfig(r=2, u=5, target_modules=["0"]), tinylora_of),
    "kasa": (
        lambda peft: peft.LoraConfig(
            r=3, lora_alpha=6, kasa_config=peft.KasaConfig(), target_modules=["0"]
        ),
        kasa_of,
    ),
    "glora": (
        lambda peft: peft.GloraConfig(
            r=3, config_A_B="lora", config_C="vector", config_D_E="vector", target_modules=["0"]
        ),
        glora_of,
    ),
    "deft": (lambda peft: peft.DeftConfig(r=3, target_modules=["0"]), deft_of),
    "deft, orthogonal": (
        lambda peft: peft.DeftConfig(r=3, decomposition_method="qr", target_modules=["0"]),
        deft_of,
    ),
    "peanut": (lambda peft: peft.PeanutConfig(r=3, depth=2, target_modules=["0"]), peanut_of),
}  # fmt: skip
SINGLE = {"kasa", "deft", "deft, orthogonal"}  # these peft computes in float32


@pytest.mark.parametrize("name", PEFT)
def test_it_is_what_peft_makes(name: str) -> None:
    config, ours = PEFT[name]
    start, linear = (layer().float().double() for _ in range(2))
    made, theirs = adapted(config, start.float() if name == "mica" else start)
    x = torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        have, want = linear(x) + ours(theirs.double(), linear).double()(x), made.double()(x)
        if name in SINGLE:
            torch.testing.assert_close(have, want, atol=3e-6, rtol=0)
        else:
            close(have, want)
        assert (have - linear(x)).abs().max() > 1e-3
