"""Updates whose factors are made of the base weight W, which itself stays as it is.

MiCA (2026), DeLoRA (Bini et al. 2025), TinyLoRA (2026), KaSA (Wang et al. 2024), GLoRA (Chavan et
al. 2023), DEFT (2025), PEANuT (Zhong et al. 2024).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RuleError, is_integer
from ..rules.part import Maker, part, shared, usually
from ..structure.module_tree import Site
from .arguments import borrowed, positive
from .base_weight import BaseWeight, base_weight, numbers, svd, wide
from .deltas import Delta
from .init import kaiming
from .low_rank import LowRank, scale_of


class MiCA(LowRank):
    """scale * B A, B (out, rank) of W and frozen, A (rank, width) trained from zero."""

    ranks: ClassVar = {"A": -2, "B": -1}
    B: Tensor

    def __init__(self, B: Tensor, width: int, scale: float = 1.0) -> None:
        super().__init__([slice(0, len(B))], len(B))
        self.rank, self.scale = B.shape[1], scale
        self.A = nn.Parameter(B.new_zeros(B.shape[1], width))
        self.register_buffer("B", B.clone())

    def maps(self) -> tuple[Tensor, Tensor]:
        return self.A, self.scale * self.B


class DeLoRA(Delta):
    """D(l, A, B) - D(l0, A0, B0), with D = l / r * sum_i (b_i / |b_i|) (a_i / |a_i|)^T diag(w).

    w are the lengths of W's columns; A0, B0, l0 are what A, B, l start from. Whatever A and B are,
    D is at most l |W| long: l alone says how far W is left.
    """

    A0: Tensor
    B0: Tensor
    bound0: Tensor

    def __init__(
        self, weight: BaseWeight, width: int, out: int, rank: int, bound: float = 15.0
    ) -> None:
        super().__init__()
        self.weight = weight
        self.A, self.B = nn.Parameter(kaiming(rank, width)), nn.Parameter(kaiming(out, rank))
        self.bound = nn.Parameter(torch.tensor(bound))
        for name, start in [*self.named_parameters()]:
            self.register_buffer(f"{name}0", start.detach().clone())

    def _factors(self, A: Tensor, B: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
        """Down (rank, width) and up (out, rank)."""
        lengths = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)
        return A * self.weight(A).norm(dim=0), B * (bound / len(A) / lengths)

    def _both(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        now = self._factors(self.A, self.B, self.bound)
        return now, self._factors(self.A0, self.B0, self.bound0)

    def delta(self) -> Tensor:
        (down, up), (down0, up0) = self._both()
        return up @ down - up0 @ down0

    def forward(self, x: Tensor) -> Tensor:
        now, start = (F.linear(F.linear(x, down), up) for down, up in self._both())
        return now - start


class TinyVector(nn.Module):
    """The few numbers that layers of TinyLoRA share."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(size))


class TinyLoRA(LowRank):
    """B (sum_i v_i P_i) A: A = V^T and B = U S of W's largest triplets, P (size, r, r) drawn.

    A, B and P are frozen; P is normal, of variance 1 / r.
    """

    A: Tensor
    B: Tensor
    P: Tensor

    def __init__(self, A: Tensor, B: Tensor, vector: TinyVector) -> None:
        super().__init__([slice(0, len(B))], len(B))
        self.vector = vector
        self.register_buffer("A", A.clone())
        self.register_buffer("B", B.clone())
        size, rank = len(vector.v), len(A)
        self.register_buffer("P", torch.empty(size, rank, rank).normal_(std=rank**-0.5))

    def maps(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B @ torch.einsum("n,nij->ij", self.vector.v, self.P)


class KaSA(LowRank):
    """scale * B diag(s) A, and W without its smallest triplets: minus D E, which is of these."""

    starts_at_zero = False
    D: Tensor
    E: Tensor

    def __init__(
        self, E: Tensor, D: Tensor, scale: float = 1.0, beta: float = 1e-4, gamma: float = 1e-3
    ) -> None:
        super().__init__([slice(0, len(D))], len(D))
        self.scale, self.beta, self.gamma = scale, beta, gamma
        rank, width = E.shape
        self.A = nn.Parameter(kaiming(rank, width))
        self.B = nn.Parameter(torch.zeros(len(D), rank))
        self.s = nn.Parameter(torch.empty(rank).normal_())
        self.register_buffer("D", D.clone())
        self.register_buffer("E", E.clone())

    def maps(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.A, self.E]), torch.cat([self.scale * self.B * self.s, -self.D], 1)

    def penalty(self) -> Tensor:
        """beta |s|^2 + gamma (|B^T B - I| + |A A^T - I|)."""
        eye = torch.eye(len(self.s), device=self.s.device, dtype=self.s.dtype)
        off = (self.B.t() @ self.B - eye).norm() + (self.A @ self.A.t() - eye).norm()
        total: Tensor = self.beta * self.s.square().sum() + self.gamma * off
        return total


