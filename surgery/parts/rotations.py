"""Orthogonal maps of what a layer is given: W (R x), |R x| = |x|.

OFT (Qiu et al. 2023), BOFT (Liu et al. 2023), GOFT (Ma et al. 2024), HRA (Yuan et al. 2024); in the
principal subspace of W alone, PSOFT (Wu et al. 2025); of what the layer gives, RoAd (Liao & Monz
2024).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RuleError, is_integer
from ..rules.part import part, usually
from ..structure.module_tree import Site
from .arguments import divisors, fitted, positive
from .base_weight import base_weight, numbers, svd, wide
from .deltas import Delta
from .init import kaiming


def cayley(skew: Tensor, size: int) -> Tensor:
    """(I + Q) (I - Q)^-1 of skew Q, told by what is above its diagonal: (b, n) to (b, size, size).

    >>> torch.equal(cayley(torch.zeros(1, 3), 3)[0], torch.eye(3))
    True
    """
    Q = wide(skewed(skew, size))
    eye = torch.eye(size, device=Q.device, dtype=Q.dtype)
    rotations: Tensor = torch.linalg.solve(eye - Q, eye + Q, left=False)
    return rotations.to(skew.dtype)


def skewed(skew: Tensor, size: int) -> Tensor:
    """The skew matrices of what is above their diagonals."""
    rows, columns = torch.triu_indices(size, size, 1, device=skew.device)
    blocks = torch.arange(len(skew), device=rows.device)[:, None]
    upper = skew.new_zeros(len(skew), size, size).index_put((blocks, rows, columns), skew)
    return upper - upper.mT


def neumann(skew: Tensor, size: int, terms: int) -> Tensor:
    """I - 2 Q + 2 Q^2 - ..., so many terms, the last one once: near (I - Q) (I + Q)^-1."""
    Q = skewed(skew, size).mT
    power, total = Q, torch.eye(size, device=Q.device, dtype=Q.dtype) + 2 * Q
    for _ in range(terms - 3):
        power = power @ Q
        total = total + 2 * power
    return total + power @ Q


class OFT(nn.Module):
    """R x, R block-diagonal with R_i = (I + Q_i) (I - Q_i)^-1 of skew Q_i (Cayley): (..., width).

    Q starts at zero, so that R is the identity. Where there are `terms`, R is near orthogonal
    alone: as many of the series of the inverse are summed, of -Q.

    >>> OFT(8, 4)(torch.ones(1, 8))[0, :2]
    tensor([1., 1.], grad_fn=<SliceBackward0>)
    """

    def __init__(
        self, width: int, size: int, terms: int | None = None, one_block: bool = False
    ) -> None:
        super().__init__()
        self.size, self.width, self.terms = size, width, terms
        blocks = 1 if one_block else width // size
        self.skew = nn.Parameter(torch.zeros(blocks, size * (size - 1) // 2))

    def rotations(self) -> Tensor:
        """(blocks, size, size)."""
        terms, skew = self.terms, self.skew
        own = cayley(skew, self.size) if terms is None else neumann(skew, self.size, terms)
        return own.expand(self.width // self.size, -1, -1)

    def forward(self, x: Tensor) -> Tensor:
        blocks = rearrange(x, "... (b i) -> ... b i", i=self.size)
        return torch.einsum("...bi,boi->...bo", blocks, self.rotations()).flatten(-2)

    def affine(self) -> tuple[Tensor, None]:
        whole: Tensor = torch.block_diag(*self.rotations())  # type: ignore[no-untyped-call]
        return whole, None


class Turns(nn.Module):
    """A linear map of features to as many: its weight is what it makes of the identity."""

    width: int

    def affine(self) -> tuple[Tensor, None]:
        some = next(self.parameters())
        eye = torch.eye(self.width, device=some.device, dtype=some.dtype)
        return self(eye).t(), None


class BOFT(Turns):
    """R_0 ... R_(m - 1) x, each a block-diagonal rotation of features that a butterfly brings near.

    R_i turns halves of blocks that lie 2 ** i halves apart: all features meet in a few factors.
    """

    def __init__(self, width: int, size: int, factors: int) -> None:
        super().__init__()
        self.width, self.piece = width, size // 2
        self.factors = nn.ModuleList(OFT(width, size) for _ in range(factors))

    def forward(self, x: Tensor) -> Tensor:
        for i, turn in reversed([*enumerate(self.factors)]):
            near = rearrange(x, "... (g p s r) -> ... (g s p r)", p=2, s=2**i, r=self.piece)
            x = rearrange(turn(near), "... (g s p r) -> ... (g p s r)", p=2, s=2**i, r=self.piece)
        return x


class GOFT(Turns):
    """width - 1 Givens rotations in a tree: of pairs, then of the first ones of pairs, ...

    With `lengths`, of what is scaled feature by feature: the columns of W R are.
    """

    def __init__(self, width: int, lengths: bool = False) -> None:
        super().__init__()
        self.width = width
        self.angles = nn.Parameter(torch.zeros(width - 1))
        self.lengths = nn.Parameter(torch.ones(width)) if lengths else None

    def forward(self, x: Tensor) -> Tensor:
        scaled = x if self.lengths is None else x * self.lengths
        return _tree(scaled, self.angles.cos(), self.angles.sin())


def _tree(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (a, b) turned, then the tree of every a, with what is left over of an odd number."""
    half = x.shape[-1] // 2
    if not half:
        return x
    a, b = x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]
    c, s = cos[:half], sin[:half]
    turned = torch.cat([c * a - s * b, x[..., 2 * half :]], -1)
    above = _tree(turned, cos[half:], sin[half:])
    pairs = torch.stack([above[..., :half], s * a + c * b], -1).flatten(-2)
    return torch.cat([pairs, above[..., half:]], -1)


