"""LoRA and what came of it, against matrices written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery
from surgery import RuleError, at, parallel, shared, unfreeze
from surgery.errors import MatchError
from surgery.methods import low_rank
from surgery.parts.low_and_high_rank import vida
from surgery.parts.low_rank import DyLoRA, dylora, lora, prolora
from surgery.parts.qkv_rows import chosen_rows, placed
from surgery.parts.shared_low_rank import frozen, tied, tied_lora, vera
from surgery.rules.roles import head, qkv
from tests.methods.reference import (
    BACKBONES,
    BOTH,
    INPUTS,
    agrees,
    blocks,
    close,
    merges,
    parts,
    starts_as_the_base,
    stirred,
    trains_and_comes_off,
    uniform,
    untrained,
    vit,
    vit_b,
)
from tests.models import hf_vit

Delta = Callable[[Any, int, int], Tensor]
QV = "q _k v"


def on_qkv(*edits: Any) -> list[Any]:
    return [at(qkv, *edits), at(head, unfreeze, optional=True)]


# the update of each, entry by entry, from its formula ------------------------------------------


def q_and_v(pieces: list[Tensor]) -> Tensor:
    """Rows (q, 0, v) of a fused projection."""
    return torch.cat([pieces[0], torch.zeros_like(pieces[0]), pieces[1]])


def of_lora(p: Any, width: int, out: int) -> Tensor:
    return p.B[0] @ p.A[0]


def of_lora_scaled(p: Any, width: int, out: int) -> Tensor:
    return 16 / 4 * q_and_v([b @ a for a, b in zip(p.A, p.B, strict=True)])


def of_dylora(p: Any, width: int, out: int) -> Tensor:
    return q_and_v([b @ a for a, b in zip(p.A, p.B, strict=True)])


def of_prolora(p: Any, width: int, out: int) -> Tensor:
    """Each entry looked up: column c of tile i = c // chunk is turned by i * step ranks."""
    (m, n), size, pieces = (4, 4), out // 3, []
    for k in range(2):
        a, b = p.A_shared[k], p.B_shared[k]
        (shared_ranks, chunk), tall = a.shape, b.shape[0]
        A, B = torch.empty(6, width).double(), torch.empty(size, 6).double()
        for r in range(shared_ranks):
            for c in range(width):
                A[r, c] = a[(r - c // chunk * max(shared_ranks // m, 1)) % shared_ranks, c % chunk]
            for c in range(size):
                B[c, r] = b[c % tall, (r - c // tall * max(shared_ranks // n, 1)) % shared_ranks]
        A[shared_ranks:], B[:, shared_ranks:] = p.A_own[k], p.B_own[k]
        pieces.append(B @ A)
    return q_and_v(pieces)


def of_vera(p: Any, width: int, out: int) -> Tensor:
    """diag(lambda_b) B diag(lambda_d) A, for q and for v."""
    A, B = p.core.A, p.core.B
    return q_and_v([v.diag() @ B @ u.diag() @ A for u, v in zip(p.u, p.v, strict=True)])


def of_tied(p: Any, width: int, out: int) -> Tensor:
    return p.v[0].diag() @ p.core.B @ p.u[0].diag() @ p.core.A


def of_vida(p: Any, width: int, out: int) -> Tensor:
    return p.B_low @ p.A_low + p.B_high @ p.A_high


CASES: dict[str, tuple[list[Any], Delta]] = {
    "lora": (low_rank.lora(rank=4), of_lora),
    "lora_q_and_v": (on_qkv(lora(rank=4, alpha=16, rows=QV)), of_lora_scaled),
    "dylora": (low_rank.dylora(rank=4), of_dylora),
    "prolora": (low_rank.prolora(rank=6, unshared=1, tiles=(4, 4)), of_prolora),
    "vera": (low_rank.vera(rank=7), of_vera),
    "tied_lora": (low_rank.tied_lora(rank=4), of_tied),
    "vida": (low_rank.vida(high=5), of_vida),
}


def own(model: nn.Module) -> list[Any]:
    """The parts of the sites, without what they share."""
    return [p for key, p in parts(model).items() if not key.startswith("shared/")]


every_case = pytest.mark.parametrize("case", CASES)


@BOTH
@every_case
def test_it_adds_the_matrix_of_its_formula(case: str, backbone: str) -> None:
    rules, delta = CASES[case]

    def rewrite(plain: nn.Module, parts: dict[str, nn.Module]) -> None:
        sites = {k: p for k, p in parts.items() if not k.startswith("shared/")}
        assert len(sites) == len(blocks(plain)) * (4 if case == "vida" else 1)
        for key, p in sites.items():
            linear: Any = plain.get_submodule(key.removesuffix("/parallel").replace("/", "."))
            linear.weight += delta(p, linear.in_features, linear.out_features)

    agrees(backbone, rules, rewrite)


@BOTH
@every_case
def test_it_starts_as_the_base_trains_merges_and_comes_off(case: str, backbone: str) -> None:
    rules, _ = CASES[case]
    assert starts_as_the_base(backbone, rules)
    trains_and_comes_off(backbone, rules)
    merges(backbone, rules)


# counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "count"),
    [
        (low_rank.lora(), 294_912),
        (at(qkv, lora(rank=8, rows=QV)), 294_912),
        (low_rank.dylora(), 294_912),
        (low_rank.vera(), 24_576),
        (low_rank.tied_lora(), 52_320),
        (low_rank.tied_lora(A=False), 52_320 - 768 * 8),
        (low_rank.tied_lora(B=False), 52_320 - 2304 * 8),
        (low_rank.tied_lora(u=False), 52_320 - 12 * 8),
        (low_rank.tied_lora(v=False), 52_320 - 12 * 2304),
        (low_rank.prolora(), 129_024),
        (low_rank.vida(), 12 * 129 * 12_288),
    ],
    ids=lambda value: value if isinstance(value, int) else "",
)
def test_it_trains_as_much_of_a_vit_b_as_its_paper_says(rules: Any, count: int) -> None:
    assert surgery.plan(vit_b(), rules).trainable == count


def test_where_q_k_and_v_are_apart_all_three_have_it() -> None:
    model = hf_vit()
    assert surgery.plan(model, low_rank.dylora(rank=2)[:-1]).trainable == 3 * 3 * 2 * (24 + 24)
    assert surgery.plan(model, low_rank.vera(rank=7)[:-1]).trainable == 3 * 3 * (7 + 24)


@pytest.mark.parametrize("made", [low_rank.dylora, low_rank.prolora, low_rank.vera])
def test_a_model_without_projections_is_refused(made: Any) -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(MatchError, match="matched no module"):
        surgery.plan(plain, made())


# starts ----------------------------------------------------------------------------------------


def first(rules: Any) -> Any:
    return own(surgery.apply(vit(), rules))[0]


def test_lora_starts_kaiming_uniform_and_zero() -> None:
    for rules in (low_rank.lora(rank=16), low_rank.dylora(rank=16)):
        p = first(rules)
        uniform(p.A, 24**-0.5)
        assert not p.B.any()
    assert not torch.equal(p.A[0], p.A[1])  # q and v do not start alike


def test_prolora_starts_as_wide_as_lora_though_its_chunks_are_narrow() -> None:
    p = first(low_rank.prolora(rank=40, unshared=10, tiles=(4, 4)))
    assert p.A_shared.shape[-1] == 6
    uniform(p.A_shared, 24**-0.5)
    uniform(p.A_own, 24**-0.5)
    assert not p.B_shared.any()
    assert not p.B_own.any()


def test_vera_starts_at_a_tenth_and_zero_on_random_matrices() -> None:
    model = surgery.apply(vit(), low_rank.vera(rank=64))
    assert all(torch.allclose(p.u, p.u.new_tensor(0.1)) and not p.v.any() for p in own(model))
    core = own(model)[0].core
    uniform(core.A, (6 / 24) ** 0.5)
    uniform(core.B, (6 / 64) ** 0.5)
    assert not [*core.parameters()]


@pytest.mark.parametrize("v", [True, False])
@pytest.mark.parametrize("u", [True, False])
@pytest.mark.parametrize("B", [True, False])
@pytest.mark.parametrize("A", [True, False])
def test_every_variant_of_tied_lora_starts_as_the_base_and_trains(
    A: bool, B: bool, u: bool, v: bool
) -> None:
    rules = low_rank.tied_lora(rank=4, A=A, B=B, u=u, v=v)
    if not (A or B or u or v):
        with pytest.raises(RuleError, match="nothing would be trained"):
            surgery.plan(vit(), rules)
        return
    assert starts_as_the_base("vit", rules)
    assert untrained("vit", rules) == []
    p = first(rules)
    trained = {name for name, _ in (*p.named_parameters(), *p.core.named_parameters())}
    assert trained == {n for n, on in {"A": A, "B": B, "u": u, "v": v}.items() if on}


def test_vida_starts_normal_by_the_square_of_its_rank() -> None:
    p = first(low_rank.vida(low=2, high=64))
    assert 0.6 < p.A_low.std() * 4 < 1.4
    assert 0.9 < p.A_high.std() * 64**2 < 1.1
    assert not p.B_low.any()
    assert not p.B_high.any()


# sharing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "core"),
    [(low_rank.vera(rank=7), "shared/frozen/24"), (low_rank.tied_lora(rank=4), "shared/tied/24")],
)
def test_the_core_is_stored_once_and_used_by_all(rules: Any, core: str, tmp_path: Path) -> None:
    model = stirred("vit", rules)
    keys = [f"default.{core}.A", f"default.{core}.B"]
    assert [k for k in model.surgery.state_dict() if k.endswith((".A", ".B"))] == keys
    file = surgery.save(model, tmp_path / "tuned.safetensors")
    assert len([k for k in load_file(file) if k.endswith((".A", ".B"))]) == 2
    loaded = surgery.load(vit(), file, rules=rules).eval()
    for each in (model, copy.deepcopy(model), loaded):
        mine = parts(each)
        assert len(own(each)) == 3
        assert all(p.core is mine[core] for p in own(each))
        with torch.no_grad():
            assert torch.equal(each(INPUTS["vit"]), model(INPUTS["vit"]))


def test_a_swin_has_a_core_for_each_size() -> None:
    keys = parts(surgery.apply(BACKBONES["swin"](), low_rank.vera(rank=7)))
    assert [k for k in keys if k.startswith("shared/")] == ["shared/frozen/24", "shared/frozen/48"]


# what a forward may choose ---------------------------------------------------------------------


def stirred_dylora(**how: Any) -> DyLoRA:
    """A part of width 8 on 12 rows whose ranks are told apart."""
    torch.manual_seed(0)
    part = DyLoRA(8, 12, rank=4).double()
    part.frozen = how.get("frozen", False)
    nn.init.normal_(part.B)
    return part


def at_rank(p: Any, b: int) -> Tensor:
    """sqrt(r / b) on each of the first b rows of A and columns of B."""
    factor = (p.rank / b) ** 0.5
    return (p.B[0, :, :b] * factor) @ (p.A[0, :b] * factor)


def test_dylora_draws_a_rank_at_each_training_forward() -> None:
    part, seen = stirred_dylora().train(), set()
    for _ in range(60):
        y = part(torch.eye(8).double()).mT
        seen |= {b for b in range(1, 5) if (y - at_rank(part, b)).abs().max() < 1e-12}
    assert seen == {1, 2, 3, 4}
    torch.manual_seed(3)
    drawn = part(torch.ones(1, 8).double())
    torch.manual_seed(3)
    assert torch.equal(part(torch.ones(1, 8).double()), drawn)  # torch's generator draws


@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_dylora_runs_and_merges_at_the_active_rank(b: int) -> None:
    part = stirred_dylora().eval()
    close(part.affine()[0], at_rank(part, 4))
    part.active = b
    close(part.affine()[0], at_rank(part, b))
    close(part.train()(torch.eye(8).double()).mT, at_rank(part, b))
    model = stirred("vit", low_rank.dylora(rank=4))
    for each in parts(model).values():
        each.active = b
    with torch.no_grad():
        close(surgery.merge(copy.deepcopy(model))(INPUTS["vit"]), model(INPUTS["vit"]))


def test_frozen_dylora_uses_all_ranks_up_to_b_and_trains_the_last() -> None:
    part = stirred_dylora(frozen=True).train()
    part.active = 3
    y = part(torch.eye(8).double()).mT
    close(y, at_rank(part, 3))
    y.sum().backward()
    assert [bool(row.any()) for row in part.A.grad[0]] == [False, False, True, False]
    assert [bool(row.any()) for row in part.B.grad[0].mT] == [False, False, True, False]
    rules = on_qkv(dylora(rank=2, frozen=True))
    assert untrained("vit", rules, steps=8) == []  # a rank must be drawn twice, for B and then A


def test_the_scales_of_vida_may_change_between_forwards() -> None:
    model = stirred("vit", low_rank.vida(high=5))
    for p in parts(model).values():
        p.low_scale, p.high_scale = 0.25, 1.75
    plain = vit()
    base = {k: v for k, v in model.state_dict().items() if not k.startswith("surgery.")}
    plain.load_state_dict(base)
    with torch.no_grad():
        for key, p in parts(model).items():
            linear: Any = plain.get_submodule(key.removesuffix("/parallel").replace("/", "."))
            linear.weight += 0.25 * p.B_low @ p.A_low + 1.75 * p.B_high @ p.A_high
        close(model(INPUTS["vit"]), plain(INPUTS["vit"]))
        close(surgery.merge(model)(INPUTS["vit"]), plain(INPUTS["vit"]))


@pytest.mark.parametrize("word", [lora, dylora, prolora, vera, tied_lora])
def test_dropout_falls_on_what_the_part_is_given(word: Any) -> None:
    model = stirred("vit", on_qkv(word(dropout=0.5)))
    p = own(model)[0].train()
    if word is dylora:
        p.active = 8
    torch.manual_seed(1)
    y = p(torch.ones(3, 24).double())
    torch.manual_seed(1)
    close(y, nn.functional.dropout(torch.ones(3, 24).double(), 0.5) @ p.affine()[0].mT)


# rows ------------------------------------------------------------------------------------------


def test_rows_are_chosen_by_name_and_laid_among_zeros() -> None:
    assert chosen_rows(None, 7, "lora") == [slice(0, 7)]
    assert chosen_rows("_a b _c _d e", 10, "lora") == [slice(2, 4), slice(8, 10)]
    one = torch.randn(3, 6)
    assert placed([one], [slice(0, 6)], 6) is one
    for rows in ("q _k v", "_q k _v", "q k v", "_q _k v", "q _k _v"):
        slices = chosen_rows(rows, 6, "lora")
        want = torch.zeros(3, 6)
        for each in slices:
            want[:, each] = one[:, each]
        assert torch.equal(placed([one[:, each] for each in slices], slices, 6), want)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lora(rank=0), r"lora\(rank=0\): it must be an integer from 1 up"),
        (lora(rank=True), r"lora\(rank=True\)"),
        (lora(alpha=-1), r"lora\(alpha=-1\): it is no positive number"),
        (lora(rows="_q _k _v"), r"lora\(rows='_q _k _v'\): it names no rows"),
        (lora(rows=""), r"lora\(rows=''\): it names no rows"),
        (dylora(rank=-1), r"dylora\(rank=-1\)"),
        (dylora(rows="a b c d e"), "gives 72 features, which are not 5 equal chunks"),
        (prolora(unshared=8), r"prolora\(rank=8, unshared=8\): of the ranks, some must be shared"),
        (prolora(tiles=4), r"prolora\(tiles=4\): it is no pair"),
        (prolora(tiles=(4, 0)), r"prolora\(tiles\[1\]=0\)"),
        (vera(core=shared(frozen(rank=0))), r"frozen\(rank=0\)"),
        (vera(core=lora()), r"vera\(core=lora\(\)\): it gave a LoRA, which has no A and B"),
        (tied_lora(core=shared(tied(rank=2.5))), r"tied\(rank=2.5\)"),
        (tied_lora(alpha="x"), r"tied_lora\(alpha='x'\)"),
        (vida(high=0), r"vida\(high=0\)"),
    ],
    ids=str,
)
def test_a_wrong_value_is_said(edit: Any, said: str) -> None:
    with pytest.raises(RuleError, match=said):
        surgery.plan(vit(), at(qkv, parallel(edit)))


@pytest.mark.parametrize("b", [0, 5, True, 2.0])
def test_a_rank_that_dylora_has_not_is_refused(b: Any) -> None:
    with pytest.raises(RuleError, match="ranks 1 to 4"):
        stirred_dylora().active = b


def test_a_square_projection_has_no_q_and_v() -> None:
    with pytest.raises(RuleError, match="gives 5 features, which are not 3 equal chunks"):
        surgery.plan(vit(), at(head, lora(rows=QV)))
