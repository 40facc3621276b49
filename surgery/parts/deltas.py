"""Updates of a weight that are no product of two factors alone: W + delta, delta of few numbers.

LoHa (Hyeon-Woo et al. 2021), LoKr (Yeh et al. 2023), HiRA (Huang et al. 2025), PiSSA (Meng et al.
2024), OLoRA (Buyukakyuz 2024), RLRR (Dong et al. 2024).
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from ..rules.part import part, usually
from ..structure.module_tree import Site
from .arguments import fitted, positive
from .base_weight import BaseWeight, base_weight, numbers, svd, wide
from .init import kaiming
from .low_rank import scale_of


class Delta(nn.Module):
    """delta x: (..., width) to (..., out); a kind of its own says by `delta` what that is."""

    starts_at_zero = True

    def delta(self) -> Tensor:
        """(out, width)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.delta())

    def affine(self) -> tuple[Tensor, None]:
        return self.delta(), None


class LoHa(Delta):
    """scale * (B1 A1) o (B2 A2): rank up to rank ** 2 of twice LoRA's parameters.

    >>> LoHa(8, 6, 2)(torch.randn(3, 8)).shape
    torch.Size([3, 6])
    """

    def __init__(self, width: int, out: int, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.A1 = nn.Parameter(kaiming(rank, width))
        self.B1 = nn.Parameter(kaiming(out, rank))
        self.A2 = nn.Parameter(kaiming(rank, width))
        self.B2 = nn.Parameter(torch.zeros(out, rank))

    def delta(self) -> Tensor:
        return self.scale * (self.B1 @ self.A1) * (self.B2 @ self.A2)


class LoKr(Delta):
    """scale * C kron (B A): C (p, q), B A (out / p, width / q).

    whole   B is all of the second factor, (out / p, width / q), and there is no A
    both    the first factor is of low rank too, C D: C (p, rank), D (rank, q)

    >>> LoKr(8, 6, 2, (2, 4))(torch.randn(3, 8)).shape
    torch.Size([3, 6])
    """

    def __init__(
        self,
        width: int,
        out: int,
        rank: int,
        blocks: tuple[int, int],
        scale: float = 1.0,
        whole: bool = False,
        both: bool = False,
    ) -> None:
        super().__init__()
        self.rank, self.scale, (p, q) = rank, scale, blocks
        self.C = nn.Parameter(torch.zeros(p, rank if both else q))
        self.D = nn.Parameter(kaiming(rank, q)) if both else None
        self.A = None if whole else nn.Parameter(kaiming(rank, width // q))
        self.B = nn.Parameter(kaiming(out // p, width // q if whole else rank))

    def outer(self) -> Tensor:
        """The first factor, (p, q)."""
        return self.C if self.D is None else self.C @ self.D

    def inner(self) -> Tensor:
        """The second factor, (out / p, width / q)."""
        return self.B if self.A is None else self.B @ self.A

    def delta(self) -> Tensor:
        return self.scale * torch.kron(self.outer(), self.inner())

    def forward(self, x: Tensor) -> Tensor:
        """Without the product written out: C on blocks of features, B A on those in each."""
        outer = self.outer()
        x = rearrange(x, "... (q i) -> ... q i", q=outer.shape[1])
        inner = F.linear(x if self.A is None else F.linear(x, self.A), self.B)
        return self.scale * torch.einsum("...qi,pq->...pi", inner, outer).flatten(-2)


class HiRA(Delta):
    """W o (B A): a full-rank update that W's own entries weigh.

    >>> HiRA(BaseWeight(nn.Linear(8, 6), "weight"), 8, 6, 2)(torch.randn(3, 8)).shape
    torch.Size([3, 6])
    """

    def __init__(
        self, weight: BaseWeight, width: int, out: int, rank: int, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.weight, self.scale = weight, scale
        self.A = nn.Parameter(kaiming(rank, width))
        self.B = nn.Parameter(torch.zeros(out, rank))

    def delta(self) -> Tensor:
        return self.scale * self.weight(self.A) * (self.B @ self.A)


class RLRR(Delta):
    """W o (left right^T): a vector for rows and one for columns re-scale W, with a bias.

    left starts at zero, right at one; adding nothing, as the paper's 1 + s_left s_right^T does.

    >>> RLRR(BaseWeight(nn.Linear(8, 6), "weight"), 8, 6)(torch.randn(3, 8)).shape
    torch.Size([3, 6])
    """

    def __init__(self, weight: BaseWeight, width: int, out: int) -> None:
        super().__init__()
        self.weight = weight
        self.left, self.right = nn.Parameter(torch.zeros(out)), nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(out))

    def delta(self) -> Tensor:
        return self.left[:, None] * self.weight(self.left) * self.right

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.right, self.weight(self.right)) * self.left + self.bias

    def affine(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.delta(), self.bias


class Principal(Delta):
    """B A - B0 A0, where B0 A0 is a part of W, which B and A start from: W itself is not changed.

    >>> Principal(torch.randn(2, 8), torch.randn(6, 2))(torch.randn(3, 8)).abs().max()
    tensor(0., grad_fn=<MaxBackward1>)
    """

    A0: Tensor
    B0: Tensor

    def __init__(
        self, A: Tensor, B: Tensor, scale: float = 1.0, weight: BaseWeight | None = None
    ) -> None:
        super().__init__()
        self.scale, self.weight = scale, weight
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        self.register_buffer("A0", A.clone())
        self.register_buffer("B0", B.clone())

    @torch.no_grad()
    def restart(self, A: Tensor, B: Tensor) -> None:
        """Start from other factors, as large: nothing is added again."""
        for mine, start in ((self.A, A), (self.A0, A), (self.B, B), (self.B0, B)):
            mine.copy_(start)

    def maps(self) -> tuple[Tensor, Tensor]:
        """Down (2 rank, width) and up (out, 2 rank), as of a LoRA that adds the same."""
        return torch.cat([self.A, self.A0]), self.scale * torch.cat([self.B, -self.B0], 1)

    def delta(self) -> Tensor:
        return self.scale * (self.B @ self.A - self.B0 @ self.A0)

    def forward(self, x: Tensor) -> Tensor:
        now = F.linear(F.linear(x, self.A), self.B)
        return self.scale * (now - F.linear(F.linear(x, self.A0), self.B0))


class MiSS(Delta):
    """D^T of x summed over groups of `rank` features: one small matrix, laid side by side.

    >>> MiSS(8, 6, 2)(torch.randn(3, 8)).shape
    torch.Size([3, 6])
    """

    def __init__(self, width: int, out: int, rank: int) -> None:
        super().__init__()
        self.width = width
        self.D = nn.Parameter(torch.zeros(rank, out))

    def delta(self) -> Tensor:
        return self.D.t().repeat(1, -(-self.width // len(self.D)))[:, : self.width]

    def forward(self, x: Tensor) -> Tensor:
        rank = len(self.D)
        whole = F.pad(x, (0, -self.width % rank))
        summed: Tensor = reduce(whole, "... (g r) -> ... r", "sum", r=rank)
        return summed @ self.D


@part
@usually("parallel")
def loha(site: Site, rank: int = 8, alpha: float | None = None) -> nn.Module:
    """A product, entry by entry, of two low-rank updates: alpha / rank * (B1 A1) o (B2 A2).

    alpha  None: the scale is 1

    Starts by adding nothing. Parameters: 2 * rank * (width + out).
    Source: Hyeon-Woo et al. 2021 (FedPara, LoHa), Eq. 2.

    >>> loha(rank=4)
    loha(rank=4)
    """
    positive("loha", rank=rank)
    return LoHa(site.width, site.out, rank, scale_of("loha", alpha, rank))


@part
@usually("parallel")
def lokr(
    site: Site,
    rank: int = 8,
    blocks: int | tuple[int, int] = 8,
    alpha: float | None = None,
    whole: bool = False,
    both: bool = False,
) -> nn.Module:
    """A Kronecker product: alpha / rank * C kron (B A), C (blocks, blocks).

    blocks  of the output and of the input, one number or one for each; where it does not divide
            them, the nearest that does
    alpha   None: the scale is 1
    whole   the second factor is one matrix B (out / p, width / q); rank is of the scale
    both    the first factor is a product of this rank, too

    Starts by adding nothing. Parameters: p * q + rank * (width / q + out / p).
    Source: Yeh et al. 2023 (LyCORIS, LoKr).

    >>> lokr(rank=4)
    lokr(rank=4)
    """
    p, q = blocks if isinstance(blocks, (tuple, list)) else (blocks, blocks)
    positive("lokr", rank=rank, **{"blocks": p, "blocks[1]": q})
    sides = fitted(site.out, p), fitted(site.width, q)
    scale = scale_of("lokr", alpha, rank)
    return LoKr(site.width, site.out, rank, sides, scale, whole, both)


@part
@usually("parallel")
def hira(site: Site, rank: int = 8, alpha: float | None = None) -> nn.Module:
    """A low-rank matrix that weighs the base weight's own entries: alpha / rank * W o (B A).

    alpha  None: the scale is 1

    Starts by adding nothing; reads W. Parameters: rank * (width + out).
    Raises RuleError where the site has no weight that can be read.
    Source: Huang et al. 2025 (HiRA), Eq. 4.

    >>> hira(rank=4)
    hira(rank=4)
    """
    positive("hira", rank=rank)
    scale = scale_of("hira", alpha, rank)
    return HiRA(base_weight(site, "hira"), site.width, site.out, rank, scale)


@part
@usually("parallel")
def rlrr(site: Site) -> nn.Module:
    """Vectors that re-scale the rows and the columns of W, and a bias: W + W o (l r^T), b + c.

    l and c start at zero, r at one: nothing is added. Parameters: width + 2 * out.
    Raises RuleError where the site has no weight that can be read.
    Source: Dong et al. 2024 (RLRR), Eq. 6.

    >>> rlrr()
    rlrr()
    """
    return RLRR(base_weight(site, "rlrr"), site.width, site.out)


@part
@usually("parallel")
def miss(site: Site, rank: int = 64) -> nn.Module:
    """One matrix (rank, out) of the sums of x over groups of `rank` features.

    Starts by adding nothing. Parameters: rank * out. Source: Kang 2024 (MiSS, Bone), Eq. 4.

    >>> miss(rank=16)
    miss(rank=16)
    """
    positive("miss", rank=rank)
    return MiSS(site.width, site.out, rank)


@part
@usually("parallel")
def pissa(site: Site, rank: int = 8) -> nn.Module:
    """LoRA that starts from the largest singular triplets of W: B = U sqrt(S), A = sqrt(S) V^T.

    The base keeps W, and B A - B0 A0 is added: as in the paper, where the base is W - B0 A0.
    Parameters: rank * (width + out); as many numbers are stored. Source: Meng et al. 2024 (PiSSA).

    >>> pissa(rank=4)
    pissa(rank=4)
    """
    positive("pissa", rank=rank)
    weight = base_weight(site, "pissa")
    U, S, V = svd(numbers(weight))
    root = S[:rank].sqrt()
    return Principal(root[:, None] * V[:rank], U[:, :rank] * root, weight=weight)


@part
@usually("parallel")
def olora(site: Site, rank: int = 8, alpha: float | None = None) -> nn.Module:
    """LoRA that starts from W = Q R, with Q's first columns as B and R's first rows as A.

    alpha  None: the scale alpha / rank is 1

    Parameters: rank * (width + out); as many numbers are stored. Source: Buyukakyuz 2024 (OLoRA).

    >>> olora(rank=4)
    olora(rank=4)
    """
    positive("olora", rank=rank)
    weight = numbers(base_weight(site, "olora"))
    Q, R = torch.linalg.qr(wide(weight))
    scale = scale_of("olora", alpha, rank)
    return Principal(R[:rank].to(weight), Q[:, :rank].to(weight), scale)
