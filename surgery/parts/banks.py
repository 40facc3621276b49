"""Low-rank updates made of numbers that layers share: random bases, a bank of vectors, a pool.

RandLoRA (Albert et al. 2025), VB-LoRA (Li et al. 2024), Uni-LoRA (Li et al. 2025).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..rules.part import Maker, part, shared, usually
from ..structure.module_tree import Site
from .arguments import borrowed, fitted, positive
from .init import kaiming
from .low_rank import LowRank
from .qkv_rows import chosen_rows, on_rows, row_size


class Bases(nn.Module):
    """Random A (rank, short) and B (long, n, rank) of unit deviation, n * rank >= short; frozen.

    short and long are the smaller and the larger of width and out.
    """

    A: Tensor
    B: Tensor

    def __init__(self, width: int, out: int, rank: int) -> None:
        super().__init__()
        short, long = sorted((width, out))
        A, B = kaiming(rank, short), kaiming(long, -(-short // rank), rank)
        self.register_buffer("A", A / A.std())
        self.register_buffer("B", B / B.std())


class RandLoRA(LowRank):
    """scale * sum_j B_j diag(l_j) A diag(g_j): of full rank, with the bases random and shared.

    Where the output is the smaller side, A and the vectors stand there: the sum is turned.
    """

    kinds: ClassVar = {"l": "vector", "g": "vector"}  # which do not decay

    def __init__(self, core: Bases, width: int, out: int, scale: float = 1.0) -> None:
        super().__init__([slice(0, out)], out)
        self.core, self.scale, self.turned = core, scale, out < width
        long, n, rank = core.B.shape
        self.l = nn.Parameter(torch.zeros(n, rank))
        self.g = nn.Parameter(torch.full((n, core.A.shape[1]), 1 / long))

    def maps(self) -> tuple[Tensor, Tensor]:
        near = (self.l[..., None] * self.core.A * self.g[:, None]).flatten(0, 1)
        far = self.core.B.flatten(1)
        return (far.t(), self.scale * near.t()) if self.turned else (near, self.scale * far)


class Bank(nn.Module):
    """Trained vectors (size, length), which start uniform in +-0.02."""

    def __init__(self, size: int, length: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.empty(size, length).uniform_(-0.02, 0.02))


class VBLoRA(LowRank):
    """B A, every piece of which mixes the `k` vectors of a bank that its logits prefer."""

    starts_at_zero = False

    def __init__(self, bank: Bank, width: int, out: int, rank: int = 4, k: int = 2) -> None:
        super().__init__([slice(0, out)], out)
        self.bank, self.k = bank, k
        size, length = bank.vectors.shape
        self.down = nn.Parameter(torch.randn(rank, width // length, size) * 0.01)
        self.up = nn.Parameter(torch.randn(rank, out // length, size) * 0.01)

    def mixed(self, logits: Tensor) -> Tensor:
        """(rank, pieces, size) to (rank, pieces * length)."""
        best, index = logits.topk(self.k)
        return (best.softmax(-1)[..., None] * self.bank.vectors[index]).sum(-2).flatten(1)

    def maps(self) -> tuple[Tensor, Tensor]:
        return self.mixed(self.down), self.mixed(self.up).t()


class Pool(nn.Module):
    """Trained numbers (size,), uniform in +-0.02, and how many places use each of them."""

    uses: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(size).uniform_(-0.02, 0.02))
        self.register_buffer("uses", torch.zeros(size, dtype=torch.int32))

    def places(self, *shape: int) -> Tensor:
        """Draw for each place of a tensor the number that it uses."""
        index = torch.randint(len(self.theta), shape)
        used = index.flatten().to(self.uses.device)
        self.uses.index_add_(0, used, self.uses.new_ones(len(used)))
        return index

    def numbers(self) -> Tensor:
        """(size,): each over the root of its uses, so that the map to all places is an isometry."""
        return self.theta * self.uses.clamp(min=1).to(self.theta.dtype).rsqrt()


class UniLoRA(LowRank):
    """B A, all of whose numbers are numbers of one pool, P theta: P isometric, drawn and fixed."""

    starts_at_zero = False
    A: Tensor
    B: Tensor

    def __init__(self, pool: Pool, width: int, out: int, rank: int = 4) -> None:
        super().__init__([slice(0, out)], out)
        self.pool = pool
        self.register_buffer("A", pool.places(rank, width))
        self.register_buffer("B", pool.places(out, rank))
        self.indices_below = dict.fromkeys(("A", "B"), len(pool.theta))

    def maps(self) -> tuple[Tensor, Tensor]:
        numbers = self.pool.numbers()
        return numbers[self.A], numbers[self.B]


@part
def bases(site: Site, rank: int = 32) -> nn.Module:
    """Random bases that stay as they are, RandLoRA's: as many of this rank as make a full one.

    Stored with the parts. Parameters: 0. Source: Albert et al. 2025 (RandLoRA).

    >>> bases(rank=16)
    bases(rank=16)
    """
    positive("bases", rank=rank)
    return Bases(site.width, site.out, rank)


@part
def bank(site: Site, size: int = 90, length: int = 256) -> nn.Module:
    """Vectors that low-rank updates are composed of, VB-LoRA's.

    length  of a vector; where it does not divide input and output, the nearest that does

    Parameters: size * length. Source: Li et al. 2024 (VB-LoRA).

    >>> bank(size=30)
    bank(size=30)
    """
    positive("bank", size=size, length=length)
    return Bank(size, fitted(math.gcd(site.width, site.out), length))


@part
def pool(site: Site, size: int = 23_040) -> nn.Module:
    """Numbers that all low-rank updates are made of, Uni-LoRA's.

    Parameters: size. Source: Li et al. 2025 (Uni-LoRA).

    >>> pool(size=1000)
    pool(size=1000)
    """
    positive("pool", size=size)
    return Pool(size)


_BASES, _BANK, _POOL = shared(bases()), shared(bank()), shared(pool())


def _sized(rows: str | None, site: Site, word: str) -> Site:
    return site.sized(site.width, row_size(chosen_rows(rows, site.out, word)))


@part
@usually("parallel")
def randlora(
    site: Site, core: Maker = _BASES, scale: float = 20.0, rows: str | None = None
) -> nn.Module:
    """A full-rank sum of low-rank updates on random bases: sum_j B_j diag(l_j) A diag(g_j).

    core   gives the bases: shared(bases(rank=32)), once for all sites of one size
    scale  of the sum: alpha / rank in the paper
    rows   as of `lora`: each chunk has vectors of its own

    Starts by adding nothing. Parameters: n * (rank + min(width, out)), n = min(width, out) / rank
    rounded up, for each chosen rows. Source: Albert et al. 2025 (RandLoRA).

    >>> randlora(core=shared(bases(rank=16)))
    randlora(core=shared(bases(rank=16)))
    """
    made = borrowed("randlora", "core", core, _sized(rows, site, "randlora"), Bases)
    return on_rows(rows, site, "randlora", lambda out: RandLoRA(made, site.width, out, scale))


@part
@usually("parallel")
def vblora(
    site: Site, core: Maker = _BANK, rank: int = 4, k: int = 2, rows: str | None = None
) -> nn.Module:
    """A low-rank update composed of a bank's vectors: top-k mixtures, piece by piece.

    core  gives the bank: shared(bank(size=90, length=256))
    k     how many vectors a piece mixes, by a softmax over their logits
    rows  as of `lora`: each chunk has logits of its own

    Starts at random, as the paper writes. Parameters: the bank's, and
    rank * size * (width + out) / length for each chosen rows.
    Source: Li et al. 2024 (VB-LoRA).

    >>> vblora(rank=2)
    vblora(rank=2)
    """
    positive("vblora", rank=rank, k=k)
    made = borrowed("vblora", "core", core, _sized(rows, site, "vblora"), Bank)
    few = min(k, len(made.vectors))
    return on_rows(rows, site, "vblora", lambda out: VBLoRA(made, site.width, out, rank, few))


@part
@usually("parallel")
def unilora(site: Site, core: Maker = _POOL, rank: int = 4, rows: str | None = None) -> nn.Module:
    """A low-rank update whose numbers are drawn of one pool: all of them are P theta.

    core  gives the pool: shared(pool(size=23_040)), once for sites of whatever widths
    rows  as of `lora`

    Starts at random, as the paper writes. Parameters: the pool's alone; as many integers as LoRA
    has numbers are stored. Source: Li et al. 2025 (Uni-LoRA).

    >>> unilora(rank=2)
    unilora(rank=2)
    """
    positive("unilora", rank=rank)
    made = borrowed("unilora", "core", core, site.sized(1, 1), Pool)
    return on_rows(rows, site, "unilora", lambda out: UniLoRA(made, site.width, out, rank))
