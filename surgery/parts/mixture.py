"""Sharing Mixture of Adapters (Li et al. 2024, Adapter-X, section 3.2, Eq. 2 to 6, Algorithm 1)."""

from __future__ import annotations

from math import gcd
from typing import ClassVar

import torch
from einops import repeat
from torch import Tensor, nn

from ..errors import RuleError
from ..rules import routing
from ..rules.part import part
from ..structure.module_tree import Site
from . import functional
from .adapters import with_dropout
from .arguments import fitted, near_divisors, positive
from .init import kaiming


class MixtureOfAdapters(nn.Module):
    """Experts, each a bottleneck adapter on sub-tokens of width / heads features, and their router.

    Takes (..., width) and returns `Routed(output, gates)`: output (..., out), gates
    (sub-tokens, experts). A token is split into `heads` contiguous sub-tokens, each routed alone.
    The router projects a sub-token to `rank` features and compares them with unit-length expert
    embeddings. top_k=1 runs the likeliest expert, scaled by its probability (Fig. 2); top_k=None
    mixes all of them (Algorithm 1).

    out  features that it gives; None: as many as it takes

    Raises RuleError where heads do not divide width and out, or top_k is neither 1 nor None.

    >>> mixture = MixtureOfAdapters(768)
    >>> sum(p.numel() for p in mixture.parameters())
    148992
    >>> output, gates = mixture(torch.randn(2, 197, 768))
    >>> output.shape, gates.shape
    (torch.Size([2, 197, 768]), torch.Size([1182, 4]))
    """

    starts_at_zero = True  # apply(..., example=x) holds it to that
    routes = True  # it returns gates, for balance_loss and routing
    kinds: ClassVar = {"reduction": "router", "embeddings": "router"}  # for surgery.groups
    # what has a row for each expert
    by_expert: tuple[str, ...] = ("embeddings", "down", "down_bias", "up", "up_bias")
    note: str | None = None  # for the report
    down_bias: Tensor
    up_bias: Tensor

    def __init__(
        self,
        width: int,
        rank: int = 64,
        experts: int = 4,
        heads: int = 3,
        *,
        top_k: int | None = 1,
        activation: type[nn.Module] = nn.ReLU,
        dropout: float = 0.0,
        bias: bool = True,
        router: int | None = None,
        by_token: bool = False,
        out: int | None = None,
    ) -> None:
        super().__init__()
        self.out = width if out is None else out
        _check(width, heads, top_k)
        _check(self.out, heads, top_k)
        self.heads, self.top_k, self.by_token = heads, top_k, by_token
        c, features = width // heads, rank if router is None else router
        reduction, down = kaiming(features, width if by_token else c), kaiming(experts, rank, c)
        self.reduction = nn.Parameter(reduction)
        self.embeddings = nn.Parameter(torch.empty(experts, features).normal_())
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(experts, self.out // heads, rank))
        for name, hidden in (("down_bias", rank), ("up_bias", self.out // heads)):
            zeros = torch.zeros(experts, hidden)
            if bias:
                self.register_parameter(name, nn.Parameter(zeros))
            else:
                self.register_buffer(name, zeros, persistent=False)
        self.act = with_dropout(activation, dropout)

    def forward(self, x: Tensor) -> routing.Routed:
        u = functional.split_heads(x, self.heads)
        routed = x.flatten(0, -2) if self.by_token else u
        gates = functional.route(routed, self.reduction, self.embeddings)
        if self.by_token:
            gates = repeat(gates, "t n -> (t h) n", h=self.heads)
        return routing.Routed(self.mix(u, gates).reshape(*x.shape[:-1], self.out), gates)

    def mix(self, u: Tensor, gates: Tensor) -> Tensor:
        """What the experts give for sub-tokens u (m, c), by gates (m, experts)."""
        experts = functional.Experts(self.down, self.down_bias, self.up, self.up_bias)
        return functional.mix(u, gates, experts, self.act, self.top_k)

    def extra_repr(self) -> str:
        experts, rank, c = self.down.shape
        return f"{c * self.heads}, rank={rank}, experts={experts}, heads={self.heads}"


def _check(width: int, heads: int, top_k: int | None) -> None:
    if heads < 1 or width % heads:
        raise RuleError(
            f"moa(heads={heads})",
            f"the width {width} does not divide by {heads} heads.",
            f"Its divisors nearest to {heads}: {near_divisors(width, heads)}. "
            f"Choose one, or write moa(heads={heads}, fit=True) to take the nearest.",
        )
    if top_k not in (1, None):
        raise RuleError(
            f"moa(top_k={top_k!r})",
            "there are two mixtures: the likeliest expert, or all of them.",
            "Write top_k=1 (the default) or top_k=None.",
        )


@part
def moa(
    site: Site,
    experts: int = 4,
    rank: int = 64,
    heads: int = 3,
    top_k: int | None = 1,
    activation: type[nn.Module] = nn.ReLU,
    dropout: float = 0.0,
    bias: bool = True,
    router: int | None = None,
    by_token: bool = False,
    fit: bool = False,
) -> nn.Module:
    """A mixture of adapters with its router; give it to `shared` to have one for all sites.

    experts     number of bottleneck adapters
    rank        hidden units of each, and width of the router
    heads       sub-tokens per token; must divide the width, or with `fit` the divisor nearest to
                it is taken (of two equally near, the larger) and the report says so
    top_k       1: the likeliest expert, scaled by its probability; None: all, mixed
    activation  of the experts
    dropout     probability, on the hidden units
    bias        of the experts
    router      features of the router; None: as many as rank
    by_token    the router looks at whole tokens, whose sub-tokens all go one way

    Starts by adding nothing. Source: Li et al. 2024 (Adapter-X), Eq. 2 to 6 and Algorithm 1.

    >>> moa(rank=16, heads=4)
    moa(rank=16, heads=4)
    """
    positive("moa", experts=experts, rank=rank, heads=heads, router=router or rank)
    used = fitted(gcd(site.width, site.out), heads) if fit else heads
    mixture = MixtureOfAdapters(
        site.width, rank, experts, used, top_k=top_k, activation=activation, dropout=dropout,
        bias=bias, router=router, by_token=by_token, out=site.out,
    )  # fmt: skip
    return noted(mixture, site.width, heads)


def noted(mixture: MixtureOfAdapters, width: int, heads: int) -> nn.Module:
    """A mixture that says so where it has not as many heads as asked for."""
    if mixture.heads != heads:
        mixture.note = f"{mixture.heads} heads: the divisor of {width} nearest to {heads}"
    return mixture
