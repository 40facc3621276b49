"""Updates of weights beyond LoRA, against matrices written out by hand and against peft."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import RuleError, at, qkv
from surgery.methods import weight_updates as sets
from surgery.parts import deltas, rotations, row_lengths
from surgery.parts.base_weight import BaseWeight, base_weight
from tests.methods.reference import (
    BOTH,
    agrees,
    blocks,
    close,
    merges,
    parts,
    starts_as_the_base,
    trains_and_comes_off,
    vit,
    vit_b,
)

Weighed = Callable[[Any, Tensor], Tensor]


# what becomes of a weight W, entry by entry, from the formula of each -----------------------------


def of_loha(p: Any, W: Tensor) -> Tensor:
    rows = range(len(W))
    entries = [[(p.B1[i] @ p.A1[:, j]) * (p.B2[i] @ p.A2[:, j]) for j in range(W.shape[1])]
               for i in rows]  # fmt: skip
    return W + torch.stack([torch.stack(row) for row in entries])


def of_lokr(p: Any, W: Tensor) -> Tensor:
    inner = p.B @ p.A
    return W + torch.cat([torch.cat([c * inner for c in row], 1) for row in p.C], 0)


def of_hira(p: Any, W: Tensor) -> Tensor:
    return W + W * (p.B @ p.A)


def of_miss(p: Any, W: Tensor) -> Tensor:
    rank = len(p.D)
    return W + torch.stack([p.D[j % rank] for j in range(W.shape[1])], 1)


def of_pissa(p: Any, W: Tensor) -> Tensor:
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    residual = W - U[:, :4] @ S[:4].diag() @ V[:4]
    return residual + p.B @ p.A


def of_olora(p: Any, W: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(W)
    return W - Q[:, :4] @ R[:4] + p.B @ p.A


def of_oft(p: Any, W: Tensor) -> Tensor:
    size, turned = p.size, W.clone()
    for b, numbers in enumerate(p.skew):
        Q = W.new_zeros(size, size)
        rows, columns = torch.triu_indices(size, size, 1)
        Q[rows, columns], Q[columns, rows] = numbers, -numbers
        eye = torch.eye(size, dtype=W.dtype)
        R = (eye + Q) @ torch.linalg.inv(eye - Q)
        close(R @ R.t(), eye)
        turned[:, b * size : (b + 1) * size] = W[:, b * size : (b + 1) * size] @ R
    return turned


def of_hra(p: Any, W: Tensor) -> Tensor:
    for u in p.u:
        W = W @ (torch.eye(len(u), dtype=W.dtype) - 2 * torch.outer(u, u) / u.square().sum())
    return W


ONE: dict[str, tuple[list[Any], Weighed, str]] = {
    "loha": (sets.loha(rank=3), of_loha, "parallel"),
    "lokr": (sets.lokr(rank=3, blocks=4), of_lokr, "parallel"),
    "hira": (sets.hira(rank=3), of_hira, "parallel"),
    "miss": (sets.miss(rank=5), of_miss, "parallel"),
    "pissa": (sets.pissa(rank=4), of_pissa, "parallel"),
    "olora": (sets.olora(rank=4), of_olora, "parallel"),
    "oft": (sets.oft(size=4), of_oft, "prepend"),
    "hra": (sets.hra(rank=4), of_hra, "prepend"),
}


@BOTH
@pytest.mark.parametrize("case", ONE)
def test_the_weight_is_that_of_its_formula(case: str, backbone: str) -> None:
    rules, weighed, word = ONE[case]

    def rewrite(plain: nn.Module, parts: dict[str, nn.Module]) -> None:
        assert len(parts) == len(blocks(plain))
        for key, p in parts.items():
            linear: Any = plain.get_submodule(key.removesuffix(f"/{word}").replace("/", "."))
            linear.weight.copy_(weighed(p, linear.weight))

    agrees(backbone, rules, rewrite, eps=64 if case in ("pissa", "olora") else 16)


@BOTH
def test_dora_is_a_length_and_a_direction_for_each_row(backbone: str) -> None:
    def rewrite(plain: nn.Module, parts: dict[str, nn.Module]) -> None:
        lengths = {k: p for k, p in parts.items() if k.endswith("/append")}
        assert len(lengths) == len(blocks(plain))
        for key, p in lengths.items():
            linear: Any = plain.get_submodule(key.removesuffix("/append").replace("/", "."))
            V = linear.weight + p.update.B[0] @ p.update.A[0]
            m = linear.weight.norm(dim=1, keepdim=True) + p.dm[:, None]
            linear.weight.copy_(m * V / V.norm(dim=1, keepdim=True))

    agrees(backbone, sets.dora(rank=3), rewrite)


@BOTH
def test_rlrr_scales_rows_and_columns(backbone: str) -> None:
    def rewrite(plain: nn.Module, parts: dict[str, nn.Module]) -> None:
        assert len(parts) == 4 * len(blocks(plain))
        for key, p in parts.items():
            linear: Any = plain.get_submodule(key.removesuffix("/parallel").replace("/", "."))
            linear.weight.mul_(1 + torch.outer(p.left, p.right))
            linear.bias += p.bias

    agrees(backbone, sets.rlrr(), rewrite)


@BOTH
def test_ia3_scales_keys_values_and_what_the_network_hides(backbone: str) -> None:
    def rewrite(plain: nn.Module, parts: dict[str, nn.Module]) -> None:
        for block in blocks(plain):
            path = next(name for name, m in plain.named_modules() if m is block).replace(".", "/")
            k, v = parts[f"{path}/attn/qkv/append"].v
            hidden = parts[f"{path}/mlp/fc2/prepend"].v[0]
            scale = torch.cat([torch.ones_like(k), k, v])
            block.attn.qkv.weight.mul_(scale[:, None])
            block.attn.qkv.bias.mul_(scale)
            block.mlp.fc2.weight.mul_(hidden)

    agrees(backbone, sets.ia3(), rewrite)


ALL = {
    **{name: case[0] for name, case in ONE.items()},
    "dora": sets.dora(rank=3), "rlrr": sets.rlrr(), "ia3": sets.ia3(),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("case", ALL)
def test_it_starts_as_the_base_trains_merges_and_comes_off(case: str, backbone: str) -> None:
    if case != "hra":  # reflections undo each other but for rounding
        assert starts_as_the_base(backbone, ALL[case])
    trains_and_comes_off(backbone, ALL[case])
    merges(backbone, ALL[case])


def test_hra_starts_as_the_base_but_for_rounding() -> None:
    model, x = vit(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        want = model(x)
        close(surgery.apply(model, sets.hra(rank=4))(x), want)


@pytest.mark.parametrize(
    ("rules", "count"),
    [
        (sets.dora(), 294_912 + 12 * 2304),
        (sets.pissa(), 294_912),
        (sets.olora(), 294_912),
        (sets.hira(), 294_912),
        (sets.rlrr(), 12 * (768 + 2 * 2304 + 3 * 768 + 768 + 2 * 3072 + 3072 + 2 * 768)),
        (sets.loha(), 2 * 294_912),
        (sets.lokr(), 12 * (64 + 8 * (768 // 8 + 2304 // 8))),
        (sets.miss(), 12 * 64 * 2304),
        (sets.oft(), 12 * 24 * 32 * 31 // 2),
        (sets.hra(), 12 * 8 * 768),
        (sets.ia3(), 12 * (2 * 768 + 3072)),
        (sets.ln_tuning(), 25 * 2 * 768),
    ],
    ids=lambda value: value if isinstance(value, int) else "",
)
def test_it_trains_as_much_of_a_vit_b_as_its_formula_says(rules: Any, count: int) -> None:
    assert surgery.plan(vit_b(), rules).trainable == count


# against peft ------------------------------------------------------------------------------------


def adapted(config: Any, linear: nn.Linear) -> Any:
    """What peft makes of a linear layer, its numbers moved."""
    import peft

    model = nn.Sequential(linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(model, config(peft))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return made, made.base_model.model[0]


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 8).double()


def taken(part: Any, **tensors: Tensor) -> Any:
    with torch.no_grad():
        for name, tensor in tensors.items():
            getattr(part, name).copy_(tensor)
    return part


def loha_of(theirs: Any, linear: nn.Linear) -> Tensor:
    part = taken(
        deltas.LoHa(12, 8, 3).double(),
        B1=theirs.hada_w1_a["default"], A1=theirs.hada_w1_b["default"],
        B2=theirs.hada_w2_a["default"], A2=theirs.hada_w2_b["default"],
    )  # fmt: skip
    return linear.weight + part.delta()


def lokr_of(theirs: Any, linear: nn.Linear) -> Tensor:
    C = theirs.lokr_w1["default"]
    part = deltas.LoKr(12, 8, 1, (C.shape[0], C.shape[1])).double()
    second = theirs.lokr_w2_a["default"] @ theirs.lokr_w2_b["default"]
    part = taken(part, C=C, B=theirs.lokr_w2_a["default"], A=theirs.lokr_w2_b["default"])
    close(torch.kron(C, second), part.delta())
    return linear.weight + part.delta()


def hira_of(theirs: Any, linear: nn.Linear) -> Tensor:
    part = taken(
        deltas.HiRA(BaseWeight(linear, "weight"), 12, 8, 3).double(),
        A=theirs.hira_A["default"], B=theirs.hira_B["default"],
    )  # fmt: skip
    return linear.weight + part.delta()


def dora_of(theirs: Any, linear: nn.Linear) -> Tensor:
    update = taken(
        deltas_lora(),
        A=theirs.lora_A["default"].weight[None],
        B=theirs.lora_B["default"].weight[None],
    )
    part = row_lengths.Magnitude(BaseWeight(linear, "weight"), update)
    m = theirs.lora_magnitude_vector["default"].weight
    part = taken(part.double(), dm=m - linear.weight.norm(dim=1))
    g, _ = part.affine()
    return g[:, None] * (linear.weight + update.affine()[0])


def deltas_lora() -> Any:
    from surgery.parts.low_rank import LoRA

    return LoRA(12, 8, 3).double()


def hra_of(theirs: Any, linear: nn.Linear) -> Tensor:
    part = taken(rotations.HRA(12, 4).double(), u=theirs.hra_u["default"].t())
    return linear.weight @ part.affine()[0]


def miss_of(theirs: Any, linear: nn.Linear) -> Tensor:
    part = taken(deltas.MiSS(12, 8, 3).double(), D=theirs.miss_block["default"])
    return linear.weight + part.delta()


PEFT: dict[str, tuple[Callable[[Any], Any], Callable[[Any, nn.Linear], Tensor]]] = {
    "loha": (lambda peft: peft.LoHaConfig(r=3, alpha=3, target_modules=["0"]), loha_of),
    "lokr": (
        lambda peft: peft.LoKrConfig(r=1, alpha=1, target_modules=["0"], decompose_factor=2),
        lokr_of,
    ),
    "hira": (lambda peft: peft.HiraConfig(r=3, target_modules=["0"]), hira_of),
    "dora": (
        lambda peft: peft.LoraConfig(r=3, lora_alpha=3, use_dora=True, target_modules=["0"]),
        dora_of,
    ),
    "hra": (lambda peft: peft.HRAConfig(r=4, target_modules=["0"]), hra_of),
    "miss": (lambda peft: peft.MissConfig(r=3, target_modules=["0"]), miss_of),
}


@pytest.mark.parametrize("name", PEFT)
def test_it_is_what_peft_makes(name: str) -> None:
    config, ours = PEFT[name]
    made, theirs = adapted(config, layer())
    linear, x = layer(), torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        weight = ours(theirs, linear)
        close(nn.functional.linear(x, weight, linear.bias), made(x))
        assert (weight - linear.weight).abs().max() > 1e-3


# the base weight ---------------------------------------------------------------------------------


def test_a_part_reads_the_weight_as_it_is_and_holds_no_copy_of_it() -> None:
    model = surgery.apply(vit(), sets.hira(rank=2))
    part = next(iter(parts(model).values()))
    assert [name for name, _ in part.named_parameters()] == ["A", "B"]
    assert not list(part.buffers())
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight += 1
    assert torch.equal(part.weight(), model.blocks[0].attn.qkv.weight)


def test_without_a_weight_there_is_nothing_to_read() -> None:
    with pytest.raises(RuleError, match=r"reads the weight of blocks\.0\.mlp"):
        surgery.plan(vit(), at("blocks.*.mlp", deltas.hira(rank=2)))


def test_reflections_come_in_pairs() -> None:
    with pytest.raises(RuleError, match="in pairs"):
        surgery.plan(vit(), at(qkv, rotations.hra(rank=3)))


def test_a_turned_weight_is_read_as_out_and_in() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 4))
    site = surgery.plan(model, at("0", deltas.miss(rank=2))).sites[0]
    assert base_weight(site, "hira")().shape == (6, 4)


class QuantLinear(nn.Module):
    """A linear layer of no class of torch's, (out, in) as nn.Linear (I-BERT)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def test_a_linear_layer_of_another_class_is_read_as_it_lies() -> None:
    model: Any = surgery.apply(nn.Sequential(QuantLinear(6, 4)), at("0", deltas.hira(rank=2)))
    (part,) = model.surgery.default.children()
    with torch.no_grad():
        part.B.normal_()
    x, layer = torch.randn(3, 6), model[0]
    want = nn.functional.linear(x, layer.weight * (1 + part.B @ part.A))
    torch.testing.assert_close(model(x), want)
