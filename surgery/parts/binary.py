"""Adapters whose weights are one or two bits each (Jie et al. 2023, Bi-AdaptFormer, Bi-LoRA)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RuleError, is_integer
from ..rules.affine import Affine
from ..rules.part import part, usually
from ..structure.module_tree import Site
from .adapters import Adapter
from .arguments import positive
from .qkv_rows import on_rows

CODES = {  # of a normal variable: the median of each cell, the cells cut halfway between codes
    1: (-0.6744897501960817, 0.6744897501960817),
    2: (-1.2657203250220042, -0.37775416114944965, 0.37775416114944965, 1.2657203250220042),
}


class QuantisedLinear(nn.Linear):
    """x W_q^T, no bias: W_q = b std + mean, with b the code nearest to (W - mean) / (std + 1e-5).

    `weight` (out, width) is kept in full to train on; mean and std (unbiased) are its own. The
    gradient passes from b to (W - mean) / (std + 1e-5) as it is, and through mean and std.

    >>> QuantisedLinear(8, 4, bits=2).quantised().unique().numel() <= 4
    True
    """

    def __init__(self, width: int, out: int, bits: int = 1) -> None:
        super().__init__(width, out, bias=False)
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantised())

    def quantised(self) -> Tensor:
        """W_q (out, width)."""
        mean, std = self.statistics()
        normal = self._normal(mean, std)
        through = normal - normal.detach()  # zero, with the gradient of `normal`
        return (self._nearest_codes(normal) + through) * std + mean

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the weight: two scalars."""
        return self.weight.mean(), self.weight.std()

    def cells(self) -> Tensor:
        """The number of each weight's code, in ascending order from 0: (out, width), uint8."""
        normal = self._normal(*self.statistics())
        return torch.stack([normal > edge for edge in self._edges()]).sum(0, dtype=torch.uint8)

    def restored(self, cells: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """A weight (out, width) that is quantised to these codes, mean and std: one value a code.

        W = (c - mean(c)) std / std(c) + mean has that mean and that std itself. In one bit it has
        its codes too; in two, where the outer ones are not rare.
        """
        codes = torch.tensor(CODES[self.bits], dtype=torch.float64)[cells.long().cpu()]
        spread = codes.std()
        scale = std.double() / spread if spread > 0 else spread
        weight = (codes - codes.mean()) * scale + mean.double()
        return weight.to(self.weight.device, self.weight.dtype)

    def _normal(self, mean: Tensor, std: Tensor) -> Tensor:
        return (self.weight - mean) / (std + 1e-5)

    def _nearest_codes(self, normal: Tensor) -> Tensor:
        first, *rest = CODES[self.bits]
        codes = torch.full_like(normal, first)
        for edge, code in zip(self._edges(), rest, strict=True):
            codes = torch.where(normal > edge, code, codes)
        return codes

    def _edges(self) -> list[float]:
        return [(a + b) / 2 for a, b in pairwise(CODES[self.bits])]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}"


class BinaryAdapter(Adapter):
    """up(drop(act(down(x)))) with quantised weights and no biases: (..., width) to (..., out).

    `up` starts normal (std 0.001, cut at 0.002), `down` as nn.Linear does: what it adds at first
    is small, not zero.

    >>> BinaryAdapter(768, rank=32)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    starts_at_zero = False
    down: QuantisedLinear
    up: QuantisedLinear

    def __init__(
        self,
        width: int,
        rank: int = 32,
        *,
        out: int | None = None,
        bits: int = 1,
        activation: type[nn.Module] = nn.ReLU,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(0, 0, out=0, activation=activation, dropout=dropout)
        self.down = QuantisedLinear(width, rank, bits)
        self.up = QuantisedLinear(rank, width if out is None else out, bits)
        nn.init.trunc_normal_(self.up.weight, std=0.001, a=-0.002, b=0.002)


class BinaryLora(BinaryAdapter):
    """up(drop(down(x))), both quantised: an update of low rank, which merges."""

    def __init__(
        self, width: int, rank: int = 32, *, out: int, bits: int = 1, dropout: float = 0.1
    ) -> None:
        super().__init__(width, rank, out=out, bits=bits, activation=nn.Identity, dropout=dropout)

    def affine(self) -> Affine:
        return Affine(self.up.quantised() @ self.down.quantised(), None)


@part
@usually("parallel")
def binary_adapter(
    site: Site,
    rank: int = 32,
    bits: int = 1,
    activation: type[nn.Module] = nn.ReLU,
    dropout: float = 0.1,
) -> nn.Module:
    """A bottleneck adapter without biases whose weights are one bit each.

    rank        hidden units
    bits        1, or 2; mean and standard deviation are those of each weight tensor
    activation  a module class such as nn.ReLU
    dropout     probability, on the hidden units

    Adds little at first, not zero. Raises RuleError for other bits.
    Parameters: rank * (width + out), kept in full for training; `surgery.state.packed` writes the
    bits.
    Source: Jie et al. 2023 (Bi-AdaptFormer).

    >>> binary_adapter(rank=8)
    binary_adapter(rank=8)
    """
    _check("binary_adapter", rank, bits)
    return BinaryAdapter(
        site.width, rank, out=site.out, bits=bits, activation=activation, dropout=dropout
    )


@part
@usually("parallel")
def binary_lora(
    site: Site, rank: int = 32, bits: int = 1, dropout: float = 0.1, rows: str | None = None
) -> nn.Module:
    """An update of low rank whose weights are one bit each; it merges, dequantised.

    rank     of the update
    bits     1, or 2; mean and standard deviation are those of each weight tensor
    dropout  probability, on the `rank` features in the middle
    rows     chunks of the output with a pair each, such as "q _k v"; None: one pair for all of it

    Adds little at first, not zero. Raises RuleError for other bits, or rows that do not fit.
    Parameters: rank * (width + out) for each pair, kept in full for training.
    Source: Jie et al. 2023 (Bi-LoRA).

    >>> binary_lora(rank=8, rows="q _k v")
    binary_lora(rank=8, rows="q _k v")
    """
    _check("binary_lora", rank, bits)

    def make(out: int) -> nn.Module:
        return BinaryLora(site.width, rank, out=out, bits=bits, dropout=dropout)

    return on_rows(rows, site, "binary_lora", make)


def _check(rule: str, rank: int, bits: int) -> None:
    positive(rule, rank=rank)
    if not is_integer(bits) or bits not in CODES:
        raise RuleError(
            f"{rule}(bits={bits!r})", "weights have one bit or two.", "Give bits=1 or bits=2."
        )
