"""A linear adapter in groups, which can be merged into the base (Luo et al. 2023, RepAdapter)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import RuleError
from ..rules.part import part
from ..structure.module_tree import Site
from .arguments import positive


class Grouped(nn.Module):
    """A linear map in groups: group g of the outputs reads group g of the inputs alone.

    `weight` is (out, width / groups), as that of a grouped 1 x 1 convolution. Starts at zero.

    >>> Grouped(8, 768, groups=2)(torch.randn(2, 197, 8)).shape
    torch.Size([2, 197, 768])
    """

    def __init__(self, width: int, out: int, *, groups: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(out, width // groups))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def dense(self) -> Tensor:
        """The weight as one matrix (out, width), zero outside the blocks on its diagonal."""
        blocks = rearrange(self.weight, "(g o) i -> g o i", g=self.groups)
        dense: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        return dense

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(), self.bias)


class RepAdapter(nn.Module):
    """scale * B(drop(A x)): (..., width) to (..., out) through `rank` hidden units, B in groups.

    A starts Xavier uniform; B and the biases start at zero, so that it starts by adding nothing.

    >>> RepAdapter(768, rank=8)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    starts_at_zero = True

    def __init__(
        self,
        width: int,
        rank: int = 8,
        *,
        out: int | None = None,
        groups: int = 2,
        scale: float = 1.0,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=bias)
        nn.init.xavier_uniform_(self.down.weight)
        if bias:
            nn.init.zeros_(self.down.bias)
        self.up = Grouped(rank, width if out is None else out, groups=groups, bias=bias)
        self.drop = nn.Dropout(dropout)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.up(self.drop(self.down(x)))
        return added * self.scale

    def affine(self) -> tuple[Tensor, Tensor | None]:
        """s B A and s (B a + b), with B as one matrix."""
        up = self.up.dense() * self.scale
        if self.up.bias is None:
            return up @ self.down.weight, None
        return up @ self.down.weight, up @ self.down.bias + self.up.bias * self.scale


@part
def repadapter(
    site: Site,
    rank: int = 8,
    groups: int = 2,
    scale: float = 1.0,
    bias: bool = True,
    dropout: float = 0.0,
) -> nn.Module:
    """A linear adapter, scale * B(drop(A x)): prepend(repadapter(), residual=True).

    rank     hidden units
    groups   of B: the first rank / groups hidden units give the first out / groups features, ...
    scale    of what it gives, searched for each task in {0.1, 0.5, 1, 5, 10}
    bias     whether A and B have biases
    dropout  probability, on the hidden units

    Starts by adding nothing. Linear, and can be merged. Raises RuleError where `groups` divides
    not both rank and features. Parameters: width * rank + rank + out * rank / groups + out.
    Source: Luo et al. 2023 (RepAdapter).

    >>> repadapter(groups=4)
    repadapter(groups=4)
    """
    positive("repadapter", rank=rank, groups=groups)
    for what, count in (("hidden units", rank), ("features", site.out)):
        if count % groups:
            raise RuleError(
                f"repadapter(rank={rank}, groups={groups})",
                f"{count} {what} do not divide by {groups} groups.",
                "Give groups that divide both rank and features, or 1.",
            )
    return RepAdapter(
        site.width, rank, out=site.out, groups=groups, scale=scale, bias=bias, dropout=dropout
    )
