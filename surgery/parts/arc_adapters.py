"""Adapters that re-scale one shared basis (Dong et al. 2023, ARC)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import RuleError
from ..rules.expression import shown
from ..rules.part import Maker, maker, part
from ..structure.module_tree import Site
from .arguments import positive
from .init import xavier


class Projection(nn.Module):
    """x U: (..., width) to (..., rank), without a bias; `weight` is U, (width, rank).

    Starts Xavier uniform, in +-sqrt(6 / (width + rank)).

    >>> Projection(768, rank=50)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 50])
    """

    def __init__(self, width: int, rank: int = 50) -> None:
        super().__init__()
        self.weight = nn.Parameter(xavier(width, rank))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class ARC(nn.Module):
    """x U diag(c) U^T + b of a basis U: (..., width) to (..., width).

    basis  holds U, and may be one for many
    zero   c starts at 0, and so does the answer; else Xavier uniform, as a matrix (1, rank)

    >>> ARC(Projection(768, rank=50))(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    def __init__(self, basis: Projection, *, zero: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        width, rank = basis.weight.shape
        self.basis = basis
        self.scale = nn.Parameter(torch.zeros(rank) if zero else xavier(1, rank)[0])
        self.bias = nn.Parameter(torch.zeros(width))
        self.drop = nn.Dropout(dropout)
        self.starts_at_zero = zero

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.drop(self.basis(x) * self.scale)
        return hidden @ self.basis.weight.t() + self.bias

    def affine(self) -> tuple[Tensor, Tensor]:
        """U diag(c) U^T, which is its own transpose, and b."""
        basis = self.basis.weight
        return (basis * self.scale) @ basis.t(), self.bias


@part
def projection(site: Site, rank: int = 50) -> nn.Module:
    """A basis U, x U: arc(basis=shared(projection(rank=50))) has one for all sites of a width.

    rank  columns of U

    Raises RuleError where rank is no integer from 1 up. Parameters: width * rank.
    Source: Dong et al. 2023 (ARC).

    >>> projection(rank=16)
    projection(rank=16)
    """
    positive("projection", rank=rank)
    return Projection(site.width, rank)


@part
def arc(site: Site, basis: Maker, zero: bool = True, dropout: float = 0.0) -> nn.Module:
    """A re-scaled basis, x U diag(c) U^T + b: prepend(arc(...), residual=True).

    basis    makes U: projection(rank=50), as a rule shared
    zero     c starts at 0 (ARC's attention); else Xavier uniform (its FFN), not as the base
    dropout  probability, on the bottleneck x U

    Linear, and can be merged. Raises RuleError where the basis is no projection.
    Parameters: rank + width, beside the basis: width * rank.
    Source: Dong et al. 2023 (ARC).

    >>> from surgery import shared
    >>> arc(shared(projection(rank=16), name="attn"))
    arc(basis=shared(projection(rank=16), name="attn"))
    """
    borrowed = maker(basis, "arc")(site)
    if not isinstance(borrowed, Projection):
        raise RuleError(
            f"arc(basis={shown(basis)})",
            f"it makes a {type(borrowed).__name__}, and no basis of which both U and U^T are used.",
            "Give projection(rank=50), or shared(projection(rank=50)).",
        )
    return ARC(borrowed, zero=zero, dropout=dropout)
