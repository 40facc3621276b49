"""Adapters of the stream behind attention and FFN, for images.

Adapter+ (Steitz and Roth 2024), Mona (Yin et al. 2025), SCT (Zhao et al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RuleError, is_integer
from ..rules.part import part, usually
from ..structure.module_tree import Site
from .adapters import Adapter, with_dropout
from .arguments import positive
from .conv import Convpass


class AdapterPlus(Adapter):
    """s * up(drop(gelu(down(x)))), s for each feature: (..., width) to (..., out).

    As published, it starts near adding nothing: both layers normal of deviation 0.01, cut at two
    deviations, biases zero, s one.
    """

    starts_at_zero = False

    def __init__(
        self, width: int, rank: int = 8, *, out: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__(width, rank, out=out, activation=nn.GELU, dropout=dropout)
        self.s = nn.Parameter(torch.ones(width if out is None else out))
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.s * super().forward(x)


class ScaledNorm(nn.Module):
    """g * LN(x) + h * x; g starts at 1e-6, h at one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.g, self.h = nn.Parameter(torch.full((width,), 1e-6)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.norm(x) * self.g + x * self.h
        return scaled


class Scales(nn.Module):
    """y + M y, y = x + the mean of x convolved by 3, 5 and 7, each channel alone: (b, c, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels) for k in (3, 5, 7)
        )
        self.mix = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + sum(conv(x) for conv in self.convs) / 3
        mixed: Tensor = self.mix(y.movedim(1, -1)).movedim(-1, 1)
        return y + mixed

    def alone(self, x: Tensor) -> Tensor:
        """What becomes of maps of one pixel, (..., c)."""
        y = x
        for conv in self.convs:
            weight, bias = dict(conv.named_parameters()).values()
            y = y + (x * weight[:, 0, weight.shape[2] // 2, weight.shape[3] // 2] + bias) / 3
        mixed: Tensor = self.mix(y)
        return y + mixed


class Mona(Convpass):
    """up(drop(gelu(scales(down(scaled norm(x)))))): as Convpass, (b, n, width) or (b, h, w, width).

    As published, nothing of it starts at zero.
    """

    starts_at_zero = False
    word = "mona"
    bend: nn.Identity  # type: ignore[assignment]
    down: nn.Sequential  # type: ignore[assignment]
    conv: Scales  # type: ignore[assignment]

    def __init__(
        self,
        width: int,
        hidden: int = 64,
        *,
        out: int | None = None,
        prefix: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(width, hidden, out=out, prefix=prefix)
        self.bend, self.act = nn.Identity(), with_dropout(nn.GELU, dropout)
        self.down = nn.Sequential(ScaledNorm(width), nn.Linear(width, hidden))
        self.conv, self.up = Scales(hidden), nn.Linear(hidden, width if out is None else out)

    def _alone(self, x: Tensor) -> Tensor:
        return self.conv.alone(x)


class Salient(nn.Module):
    """scale * (M z + b) at some channels z of x, and zero at the others: (..., width) to the same.

    `index` (channels,) says which, and is never trained: it starts as drawn; `aim` sets it, and
    `surgery.training.aim_at_salient` chooses by the features of a task. As published, M starts
    normal of deviation 0.02.
    """

    index: Tensor

    def __init__(self, width: int, channels: int = 96, scale: float = 1.0) -> None:
        super().__init__()
        self.width, self.scale = width, scale
        self.register_buffer("index", torch.randperm(width)[:channels].clone())
        self.indices_below = {"index": width}
        self.M = nn.Parameter(torch.empty(len(self.index), len(self.index)).normal_(std=0.02))
        self.b = nn.Parameter(torch.zeros(len(self.index)))

    def aim(self, index: Tensor) -> None:
        """Change these channels. Raises RuleError unless they are as many, each once."""
        n, chosen = len(self.index), set(index.flatten().tolist())
        if index.shape != (n,) or len(chosen) != n or not chosen <= set(range(self.width)):
            raise RuleError(
                f"salient(channels={n})",
                f"it was given {index.tolist()}, no channels of {self.width}, each once.",
                f"Give {n} of their numbers.",
            )
        self.index.copy_(index)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.index_select(-1, self.index), self.scale * self.M, self.scale * self.b)
        return torch.zeros_like(x).index_copy(-1, self.index, y)


@part
def adapter_plus(site: Site, rank: int = 8, dropout: float = 0.0) -> nn.Module:
    """A bottleneck with a trained scale for each feature: append(adapter_plus(), residual=True).

    dropout  probability, on the hidden units

    Starts near adding nothing, as published. Parameters:
    width * rank + rank + rank * out + 2 * out. Source: Steitz and Roth 2024 (Adapter+), section 3.

    >>> adapter_plus(rank=16)
    adapter_plus(rank=16)
    """
    positive("adapter_plus", rank=rank)
    return AdapterPlus(site.width, rank, out=site.out, dropout=dropout)


@part
def mona(
    site: Site, hidden: int = 64, prefix: int | None = None, dropout: float = 0.0
) -> nn.Module:
    """A bottleneck with convolutions of three sizes over the patches.

    hidden, prefix, dropout  as of `convpass`

    Does not start at zero, as published. Raises as `convpass` does. Parameters: 4 * width +
    width * hidden + 88 * hidden + hidden^2 + hidden * out + out. Source: Yin et al. 2025 (Mona).

    >>> mona(hidden=16)
    mona(hidden=16)
    """
    positive("mona", hidden=hidden)
    if prefix is not None and not is_integer(prefix, least=0):
        raise RuleError(
            f"mona(prefix={prefix!r})", "it is no number of tokens.", "Give 0, 1, ... or None."
        )
    return Mona(site.width, hidden, out=site.out, prefix=prefix, dropout=dropout)


@part
@usually("append")
def salient(site: Site, channels: int = 96, scale: float = 1.0) -> nn.Module:
    """A linear map among a few channels, of all at most; `surgery.training` says which.

    Starts near zero, as published, at channels drawn at random. Raises RuleError where it does not
    return what it is given. Parameters: channels^2 + channels. Source: Zhao et al. 2023 (SCT).

    >>> salient(channels=32)
    salient(channels=32)
    """
    positive("salient", channels=channels)
    if site.width != site.out:
        raise RuleError(
            "salient()", f"it is given {site.width} features, to return {site.out}.",
            "Write append(salient(), residual=True).",
        )  # fmt: skip
    return Salient(site.width, channels, scale)
