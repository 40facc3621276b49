"""Orthogonal maps of what a layer is given: W (R x), |R x| = |x|.

OFT (Qiu et al. 2023), HRA (Yuan et al. 2024).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import RuleError, is_integer
from ..rules.part import part, usually
from ..structure.module_tree import Site
from .arguments import fitted, positive
from .base_weight import wide
from .init import kaiming


class OFT(nn.Module):
    """R x, R block-diagonal with R_i = (I + Q_i) (I - Q_i)^-1 of skew Q_i (Cayley): (..., width).

    Q starts at zero, so that R is the identity.

    >>> OFT(8, 4)(torch.ones(1, 8))[0, :2]
    tensor([1., 1.], grad_fn=<SliceBackward0>)
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.size, self.width = size, width
        self.skew = nn.Parameter(torch.zeros(width // size, size * (size - 1) // 2))

    def rotations(self) -> Tensor:
        """(blocks, size, size)."""
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=self.skew.device)
        upper = self.skew.new_zeros(len(self.skew), self.size, self.size)
        upper = upper.index_put(
            (torch.arange(len(self.skew), device=rows.device)[:, None], rows, columns), self.skew
        )
        Q = wide(upper - upper.mT)
        eye = torch.eye(self.size, device=Q.device, dtype=Q.dtype)
        rotations: Tensor = torch.linalg.solve(eye - Q, eye + Q, left=False)
        return rotations.to(self.skew.dtype)

    def forward(self, x: Tensor) -> Tensor:
        blocks = rearrange(x, "... (b i) -> ... b i", i=self.size)
        return torch.einsum("...bi,boi->...bo", blocks, self.rotations()).flatten(-2)

    def affine(self) -> tuple[Tensor, None]:
        whole: Tensor = torch.block_diag(*self.rotations())  # type: ignore[no-untyped-call]
        return whole, None


class HRA(nn.Module):
    """H_1 ... H_r x, each H = I - 2 u u^T a reflection, u of unit length: (..., width).

    They start in equal pairs, which undo each other.

    >>> x = torch.randn(3, 8)
    >>> torch.allclose(HRA(8, 4)(x), x, atol=1e-6)
    True
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.u = nn.Parameter(kaiming(rank // 2, width).repeat_interleave(2, 0))

    def forward(self, x: Tensor) -> Tensor:
        for u in torch.nn.functional.normalize(self.u, dim=-1).flip(0):
            x = x - 2 * (x @ u)[..., None] * u
        return x

    def affine(self) -> tuple[Tensor, None]:
        eye = torch.eye(self.u.shape[1], device=self.u.device, dtype=self.u.dtype)
        return self(eye).t(), None


@part
@usually("prepend")
def oft(site: Site, size: int = 32) -> nn.Module:
    """Rotations of blocks of features before a linear layer: W (R x), R orthogonal.

    size  of the blocks; where it does not divide the width, the nearest that does

    Starts as the identity. Parameters: width / size * size (size - 1) / 2.
    Source: Qiu et al. 2023 (OFT), Eq. 6, with the input-centric form of OFTv2 (Qiu et al. 2025).

    >>> oft(size=16)
    oft(size=16)
    """
    positive("oft", size=size)
    return OFT(site.width, fitted(site.width, size))


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
