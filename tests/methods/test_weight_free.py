"""Updates that do not look at W, and rotations, against matrices written out and against peft."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import MatchError, RuleError, at, fc1, fc2, proj, qkv, shared
from surgery import methods as sets
from surgery.parts import banks, low_rank, low_rank_forms, rotations, row_lengths, spectral
from surgery.parts.qkv_rows import OnRows
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

Weighed = Callable[[Any, Tensor], Tensor]


# what becomes of a weight W (or of the rows that a part has), entry by entry -------------------


def entries(W: Tensor, entry: Callable[[int, int], Tensor]) -> Tensor:
    rows = [torch.stack([entry(i, j) for j in range(W.shape[1])]) for i in range(len(W))]
    return torch.stack(rows)


def of_lora(scale: float) -> Weighed:
    return lambda p, W: W + scale * p.B[0] @ p.A[0]


def of_fourierft(p: Any, W: Tensor) -> Tensor:
    out, width = W.shape
    i, j = torch.meshgrid(torch.arange(out), torch.arange(width), indexing="ij")
    delta = torch.zeros_like(W)
    for place, c in zip(p.places.index.tolist(), p.c, strict=True):
        u, v = divmod(place, width)
        turns = (u * i % out).double() / out + (v * j % width).double() / width
        delta += c * torch.cos(2 * torch.pi * turns)
    return W + p.alpha * delta / (out * width)


def haar(n: int) -> Tensor:
    """(n, n): the wavelets of means first, those of differences after them, in columns."""
    H = torch.zeros(n, n, dtype=torch.float64)
    for k in range(n // 2):
        H[2 * k : 2 * k + 2, k] = 0.5**0.5
        H[2 * k, n // 2 + k], H[2 * k + 1, n // 2 + k] = 0.5**0.5, -(0.5**0.5)
    return H


def of_waveft(p: Any, W: Tensor) -> Tensor:
    S = torch.zeros_like(W)
    S.view(-1)[p.places.index] = p.c
    return W + p.alpha * haar(len(W)) @ swapped(S) @ haar(W.shape[1]).t()


def swapped(S: Tensor) -> Tensor:
    """What is at the top right and at the bottom left, each at the other's place."""
    h, w = len(S) // 2, S.shape[1] // 2
    top, bottom = [S[:h, :w], S[h:, :w]], [S[:h, w:], S[h:, w:]]
    return torch.cat([torch.cat(top, 1), torch.cat(bottom, 1)])


