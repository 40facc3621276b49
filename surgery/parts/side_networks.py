"""Networks beside a model, through which alone gradients go (LST, DTL, LoSA, Res-Tuning)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import GraftError
from ..rules.part import part, usually
from ..structure.module_tree import Site
from .adapters import Adapter
from .arguments import positive
from .init import kaiming


class Rung(nn.Module):
    """s = f(u s_before + (1 - u) D y), u = sigmoid(alpha / 0.1): (..., width) to (..., inner).

    f is a feed-forward network with its norm and skip; before the first rung s is zero.

    >>> Rung(32, 4)(torch.randn(2, 5, 32), torch.randn(2, 5, 4)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, inner)
        self.alpha = nn.Parameter(torch.zeros(()))
        self.norm = nn.LayerNorm(inner)
        self.fc1, self.fc2 = nn.Linear(inner, 4 * inner), nn.Linear(4 * inner, inner)

    def forward(self, y: Tensor, before: Tensor | None) -> Tensor:
        u, new = torch.sigmoid(self.alpha / 0.1), self.down(y)
        s: Tensor = (1 - u) * new if before is None else u * before + (1 - u) * new
        answer: Tensor = s + self.fc2(F.gelu(self.fc1(self.norm(s))))
        return answer


class Climb(nn.Module):
    """U s of what is heard, U of zeros at the start: (..., inner) to (..., width).

    >>> Climb(4, 32)(torch.randn(2, 5, 32), torch.randn(2, 5, 4)).abs().max()
    tensor(0., grad_fn=<MaxBackward1>)
    """

    starts_at_zero = True

    def __init__(self, inner: int, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, y: Tensor, heard: Tensor) -> Tensor:
        answer: Tensor = self.up(heard)
        return answer


class Track(nn.Module):
    """s = s_before + B A y: (..., width) to (..., width).

    >>> Track(8, 2)(torch.randn(3, 8), None).abs().max()
    tensor(0., grad_fn=<MaxBackward1>)
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(kaiming(rank, width))
        self.B = nn.Parameter(torch.zeros(width, rank))

    def forward(self, y: Tensor, before: Tensor | None) -> Tensor:
        s = F.linear(F.linear(y, self.A), self.B)
        return s if before is None else s + before


class Return(nn.Module):
    """Swish of what is heard, s * sigmoid(100 s), of no parameters.

    >>> Return()(torch.zeros(3, 8), torch.zeros(3, 8)).shape
    torch.Size([3, 8])
    """

    starts_at_zero = True

    def forward(self, y: Tensor, heard: Tensor) -> Tensor:
        return heard * torch.sigmoid(100 * heard)


class Mixer(nn.Module):
    """s = s_before + scale * C(z + T(z)), z = y + s_before: (b, n, width) to the same.

    C is a bottleneck over channels, up gelu(down z); T one over tokens, where their number is told.
    Before the first, s is y.
    """

    def __init__(self, width: int, rank: int, tokens: int | None, scale: float) -> None:
        super().__init__()
        self.channels = Adapter(width, rank, activation=nn.GELU)
        self.tokens = Adapter(tokens, rank, activation=nn.GELU) if tokens else None
        self.number, self.scale, self.mixes_tokens = tokens, scale, bool(tokens)

    def forward(self, y: Tensor, before: Tensor | None) -> Tensor:
        s = y if before is None else before
        z = y + s
        if self.tokens is not None:
            if z.dim() < 3 or z.shape[-2] != self.number:
                raise GraftError(
                    f"mixer(tokens={self.number})",
                    f"it was given {tuple(y.shape)}, which are no {self.number} tokens.",
                    "Say how many come, the class token among them, or leave tokens out.",
                )
            z = z + self.tokens(z.mT).mT
        return torch.add(s, self.channels(z), alpha=self.scale)


class Bypass(nn.Module):
    """s = u f(y) + (1 - u) g(s_before), u = sigmoid(alpha): (..., width) to the same.

    f and g are x + up(gelu(down(x))), drawn as Xavier writes. Before the first, s is y.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.across, self.along = (Adapter(width, rank, activation=nn.GELU) for _ in range(2))
        self.alpha = nn.Parameter(torch.zeros(()))
        for each in (self.across, self.along):
            nn.init.xavier_uniform_(each.down.weight)
            nn.init.xavier_uniform_(each.up.weight)

    def forward(self, y: Tensor, before: Tensor | None) -> Tensor:
        u, s = torch.sigmoid(self.alpha), y if before is None else before
        answer: Tensor = u * (y + self.across(y)) + (1 - u) * (s + self.along(s))
        return answer


