"""Low-rank updates (Hu et al. 2021, LoRA), one rank in training (DyLoRA), tiled (PRoLoRA)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RuleError, is_integer, is_number
from ..rules.part import part, usually
from ..structure.module_tree import Site
from .arguments import positive
from .init import kaiming, register
from .qkv_rows import chosen_rows, placed, row_size


class LowRank(nn.Module):
    """up(down(drop(x))), (..., width) to (..., out), without biases: what all of these compute.

    A kind of its own says by `maps` how its tensors make the two matrices.
    """

    starts_at_zero = True  # apply(..., example=x) holds it to that

    def __init__(self, rows: list[slice], out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.rows, self.out = rows, out
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()

    def maps(self) -> tuple[Tensor, Tensor]:
        """Down (rank, width) and up (out, rank)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.maps()
        return F.linear(F.linear(self.drop(x), down), up)

    def affine(self) -> tuple[Tensor, None]:
        down, up = self.maps()
        return up @ down, None

    def joined(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A (k, rank, width) and B (k, size, rank), a pair for each chosen rows, as down and up.

        Zeros are laid between the rows of `up`, which costs less than between features.
        """
        pairs = zip(B, self.rows, strict=True)
        up = torch.cat([placed([b.mT], [rows], self.out) for b, rows in pairs]).mT
        return A.flatten(0, 1), up


class LoRA(LowRank):
    """scale * B A drop(x): (..., width) to (..., out), for each of the chosen rows of `out` alone.

    A (k, rank, width) starts Kaiming uniform (a = sqrt 5), B (k, out / chunks, rank) at zero.
    With `frozen_A`, A stays as it is.

    >>> LoRA(768, 2304, rank=8)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 2304])
    """

    ranks: ClassVar = {"A": -2, "B": -1}
    A: Tensor

    def __init__(
        self,
        width: int,
        out: int,
        rank: int = 8,
        *,
        rows: list[slice] | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        frozen_A: bool = False,
    ) -> None:
        super().__init__(rows or [slice(0, out)], out, dropout)
        self.rank, self.scale = rank, scale
        k, size = len(self.rows), row_size(self.rows)
        register(self, "A", kaiming(k, rank, width), trained=not frozen_A)
        self.B = nn.Parameter(torch.zeros(k, size, rank))

    def maps(self) -> tuple[Tensor, Tensor]:
        return self.joined(self.A, self.scale * self.B)


class DyLoRA(LoRA):
    """LoRA of which each training forward uses the first b of `rank` ranks, b drawn uniformly.

    The ranks that are used are scaled by rank / b. Every site draws a b of its own.

    active  the b that is used, in training too; None: drawn in training, all in eval mode
    frozen  only the b-th rank is trained, the ones before it are used as they are

    >>> part = DyLoRA(768, 768, rank=8).eval()
    >>> part.active, _ = 2, nn.init.normal_(part.B)
    >>> torch.linalg.matrix_rank(part.affine()[0]).item()
    2
    """

    frozen = False
    _active: int | None = None

    @property
    def active(self) -> int | None:
        return self._active

    @active.setter
    def active(self, b: int | None) -> None:
        if b is not None and not (is_integer(b) and b <= self.rank):
            raise RuleError(
                f"active={b!r}",
                f"this DyLoRA has ranks 1 to {self.rank}.",
                "Give one of them, or None for all of them (in training: for a drawn one).",
            )
        self._active = b

    def maps(self) -> tuple[Tensor, Tensor]:
        if not self.training and self.active is None:
            return super().maps()
        b: int | Tensor | None = self.active
        if b is None:
            b = torch.randint(1, self.rank + 1, (), device=self.A.device)
        A: Tensor = self.A
        B: Tensor = self.B
        ranks = torch.arange(1, A.shape[1] + 1, device=A.device)
        if self.training and self.frozen:
            A = torch.where((ranks == b)[:, None], A, A.detach())
            B = torch.where(ranks == b, B, B.detach())
        used = (ranks <= b).to(B.dtype) / b
        return self.joined(A, self.scale * self.rank * used * B)


class PRoLoRA(LowRank):
    """LoRA that makes most of its ranks by tiling small chunks, each tile turned by some ranks.

    A chunk of A (rank - unshared, width / m) is laid m times along the width, the i-th time turned
    along the ranks by i * max((rank - unshared) // m, 1); n chunks of B along the output likewise.
    `unshared` ranks are those of LoRA.

    >>> sum(p.numel() for p in PRoLoRA(768, 768).parameters())
    5376
    """

    def __init__(
        self,
        width: int,
        out: int,
        rank: int = 8,
        unshared: int = 2,
        tiles: tuple[int, int] = (4, 4),
        *,
        rows: list[slice] | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(rows or [slice(0, out)], out, dropout)
        self.tiles, self.scale, self.width = tiles, scale, width
        k, self.size = len(self.rows), row_size(self.rows)
        chunk, tall = -(-width // tiles[0]), -(-self.size // tiles[1])
        shared = rank - unshared
        self.A_shared = nn.Parameter(kaiming(k, shared, chunk, fan_in=width))
        self.B_shared = nn.Parameter(torch.zeros(k, tall, shared))
        self.A_own = nn.Parameter(kaiming(k, unshared, width))
        self.B_own = nn.Parameter(torch.zeros(k, self.size, unshared))

    def maps(self) -> tuple[Tensor, Tensor]:
        A = _tiled(self.A_shared, self.tiles[0], self.width)
        B = _tiled(self.B_shared.mT, self.tiles[1], self.size).mT
        A, B = torch.cat([A, self.A_own], 1), torch.cat([B, self.B_own], 2)
        return self.joined(A, self.scale * B)


def _tiled(chunk: Tensor, times: int, size: int) -> Tensor:
    """A chunk (k, rank, c) laid `times` times along its last axis, turned, and cut to `size`."""
    step = max(chunk.shape[1] // times, 1)
    return torch.cat([chunk.roll(i * step, 1) for i in range(times)], -1)[..., :size]


def scale_of(rule: str, alpha: float | None, rank: int, root: bool = False) -> float:
    """alpha / rank, or over its root; alpha is the rank where there is none.

    Raises RuleError where alpha is no positive number.
    """
    if alpha is None:
        return math.sqrt(rank) if root else 1.0
    if not (is_number(alpha) and 0 < alpha < math.inf):
        raise RuleError(
            f"{rule}(alpha={alpha!r})", "it is no positive number.", "Give one, or None for rank."
        )
    return alpha / (math.sqrt(rank) if root else rank)


@part
@usually("parallel")
def lora(
    site: Site,
    rank: int = 8,
    alpha: float | None = None,
    rows: str | None = None,
    dropout: float = 0.0,
    root: bool = False,
    frozen_A: bool = False,
) -> nn.Module:
    """A low-rank update of a linear: W x + alpha / rank * B A x.

    rank      of the update
    alpha     None: it is the rank
    rows      chunks of the output that have an A and a B each, "q _k v"; a "_" leaves one alone;
              None: one A and B over all
    dropout   probability, on x
    root      the scale is alpha / sqrt(rank) (Kalajdzievski 2023, rsLoRA)
    frozen_A  A stays as it was drawn (Zhang et al. 2023, LoRA-FA)

    Raises RuleError where the output is not as many equal chunks. Starts by adding nothing.
    Parameters: rank * (width + out); with rows, rank * (width + out / chunks) for each chosen one;
    without A's where it is frozen. Source: Hu et al. 2021 (LoRA), Eq. 3.

    >>> lora(rank=4, rows="q _k v")
    lora(rank=4, rows="q _k v")
    """
    positive("lora", rank=rank)
    chosen = chosen_rows(rows, site.out, "lora")
    scale = scale_of("lora", alpha, rank, root)
    return LoRA(
        site.width, site.out, rank,
        rows=chosen, scale=scale, dropout=dropout, frozen_A=frozen_A,
    )  # fmt: skip


@part
@usually("parallel")
def dylora(
    site: Site,
    rank: int = 8,
    alpha: float | None = None,
    rows: str | None = None,
    dropout: float = 0.0,
    frozen: bool = False,
) -> nn.Module:
    """LoRA trained at all ranks up to `rank` at once: each training forward uses the first b.

    b is drawn from 1 to rank, at each site, by torch's generator. To run or merge at one rank, set
    `active` of the parts to it.

    rank, alpha, rows, dropout  as in `lora`; the scale is alpha / rank * rank / b
    frozen   only the b-th rank is trained at a time

    Parameters: as `lora`. Source: Valipour et al. 2022 (DyLoRA), Algorithm 1.

    >>> dylora(rank=4, frozen=True)
    dylora(rank=4, frozen=True)
    """
    positive("dylora", rank=rank)
    chosen = chosen_rows(rows, site.out, "dylora")
    scale = scale_of("dylora", alpha, rank)
    part = DyLoRA(site.width, site.out, rank, rows=chosen, scale=scale, dropout=dropout)
    part.frozen = frozen
    return part


@part
@usually("parallel")
def prolora(
    site: Site,
    rank: int = 8,
    unshared: int = 2,
    tiles: tuple[int, int] = (4, 4),
    alpha: float | None = None,
    rows: str | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """LoRA whose A and B are partly tiled of small chunks, each tile turned along the ranks.

    rank      of the update, `unshared` of them as in LoRA
    tiles     (m, n): how often a chunk of A is laid along the width, one of B along the output
    alpha, rows, dropout  as in `lora`

    Raises RuleError where no rank would be tiled. Starts by adding nothing. Parameters:
    unshared * (width + out) + (rank - unshared) * (width / m + out / n), for each chosen rows.
    Source: Wang et al. 2024 (PRoLoRA).

    >>> prolora(rank=4, unshared=1)
    prolora(rank=4, unshared=1)
    """
    positive("prolora", rank=rank)
    if not is_integer(unshared, least=0) or unshared >= rank:
        raise RuleError(
            f"prolora(rank={rank}, unshared={unshared!r})",
            "of the ranks, some must be shared.",
            f"Give unshared from 0 to {rank - 1}, or use lora(rank={rank}).",
        )
    if not isinstance(tiles, (tuple, list)) or len(tiles) != 2:
        raise RuleError(f"prolora(tiles={tiles!r})", "it is no pair.", "Give (m, n).")
    positive("prolora", **{"tiles[0]": tiles[0], "tiles[1]": tiles[1]})
    chosen = chosen_rows(rows, site.out, "prolora")
    scale = scale_of("prolora", alpha, rank)
    return PRoLoRA(
        site.width, site.out, rank, unshared, (tiles[0], tiles[1]),
        rows=chosen, scale=scale, dropout=dropout,
    )  # fmt: skip
