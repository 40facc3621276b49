"""Visual domain adapters (Liu et al. 2023, ViDA): a low-rank and a high-rank update."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..rules.part import part, usually
from ..structure.module_tree import Site
from .arguments import positive
from .low_rank import LowRank


class ViDA(LowRank):
    """low_scale * B_low A_low x + high_scale * B_high A_high x: (..., width) to (..., out).

    The scales may be set to other numbers between forwards. A starts normal with a deviation of
    1 / rank^2, B at zero.

    >>> ViDA(768, 768)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    def __init__(
        self,
        width: int,
        out: int,
        low: int = 1,
        high: int = 128,
        *,
        low_scale: float = 1.0,
        high_scale: float = 1.0,
    ) -> None:
        super().__init__([slice(0, out)], out)
        self.low_scale, self.high_scale = low_scale, high_scale
        self.A_low = nn.Parameter(torch.empty(low, width).normal_(0.0, low**-2))
        self.B_low = nn.Parameter(torch.zeros(out, low))
        self.A_high = nn.Parameter(torch.empty(high, width).normal_(0.0, high**-2))
        self.B_high = nn.Parameter(torch.zeros(out, high))

    def maps(self) -> tuple[Tensor, Tensor]:
        up = [self.low_scale * self.B_low, self.high_scale * self.B_high]
        return torch.cat([self.A_low, self.A_high]), torch.cat(up, 1)


@part
@usually("parallel")
def vida(
    site: Site,
    low: int = 1,
    high: int = 128,
    low_scale: float = 1.0,
    high_scale: float = 1.0,
) -> nn.Module:
    """A low-rank and a high-rank update of a linear, each with a scale of its own.

    low, high              their ranks: what domains share, what one domain has of its own
    low_scale, high_scale  also attributes of the part, to be set between forwards

    Starts by adding nothing. Parameters: (low + high) * (width + out).
    Source: Liu et al. 2023 (ViDA).

    >>> vida(high=64)
    vida(high=64)
    """
    positive("vida", low=low, high=high)
    return ViDA(site.width, site.out, low, high, low_scale=low_scale, high_scale=high_scale)
