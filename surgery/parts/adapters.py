"""The bottleneck adapter (Houlsby et al. 2019; Chen et al. 2022, AdaptFormer, Eq. 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RuleError
from ..rules.part import part
from ..structure.module_tree import Site
from .arguments import positive
from .base_weight import BaseWeight, base_weight
from .init import kaiming


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of NOAH's adapters (Zhang et al. 2022)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Adapter(nn.Module):
    """up(drop(act(down(x)))): (..., width) to (..., out) through `rank` hidden units.

    `up` and the biases start at zero, so that the adapter starts by adding nothing; `down` starts
    as nn.Linear does (Kaiming uniform, a = sqrt 5), as in AdaptFormer's and LoRA's code.

    >>> Adapter(768, rank=64)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    starts_at_zero = True  # apply(..., example=x) holds it to that

    def __init__(
        self,
        width: int,
        rank: int = 64,
        *,
        out: int | None = None,
        activation: type[nn.Module] = nn.ReLU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.down = _linear(kaiming(rank, width))
        self.up = _linear(torch.zeros(width if out is None else out, rank))
        self.act = with_dropout(activation, dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up(self.act(self.down(x)))
        return hidden


class NormedAdapter(Adapter):
    """The adapter of what a norm of the base makes of x: up(act(down(norm(x)))).

    >>> norm = nn.LayerNorm(768)
    >>> part = NormedAdapter(BaseWeight(norm, "weight"), norm.eps, 768, rank=64)
    >>> part(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    def __init__(self, weight: BaseWeight, eps: float, width: int, rank: int, **named: Any) -> None:
        super().__init__(width, rank, **named)
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight(x), self.weight.bias(x)
        return super().forward(F.layer_norm(x, weight.shape, weight, bias, self.eps))


def with_dropout(activation: type[nn.Module], dropout: float) -> nn.Module:
    """An activation, and dropout on what it gives where there is any."""
    return nn.Sequential(activation(), nn.Dropout(dropout)) if dropout else activation()


def _linear(weight: Tensor) -> nn.Linear:
    """nn.Linear around a weight, bias zero, at a third of the cost of making one and filling it.

    Its own `__init__` draws a start that would be thrown away, and a plan makes thousands.
    """
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    out, width = weight.shape
    vars(linear).update(in_features=width, out_features=out)
    linear._parameters["weight"] = nn.Parameter(weight)
    linear._parameters["bias"] = nn.Parameter(torch.zeros(out))
    return linear


@part
def adapter(
    site: Site,
    rank: int = 64,
    activation: type[nn.Module] = nn.ReLU,
    dropout: float = 0.0,
    normed: bool = False,
) -> nn.Module:
    """A bottleneck adapter of the site's width: up(drop(act(down(x)))).

    rank        hidden units
    activation  a module class such as nn.ReLU, nn.GELU or QuickGELU
    dropout     probability, on the hidden units
    normed      down reads what the LayerNorm at the site makes of x, so that
                at(norm, prepend(adapter(normed=True), residual=True)) is AdapterFusion's adapter,
                norm(x + adapter(norm(x)))

    Raises RuleError where `normed` stands at no LayerNorm. Starts by adding nothing.
    Parameters: width * rank + rank + rank * out + out.
    Sources: Houlsby et al. 2019; Chen et al. 2022 (AdaptFormer), Eq. 2; Pfeiffer et al. 2021.

    >>> adapter(rank=8)
    adapter(rank=8)
    """
    positive("adapter", rank=rank)
    if normed:
        weight, layer = base_weight(site, "adapter(normed=True)"), site.module
        if not isinstance(layer, nn.LayerNorm):
            kind = type(layer).__name__
            raise RuleError("adapter(normed=True)", f"a {kind} is no LayerNorm.", "Leave normed=.")
        return NormedAdapter(
            weight, layer.eps, site.width, rank, activation=activation, dropout=dropout
        )
    return Adapter(site.width, rank, out=site.out, activation=activation, dropout=dropout)
