"""Low-rank updates that are another for each token: of ranks scaled, or of experts mixed.

TopLoRA (Li et al. 2025); MoLoRA (Zadouri et al. 2023), HydraLoRA (Tian et al. 2024), Lily (Zhong et
al. 2024).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..rules.part import Maker, part, shared, usually
from ..rules.routing import Routed
from ..structure.module_tree import Site
from .arguments import borrowed, positive
from .init import kaiming
from .low_rank import scale_of


class TopLoRA(nn.Module):
    """scale * B diag(exp(norm(T x))) A x, norm the RMS: (..., width) to (..., out)."""

    starts_at_zero = True

    def __init__(self, width: int, out: int, rank: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.A, self.T = (nn.Parameter(kaiming(rank, width)) for _ in "AT")
        self.B = nn.Parameter(torch.zeros(out, rank))
        self.norm = nn.RMSNorm(rank)

    def forward(self, x: Tensor) -> Tensor:
        lengths = self.norm(F.linear(x, self.T)).exp()
        return self.scale * F.linear(F.linear(x, self.A) * lengths, self.B)


class MoLoRA(nn.Module):
    """scale * sum_i g_i B_i A_i x, g = softmax(R x): Routed((..., out), gates (tokens, experts)).

    one_A  all experts have the same
    """

    starts_at_zero = routes = True
    ranks: ClassVar = {"A": -2, "B": -1}

    def __init__(
        self, width: int, out: int, rank: int, experts: int, one_A: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        self.by_expert = ("router", "B") if one_A else ("router", "A", "B")
        self.router = nn.Parameter(kaiming(experts, width))
        self.A = nn.Parameter(kaiming(1 if one_A else experts, rank, width))
        self.B = nn.Parameter(torch.zeros(experts, out, rank))

    def forward(self, x: Tensor) -> Routed:
        hidden = torch.einsum("...i,nri->...nr", x, self.A)
        return _mixed(hidden, F.linear(x, self.router), self.scale * self.B)


class Ups(nn.Module):
    """B (experts, out, rank) that layers share; zero at the start."""

    def __init__(self, out: int, rank: int, experts: int) -> None:
        super().__init__()
        self.B = nn.Parameter(torch.zeros(experts, out, rank))


class Lily(nn.Module):
    """scale * sum_i g_i B_i A x, g = softmax(R A x): A and R its own, B of all layers."""

    starts_at_zero = routes = True

    def __init__(self, width: int, ups: Ups, scale: float = 1.0) -> None:
        super().__init__()
        self.ups, self.scale = ups, scale
        experts, _, rank = ups.B.shape
        self.A = nn.Parameter(kaiming(rank, width))
        self.router = nn.Parameter(kaiming(experts, rank))

    def forward(self, x: Tensor) -> Routed:
        hidden = F.linear(x, self.A)
        logits = F.linear(hidden, self.router)
        return _mixed(hidden.unsqueeze(-2), logits, self.scale * self.ups.B)


def _mixed(hidden: Tensor, logits: Tensor, B: Tensor) -> Routed:
    """sum_i g_i B_i h_i in one product: hidden (..., experts or 1, rank), logits (..., experts)."""
    fine = torch.promote_types(logits.dtype, torch.float32)
    gates = logits.softmax(-1, dtype=fine)
    gated = hidden * gates.to(hidden.dtype).unsqueeze(-1)
    up = B.mT.flatten(0, 1)
    return Routed(gated.flatten(-2) @ up, gates.reshape(-1, len(B)))


@part
@usually("parallel")
def toplora(site: Site, rank: int = 8, alpha: float | None = None) -> nn.Module:
    """LoRA whose ranks are scaled for each token: B diag(exp(norm(T x))) A x.

    alpha  None: the scale alpha / rank is 1

    Starts by adding nothing. Not linear. Parameters: rank * (2 * width + out + 1).
    Source: Li et al. 2025 (TopLoRA, arXiv 2510.23123).

    >>> toplora(rank=4)
    toplora(rank=4)
    """
    positive("toplora", rank=rank)
    return TopLoRA(site.width, site.out, rank, scale_of("toplora", alpha, rank))


@part
@usually("parallel")
def molora(
    site: Site, experts: int = 4, rank: int = 8, one_A: bool = False, alpha: float | None = None
) -> nn.Module:
    """A mixture of LoRAs, all of which run, by gates of each token.

    one_A  all experts have the same A, as in HydraLoRA
    alpha  None: the scale alpha / rank is 1

    Starts by adding nothing. Not linear. It routes: `routing(model)` shows the gates.
    Parameters: experts * (width + rank * (width + out)).
    Sources: Zadouri et al. 2023 (MoLoRA), Eq. 4; Tian et al. 2024 (HydraLoRA).

    >>> molora(experts=3, one_A=True)
    molora(experts=3, one_A=True)
    """
    positive("molora", experts=experts, rank=rank)
    return MoLoRA(site.width, site.out, rank, experts, one_A, scale_of("molora", alpha, rank))


@part
def lily_ups(site: Site, experts: int = 4, rank: int = 16) -> nn.Module:
    """The up-projections that layers of Lily mix: shared(lily_ups()), for all of one output size.

    Starts at zero. Parameters: experts * rank * out. Source: Zhong et al. 2024 (Lily).

    >>> lily_ups(experts=2)
    lily_ups(experts=2)
    """
    positive("lily_ups", experts=experts, rank=rank)
    return Ups(site.out, rank, experts)


_UPS = shared(lily_ups())


@part
@usually("parallel")
def lily(site: Site, ups: Maker = _UPS, scale: float = 1.0) -> nn.Module:
    """LoRA with an A of its own and a B that each token mixes of those that all layers share.

    ups  gives B: shared(lily_ups(experts=4, rank=16))

    The published code mixes one B for the whole batch, by the mean of the gates; then what a sample
    gives depends on those beside it. Starts by adding nothing. Not linear. It routes.
    Parameters: rank * (width + experts), and those of `ups`. Source: Zhong et al. 2024 (Lily).

    >>> lily(ups=shared(lily_ups(rank=8)))
    lily(ups=shared(lily_ups(rank=8)))
    """
    return Lily(site.width, borrowed("lily", "ups", ups, site.sized(1, site.out), Ups), scale)
