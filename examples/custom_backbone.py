"""A backbone that nobody knows, and what Surgery sees in it. Read on in custom_rules.py.

    python examples/custom_backbone.py

Loom mixes tokens by a learned decay, not by attention, and its feed-forward network is no module:
two linears in a block with a function in between. Nothing here knows of Surgery.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor, nn


class Retention(nn.Module):
    """Each token gathers those before it, weighed by decay ** distance, a decay for each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.decay = nn.Parameter(torch.linspace(0, 3, heads))

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inward(x).chunk(2, dim=-1)
        place = torch.arange(x.shape[1], device=x.device)
        distance = place[:, None] - place
        weights = self.decay.sigmoid()[:, None, None] ** distance.clamp(min=0) * (distance >= 0)
        value = rearrange(value, "b n (h d) -> b h n d", h=len(self.decay))
        mixed = einsum(weights, value, "h i j, b h j d -> b h i d")
        return self.outward(rearrange(mixed, "b h n d -> b n (h d)") * torch.sigmoid(gate))


class Thread(nn.Module):
    """A block: retention, then a feed-forward network, each around the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.calm, self.weft = nn.RMSNorm(width), Retention(width, heads)
        self.still, self.widen, self.narrow = (
            nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.weft(self.calm(x))
        return x + self.narrow(nn.functional.gelu(self.widen(self.still(x))))


class Loom(nn.Module):
    """Ids (b, n) of 64 words to logits (b, n, 64)."""

    def __init__(self, width: int = 24, depth: int = 3, heads: int = 3) -> None:
        super().__init__()
        self.words = nn.Embedding(64, width)
        self.threads = nn.ModuleList([Thread(width, heads) for _ in range(depth)])
        self.end, self.answer = nn.RMSNorm(width), nn.Linear(width, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for thread in self.threads:
            x = thread(x)
        return self.answer(self.end(x))

    def example(self) -> Tensor:
        """Two sentences of seven words."""
        return torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    import surgery

    model = Loom()
    print(surgery.anatomy(model, model.example()))
    print(surgery.plan(model, "adapterx_ffn", example=model.example()))
