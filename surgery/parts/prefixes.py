"""Keys and values that are trained, for attention to attend to (Li & Liang 2021)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ..rules.part import Maker, part, usually
from ..structure.module_tree import Site
from .arguments import borrowed, positive


class PrefixFeatures(nn.Module):
    """tanh(E W + b) of an embedding E (tokens, width): (tokens, inner).

    >>> PrefixFeatures(768, 5, 64)().shape
    torch.Size([5, 64])
    """

    def __init__(self, width: int, tokens: int, inner: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(tokens, width))
        self.fc = nn.Linear(width, inner)

    def forward(self) -> Tensor:
        return torch.tanh(self.fc(self.embedding))


class Prefix(nn.Module):
    """Trained keys and values, each (tokens, width), whatever it is given.

    They start standard normal. With `features` (tokens, inner), a module that is borrowed, they
    are a linear map of what it gives.

    >>> [t.shape for t in Prefix(768, 5)(torch.randn(2, 197, 768))]
    [torch.Size([5, 768]), torch.Size([5, 768])]
    """

    def __init__(
        self, width: int, tokens: int = 10, features: PrefixFeatures | None = None
    ) -> None:
        super().__init__()
        self.features = features
        if features is None:
            self.prefix = nn.Parameter(torch.randn(tokens, 2 * width))
        else:
            self.up = nn.Linear(features.fc.out_features, 2 * width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.prefix if self.features is None else self.up(self.features())
        keys, values = rearrange(rows, "p (two c) -> two p c", two=2)
        return keys, values


@part
def prefix_features(site: Site, tokens: int = 10, inner: int = 512) -> nn.Module:
    """What prefixes of all layers are made of: shared(prefix_features()), for all of one width.

    Parameters: tokens * width + inner * (width + 1). Source: Li & Liang 2021, section 4.3.

    >>> prefix_features(inner=800)
    prefix_features(inner=800)
    """
    positive("prefix_features", tokens=tokens, inner=inner)
    return PrefixFeatures(site.width, tokens, inner)


@part
@usually("attend")
def prefix(
    site: Site, tokens: int = 10, features: Maker | None = None, width: int = 0
) -> nn.Module:
    """Trained keys and values before those of attention: at(attn, prefix()).

    tokens    how many
    features  what they are a linear map of: shared(prefix_features(tokens=10)), which says how many
    width     of the keys of all heads; 0: as the projections of the attention tell

    Starts otherwise than the base. Raises RuleError where nothing tells how wide keys are.
    Parameters: 2 * tokens * width; with `features` 2 * width * (inner + 1), and those of it.
    Source: Li & Liang 2021 (prefix tuning), section 4.

    >>> prefix(tokens=20)
    prefix(tokens=20)
    """
    positive("prefix", tokens=tokens)
    wide = width or site.out
    if features is None:
        return Prefix(wide, tokens)
    return Prefix(wide, features=borrowed("prefix", "features", features, site, PrefixFeatures))
