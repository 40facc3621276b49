"""Low-rank updates of other forms: in a grid, rank by rank, by a kernel.

GraLoRA (Jung et al. 2025), MLAE (Wang et al. 2024), AdaLoRA (Zhang et al. 2023), SNELL (Shen et
al. 2024).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from ..errors import RuleError, is_number
from ..rules.part import part, usually
from ..structure.module_tree import Site
from .arguments import fitted, positive
from .base_weight import wide
from .deltas import Delta
from .init import kaiming
from .low_rank import LowRank, scale_of
from .qkv_rows import on_rows


class GraLoRA(Delta):
    """A grid of k x k low-rank updates of rank / k each: LoRA's cost, and k times its rank."""

    def __init__(self, width: int, out: int, rank: int, k: int, scale: float = 1.0) -> None:
        super().__init__()
        self.k, self.scale = k, scale
        self.A = nn.Parameter(kaiming(k, rank, width // k))
        self.B = nn.Parameter(torch.zeros(k, out // k, rank))

    def delta(self) -> Tensor:
        A = rearrange(self.A, "n (m s) i -> n m s i", m=self.k)
        B = rearrange(self.B, "m o (n s) -> m o n s", n=self.k)
        blocks = einsum(B, A, "m o n s, n m s i -> m o n i")
        return self.scale * rearrange(blocks, "m o n i -> (m o) (n i)")

    def forward(self, x: Tensor) -> Tensor:
        """Each block of features gives every block of outputs a piece of its hidden units."""
        x = rearrange(x, "... (n i) -> ... n i", n=self.k)
        hidden = torch.einsum("...ni,nri->...nr", x, self.A)
        mixed = rearrange(hidden, "... n (m s) -> ... m (n s)", m=self.k)
        return self.scale * torch.einsum("...mr,mor->...mo", mixed, self.B).flatten(-2)


class Ranks(LowRank):
    """scale * B diag(l) A: ranks with a number each, which training may mask at random.

    A (rank, width), l (rank,), B (out, rank); l or B starts at zero.
    """

    def __init__(
        self, width: int, out: int, rank: int, scale: float = 1.0, mask: float = 0.0
    ) -> None:
        super().__init__([slice(0, out)], out)
        self.scale, self.mask = scale, nn.Dropout(mask)
        self.A, self.B = nn.Parameter(kaiming(rank, width)), nn.Parameter(torch.zeros(out, rank))
        self.l = nn.Parameter(torch.ones(rank))

    def maps(self) -> tuple[Tensor, Tensor]:
        return self.A, self.scale * self.l * self.B

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.A) * self.mask(self.scale * self.l)
        return F.linear(hidden, self.B)


class AdaLoRA(Ranks):
    """Triplets P diag(l) Q with P, `B`, and Q, `A`, held orthogonal by a penalty; l starts at zero.

    gamma  the weight of the penalty

    `surgery.training.Budget` sets the l of the least important triplets to zero.
    """

    def __init__(
        self, width: int, out: int, rank: int, scale: float = 1.0, gamma: float = 0.1
    ) -> None:
        super().__init__(width, out, rank, scale)
        self.gamma = gamma
        self.A, self.B = nn.Parameter(_small(rank, width)), nn.Parameter(_small(out, rank))
        self.l = nn.Parameter(torch.zeros(rank))

    def penalty(self) -> Tensor:
        """gamma (|P^T P - I|^2 + |Q Q^T - I|^2), of Frobenius: a term of `surgery.penalty`."""
        eye = torch.eye(len(self.l), device=self.l.device, dtype=self.l.dtype)
        far = (self.B.t() @ self.B - eye).square().sum()
        return self.gamma * (far + (self.A @ self.A.t() - eye).square().sum())


def _small(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.02


class SNELL(Delta):
    """0.1 (|b - a| - |b' - a'|) of each output's and input's vectors, where it is large, weighed.

    A number d of that matrix becomes d |d| where |d| is above the `sparsity` quantile, and zero
    elsewhere; no gradient goes through |d|. Of the vectors, `inputs` are (2, width, rank / 2) and
    `outputs` (2, out, rank / 2).
    """

    starts_at_zero = False

    def __init__(self, width: int, out: int, rank: int, sparsity: float = 0.9) -> None:
        super().__init__()
        self.sparsity = sparsity
        self.inputs = nn.Parameter(kaiming(2, width, rank // 2))
        self.outputs = nn.Parameter(kaiming(2, out, rank // 2))

    def delta(self) -> Tensor:
        distances: Tensor = torch.cdist(
            wide(self.outputs), wide(self.inputs), compute_mode="donot_use_mm_for_euclid_dist"
        )
        whole = 0.1 * (distances[0] - distances[1])
        size = whole.detach().abs()
        least = size.flatten().kthvalue(math.floor(self.sparsity * (size.numel() - 1)) + 1).values
        return (whole * torch.where(size > least, size, 0.0)).to(self.inputs.dtype)


@part
@usually("parallel")
def gralora(site: Site, rank: int = 32, k: int = 2, alpha: float | None = None) -> nn.Module:
    """A grid of k x k low-rank updates of rank / k each: alpha / rank * (B_mn A_mn).

    k      blocks of input and of output; where it does not divide them and the rank, the nearest
           that does
    alpha  None: the scale is 1

    Starts by adding nothing. Parameters: rank * (width + out).
    Source: Jung et al. 2025 (GraLoRA).

    >>> gralora(rank=16, k=4)
    gralora(rank=16, k=4)
    """
    positive("gralora", rank=rank, k=k)
    blocks = fitted(math.gcd(site.width, site.out, rank), k)
    return GraLoRA(site.width, site.out, rank, blocks, scale_of("gralora", alpha, rank))


@part
@usually("parallel")
def mlae(site: Site, rank: int = 8, mask: float = 0.5) -> nn.Module:
    """LoRA as a sum of experts of rank 1, masked at random in training: sum_i m_i l_i b_i a_i^T.

    mask  the probability that an expert is left out of a forward

    Starts by adding nothing, l at one. Parameters: rank * (width + out + 1).
    Source: Wang et al. 2024 (MLAE).

    >>> mlae(rank=4)
    mlae(rank=4)
    """
    positive("mlae", rank=rank)
    _fraction("mlae", "mask", mask)
    return Ranks(site.width, site.out, rank, mask=mask)


@part
@usually("parallel")
def adalora(
    site: Site, rank: int = 12, alpha: float | None = None, gamma: float = 0.1
) -> nn.Module:
    """LoRA as singular triplets, alpha / rank * P diag(l) Q, of which a budget keeps the important.

    alpha  None: the scale is 1
    gamma  weighs what keeps P and Q near orthogonal: its term in `surgery.penalty(model)`

    Starts by adding nothing. `surgery.training.Budget` prunes.
    Parameters: rank * (width + out + 1).
    Source: Zhang et al. 2023 (AdaLoRA), Eq. 3 and 4.

    >>> adalora(rank=6)
    adalora(rank=6)
    """
    positive("adalora", rank=rank)
    return AdaLoRA(site.width, site.out, rank, scale_of("adalora", alpha, rank), gamma)


@part
@usually("parallel")
def snell(site: Site, rank: int = 8, sparsity: float = 0.9, rows: str | None = None) -> nn.Module:
    """A sparse update made by a kernel of low-rank vectors, whose largest entries compete.

    rank      even: half of it in each of two distances
    sparsity  the share of the matrix that stays zero
    rows      as of `lora`: each chunk is a matrix of its own

    Starts at random, as the paper's code. Parameters: rank * (width + out), for each chosen rows.
    Source: Shen et al. 2024 (SNELL), in the form of its code.

    >>> snell(rank=16)
    snell(rank=16)
    """
    positive("snell", rank=rank)
    _fraction("snell", "sparsity", sparsity)
    if rank % 2:
        raise RuleError(f"snell(rank={rank})", "its kernel has two halves.", "Give an even rank.")
    return on_rows(rows, site, "snell", lambda out: SNELL(site.width, out, rank, sparsity))


def _fraction(word: str, name: str, value: object) -> None:
    if not (is_number(value) and 0 <= value < 1):
        raise RuleError(f"{word}({name}={value!r})", "it is no share.", "Give 0 to below 1.")
