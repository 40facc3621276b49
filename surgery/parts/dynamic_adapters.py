"""The dynamic adapter (Zhou et al. 2024, DAPT), and mixtures of them (Li et al. 2024, DAPT-X)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..rules.part import part
from ..structure.module_tree import Site
from . import functional
from .adapters import Adapter
from .arguments import fitted, positive
from .init import kaiming
from .mixture import MixtureOfAdapters, noted


class DynamicAdapter(nn.Module):
    """relu(w . z + b) * up(drop(gelu(down(z)))), z = LN(x): (..., width) to (..., out).

    The first factor is a scale of its own for every token. Starts by adding nothing.

    >>> DynamicAdapter(384, rank=64)(torch.randn(2, 129, 384)).shape
    torch.Size([2, 129, 384])
    """

    starts_at_zero = True  # apply(..., example=x) holds it to that

    def __init__(
        self, width: int, rank: int = 64, *, out: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Linear(width, 1)
        nn.init.zeros_(self.scale.bias)
        self.adapter = Adapter(width, rank, out=out, activation=nn.GELU, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        scaled: Tensor = self.scale(z).relu() * self.adapter(z)
        return scaled


class MixtureOfDynamicAdapters(MixtureOfAdapters):
    """A mixture whose experts are dynamic adapters, each with a norm and a scale of its own.

    Takes and returns what MixtureOfAdapters does. An expert's norm is an affine map of what
    all of them share, the normalised sub-token, so it is merged into the expert's first layer.

    >>> mixture = MixtureOfDynamicAdapters(384, rank=32)
    >>> sum(p.numel() for p in mixture.parameters())
    39172
    """

    by_expert = (
        *MixtureOfAdapters.by_expert, "norm_weight", "norm_bias", "scale_weight", "scale_bias",
    )  # fmt: skip

    def __init__(
        self,
        width: int,
        rank: int = 64,
        experts: int = 4,
        heads: int = 3,
        *,
        top_k: int | None = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            width, rank, experts, heads, top_k=top_k, activation=nn.GELU, dropout=dropout
        )
        c = width // heads
        self.norm_weight = nn.Parameter(torch.ones(experts, c))
        self.norm_bias = nn.Parameter(torch.zeros(experts, c))
        self.scale_weight = nn.Parameter(kaiming(experts, c))
        self.scale_bias = nn.Parameter(torch.zeros(experts))

    def mix(self, u: Tensor, gates: Tensor) -> Tensor:
        z = F.layer_norm(u, u.shape[-1:])
        shift = torch.einsum("nrc,nc->nr", self.down, self.norm_bias)
        experts = functional.Experts(
            self.down * self.norm_weight.unsqueeze(1), self.down_bias + shift, self.up, self.up_bias
        )
        bias = (self.scale_weight * self.norm_bias).sum(1) + self.scale_bias
        scale = F.linear(z, self.scale_weight * self.norm_weight, bias).relu()
        if self.top_k is None:
            return functional.mix(z, gates * scale, experts, self.act)
        of_winner = scale.gather(1, gates.argmax(1, keepdim=True))
        return functional.mix(z, gates, experts, self.act, self.top_k) * of_winner


@part
def dynamic_adapter(site: Site, rank: int = 64, dropout: float = 0.0) -> nn.Module:
    """DAPT's adapter, which scales what it adds to each token: relu(w . z + b) * adapter(z).

    rank     hidden units
    dropout  probability, on the hidden units

    Starts by adding nothing. Parameters: 2 * width + width + 1 + width * rank + rank + rank * out +
    out. Source: Zhou et al. 2024 (DAPT).

    >>> dynamic_adapter(rank=8)
    dynamic_adapter(rank=8)
    """
    positive("dynamic_adapter", rank=rank)
    return DynamicAdapter(site.width, rank, out=site.out, dropout=dropout)


@part
def dynamic_moa(
    site: Site,
    experts: int = 4,
    rank: int = 32,
    heads: int = 3,
    top_k: int | None = 1,
    dropout: float = 0.0,
    fit: bool = False,
) -> nn.Module:
    """A mixture of dynamic adapters with its router; give it to `shared` to have one for all sites.

    experts  number of dynamic adapters
    rank     hidden units of each, and width of the router
    heads    sub-tokens per token, as in `moa`; so are top_k and fit
    dropout  probability, on the hidden units

    Starts by adding nothing. Source: Li et al. 2024 (Adapter-X), section 3.2, with DAPT's adapter.

    >>> dynamic_moa(rank=16)
    dynamic_moa(rank=16)
    """
    positive("dynamic_moa", experts=experts, rank=rank, heads=heads)
    used = fitted(site.width, heads) if fit else heads
    mixture = MixtureOfDynamicAdapters(
        site.width, rank, experts, used, top_k=top_k, dropout=dropout
    )
    return noted(mixture, site.width, heads)