def of_c3a(p: Any, W: Tensor) -> Tensor:
    b = p.size
    return W + entries(W, lambda i, j: p.kernel[i // b, j // b, (j - i) % b]) / W.shape[1]


def of_randlora(p: Any, W: Tensor) -> Tensor:
    A, B = p.core.A, p.core.B
    delta = sum(B[:, j] @ p.l[j].diag() @ A @ p.g[j].diag() for j in range(len(p.l)))
    assert isinstance(delta, Tensor)
    return W + p.scale * (delta.t() if len(W) < W.shape[1] else delta)


def of_vblora(p: Any, W: Tensor) -> Tensor:
    def piece(logits: Tensor) -> Tensor:
        chosen = sorted(range(len(logits)), key=lambda i: -logits[i].item())[: p.k]
        total = sum(logits[i].exp() for i in chosen)
        mixed = sum(logits[i].exp() / total * p.bank.vectors[i] for i in chosen)
        assert isinstance(mixed, Tensor)
        return mixed

    A, B = (torch.stack([torch.cat([*map(piece, r)]) for r in m]) for m in (p.down, p.up))
    return W + B.t() @ A


def of_unilora(p: Any, W: Tensor) -> Tensor:
    def number(place: Tensor) -> Tensor:
        return torch.stack(
            [p.pool.theta[i] / p.pool.uses[i].double().sqrt() for i in place.flatten()]
        )

    return W + number(p.B).view(p.B.shape) @ number(p.A).view(p.A.shape)


def of_gralora(p: Any, W: Tensor) -> Tensor:
    k, (out, width), each = p.k, W.shape, p.A.shape[1] // p.k
    delta = torch.zeros_like(W)
    for m in range(k):
        for n in range(k):
            block = p.B[m][:, n * each : n * each + each] @ p.A[n][m * each : m * each + each]
            delta[m * out // k :, n * width // k :][: out // k, : width // k] = block
    return W + delta


def of_ranks(p: Any, W: Tensor) -> Tensor:
    ranks = zip(p.l, p.B.t(), p.A, strict=True)
    return W + sum(length * torch.outer(b, a) for length, b, a in ranks)


def of_snell(p: Any, W: Tensor) -> Tensor:
    def d(i: int, j: int) -> Tensor:
        return 0.1 * (
            (p.outputs[0, i] - p.inputs[0, j]).norm() - (p.outputs[1, i] - p.inputs[1, j]).norm()
        )

    whole = entries(W, d)
    least = whole.abs().flatten().sort().values[int(p.sparsity * (W.numel() - 1))]
    kept = whole.abs() > least
    assert kept.sum() == W.numel() - 1 - int(p.sparsity * (W.numel() - 1))
    return W + torch.where(kept, whole * whole.abs(), 0.0)


def turn(skew: Tensor, size: int) -> Tensor:
    Q = skew.new_zeros(size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    Q[rows, columns], Q[columns, rows] = skew, -skew
    eye = torch.eye(size, dtype=skew.dtype)
    return (eye + Q) @ torch.linalg.inv(eye - Q)


def of_boft(p: Any, W: Tensor) -> Tensor:
    width, half = W.shape[1], p.piece
    for i, factor in enumerate(p.factors):
        M = torch.zeros(width, width, dtype=W.dtype)
        firsts = [h for h in range(width // half) if not h >> i & 1]
        for skew, h in zip(factor.skew, firsts, strict=True):
            at = [s * half + r for s in (h, h + 2**i) for r in range(half)]
            M[torch.tensor(at)[:, None], torch.tensor(at)] = turn(skew, 2 * half)
        W = W @ M
    return W


def of_goft(p: Any, W: Tensor) -> Tensor:
    at, angles, turned = [*range(W.shape[1])], iter(p.angles), torch.eye(W.shape[1], dtype=W.dtype)
    while len(at) > 1:
        for a, b in zip(at[::2], at[1::2], strict=False):
            t, G = next(angles), torch.eye(W.shape[1], dtype=W.dtype)
            G[a, a], G[a, b], G[b, a], G[b, b] = t.cos(), -t.sin(), t.sin(), t.cos()
            turned = G @ turned
        at = at[::2]
    close(turned @ turned.t(), torch.eye(W.shape[1], dtype=W.dtype))
    return W @ turned if p.lengths is None else W @ turned @ p.lengths.diag()


def of_psoft(p: Any, W: Tensor) -> Tensor:
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    r = len(p.a)
    U, S, V = U[:, :r], S[:r].diag(), V[:r]
    return W - U @ S @ V + U @ S @ p.b.diag() @ turn(p.skew[0], r) @ p.a.diag() @ V


ONE: dict[str, tuple[Any, Weighed]] = {
    "rslora": (sets.rslora(rank=4), of_lora(2.0)),
    "lora_fa": (sets.lora_fa(rank=3), of_lora(1.0)),
    "fourierft": (sets.fourierft(n=40, alpha=2.0), of_fourierft),
    "waveft": (sets.waveft(n=40, alpha=2.0), of_waveft),
    "c3a": (sets.c3a(size=4), of_c3a),
    "randlora": (sets.randlora(rank=5, scale=2.0), of_randlora),
    "vblora": (sets.vblora(rank=3, size=7, length=4), of_vblora),
    "unilora": (sets.unilora(rank=3, size=50), of_unilora),
    "gralora": (sets.gralora(rank=6, k=3), of_gralora),
    "mlae": (sets.mlae(rank=3), of_ranks),
    "adalora": (sets.adalora(rank=3), of_ranks),
    "snell": (sets.snell(rank=4), of_snell),
    "boft": (sets.boft(size=2, factors=3), of_boft),
    "goft": (sets.goft(), of_goft),
    "goft_lengths": (sets.goft(lengths=True), of_goft),
    "psoft": (sets.psoft(rank=4), of_psoft),
}


def weights(plain: nn.Module, parts: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    """Each part with the weight, or those rows of it, that it has; at every linear once."""
    for key, p in parts.items():
        if key.startswith("shared/"):
            continue
        linear: Any = plain.get_submodule(key.rpartition("/")[0].replace("/", "."))
        several = isinstance(p, OnRows)
        for one, rows in zip(p.parts if several else [p],
                             p.slices if several else [slice(None)], strict=True):  # fmt: skip
            yield one, linear.weight[rows]


@BOTH
@pytest.mark.parametrize("case", ONE)
def test_the_weight_is_that_of_its_formula(case: str, backbone: str) -> None:
    rules, weighed = ONE[case]

    def rewrite(plain: nn.Module, parts: dict[str, nn.Module]) -> None:
        some = [*weights(plain, parts)]
        assert len(some) >= len(blocks(plain))
        for p, weight in some:
            weight.copy_(weighed(p, weight))

    agrees(backbone, rules, rewrite, eps=64 if case == "psoft" else 16)


@BOTH
def test_hydra_adds_beside_and_after(backbone: str) -> None:
    def rewrite(plain: nn.Module, parts: dict[str, Any]) -> None:
        assert len(parts) == 4 * len(blocks(plain))
        for key, p in parts.items():
            path, _, word = key.rpartition("/")
            if word == "append":
                linear: Any = plain.get_submodule(path.replace("/", "."))
                q = parts[f"{path}/parallel"]
                after = p.B[0] @ p.A[0]
                linear.weight += q.B[0] @ q.A[0] + after @ linear.weight
                linear.bias += after @ linear.bias

    agrees(backbone, sets.hydra(rank=2), rewrite)


@BOTH
def test_beft_shifts_the_values(backbone: str) -> None:
    def rewrite(plain: nn.Module, parts: dict[str, Any]) -> None:
        for block in blocks(plain):
            path = next(name for name, m in plain.named_modules() if m is block).replace(".", "/")
            b = parts[f"{path}/attn/qkv/append"].bias[0]
            block.attn.qkv.bias[-len(b) :] += b
            assert len(block.attn.qkv.bias) == 3 * len(b)

    agrees(backbone, sets.beft(), rewrite)


def test_beft_is_refused_where_there_are_no_values() -> None:
    from tests.laws.test_backbones import convnext

    with pytest.raises(MatchError):
        surgery.plan(convnext(), "beft")


@BOTH
@pytest.mark.parametrize("kinds", [1, 2, 4])
def test_road_turns_and_scales_pairs(kinds: int, backbone: str) -> None:
    def rewrite(plain: nn.Module, parts: dict[str, Any]) -> None:
        assert len(parts) == 4 * len(blocks(plain))
        for key, p in parts.items():
            linear: Any = plain.get_submodule(key.removesuffix("/append").replace("/", "."))
            R = torch.zeros(2 * [len(linear.weight)], dtype=torch.float64)
            for i in range(len(R) // 2):
                t, a = (
                    [m.view(kinds, -1)[k % kinds, i] for k in range(4)] for m in (p.theta, p.alpha)
                )
                R[2 * i, 2 * i] = a[0] * t[0].cos()
                R[2 * i + 1, 2 * i + 1] = a[1] * t[1].cos()
                R[2 * i, 2 * i + 1] = -a[2] * t[2].sin()
                R[2 * i + 1, 2 * i] = a[3] * t[3].sin()
            linear.weight.copy_(R @ linear.weight)
            linear.bias.copy_(R @ linear.bias)

    agrees(backbone, sets.road(kinds=kinds), rewrite)


ALL = {
    **{name: case[0] for name, case in ONE.items()},
    "hydra": sets.hydra(), "beft": sets.beft(), "road": sets.road(),
    "randlora, turned": [at(proj, surgery.parallel(lambda site: banks.RandLoRA(
        banks.Bases(site.width, site.out, 5), site.width, site.out)))],
}  # fmt: skip
RANDOM = {"fourierft", "vblora", "unilora", "snell"}


@BOTH
@pytest.mark.parametrize("case", ALL)
def test_it_starts_as_it_says_trains_merges_and_comes_off(case: str, backbone: str) -> None:
    assert starts_as_the_base(backbone, ALL[case]) is (case not in RANDOM)
    trains_and_comes_off(backbone, ALL[case], steps=8 if case == "mlae" else 2)  # masked at random
    merges(backbone, ALL[case])


@pytest.mark.parametrize(
    ("rules", "count"),
    [
        (sets.rslora(), 294_912),
        (sets.lora_fa(), 12 * 8 * 2304),
        (sets.hydra(), 12 * 2 * ((768 + 768) + 2 * (768 + 768) + (3072 + 768))),
        (sets.beft(), 12 * 768),
        (sets.fourierft(), 72_000),
        (sets.waveft(), 72_000),
        (sets.c3a(), 12 * 768 * 2304 // 256),
        (sets.randlora(), 24 * 24 * (32 + 768)),
        (sets.vblora(), 90 * 256 + 24 * 4 * 90 * (768 + 768) // 256),
        (sets.unilora(), 23_040),
        (sets.gralora(), 12 * 32 * (768 + 2304)),
        (sets.mlae(), 12 * 8 * (768 + 2304 + 1)),
        (sets.adalora(), 12 * 12 * ((768 + 2304 + 1) + (768 + 768 + 1) + 2 * (768 + 3072 + 1))),
        (sets.snell(), 12 * 8 * (4 * 2 * 768 + 2 * (768 + 3072))),
        (sets.boft(), 12 * 2 * 96 * 28),
        (sets.goft(), 12 * 767),
        (sets.goft(lengths=True), 12 * (767 + 768)),
        (sets.psoft(), 48 * (32 * 31 // 2 + 64)),
        (sets.road(), 12 * (2304 + 768 + 3072 + 768)),
    ],
    ids=lambda value: value if isinstance(value, int) else "",
)
def test_it_trains_as_much_of_a_vit_b_as_its_formula_says(rules: Any, count: int) -> None:
    assert surgery.plan(vit_b(), rules).trainable == count


# against peft ------------------------------------------------------------------------------------


def low_rank_of(theirs: Any, linear: nn.Linear) -> Tensor:
    scale = low_rank.scale_of("lora", 5.0, 3, root=True)
    part = taken(
        low_rank.LoRA(12, 8, 3, scale=scale).double(),
        A=theirs.lora_A["default"].weight[None], B=theirs.lora_B["default"].weight[None],
    )  # fmt: skip
    return linear.weight + part.affine()[0]


def waveft_of(theirs: Any, linear: nn.Linear) -> Tensor:
    return linear.weight + sparse_of(theirs, spectral.WaveFT, "waveft", "waveft_indices")


def fourierft_of(theirs: Any, linear: nn.Linear) -> Tensor:
    return linear.weight + sparse_of(theirs, spectral.FourierFT, "fourierft", "indices")


def sparse_of(theirs: Any, kind: Any, word: str, indices: str) -> Tensor:
    rows, columns = getattr(theirs, indices)["default"]
    at = taken(spectral.Places(12, 8, len(rows)), index=rows * 12 + columns)
    part = kind(at, 12, 8, getattr(theirs, f"{word}_scaling")["default"]).double()
    delta: Tensor = taken(part, c=getattr(theirs, f"{word}_spectrum")["default"]).delta()
    return delta


def c3a_of(theirs: Any, linear: nn.Linear) -> Tensor:
    part = taken(spectral.C3A(12, 8, 4).double(), kernel=theirs.c3a_kernel["default"])
    return linear.weight + part.delta()


def randlora_of(theirs: Any, linear: nn.Linear) -> Tensor:
    """Theirs lays A out rank by rank where B is laid out base by base: other pairs are formed."""
    A, B = theirs.randlora_A["default"][:, 0], theirs.randlora_B["default"]
    paired = B.flatten(1).unflatten(1, (A.shape[0], B.shape[1])).mT
    core = taken(banks.Bases(12, 8, 3).double(), A=A, B=paired)
    part = taken(
        banks.RandLoRA(core, 12, 8, theirs.scaling["default"]).double(),
        l=theirs.randlora_lambda["default"].t(), g=theirs.randlora_gamma["default"],
    )  # fmt: skip
    return linear.weight + part.affine()[0]


def vblora_of(theirs: Any, linear: nn.Linear) -> Tensor:
    bank = taken(banks.Bank(6, 4).double(), vectors=theirs.vblora_vector_bank["default"])
    part = taken(
        banks.VBLoRA(bank, 12, 8, rank=3).double(),
        down=theirs.vblora_logits_A["default"],
        up=theirs.vblora_logits_B["default"].transpose(0, 1),
    )  # fmt: skip
    return linear.weight + part.affine()[0]


def unilora_of(theirs: Any, linear: nn.Linear) -> Tensor:
    pool = taken(banks.Pool(20).double(), theta=theirs.unilora_theta_d["default"])
    part = banks.UniLoRA(pool, 12, 8, rank=3)
    A, B = theirs.unilora_indices_A["default"], theirs.unilora_indices_B["default"]
    part = taken(part.double(), A=A, B=B)
    pool.uses.copy_(torch.cat([A.flatten(), B.flatten()]).bincount(minlength=20))
    return linear.weight + part.affine()[0]


def gralora_of(theirs: Any, linear: nn.Linear) -> Tensor:
    part = taken(
        low_rank_forms.GraLoRA(12, 8, 4, 2, scale=theirs.scaling["default"]).double(),
        A=theirs.gralora_A["default"].mT, B=theirs.gralora_B["default"].mT,
    )  # fmt: skip
    return linear.weight + part.delta()


def adalora_of(theirs: Any, linear: nn.Linear) -> Tensor:
    scale = (theirs.scaling["default"] / (theirs.ranknum["default"] + 1e-5)).item()
    part = taken(
        low_rank_forms.AdaLoRA(12, 8, 3, scale).double(),
        A=theirs.lora_A["default"], B=theirs.lora_B["default"], l=theirs.lora_E["default"][:, 0],
    )  # fmt: skip
    return linear.weight + part.affine()[0]


def boft_of(theirs: Any, linear: nn.Linear) -> Tensor:
    part, R = rotations.BOFT(12, 4, 1).double(), theirs.boft_R["default"][0]
    with torch.no_grad():  # theirs turns the other way
        rows, columns = torch.triu_indices(4, 4, 1)
        part.factors[0].skew.copy_(((R - R.mT) / 2)[:, rows, columns])
    return linear.weight @ part.affine()[0] * theirs.boft_s["default"]


def psoft_of(theirs: Any, linear: nn.Linear) -> Tensor:
    R = theirs.psoft_R["default"]
    A, B = theirs._psoft_A_cache["default"], theirs._psoft_B_cache["default"]
    part = taken(
        rotations.PSOFT(A, B).double(), skew=R.weight[None], a=R.vector_a, b=R.vector_b
    )  # fmt: skip
    return linear.weight + theirs.scaling["default"] * part.delta()


def beft_of(theirs: Any, linear: nn.Linear) -> Tensor:
    part = taken(row_lengths.Shift(8).double(), bias=theirs.beft_bias["default"])
    linear.bias += part.affine()[1]
    return linear.weight + 0.01


def road_of(kinds: int) -> Callable[[Any, nn.Linear], Tensor]:
    def weight(theirs: Any, linear: nn.Linear) -> Tensor:
        """Numbers of a group of two: of its first row, of its second, or of both cosines first."""
        of_pairs = {
            name: getattr(theirs, f"road_{name}")["default"].view(-1, kinds).t().flatten()
            for name in ("theta", "alpha")
        }
        R, _ = taken(rotations.RoAd(8, kinds).double(), **of_pairs).affine()
        linear.bias.copy_(R @ linear.bias)
        return R @ linear.weight

    return weight


PEFT: dict[str, tuple[Callable[[Any], Any], Callable[[Any, nn.Linear], Tensor]]] = {
    "rslora": (
        lambda peft: peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["0"]),
        low_rank_of,
    ),
    "fourierft": (
        lambda peft: peft.FourierFTConfig(n_frequency=20, scaling=3.0, target_modules=["0"]),
        fourierft_of,
    ),
    "waveft": (
        lambda peft: peft.WaveFTConfig(n_frequency=20, scaling=3.0, target_modules=["0"]),
        waveft_of,
    ),
    "c3a": (lambda peft: peft.C3AConfig(block_size=4, target_modules=["0"]), c3a_of),
    "randlora": (
        lambda peft: peft.RandLoraConfig(r=3, randlora_alpha=4, target_modules=["0"]),
        randlora_of,
    ),
    "vblora": (
        lambda peft: peft.VBLoRAConfig(r=3, num_vectors=6, vector_length=4, target_modules=["0"]),
        vblora_of,
    ),
    "unilora": (
        lambda peft: peft.UniLoraConfig(r=3, theta_d_length=20, target_modules=["0"]),
        unilora_of,
    ),
    "gralora": (
        lambda peft: peft.GraloraConfig(r=4, alpha=3, gralora_k=2, target_modules=["0"]),
        gralora_of,
    ),
    "adalora": (
        lambda peft: peft.AdaLoraConfig(init_r=3, total_step=9, target_modules=["0"]),
        adalora_of,
    ),
    "boft": (lambda peft: peft.BOFTConfig(boft_block_size=4, target_modules=["0"]), boft_of),
    "psoft": (lambda peft: peft.PsoftConfig(r=4, target_modules=["0"]), psoft_of),
    "beft": (lambda peft: peft.BeftConfig(target_modules=["0"]), beft_of),
    **{
        f"road_{k}": (
            lambda peft, k=k: peft.RoadConfig(
                variant=f"road_{k}", group_size=2, target_modules=["0"]
            ),
            road_of(k),
        )
        for k in (1, 2, 4)
    },
}
SINGLE = {"fourierft", "c3a", "unilora"}  # what peft computes in single precision anyway


@pytest.mark.parametrize("name", PEFT)
def test_it_is_what_peft_makes(name: str) -> None:
    config, ours = PEFT[name]
    made, theirs = adapted(config, layer().float() if name == "psoft" else layer())
    made = made.double()
    linear, x = layer(), torch.randn(5, 12, dtype=torch.float64)
    linear.load_state_dict(theirs.get_base_layer().state_dict())
    with torch.no_grad():
        base = linear(x)
        weight = ours(theirs, linear.requires_grad_(False))
        weight = weight - 0.01 if name == "beft" else weight
        want = made(x)
        close(nn.functional.linear(x, weight, linear.bias), want, 1e9 if name in SINGLE else 16)
        assert (want - base).abs().max() > 1e-3


def test_a_butterfly_of_several_factors_is_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has it for CUDA alone: its kernel, of block-diagonal matrices, is stood in for."""
    import peft
    from peft.tuners.boft import layer as boft

    class Blocks:
        @staticmethod
        def apply(R: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in R])

    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft, "FastBlockDiag", Blocks)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["0"])
    torch.manual_seed(0)
    base = nn.Linear(32, 8).double()
    _, theirs = adapted(lambda peft: config, base)
    theirs = theirs.double()
    part, R = rotations.BOFT(32, 4, 3).double(), theirs.boft_R["default"]
    rows, columns = torch.triu_indices(4, 4, 1)
    x = torch.randn(5, 32, dtype=torch.float64)
    with torch.no_grad():
        for factor, r in zip(part.factors, R, strict=True):
            factor.skew.copy_(((r - r.mT) / 2)[:, rows, columns])
        weight = base.weight @ part.affine()[0]
        turned, scale = theirs.get_delta_weight("default")
        close(weight, (turned @ base.weight.t()).t())
        close(nn.functional.linear(x, weight * scale, base.bias), theirs(x))


def test_fourierft_is_pefts_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    config, ours = PEFT["fourierft"]
    made, theirs = adapted(config, layer())
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr("torch.zeros", partial(torch.zeros, dtype=torch.float64))
    linear, x = layer(), torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        close(nn.functional.linear(x, ours(theirs.double(), linear), linear.bias), made(x))


def test_c3a_is_pefts_in_double_precision() -> None:
    from peft.tuners.c3a.utils import get_circulant_fast

    kernel = torch.randn(2, 3, 4, dtype=torch.float64)
    part: Any = taken(spectral.C3A(12, 8, 4).double(), kernel=kernel)
    x = torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        close(part.delta(), get_circulant_fast(kernel) / 12)
        close(part(x), x @ part.delta().t())


# one by one --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules",
    [sets.unilora(rank=2, size=300), at(fc1 | fc2, banks.unilora(shared(banks.pool(size=300))))],
)
def test_the_pool_maps_to_all_numbers_by_an_isometry(rules: Any) -> None:
    model = stirred("vit", rules)
    found = [p for part in parts(model).values() for p in part.modules()]
    updates = [p for p in found if isinstance(p, banks.UniLoRA)]
    pool = updates[0].pool
    assert all(p.pool is pool for p in updates)
    index = torch.cat([t.flatten() for p in updates for t in (p.A, p.B)])
    assert torch.equal(pool.uses, index.bincount(minlength=300).int())
    scale = pool.numbers() / pool.theta
    P = torch.zeros(len(index), 300, dtype=torch.float64)
    P[torch.arange(len(index)), index] = scale[index].detach()
    used = pool.uses > 0
    close((P.t() @ P)[used][:, used], torch.eye(int(used.sum()), dtype=torch.float64))


def test_experts_are_masked_in_training_alone() -> None:
    part, x = low_rank_forms.Ranks(6, 6, 4, mask=0.5), torch.eye(6)
    nn.init.ones_(part.B)
    torch.manual_seed(0)
    with torch.no_grad():
        seen = {part(x)[0, 0].item() for _ in range(200)}
        a = (2 * part.A[:, 0]).tolist()  # what is left is scaled up
        sums = [sum(k) for n in range(5) for k in combinations(a, n)]
    assert len(seen) == 16
    assert sorted(seen) == pytest.approx(sorted(sums), abs=1e-6)
    whole = part.eval()(x)
    torch.testing.assert_close(whole, part.affine()[0].t())
    torch.testing.assert_close(part.train().affine()[0].t(), whole)


def test_odd_sides_are_padded_by_wavelets() -> None:
    part: Any = spectral.WaveFT(spectral.Places(7, 5, 35), 7, 5, alpha=1.0).double()
    nn.init.normal_(part.c)
    S = torch.zeros(6, 8, dtype=torch.float64)
    S[:5, :7] = part.coefficients()
    close(part.delta().detach(), (haar(6) @ swapped(S) @ haar(8).t())[:5, :7].detach())


def test_a_tree_of_rotations_reaches_every_feature() -> None:
    """Of an odd number too."""
    for width in (1, 2, 7, 12):
        part = rotations.GOFT(width)
        nn.init.uniform_(part.angles, 0.5, 1.0)
        moved = part(torch.eye(width)[:1])[0]
        assert (moved.abs() > 1e-4).sum() >= math.ceil(math.log2(width)) + 1
        torch.testing.assert_close(moved.norm(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (rotations.boft(factors=9), "do not divide into"),
        (rotations.road(kinds=3), "1, 2 or 4"),
        (low_rank_forms.snell(rank=3), "two halves"),
        (low_rank_forms.mlae(mask=1.0), "no share"),
        (banks.randlora(core=spectral.places()), "makes a Places, and no Bases"),
    ],
)
def test_what_cannot_be_made_is_refused(part: Any, told: str) -> None:
    with pytest.raises(RuleError, match=told):
        surgery.plan(vit(), at(qkv, part))
