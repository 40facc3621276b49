"""A bottleneck with a convolution between its layers (Jie and Deng 2022, Convpass)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import GraftError, RuleError, is_integer
from ..rules.layout import Layout
from ..rules.part import part
from ..structure.module_tree import Site
from .adapters import Adapter, QuickGELU
from .arguments import positive

UNKNOWN = Layout(None)
MOST = 8  # tokens before the patches, where nobody says how many


class Convpass(Adapter):
    """up(drop(Q(conv(Q(down x))))), Q = QuickGELU: (b, n, width) or (b, h, w, width), to `out`.

    Of n tokens the first `prefix` are no patches: each is convolved as a map of its own, of which
    the centre of the kernel alone is used. The rest are a map, row by row: that of `layout`, which
    the engine gives where the model shows it, or else a square.

    `up` and the biases start at zero, so that it starts by adding nothing; `down` starts Xavier
    uniform, the convolution as the identity, or Xavier uniform too.

    >>> Convpass(768, hidden=8)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    mixes_tokens = reads_map = True
    word = "convpass"

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

    def forward(self, x: Tensor, layout: Layout = UNKNOWN) -> Tensor:
        if x.dim() == 3 and layout.axis == 0:
            return self(x.transpose(0, 1), layout._replace(axis=1)).transpose(0, 1)  # type: ignore[no-any-return]
        if x.dim() not in (3, 4):
            raise GraftError(
                f"{self.word}()",
                f"it was given {tuple(x.shape)}, which is neither tokens (b, n, width) nor a map "
                "(b, h, w, width).",
                "Put it where such features pass, at attn or ffn.",
            )
        hidden = self.bend(self.down(x))
        mixed = self._map(hidden) if x.dim() == 4 else self._tokens(hidden, layout.grid)
        out: Tensor = self.up(self.act(mixed))
        return out

    def _map(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.conv(rearrange(x, "b h w c -> b c h w"))
        return rearrange(mixed, "b c h w -> b h w c")

    def _tokens(self, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        n = x.shape[1]
        first, rows, columns = _laid_out(n, self.prefix, grid, self.word)
        mixed = self._map(rearrange(x[:, first:], "b (h w) c -> b h w c", h=rows, w=columns))
        return torch.cat([self._alone(x[:, :first]), rearrange(mixed, "b h w c -> b (h w) c")], 1)

    def _alone(self, x: Tensor) -> Tensor:
        """What becomes of tokens (..., hidden) that are a map each."""
        return F.linear(x, self.conv.weight[:, :, 1, 1], self.conv.bias)


def _laid_out(
    n: int, prefix: int | None, grid: tuple[int, int] | None, word: str
) -> tuple[int, int, int]:
    """(tokens before the patches, rows, columns of these) of n tokens. Raises GraftError."""
    side = math.isqrt(max(n - (prefix or 0), 0))
    rows, columns = grid or (side, side)
    first = n - rows * columns if prefix is None else prefix
    if rows * columns and first + rows * columns == n and (prefix is not None or first <= MOST):
        return first, rows, columns
    if grid:
        fact, before = f"of which the model made {rows} x {columns} patches", n - rows * columns
        remedy = f"Give prefix={before} if so many come before the patches, or "
        remedy = f"{remedy if before >= 0 else ''}use parts that take each token alone."
    else:
        near = f"the nearest square is {side**2}" if prefix is None else f"{n - prefix} is none"
        fact = f"whose patches should be a square map, and {near}"
        remedy = (
            "Give prefix, the number of tokens before the patches (1: a class token); patches "
            "that are no square it takes as a map (b, h, w, width)."
        )
    call = f"{word}({'' if prefix is None else f'prefix={prefix}'})"
    raise GraftError(call, f"it was given {n} tokens, {fact}.", f"{remedy[0].upper()}{remedy[1:]}")


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
    prefix   tokens before the patches (1: a class token); None: those beyond the patches, up to 8.
             How many patches, in rows and columns, each forward shows where a 2-D convolution
             makes them; else they must be a square. A map (b, h, w, width) has no prefix
    xavier   the convolution starts Xavier uniform; else as the identity
    dropout  probability, on the units after the convolution

    Starts by adding nothing. Not linear: cannot be merged. Raises RuleError where hidden or
    prefix is no such number; GraftError, in the forward, where the patches are none that it
    can lay out, or a mask hides tokens from others.
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
