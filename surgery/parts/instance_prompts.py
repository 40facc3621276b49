"""A prompt made of the tokens themselves (Zha et al. 2023, IDPT)."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ..errors import GraftError, RuleError, is_integer
from ..rules.part import part
from ..structure.module_tree import Site
from .arguments import positive


class EdgeConv(nn.Module):
    """max_j leaky(BN(W [x_j - x_i; x_i])) over the k tokens j nearest to i, in features.

    (b, n, width) to (b, n, width). As W = [A B] is linear, A (x_j - x_i) + B x_i is
    A x_j + (B - A) x_i, two products for each token where the edges would need k.

    >>> EdgeConv(24, k=4)(torch.randn(2, 16, 24)).shape
    torch.Size([2, 16, 24])
    """

    def __init__(self, width: int, k: int = 20) -> None:
        super().__init__()
        self.k = k
        self.edge = nn.Linear(2 * width, width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        near = nearest_tokens(x.detach(), min(self.k, x.shape[1]))
        A, B = self.edge.weight.chunk(2, dim=1)
        tip, tail = x @ A.t(), x @ (B - A).t()
        index = repeat(near, "b n k -> b (n k) d", d=x.shape[2])
        edges = rearrange(tip.gather(1, index), "b (n k) d -> b d n k", k=near.shape[2])
        edges = self.act(self.norm(edges + rearrange(tail, "b n d -> b d n 1")))
        longest: Tensor = rearrange(edges.amax(3), "b d n -> b n d")
        return longest


class InstancePrompt(nn.Module):
    """One token a sample, made of its tokens by three EdgeConvs: (b, n, width) to (b, 1, width).

    skip  how many tokens at the beginning are none of the sample's own: 1, the class token

    >>> InstancePrompt(24, k=4)(torch.randn(2, 17, 24)).shape
    torch.Size([2, 1, 24])
    """

    mixes_tokens = True

    def __init__(self, width: int, k: int = 20, layers: int = 3, skip: int = 1) -> None:
        super().__init__()
        self.skip = skip
        self.layers = nn.ModuleList(EdgeConv(width, k) for _ in range(layers))
        self.fuse = nn.Linear(layers * width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[1] <= self.skip:
            raise GraftError(
                f"instance_prompt(skip={self.skip})",
                f"it is given {tuple(x.shape)}: no tokens (b, n, width) behind those it skips.",
                "Put it where the sample's own tokens are.",
            )
        features = [x[:, self.skip :]]
        for layer in self.layers:
            features.append(layer(features[-1]))
        fused = rearrange(self.fuse(torch.cat(features[1:], 2)), "b n d -> b d n")
        token: Tensor = rearrange(self.act(self.norm(fused)).amax(2), "b d -> b 1 d")
        return token


def nearest_tokens(x: Tensor, k: int) -> Tensor:
    """Indices (b, n, k) of the k tokens of (b, n, d) nearest to each, itself among them."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    by_differences = "donot_use_mm_for_euclid_dist"  # products leave nothing of it far from 0
    distance = torch.cdist(x, x, compute_mode=by_differences)
    return distance.topk(k, dim=2, largest=False).indices


@part
def instance_prompt(site: Site, k: int = 20, layers: int = 3, skip: int = 1) -> nn.Module:
    """A token made of the sample's own: at(block[-1:], insert(instance_prompt(), keep=True)).

    k       tokens that each is joined to, the nearest in features; at most as many as there are
    layers  EdgeConvs
    skip    tokens at the beginning that are left out: 1, the class token

    Parameters: 2 * width^2 * layers + layers * width^2 + 2 * width * (layers + 1).
    Sources: Zha et al. 2023 (IDPT); Wang et al. 2019 (EdgeConv), Eq. 7 and 8.

    >>> instance_prompt(k=8)
    instance_prompt(k=8)
    """
    positive("instance_prompt", k=k, layers=layers)
    if not is_integer(skip, least=0):
        raise RuleError(
            f"instance_prompt(skip={skip!r})", "it is no number of tokens.", "Give 0, or 1."
        )
    return InstancePrompt(site.width, k, layers, skip)