class GLoRA(Delta):
    """W o A + B, and for the bias b o D + E + W C: A, B (out, width) of low rank, C, D, E vectors.

    biased  False: there is no bias to change, and no C, D, E
    """

    def __init__(
        self, weight: BaseWeight, width: int, out: int, rank: int, biased: bool = True
    ) -> None:
        super().__init__()
        self.weight, self.biased = weight, biased
        self.A_down, self.B_down = (nn.Parameter(kaiming(rank, width)) for _ in "AB")
        self.A_up, self.B_up = (nn.Parameter(torch.zeros(out, rank)) for _ in "AB")
        if biased:
            self.C = nn.Parameter(torch.zeros(width))
            self.D, self.E = (nn.Parameter(torch.zeros(out)) for _ in "DE")

    def delta(self) -> Tensor:
        weighed = self.weight(self.A_up) * (self.A_up @ self.A_down)
        return weighed + self.B_up @ self.B_down

    def affine(self) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        if not self.biased:
            return self.delta(), None
        shift = self.E + self.weight(self.C) @ self.C
        bias = self.weight.bias(self.D)
        return self.delta(), shift if bias is None else shift + bias * self.D

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.affine())


class DEFT(LowRank):
    """(I - Q N^T) W + Q R - W = Q (R - N^T W): a subspace of W's outputs is exchanged.

    Q = N is the orthonormal basis of P (out, rank), or Q = P and N = relu(P). R is dR and what it
    starts at, N^T W with the P at the start, whatever W is: another base may be loaded.
    """

    P0: Tensor

    def __init__(self, weight: BaseWeight, rank: int, orthogonal: bool = False) -> None:
        out, width = weight().shape
        super().__init__([slice(0, out)], out)
        self.weight, self.orthogonal = weight, orthogonal
        self.P = nn.Parameter(torch.empty(out, rank).normal_(std=0.02))
        self.dR = nn.Parameter(torch.zeros(rank, width))
        self.register_buffer("P0", self.P.detach().clone())

    def _bases(self, P: Tensor) -> tuple[Tensor, Tensor]:
        """Q and N (out, rank)."""
        if self.orthogonal:
            Q = torch.linalg.qr(wide(P))[0].to(P)
            return Q, Q
        return P, P.relu()

    def maps(self) -> tuple[Tensor, Tensor]:
        (Q, N), (_, N0) = self._bases(self.P), self._bases(self.P0)
        return self.dR - (N - N0).t() @ self.weight(self.P), Q