class HRA(Turns):
    """H_1 ... H_r x, each H = I - 2 u u^T a reflection, u of unit length: (..., width).

    They start in equal pairs, which undo each other.

    >>> x = torch.randn(3, 8)
    >>> torch.allclose(HRA(8, 4)(x), x, atol=1e-6)
    True
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.width = width
        self.u = nn.Parameter(kaiming(rank // 2, width).repeat_interleave(2, 0))

    def forward(self, x: Tensor) -> Tensor:
        for u in torch.nn.functional.normalize(self.u, dim=-1).flip(0):
            x = x - 2 * (x @ u)[..., None] * u
        return x


class PSOFT(Delta):
    """B (diag(b) R diag(a) - I) A, where B A is the principal part of W: U S and V^T, fixed.

    R (rank, rank) is a rotation, a and b re-scale: they start as the identity.
    """

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        rank = len(A)
        self.register_buffer("A", A.clone())
        self.register_buffer("B", B.clone())
        self.skew = nn.Parameter(A.new_zeros(1, rank * (rank - 1) // 2))
        self.a, self.b = nn.Parameter(A.new_ones(rank)), nn.Parameter(A.new_ones(rank))

    def turned(self) -> Tensor:
        """(rank, rank): diag(b) R diag(a) - I."""
        R = cayley(self.skew, len(self.a))[0]
        return self.b[:, None] * R * self.a - torch.eye(len(R), device=R.device, dtype=R.dtype)

    def delta(self) -> Tensor:
        return self.B @ self.turned() @ self.A

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(F.linear(x, self.A), self.turned()), self.B)


class RoAd(Turns):
    """Each pair of features (x, y) as (a cos t x - a sin t y, a sin t x + a cos t y).

    alpha (kinds * width / 2,) of ones and theta of zeros: one number of each for a pair; two, one a
    row; or four, one an entry, those of cosines first.
    """

    def __init__(self, width: int, kinds: int = 1) -> None:
        super().__init__()
        self.width = width
        self.theta = nn.Parameter(torch.zeros(kinds * width // 2))
        self.alpha = nn.Parameter(torch.ones(kinds * width // 2))

    def forward(self, x: Tensor) -> Tensor:
        theta, alpha = (t.repeat(2 * self.width // len(t)).view(4, -1)
                        for t in (self.theta, self.alpha))  # fmt: skip
        cos, sin = alpha[:2] * theta[:2].cos(), alpha[2:] * theta[2:].sin()
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([cos[0] * a - sin[0] * b, sin[1] * a + cos[1] * b], -1).flatten(-2)


@part
@usually("prepend")
def oft(site: Site, size: int = 32, terms: int | None = None, one_block: bool = False) -> nn.Module:
    """Rotations of blocks of features before a linear layer: W (R x), R orthogonal.

    size       of the blocks; where it does not divide the width, the nearest that does
    terms      of the series of the inverse, 3 or more, as PEFT has it; None: the inverse itself
    one_block  all blocks are turned alike

    Starts as the identity. Parameters: width / size * size (size - 1) / 2, or those of one block.
    Source: Qiu et al. 2023 (OFT), Eq. 6, with the input-centric form of OFTv2 (Qiu et al. 2025).

    >>> oft(size=16)
    oft(size=16)
    """
    positive("oft", size=size)
    if terms is not None and not is_integer(terms, least=3):
        raise RuleError(f"oft(terms={terms!r})", "the series has 3 terms or more.", "Give 5.")
    return OFT(site.width, fitted(site.width, size), terms, one_block)


@part
@usually("prepend")
def hra(site: Site, rank: int = 8) -> nn.Module:
    """A chain of reflections before a linear layer: W (H_1 ... H_r x).

    Raises RuleError where rank is odd: they start in pairs that undo each other, as the identity
    but for rounding. Parameters: rank * width. Source: Yuan et al. 2024 (HRA), Eq. 3.

    >>> hra(rank=4)
    hra(rank=4)
    """
    if not is_integer(rank, least=2) or rank % 2:
        raise RuleError(f"hra(rank={rank!r})", "reflections come in pairs.", "Give 2, 4, 6, ...")
    return HRA(site.width, rank)


@part
@usually("prepend")
def boft(site: Site, size: int = 8, factors: int = 2) -> nn.Module:
    """A butterfly of rotations before a linear layer: W (R_0 ... R_(m - 1) x).

    size     of the blocks; where it is not even, or 2 ** (factors - 1) blocks do not divide the
             width, the nearest that is and does
    factors  m; with one it is `oft`

    Starts as the identity. Raises RuleError where there is no such size.
    Parameters: factors * width * (size - 1) / 2. Source: Liu et al. 2023 (BOFT).

    >>> boft(size=4, factors=4)
    boft(size=4, factors=4)
    """
    positive("boft", size=size, factors=factors)
    known = [n for n in divisors(site.width) if n % 2 == 0 and site.width % (n << factors - 1) == 0]
    if not known:
        raise RuleError(
            f"boft(factors={factors})",
            f"{site.width} features do not divide into 2 ** {factors} halves of blocks.",
            "Give fewer factors, or use oft().",
        )
    nearest = min(known, key=lambda n: (abs(n - size), -n))
    return BOFT(site.width, nearest, factors)


@part
@usually("prepend")
def goft(site: Site, lengths: bool = False) -> nn.Module:
    """width - 1 Givens rotations before a linear layer, in a tree of log2(width) steps.

    lengths  the columns of the turned weight are scaled, too, as in its code

    Starts as the identity. Parameters: width - 1, and width more with lengths.
    Source: Ma et al. 2024 (GOFT).

    >>> goft(lengths=True)
    goft(lengths=True)
    """
    return GOFT(site.width, lengths)


@part
@usually("parallel")
def psoft(site: Site, rank: int = 32) -> nn.Module:
    """A rotation, and scales, within the principal subspace of W: W + B (diag(b) R diag(a) - I) A.

    Starts by adding nothing; reads W. Raises RuleError where the site has no weight that can be
    read. Parameters: rank * (rank - 1) / 2 + 2 * rank; rank * (width + out) numbers are stored.
    Source: Wu et al. 2025 (PSOFT).

    >>> psoft(rank=16)
    psoft(rank=16)
    """
    positive("psoft", rank=rank)
    U, S, V = svd(numbers(base_weight(site, "psoft")))
    return PSOFT(V[:rank], U[:, :rank] * S[:rank])


@part
@usually("append")
def road(site: Site, kinds: int = 1) -> nn.Module:
    """A rotation and a scale of each pair of what a linear layer gives.

    kinds  1, 2 or 4 numbers of each for a pair: RoAd_1, RoAd_2, RoAd_4

    Starts as the identity. Raises RuleError where the features are no pairs.
    Parameters: kinds * out. Source: Liao & Monz 2024 (RoAd), Eq. 4.

    >>> road(kinds=2)
    road(kinds=2)
    """
    if kinds not in (1, 2, 4) or site.width % 2:
        raise RuleError(
            f"road(kinds={kinds!r})",
            f"it has 1, 2 or 4 for each pair of an even number of features, here {site.width}.",
            "Give road(kinds=1), at linears of even width.",
        )
    return RoAd(site.width, kinds)
