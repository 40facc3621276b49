"""A bottleneck with a convolution between its layers (Jie and Deng 2022, Convpass)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import GraftError, RuleError, is_integer
from ..rules.part import part
from ..structure.module_tree import Site
from .adapters import Adapter, QuickGELU
from .arguments import positive

MOST = 8  # tokens before the patches, where nobody says how many


class Convpass(Adapter):
    """up(drop(Q(conv(Q(down x))))), Q = QuickGELU: (b, n, width) or (b, h, w, width), to `out`.

    Of n tokens the first `prefix` are no patches: each is convolved as a map of its own, of which
    the centre of the kernel alone is used. The rest are a square map, row by row.

    `up` and the biases start at zero, so that it starts by adding nothing; `down` starts Xavier
    uniform, the convolution as the identity, or Xavier uniform too.

    >>> Convpass(768, hidden=8)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    mixes_tokens = True

    def __init__(
        self,
        width: int,
        hidden: int = 8,
        *,
        out: int | None = None,
        prefix: int | None = None,
        xavier: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(width, hidden, out=out, activation=QuickGELU, dropout=dropout)
        self.bend, self.prefix = QuickGELU(), prefix
        self.conv = nn.Conv2d(hidden, hidden, 3, padding=1)
        nn.init.xavier_uniform_(self.down.weight)
        (nn.init.xavier_uniform_ if xavier else nn.init.dirac_)(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (3, 4):
            raise GraftError(
                "convpass()",
                f"it was given {tuple(x.shape)}, which is neither tokens (b, n, width) nor a map "
                "(b, h, w, width).",
                "Put it where such features pass, at attn or ffn.",
            )
        hidden = self.bend(self.down(x))
        mixed = self._map(hidden) if x.dim() == 4 else self._tokens(hidden)
        out: Tensor = self.up(self.act(mixed))
        return out

    def _map(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.conv(rearrange(x, "b h w c -> b c h w"))
        return rearrange(mixed, "b c h w -> b h w c")

    def _tokens(self, x: Tensor) -> Tensor:
        first, side = _layout(x.shape[1], self.prefix)
        alone = F.linear(x[:, :first], self.conv.weight[:, :, 1, 1], self.conv.bias)
        mixed = self._map(rearrange(x[:, first:], "b (h w) c -> b h w c", h=side))
        return torch.cat([alone, rearrange(mixed, "b h w c -> b (h w) c")], 1)


def _layout(n: int, prefix: int | None) -> tuple[int, int]:
    """(tokens before the patches, side of the square of patches) of n tokens. Raises GraftError."""
    side = math.isqrt(max(n - (prefix or 0), 0))
    first = n - side**2 if prefix is None else prefix
    too_many = prefix is None and first > MOST
    if not side or first + side**2 != n or too_many:
        argument = "" if prefix is None else f"prefix={prefix}"
        near = f"the nearest square is {side**2}" if prefix is None else f"{n - prefix} is none"
        raise GraftError(
            f"convpass({argument})",
            f"it was given {n} tokens, whose patches should be a square map, and {near}.",
            "Give prefix, the number of tokens before the patches (1: a class token); patches "
            "that are no square it takes as a map (b, h, w, width).",
        )
    return first, side


@part
def convpass(
    site: Site,
    hidden: int = 8,
    prefix: int | None = None,
    xavier: bool = False,
    dropout: float = 0.0,
) -> nn.Module:
    """A bottleneck with a 3 x 3 convolution over the patches: parallel(convpass()).

    hidden   units of the bottleneck, the channels of the convolution
    prefix   tokens before the patches (1: a class token); None: those beyond the largest square,
             up to 8. Patches must be a square, row by row. A map (b, h, w, width) has none
    xavier   the convolution starts Xavier uniform; else as the identity
    dropout  probability, on the units after the convolution

    Starts by adding nothing. Not linear: cannot be merged. Raises RuleError where hidden or
    prefix is no such number; GraftError, in the forward, where the patches are no square.
    Parameters: width * hidden + hidden + 9 * hidden^2 + hidden + hidden * out + out.
    Source: Jie and Deng 2022 (Convpass).

    >>> convpass(prefix=1)
    convpass(prefix=1)
    """
    positive("convpass", hidden=hidden)
    if prefix is not None and not is_integer(prefix, least=0):
        raise RuleError(
            f"convpass(prefix={prefix!r})", "it is no number of tokens.", "Give 0, 1, ... or None."
        )
    return Convpass(site.width, hidden, out=site.out, prefix=prefix, xavier=xavier, dropout=dropout)
