"""An adapter in the spectrum of a cloud's graph (Liang et al. 2024, PointGST)."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import GraftError
from ..rules.part import part, usually
from ..structure.module_tree import Site
from .adapters import Adapter
from .arguments import fitted, positive
from .base_weight import wide


class SpectralBasis(nn.Module):
    """Bases (b, 2, g, g) of clouds' centres (b, g, 3): of all, and of `local` neighbours each.

    Their columns are the eigenvectors of the Laplacian of the graph whose edges weigh the inverse
    of their lengths. Neighbours follow one another along a Morton curve; where `local` does not
    divide g, the nearest that does is taken. Of no parameters, and without gradient.
    """

    mixes_tokens = True

    def __init__(self, local: int = 32) -> None:
        super().__init__()
        self.local = local

    @torch.no_grad()
    def forward(self, y: Tensor, centers: Tensor) -> Tensor:
        points = wide(centers)
        n, g = fitted(points.shape[1], self.local), points.shape[1]
        order = morton(points).argsort(1)
        near = points.gather(1, repeat(order, "b g -> b g 3"))
        blocks = basis(rearrange(near, "b (k n) c -> b k n c", n=n))
        apart = torch.eye(g // n, dtype=points.dtype, device=points.device)
        sorted = torch.einsum("bkij,kl->bkilj", blocks, apart).reshape(-1, g, g)
        local = torch.zeros_like(sorted).scatter(1, repeat(order, "b g -> b g h", h=g), sorted)
        return torch.stack([basis(points), local], 1).to(centers)


def basis(points: Tensor) -> Tensor:
    """Eigenvectors (..., n, n), as columns, of the graph of points (..., n, 3)."""
    length = (points.unsqueeze(-2) - points.unsqueeze(-3)).norm(dim=-1)
    least = length.masked_fill(length == 0, torch.inf).amin((-2, -1), keepdim=True)
    least = least.masked_fill(least.isinf(), 1.0)
    weight = (least / length.clamp(min=least)) * (1 - torch.eye(points.shape[-2]).to(points))
    vectors: Tensor = torch.linalg.eigh(weight.sum(-1).diag_embed() - weight)[1]
    return vectors


def morton(points: Tensor) -> Tensor:
    """The places (b, g) of points (b, g, 3) on a Morton curve through their cloud's cube."""
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    side = (high - low).amax(-1, keepdim=True).clamp(min=torch.finfo(points.dtype).tiny)
    cell = ((points - low) / side * 1023).long()
    places = (((cell[..., i] >> bit) & 1) << (3 * bit + i) for bit in range(10) for i in range(3))
    return torch.stack(list(places)).sum(0)


class SpectralAdapter(Adapter):
    """up(silu(h) + sum_U U s), h = down(x), s = t + silu(M LN(t)), t = U^T h: (b, n, width).

    The sum, over the two bases of `heard` (b, 2, g, g), is of the last g tokens, the cloud's own.
    """

    mixes_tokens = True

    def __init__(self, width: int, rank: int = 36, *, out: int | None = None) -> None:
        super().__init__(width, rank, out=out, activation=nn.SiLU)
        nn.init.xavier_uniform_(self.down.weight)
        self.norms = nn.ModuleList(nn.LayerNorm(rank) for _ in range(2))
        self.M, self.b = nn.Parameter(torch.zeros(rank, rank)), nn.Parameter(torch.zeros(rank))

    def forward(self, x: Tensor, heard: Tensor) -> Tensor:  # type: ignore[override]
        g = heard.shape[-1]
        if x.dim() != 3 or x.shape[1] < g:
            raise GraftError(
                "spectral_adapter()",
                f"it was given {tuple(x.shape)}, and {g} centres: no tokens (b, n, width) of them.",
                "Put it where the cloud's tokens pass.",
            )
        h = self.down(x)
        before, own = h[:, :-g], h[:, -g:]
        added = self.act(own)
        for U, norm in zip(heard.unbind(1), self.norms, strict=True):
            t = U.mT @ own
            added = added + U @ (t + F.silu(F.linear(norm(t), self.M, self.b)))
        answer: Tensor = self.up(torch.cat([self.act(before), added], 1))
        return answer


@part
@usually("side")
def spectral_basis(site: Site, local: int = 32) -> nn.Module:
    """What a cloud's centres, which it hears, make: side(spectral_basis(), hears="**.pos_embed").

    local  centres in each of the small graphs

    Parameters: 0. Source: Liang et al. 2024 (PointGST), section 3.3.

    >>> spectral_basis(local=16)
    spectral_basis(local=16)
    """
    positive("spectral_basis", local=local)
    return SpectralBasis(local)


@part
def spectral_adapter(site: Site, rank: int = 36) -> nn.Module:
    """A bottleneck that acts in the spectrum of the cloud whose basis it hears.

    Its code takes U for U^T. Starts by adding nothing. Raises GraftError, in the forward, where
    there are fewer tokens than centres. Parameters: rank * (width + out + rank + 6) + out.
    Source: Liang et al. 2024 (PointGST), section 3.2.

    >>> spectral_adapter(rank=8)
    spectral_adapter(rank=8)
    """
    positive("spectral_adapter", rank=rank)
    return SpectralAdapter(site.width, rank, out=site.out)