class Instead(nn.Module):
    """What is heard, of no parameters.

    >>> Instead()(torch.ones(8), torch.zeros(8)).sum()
    tensor(0.)
    """

    def forward(self, y: Tensor, heard: Tensor) -> Tensor:
        return heard


@part
@usually("side")
def ladder(site: Site, reduction: int = 8) -> nn.Module:
    """One rung of a ladder beside the model, `reduction` times narrower.

    Parameters, with c = width / reduction: width c + c + 1 + 8 c c + 7 c.
    Source: Sung et al. 2022 (LST), section 3.2; its rungs are whole blocks, with attention too,
    which would need the mask of the model's.

    >>> ladder(reduction=4)
    ladder(reduction=4)
    """
    positive("ladder", reduction=reduction)
    return Rung(site.width, max(1, site.width // reduction))


@part
def climb(site: Site, reduction: int = 8) -> nn.Module:
    """The way back from a ladder, to be joined with residual=True and hears=block.

    Starts by adding nothing. Parameters: width * (width / reduction + 1).
    Source: Sung et al. 2022 (LST), section 3.2, where it stands instead of the model's features.

    >>> climb(reduction=4)
    climb(reduction=4)
    """
    positive("climb", reduction=reduction)
    return Climb(max(1, site.width // reduction), site.width)


@part
@usually("side")
def track(site: Site, rank: int = 2) -> nn.Module:
    """A low-rank map, added to what those before it gave.

    Starts at zero. Parameters: 2 * rank * width. Source: Fu et al. 2024 (DTL), Eq. 4.

    >>> track(rank=4)
    track(rank=4)
    """
    positive("track", rank=rank)
    return Track(site.width, rank)


@part
def back(site: Site) -> nn.Module:
    """Swish (beta = 100) of what is heard, to be joined with residual=True and hears=block.

    Source: Fu et al. 2024 (DTL), Eq. 5.

    >>> back()
    back()
    """
    return Return()


@part
@usually("side")
def mixer(site: Site, rank: int = 8, tokens: int | None = None, scale: float = 1.0) -> nn.Module:
    """A low-rank mixer of what a block gives and what those before it gave, added to the latter.

    tokens  how many come, which no structure tells: then they are mixed too, before the channels
    scale   of what is added

    Starts by adding nothing. Raises GraftError, in the forward, where other tokens come.
    Parameters: rank * (2 * width + 1) + width, and the same of `tokens`.
    Source: Mercea et al. 2024 (LoSA), its recursion; the order of the two, no norm, and the start
    are chosen here.

    >>> mixer(rank=16, tokens=197)
    mixer(rank=16, tokens=197)
    """
    positive("mixer", rank=rank, **({} if tokens is None else {"tokens": tokens}))
    return Mixer(site.width, rank, tokens, scale)


@part
@usually("side")
def bypass(site: Site, rank: int = 32) -> nn.Module:
    """A sum, of weights that are learned, of two tuners: of a block, and of those before it.

    Starts at random, as published, of even weights. Parameters: 2 * (rank * (2 * width + 1)
    + width) + 1. Source: Jiang et al. 2023 (Res-Tuning); its code sums without weights.

    >>> bypass(rank=10)
    bypass(rank=10)
    """
    positive("bypass", rank=rank)
    return Bypass(site.width, rank)


@part
def heard(site: Site) -> nn.Module:
    """What is heard in place of what the site gives: append(heard(), hears=block).

    >>> heard()
    heard()
    """
    return Instead()
