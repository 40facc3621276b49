"""FacT: the weights of all layers as one tensor, what is added to it factored (Jie & Deng 2023).

A linear is a grid of square slices of the model's width d: the projection of q, k and v is three
slices of outputs, fc1 four, fc2 four of inputs. What is added to a slice is V core U, with U (r, d)
and V (d, r) shared by all slices of the model and a core (r, r) of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from ..rules.part import Maker, part, shared, usually
from ..structure.module_tree import Site
from .arguments import borrowed, positive
from .init import kaiming, xavier


class TTFactors(nn.Module):
    """U, `down` (rank, width), and V, `up` (width, rank); V starts at zero, U as nn.Linear does."""

    def __init__(self, width: int, rank: int = 16) -> None:
        super().__init__()
        self.down = nn.Parameter(kaiming(rank, width))
        self.up = nn.Parameter(torch.zeros(width, rank))


class TKFactors(TTFactors):
    """U, V, and C, `core` (rank, rank, rank), which starts as Xavier uniform."""

    def __init__(self, width: int, rank: int = 32) -> None:
        super().__init__(width, rank)
        self.core = nn.Parameter(torch.empty(rank, rank, rank))
        nn.init.xavier_uniform_(self.core)


class FacT(nn.Module):
    """V core U on every slice: (..., width) to (..., out). A subclass says its `cores()`.

    Dropout acts on what the cores give. A slice that would reach over the end of the features is
    cut off there, so that no ratio of widths is left out.
    """

    starts_at_zero = True

    def __init__(self, width: int, out: int, factors: TTFactors, *, dropout: float = 0.1) -> None:
        super().__init__()
        rank, d = factors.down.shape
        self.width, self.out, self.rank, self.factors = width, out, rank, factors
        self.slices = -(-out // d), -(-width // d)  # of outputs, of inputs
        self.drop = nn.Dropout(dropout)

    def cores(self) -> Tensor:
        """(slices of outputs, slices of inputs, rank, rank)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        over = self.slices[1] * self.factors.down.shape[1] - self.width
        whole = F.pad(x, (0, over)) if over else x
        sliced = rearrange(whole, "... (i d) -> ... i d", i=self.slices[1])
        u = F.linear(sliced, self.factors.down)
        mixed = self.drop(einsum(u, self.cores(), "... i r, o i s r -> ... o s"))
        y = rearrange(F.linear(mixed, self.factors.up), "... o d -> ... (o d)")
        return y[..., : self.out]

    def affine(self) -> tuple[Tensor, None]:
        sides = self.factors.up, self.cores(), self.factors.down
        weight = einsum(*sides, "d s, o i s r, r e -> o d i e").flatten(2).flatten(0, 1)
        return weight[: self.out, : self.width], None

    def extra_repr(self) -> str:
        return f"{self.width}, {self.out}, rank={self.rank}, slices={self.slices}"


class FacTTT(FacT):
    """The tensor-train form: a free core for every slice, which starts as nn.Linear does."""

    def __init__(self, width: int, out: int, factors: TTFactors, *, dropout: float = 0.1) -> None:
        super().__init__(width, out, factors, dropout=dropout)
        o, i = self.slices
        self.core = nn.Parameter(kaiming(o, i, self.rank, self.rank, fan_in=i * self.rank))

    def cores(self) -> Tensor:
        return self.core


class FacTTK(FacT):
    """The Tucker form: core_k = sum_j P[j, k] C[:, :, j], with C shared.

    P is (rank, slices of the model) and has a column for each slice; each site keeps its own
    columns, `mixing` (rank, slices of outputs, slices of inputs), and all sites together keep P.
    """

    def __init__(
        self, width: int, out: int, factors: TKFactors, *, dropout: float = 0.1, slices: int = 144
    ) -> None:
        super().__init__(width, out, factors, dropout=dropout)
        self.mixing = nn.Parameter(xavier(self.rank, *self.slices, fans=self.rank + slices))
        self.factors: TKFactors = factors

    def cores(self) -> Tensor:
        return einsum(self.factors.core, self.mixing, "s r j, j o i -> o i s r")


@part
def tt_factors(site: Site, rank: int = 16) -> nn.Module:
    """U and V of FacT-TT, for `shared`: one pair for all linears of a model at a width.

    Parameters: 2 * width * rank. Source: Jie & Deng 2023 (FacT).

    >>> tt_factors(rank=4)
    tt_factors(rank=4)
    """
    positive("tt_factors", rank=rank)
    return TTFactors(site.width, rank)


@part
def tk_factors(site: Site, rank: int = 32) -> nn.Module:
    """U, V and C of FacT-TK, for `shared`: one set for all linears of a model at a width.

    Parameters: 2 * width * rank + rank ** 3. Source: Jie & Deng 2023 (FacT).

    >>> tk_factors(rank=8)
    tk_factors(rank=8)
    """
    positive("tk_factors", rank=rank)
    return TKFactors(site.width, rank)


_TT, _TK = shared(tt_factors()), shared(tk_factors())


@part
@usually("parallel")
def fact_tt(site: Site, factors: Maker = _TT, dropout: float = 0.1) -> nn.Module:
    """V core U for every square slice of a linear, each with a core of its own (tensor train).

    factors  makes U and V, `shared(tt_factors())`, at the smaller of the linear's two widths
    dropout  probability, on what the cores give

    Starts by adding nothing. Parameters: slices * rank ** 2, and those of the factors.
    Source: Jie & Deng 2023 (FacT).

    >>> fact_tt(factors=shared(tt_factors(rank=4)))
    fact_tt(factors=shared(tt_factors(rank=4)))
    """
    pair = borrowed("fact_tt", "factors", factors, _square(site), TTFactors)
    return FacTTT(site.width, site.out, pair, dropout=dropout)


@part
@usually("parallel")
def fact_tk(site: Site, factors: Maker = _TK, dropout: float = 0.1, slices: int = 144) -> nn.Module:
    """V core U for every square slice of a linear, the cores mixed of one tensor C (Tucker).

    factors  makes U, V and C, `shared(tk_factors())`, at the smaller of the linear's two widths
    dropout  probability, on what the cores give
    slices   of the whole model, 144 in a ViT-B: they set the bound of the start of P alone

    Starts by adding nothing. Parameters: slices at the site * rank, and those of the factors.
    Source: Jie & Deng 2023 (FacT).

    >>> fact_tk(factors=shared(tk_factors(rank=8)))
    fact_tk(factors=shared(tk_factors(rank=8)))
    """
    positive("fact_tk", slices=slices)
    triple = borrowed("fact_tk", "factors", factors, _square(site), TKFactors)
    return FacTTK(site.width, site.out, triple, dropout=dropout, slices=slices)


def _square(site: Site) -> Site:
    """The site of one slice: as wide as the smaller side of the linear, on both."""
    d = min(site.width, site.out)
    return site.sized(d, d)