class PEANuT(LowRank):
    """B h, h = f(A W) (rank, width): a small network reads W's columns, and its answer is added.

    With `depth`, h goes through as many square layers in and out, f after each, and what goes in is
    added to what comes out.
    """

    def __init__(
        self,
        weight: BaseWeight,
        out: int,
        rank: int,
        depth: int = 0,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__([slice(0, out)], out)
        self.weight, self.act = weight, activation()
        self.A = nn.Parameter(kaiming(rank, out))
        self.layers = nn.ParameterList(kaiming(rank, rank) for _ in range(2 * depth))
        self.B = nn.Parameter(torch.zeros(out, rank))

    def maps(self) -> tuple[Tensor, Tensor]:
        h: Tensor = self.act(self.A @ self.weight(self.A))
        kept, layers = [], list(self.layers)
        for layer in layers[: len(layers) // 2]:
            kept.append(h)
            h = self.act(layer @ h)
        for layer in layers[len(layers) // 2 :]:
            h = self.act(layer @ h) + kept.pop()
        return h, self.B


@part
@usually("parallel")
def mica(site: Site, rank: int = 8, alpha: float | None = None) -> nn.Module:
    """LoRA whose B is W's left singular vectors of the smallest singular values, frozen.

    alpha  None: the scale alpha / rank is 1

    Starts by adding nothing. Parameters: rank * width; rank * out numbers are stored.
    Source: MiCA (arXiv 2604.01694, 2026).

    >>> mica(rank=4)
    mica(rank=4)
    """
    positive("mica", rank=rank)
    U = svd(numbers(base_weight(site, "mica")))[0]
    return MiCA(U[:, -rank:], site.width, scale_of("mica", alpha, rank))


@part
@usually("parallel")
def delora(site: Site, rank: int = 8, bound: float = 15.0) -> nn.Module:
    """LoRA of factors of length one: how far W is left is one trained number, `bound`.

    bound  that it starts from, in lengths of W's columns (the paper writes |W|; so does its code)

    Starts by adding nothing: a frozen copy of the start is taken away. Parameters:
    rank * (width + out) + 1; as many numbers are stored. Source: Bini et al. 2025 (DeLoRA).

    >>> delora(rank=4)
    delora(rank=4)
    """
    positive("delora", rank=rank)
    return DeLoRA(base_weight(site, "delora"), site.width, site.out, rank, bound)


@part
def tiny_vector(site: Site, size: int = 13) -> nn.Module:
    """The trained numbers of TinyLoRA: shared(tiny_vector(size=13)) for all layers.

    Starts at zero. Parameters: size. Source: TinyLoRA (arXiv 2602.04118, 2026).

    >>> tiny_vector(size=1)
    tiny_vector(size=1)
    """
    positive("tiny_vector", size=size)
    return TinyVector(size)


_VECTOR = shared(tiny_vector())


@part
@usually("parallel")
def tinylora(site: Site, vector: Maker = _VECTOR, rank: int = 2) -> nn.Module:
    """U S (sum_i v_i P_i) V^T of W's largest singular triplets, with frozen random P_i.

    vector  gives v: tiny_vector(), one a site, or shared(tiny_vector()), one for all

    Starts by adding nothing. Parameters: those of v; rank * (width + out) + size * rank^2 numbers
    are stored. Source: TinyLoRA (arXiv 2602.04118, 2026).

    >>> tinylora(vector=tiny_vector(size=64))
    tinylora(vector=tiny_vector(size=64))
    """
    positive("tinylora", rank=rank)
    v = borrowed("tinylora", "vector", vector, site.sized(1, 1), TinyVector)
    U, S, V = svd(numbers(base_weight(site, "tinylora")))
    return TinyLoRA(V[:rank], U[:, :rank] * S[:rank], v)


@part
@usually("parallel")
def kasa(
    site: Site,
    rank: int = 8,
    alpha: float | None = None,
    beta: float = 1e-4,
    gamma: float = 1e-3,
) -> nn.Module:
    """B diag(s) A beside W without its `rank` smallest singular triplets.

    alpha        None: the scale alpha / rank is 1
    beta, gamma  of the penalty: of |s|^2, and of how far A and B are from orthonormal

    Starts away from the base, as published, by these triplets. Parameters:
    rank * (width + out + 1); rank * (width + out) numbers are stored. Raises RuleError
    where no triplet would be left. Source: Wang et al. 2024 (KaSA); penalties: Eq. 9 to 11.

    >>> kasa(rank=4)
    kasa(rank=4)
    """
    positive("kasa", rank=rank)
    if rank >= min(site.width, site.out):
        raise RuleError(
            f"kasa(rank={rank})",
            f"W has {min(site.width, site.out)} singular values, of which none would be left.",
            "Give a smaller rank.",
        )
    U, S, V = svd(numbers(base_weight(site, "kasa")))
    scale = scale_of("kasa", alpha, rank)
    return KaSA(V[-rank:], U[:, -rank:] * S[-rank:], scale, beta, gamma)


@part
@usually("parallel")
def glora(site: Site, rank: int = 4) -> nn.Module:
    """W + W o A + B and b + b o D + E + W C: low-rank A and B, and vectors C, D, E.

    The largest of the paper's search space. Where a layer has no bias there is no C, D, E.

    Starts by adding nothing. Parameters: 2 * rank * (width + out) + width + 2 * out.
    Source: Chavan et al. 2023 (GLoRA).

    >>> glora(rank=2)
    glora(rank=2)
    """
    positive("glora", rank=rank)
    weight = base_weight(site, "glora")
    return GLoRA(weight, site.width, site.out, rank, biased=weight.bias() is not None)


@part
@usually("parallel")
def deft(site: Site, rank: int = 8, orthogonal: bool = False) -> nn.Module:
    """A subspace of what W gives is taken out, and a trained one put in: (I - Q N^T) W + Q R.

    orthogonal  Q = N, an orthonormal basis of the trained P; else Q = P and N = relu(P)

    Starts by adding nothing. Parameters: rank * (width + out). Source: DEFT (NeurIPS 2025).

    >>> deft(rank=4)
    deft(rank=4)
    """
    positive("deft", rank=rank)
    return DEFT(base_weight(site, "deft"), rank, orthogonal)


@part
@usually("parallel")
def peanut(
    site: Site, rank: int = 8, depth: int = 0, activation: type[nn.Module] = nn.ReLU
) -> nn.Module:
    """What a small network makes of W's columns: B f(A W).

    depth       pairs of square layers between A and B
    activation  f, a module class such as nn.ReLU

    Starts by adding nothing. Parameters: 2 * rank * out + 2 * depth * rank^2.
    Source: Zhong et al. 2024 (PEANuT, arXiv 2410.01870).

    >>> peanut(depth=1)
    peanut(depth=1)
    """
    positive("peanut", rank=rank)
    if not is_integer(depth, least=0):
        raise RuleError(f"peanut(depth={depth!r})", "it is no number of layers.", "Give 0, 1, ...")
    return PEANuT(base_weight(site, "peanut"), site.out, rank, depth, activation)
