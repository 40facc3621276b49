"""Tokens that are trained, or made of what a block gave (Jia et al. 2022; Zhou et al. 2024)."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ..errors import RuleError
from ..rules.part import part, usually
from ..structure.module_tree import Site
from .arguments import fitted, positive
from .init import xavier


class Prompt(nn.Module):
    """`tokens` trained vectors: (b, n, width) to (b, tokens, width), the same for every sample.

    Starts uniform in +-sqrt(6 / (fan_in + width)), VPT's start (fan_in: numbers in an image patch).

    >>> Prompt(768, tokens=10)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 10, 768])
    """

    def __init__(
        self, width: int, tokens: int = 10, *, dropout: float = 0.0, fan_in: int | None = None
    ) -> None:
        super().__init__()
        fans = max(width, 1) + (width if fan_in is None else fan_in)
        self.tokens = nn.Parameter(xavier(tokens, width, fans=fans))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        inserted: Tensor = self.drop(repeat(self.tokens, "p d -> b p d", b=x.shape[0]))
        return inserted


class PromptGenerator(nn.Module):
    """One token a sample, P = gamma * mean_t f(A_t) + beta, of what a part A gave at each token.

    Called with the tokens that come, (b, n, width), and A, (b, t, width); gives (b, 1, width).
    gamma and beta have `features` numbers, repeated over the width: width / heads of them are
    shared by the heads, one is a scalar.

    >>> PromptGenerator(768, 256)(torch.randn(2, 197, 768), torch.randn(2, 197, 768)).shape
    torch.Size([2, 1, 768])
    """

    mixes_tokens = True

    def __init__(
        self, width: int, features: int, *, activation: type[nn.Module] = nn.Identity
    ) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(features).normal_(1.0, 0.02))
        self.beta = nn.Parameter(torch.empty(features).normal_(0.0, 0.02))
        self.act = activation()
        self.times = width // max(features, 1)

    def forward(self, x: Tensor, heard: Tensor) -> Tensor:
        mean = self.act(heard).mean(1)
        by_head = rearrange(mean, "b (h c) -> b h c", h=self.times)
        token: Tensor = rearrange(self.gamma * by_head + self.beta, "b h c -> b 1 (h c)")
        return token


@part
@usually("insert")
def prompt(
    site: Site, tokens: int = 10, dropout: float = 0.0, fan_in: int | None = None
) -> nn.Module:
    """Trained tokens: at(block, prompt()) gives every block its own (VPT-deep).

    tokens   how many; dropout on them
    fan_in   of the start, +-sqrt(6 / (fan_in + width)): channels * height * width of an image
             patch; None: the width, which it is for patches of 16 x 16 in a ViT-B

    Parameters: tokens * width. Source: Jia et al. 2022 (VPT), section 3.2.

    >>> prompt(tokens=50)
    prompt(tokens=50)
    """
    positive("prompt", tokens=tokens)
    return Prompt(site.width, tokens, dropout=dropout, fan_in=fan_in)


@part
def prompt_generator(
    site: Site,
    heads: int = 1,
    scalar: bool = False,
    activation: type[nn.Module] = nn.Identity,
    fit: bool = False,
) -> nn.Module:
    """A token made of what a part gave: insert(prompt_generator(), hears=ffn) (Adapter-X, DAPT).

    heads       gamma and beta have width / heads numbers, shared by the heads
    scalar      gamma and beta are one number each
    activation  of what is heard, before the mean over tokens (nn.GELU in DAPT; none in Fig. 2)
    fit         where heads do not divide the width, the divisor nearest to them, as in `moa`

    Parameters: 2 * width / heads. Sources: Li et al. 2024 (Adapter-X), Fig. 2 and section 3.3;
    Zhou et al. 2024 (DAPT).

    >>> prompt_generator(heads=3)
    prompt_generator(heads=3)
    """
    positive("prompt_generator", heads=heads)
    heads = fitted(site.width, heads) if fit else heads
    if site.width % heads:
        raise RuleError(
            f"prompt_generator(heads={heads})",
            f"the width {site.width} does not divide by {heads} heads.",
            "Give the heads of the mixture that it hears, or 1.",
        )
    return PromptGenerator(site.width, 1 if scalar else site.width // heads, activation=activation)
