"""An adapter among the neighbours of a cloud's centres (Tang et al. 2024, Point-PEFT)."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import GraftError
from ..rules.part import Maker, part, shared, usually
from ..structure.module_tree import Site
from .adapters import Adapter, QuickGELU
from .arguments import borrowed, positive
from .base_weight import wide


class CentreDistances(nn.Module):
    """Squares of distances (b, s, g) from half of the centres (b, g, 3), far apart, to all.

    Of each to itself -1, so that it comes first. Of no parameters, and without gradient.
    """

    mixes_tokens = True

    @torch.no_grad()
    def forward(self, y: Tensor, centers: Tensor) -> Tensor:
        points = wide(centers)
        index = far_apart(points, (points.shape[1] + 1) // 2)
        some = points.gather(1, repeat(index, "b s -> b s c", c=3))
        square = (some.unsqueeze(2) - points.unsqueeze(1)).square().sum(-1)
        return square.scatter(2, index.unsqueeze(2), -1.0).to(centers)


def far_apart(points: Tensor, m: int) -> Tensor:
    """Indices (b, m) of points (b, g, 3), from the first on each the farthest from those before."""
    index = [torch.zeros_like(points[:, 0, 0], dtype=torch.long)]
    least = torch.full_like(points[..., 0], torch.inf)
    for _ in range(m - 1):
        last = points.gather(1, repeat(index[-1], "b -> b 1 c", c=3))
        least = torch.minimum(least, (points - last).square().sum(-1))
        index.append(least.argmax(1))
    return torch.stack(index, 1)


class LocalAttention(nn.Module):
    """z + proj(attention(norm(z))) within groups of k tokens: (..., k, width) to the same."""

    def __init__(self, width: int, heads: int = 6, size: int = 3) -> None:
        super().__init__()
        self.heads, inner = heads, heads * size
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.proj = nn.Linear(inner, width)

    def forward(self, z: Tensor) -> Tensor:
        parted = "... k (three h c) -> three ... h k c"
        q, k, v = rearrange(self.qkv(self.norm(z)), parted, three=3, h=self.heads).unbind(0)
        share = (q @ k.mT * (self.heads * q.shape[-1]) ** -0.5).softmax(-1)
        mixed: Tensor = self.proj(rearrange(share @ v, "... h k c -> ... k (h c)"))
        return z + mixed


class GeometryAdapter(Adapter):
    """p + up(quickgelu(down(x + p))): (b, n, width) to the same, to be added to x.

    p, of the last g tokens, the cloud's own: `heard` (b, s, g) says which k are nearest to each of
    s; those attend to one another, what is largest in each feature is normed over the batch, and
    with 0.3 of the middle it is spread to all g by inverse squares of distances, 0.3 of it.
    """

    mixes_tokens, starts_at_zero = True, False

    def __init__(self, width: int, rank: int, local: LocalAttention, k: int) -> None:
        super().__init__(width, rank, activation=QuickGELU)
        self.local, self.k = local, k
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor, heard: Tensor) -> Tensor:  # type: ignore[override]
        g = heard.shape[-1]
        if x.dim() != 3 or x.shape[1] < g:
            raise GraftError(
                "geometry_adapter()",
                f"it was given {tuple(x.shape)}, and {g} centres: no tokens (b, n, width) of them.",
                "Put it where the cloud's tokens pass.",
            )
        near = heard.topk(min(self.k, g), largest=False).indices
        index = repeat(near, "b s k -> b (s k) c", c=x.shape[2])
        patches = rearrange(x[:, -g:].gather(1, index), "b (s k) c -> b s k c", k=near.shape[2])
        largest = rearrange(self.local(patches).amax(2), "b s c -> b c s")
        made = F.gelu(self.norm(largest)).mT + 0.3 * patches[:, :, 0]
        share = 1 / (wide(heard).clamp(min=0) + 1e-8)
        share = (share / share.sum(1, keepdim=True)).to(made)
        p = F.pad(0.3 * share.mT @ made, (0, 0, x.shape[1] - g, 0))
        return p + super().forward(x + p)


@part
@usually("side")
def centre_distances(site: Site) -> nn.Module:
    """What a cloud's centres, which it hears, make: side(..., hears="**.pos_embed").

    Parameters: 0. Source: Tang et al. 2024 (Point-PEFT), section 3.3.

    >>> centre_distances()
    centre_distances()
    """
    return CentreDistances()


@part
def local_attention(site: Site, heads: int = 6, size: int = 3) -> nn.Module:
    """Attention among neighbours, that all geometry adapters share.

    size  features of a head

    Parameters: 4 * heads * size * width + 3 * width. Source: Tang et al. 2024 (Point-PEFT).

    >>> local_attention(heads=3)
    local_attention(heads=3)
    """
    positive("local_attention", heads=heads, size=size)
    return LocalAttention(site.width, heads, size)


_LOCAL = shared(local_attention())


@part
def geometry_adapter(site: Site, rank: int = 16, k: int = 16, core: Maker = _LOCAL) -> nn.Module:
    """A bottleneck behind what the neighbours of a cloud's centres, whose distances it hears, tell.

    k     neighbours of each
    core  gives the attention: shared(local_attention(), by=...)

    Only the bottleneck starts at zero. Raises GraftError, in the forward, where there are fewer
    tokens than centres. Parameters: rank * (2 * width + 1) + 3 * width, and the core's.
    Source: Tang et al. 2024 (Point-PEFT), section 3.3, and its code, without drop path.

    >>> geometry_adapter(rank=8)
    geometry_adapter(rank=8)
    """
    positive("geometry_adapter", rank=rank, k=k)
    local = borrowed("geometry_adapter", "core", core, site, LocalAttention)
    return GeometryAdapter(site.width, rank, local, k)
