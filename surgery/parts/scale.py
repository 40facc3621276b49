"""Scale and shift of features (Lian et al. 2022, SSF)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import RuleError
from ..rules.part import part, usually
from ..structure.module_tree import Site


class ScaleShift(nn.Module):
    """gamma * x + beta, feature by feature: (..., width) to (..., width).

    Starts at random, gamma ~ N(1, 0.02) and beta ~ N(0, 0.02): near the identity, not at it.

    >>> ScaleShift(768)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    def __init__(self, width: int, *, shift: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width).normal_(1.0, 0.02))
        self.beta = nn.Parameter(torch.empty(width).normal_(0.0, 0.02)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        scaled = x * self.gamma
        return scaled if self.beta is None else scaled + self.beta

    def affine(self) -> tuple[Tensor, Tensor | None]:
        """gamma, the diagonal of the weight, and beta."""
        return self.gamma, self.beta


@part
@usually("append")
def scale_shift(site: Site, shift: bool | None = True) -> nn.Module:
    """Scale and shift what a module gives, gamma * y + beta: at(norm, scale_shift()).

    shift  False: only gamma; None: no beta where the module has a weight and no bias that beta
           could be merged into

    Linear, and can be merged. Starts near the identity, not at it. Raises RuleError where it
    stands beside a module that changes the number of features. Parameters: 2 * out.
    Source: Lian et al. 2022 (SSF).

    >>> scale_shift()
    scale_shift()
    """
    if site.width != site.out:
        raise RuleError(
            "scale_shift()",
            f"it is given {site.width} features where {site.out} are needed, and it only scales.",
            "Write append(scale_shift()).",
        )
    shifts = not _lacks_bias(site.exit.module) if shift is None else shift
    return ScaleShift(site.width, shift=shifts)


def _lacks_bias(module: nn.Module) -> bool:
    parameters = module._parameters
    return parameters.get("weight") is not None and parameters.get("bias") is None
