"""How long the rows of a changed weight are: DoRA's magnitude; and vectors that re-scale (IA3) or
shift (BEFT) features."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..rules.part import Maker, part, usually
from ..structure.module_tree import Site
from .arguments import borrowed
from .base_weight import BaseWeight, base_weight
from .low_rank import LoRA
from .qkv_rows import chosen_rows, placed, row_size


class Magnitude(nn.Module):
    """g y + (1 - g) b, g = m / |W + B A| by row, of y = (W + B A) x + b: (..., out) to (..., out).

    m is |W| + dm with dm of zeros at the start, and so g is one, whatever W is: another base may
    be loaded. The norm is formed by |W|^2 + 2 <W, B A> + |B A|^2, without the sum itself, and no
    gradient goes through it.

    >>> linear = nn.Linear(8, 6)
    >>> part, y = Magnitude(BaseWeight(linear, "weight"), LoRA(8, 6)), torch.randn(3, 6)
    >>> torch.equal(part(y), y)
    True
    """

    def __init__(self, weight: BaseWeight, update: LoRA) -> None:
        super().__init__()
        self.weight, self.update = weight, update
        self.dm = nn.Parameter(torch.zeros(len(weight())))

    @torch.no_grad()
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Of the rows of W, and of W + B A."""
        A, B = self.update.maps()
        W = self.weight(A)
        base = W.square().sum(1)
        cross = 2 * ((W @ A.t()) * B).sum(1)
        return base.sqrt(), (base + cross + ((B @ (A @ A.t())) * B).sum(1)).sqrt()

    def affine(self) -> tuple[Tensor, Tensor | None]:
        base, now = self.lengths()
        g, bias = (base + self.dm) / now, self.weight.bias(self.dm)
        return g, None if bias is None else (1 - g) * bias

    def forward(self, y: Tensor) -> Tensor:
        g, bias = self.affine()
        return y * g if bias is None else y * g + bias


class Rescale(nn.Module):
    """v * x, feature by feature, v of one at the start; of the chosen rows alone.

    >>> Rescale(8)(torch.ones(1, 8)).shape
    torch.Size([1, 8])
    """

    kinds: ClassVar = {"v": "vector"}  # it starts at one, and is not to decay

    def __init__(self, width: int, rows: list[slice] | None = None) -> None:
        super().__init__()
        self.width, self.rows = width, rows or [slice(0, width)]
        self.v = nn.Parameter(torch.ones(len(self.rows), row_size(self.rows)))

    def affine(self) -> tuple[Tensor, None]:
        return placed([v - 1 for v in self.v], self.rows, self.width) + 1, None

    def forward(self, x: Tensor) -> Tensor:
        return x * self.affine()[0]


class Shift(nn.Module):
    """x + b, b of zero at the start; of the chosen rows alone."""

    def __init__(self, width: int, rows: list[slice] | None = None) -> None:
        super().__init__()
        self.width, self.rows = width, rows or [slice(0, width)]
        self.bias = nn.Parameter(torch.zeros(len(self.rows), row_size(self.rows)))

    def affine(self) -> tuple[Tensor, Tensor]:
        return self.bias.new_ones(self.width), placed([*self.bias], self.rows, self.width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.affine()[1]


@part
@usually("append")
def magnitude(site: Site, update: Maker) -> nn.Module:
    """The length of each row of W + B A, trained as its difference to that of W: DoRA beside LoRA.

    update  the LoRA that the site has: at(qkv, parallel(update), append(magnitude(update))), with
            update = shared(lora(), by=qkv)

    Linear, and merges. Raises RuleError where the site has no weight that can be read.
    Parameters: out. Source: Liu et al. 2024 (DoRA), Eq. 5, and the constant norm of section 4.3.

    >>> from surgery.rules.part import shared
    >>> from surgery.parts.low_rank import lora
    >>> magnitude(shared(lora(rank=4)))
    magnitude(update=shared(lora(rank=4)))
    """
    weight = base_weight(site, "magnitude")
    out, width = weight().shape
    whole = site.sized(width, out)
    core = borrowed("magnitude", "update", update, whole, LoRA)
    return Magnitude(weight, core)


@part
@usually("append")
def rescale(site: Site, rows: str | None = None) -> nn.Module:
    """A vector that features are multiplied with, of ones at the start: append or prepend it.

    rows  as of `lora`: "_q k v" leaves the first third alone

    Linear, and merges. Parameters: width, or that of the chosen rows.
    Source: Liu et al. 2022 (IA3).

    >>> rescale(rows="_q k v")
    rescale(rows="_q k v")
    """
    return Rescale(site.width, chosen_rows(rows, site.width, "rescale"))


@part
@usually("append")
def shift(site: Site, rows: str | None = None) -> nn.Module:
    """A bias that is added to features, of zeros at the start.

    rows  as of `lora`: "_q _k v" for that of the values alone

    Linear, and merges where the layer has a bias. Parameters: width, or that of the chosen rows.
    Source: Huang et al. 2025 (BEFT).

    >>> shift(rows="_q _k v")
    shift(rows="_q _k v")
    """
    return Shift(site.width, chosen_rows(rows, site.width, "shift"))
