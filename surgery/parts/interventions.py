"""Interventions on what blocks give, in a subspace of the features (Wu et al. 2024, LoReFT)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import GraftError, RuleError, is_integer
from ..rules.part import part, usually
from ..structure.module_tree import Site
from .arguments import positive
from .base_weight import wide
from .init import kaiming


class LoReFT(nn.Module):
    """R^T (W h + b - R h), R of orthonormal rows: (..., width) to the same, to be added to h.

    Of tokens (b, n, width) only the `first` and the `last` are changed, where these are given.
    R is the basis of the rows of a trained matrix, which starts orthonormal. W and b start as
    nn.Linear's, so that, as published, it starts away from adding nothing.
    """

    def __init__(
        self, width: int, rank: int, first: int | None = None, last: int | None = None
    ) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.R = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, width)))
        self.W, self.b = (
            nn.Parameter(kaiming(rank, width)),
            nn.Parameter(kaiming(rank, fan_in=width)),
        )

    def rows(self) -> Tensor:
        """R (rank, width)."""
        Q, triangle = torch.linalg.qr(wide(self.R).mT)
        rows: Tensor = torch.where(triangle.diagonal() < 0, -Q, Q).mT
        return rows.to(self.R)

    def forward(self, x: Tensor) -> Tensor:
        R = self.rows()
        if self.first is None and self.last is None:
            return self._moved(x, R)
        if x.dim() != 3:
            raise GraftError(
                f"loreft(first={self.first}, last={self.last})",
                f"it was given {tuple(x.shape)}, which are no tokens (b, n, width).",
                "Leave out first and last, to change all.",
            )
        begin = min(self.first or 0, x.shape[1])
        end = max(x.shape[1] - (self.last or 0), begin)
        middle = torch.zeros_like(x[:, begin:end])
        return torch.cat([self._moved(x[:, :begin], R), middle, self._moved(x[:, end:], R)], 1)

    def _moved(self, h: Tensor, R: Tensor) -> Tensor:
        return F.linear(h, self.W - R, self.b) @ R


@part
@usually("append")
def loreft(
    site: Site, rank: int = 4, first: int | None = None, last: int | None = None
) -> nn.Module:
    """Features moved in a subspace, h + R^T (W h + b - R h): append(loreft(), residual=True).

    first, last  how many tokens of (b, n, width) are changed, counted in each forward from the
                 beginning and from the end, padding among them; None and None: all

    Starts at random, as published. Raises RuleError where it does not return what it is given;
    GraftError, in the forward, where it should tell tokens apart and there are none.
    Parameters: 2 * rank * width + rank. Source: Wu et al. 2024 (LoReFT), Eq. 2.

    >>> loreft(first=1)
    loreft(first=1)
    """
    positive("loreft", rank=rank)
    for name, value in (("first", first), ("last", last)):
        if value is not None and not is_integer(value, least=0):
            raise RuleError(
                f"loreft({name}={value!r})", "it is no number of tokens.", "Give 1, 2, ... or None."
            )
    if site.width != site.out or rank > site.width:
        raise RuleError(
            f"loreft(rank={rank})",
            f"it is given {site.width} features to return {site.out}, and moves {rank} directions.",
            "Write append(loreft(rank=4), residual=True).",
        )
    return LoReFT(site.width, rank, first, last)
