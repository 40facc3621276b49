"""A small transformer in any of the forms that they come in, for `transformers()` to draw."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

CLASSES = 5
FORMS = ("post", "fused", "gated", "spread", "first")  # of a block


class Attention(nn.Module):
    """Self-attention with one fused or three split projections; (b, n, c), or (b, c, h, w)."""

    def __init__(self, width: int, heads: int, fused: bool, first: bool, weights: bool) -> None:
        super().__init__()
        self.heads, self.first, self.weights = heads, first, weights
        if fused:
            self.qkv = _linear(width, 3 * width, first)
        else:
            self.q, self.k, self.v = (_linear(width, width, first) for _ in range(3))
        self.proj = _linear(width, width, first)

    def forward(self, x: Tensor) -> Any:
        if hasattr(self, "qkv"):
            q, k, v = self.qkv(x).chunk(3, dim=1 if self.first else -1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        size = x.shape[-1]
        split = "b (h d) y x -> b h (y x) d" if self.first else "b n (h d) -> b h n d"
        q, k, v = (rearrange(t, split, h=self.heads) for t in (q, k, v))
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        join = "b h (y x) d -> b (h d) y x" if self.first else "b h n d -> b n (h d)"
        mixed = rearrange(scores @ v, join, **({"x": size} if self.first else {}))
        out = self.proj(mixed)
        return (out, scores) if self.weights else out


class Mlp(nn.Module):
    """A feed-forward network, gated or plain."""

    def __init__(self, width: int, act: type[nn.Module], gated: bool, first: bool) -> None:
        super().__init__()
        self.fc1 = _linear(width, 2 * width, first)
        if gated:
            self.gate = _linear(width, 2 * width, first)
        self.act = act()
        self.fc2 = _linear(2 * width, width, first)

    def forward(self, x: Tensor) -> Tensor:
        hidden = (
            self.act(self.gate(x)) * self.fc1(x) if hasattr(self, "gate") else self.act(self.fc1(x))
        )
        out: Tensor = self.fc2(hidden)
        return out


class Block(nn.Module):
    """Attention and a feed-forward network around a residual stream; pre-norm or post-norm."""

    def __init__(
        self, width: int, heads: int, act: type[nn.Module], *, post: bool, fused: bool,
        gated: bool, spread: bool, first: bool, weights: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.post = post
        self.norm1 = _norm(width, first)
        self.attn = Attention(width, heads, fused, first, weights)
        self.norm2 = _norm(width, first)
        if spread:  # its parts lie in the block itself, so that it is a span
            self.fc1, self.act = _linear(width, 2 * width, first), act()
            self.fc2 = _linear(2 * width, width, first)
        else:
            self.mlp = Mlp(width, act, gated, first)

    def forward(self, hidden: Tensor) -> Tensor:
        if self.post:
            hidden = self.norm1(hidden + self.mix(hidden))
            out: Tensor = self.norm2(hidden + self.feed(hidden))
            return out
        hidden = hidden + self.mix(self.norm1(hidden))
        return hidden + self.feed(self.norm2(hidden))

    def mix(self, x: Tensor) -> Tensor:
        out = self.attn(x)
        mixed: Tensor = out[0] if isinstance(out, tuple) else out
        return mixed

    def feed(self, x: Tensor) -> Tensor:
        fed: Tensor = self.mlp(x) if hasattr(self, "mlp") else self.fc2(self.act(self.fc1(x)))
        return fed


class Pool(nn.Module):
    """The mean over all positions: (b, n, c) or (b, c, h, w) to (b, c)."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3) if self.first else 1)


class Transformer(nn.Module):
    """embed, blocks in stages, norm, head; `example()` gives inputs for it.

    widths   of the stages; features step up between them
    depth    blocks in a stage
    post     norms after the residual sums, not before the branches
    fused    one projection for query, key and value
    gated    a product of two projections in the feed-forward network
    spread   the feed-forward network lies in the block itself, in no module of its own
    first    features lie after the batch: (b, c, h, w)
    aliased  the last block is also there, and called, under a second name
    weights  attention returns a tuple
    named    blocks are called by keyword, and the answer is a dict
    """

    def __init__(
        self, widths: tuple[int, ...] = (8,), depth: int = 2, heads: int = 2,
        act: type[nn.Module] = nn.GELU, post: bool = False, fused: bool = True,
        gated: bool = False, spread: bool = False, first: bool = False, aliased: bool = False,
        weights: bool = False, named: bool = False, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        options = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.options, self.first, self.named, self.seed = options, first, named, seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = _linear(3, widths[0], first)
            forms = {name: options[name] for name in FORMS}
            stages: list[nn.ModuleList] = []
            for i, width in enumerate(widths):
                blocks = [Block(width, heads, act, weights=weights, **forms) for _ in range(depth)]
                step_up = [_linear(widths[i - 1], width, first)] if i else []
                stages.append(nn.ModuleList([*step_up, *blocks]))
            self.stages = nn.ModuleList(stages)
            self.again = stages[-1][-1] if aliased else None
            self.norm, self.pool = _norm(widths[-1], first), Pool(first)
            self.head = nn.Linear(widths[-1], CLASSES)
        self.eval().double()

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x)
        for layer in self.layers():
            x = layer(hidden=x) if self.named and isinstance(layer, Block) else layer(x)
        x = self.again(x) if self.again is not None else x
        answer = self.head(self.pool(self.norm(x)))
        return {"logits": answer, "hidden": x} if self.named else answer

    def layers(self) -> list[nn.Module]:
        """The blocks, and what steps up between stages, in order."""
        return [layer for stage in self.stages for layer in stage.children()]

    def example(self) -> Tensor:
        """Two samples: (2, 8, 3), or (2, 3, 2, 8); as many positions as there may be features."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (2, 3, 2, 8) if self.first else (2, 8, 3)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def __repr__(self) -> str:
        defaults = zip(self.options, Transformer.__init__.__defaults__ or (), strict=True)
        changed = [name for name, default in defaults if self.options[name] != default]
        arguments = [f"{name}={_written(self.options[name])}" for name in changed]
        return f"Transformer({', '.join(arguments)})"


class Row(nn.Sequential):
    """The layers of a Transformer in a row, as the children of a root that calls them."""

    def __init__(self, whole: Transformer) -> None:
        super().__init__(whole.embed, *whole.layers(), whole.norm, whole.pool, whole.head)
        self.__dict__["whole"] = whole  # no child of it: its layers are
        self.eval()

    def example(self) -> Tensor:
        """Two samples."""
        whole: Transformer = self.__dict__["whole"]
        return whole.example()

    def __repr__(self) -> str:
        return f"Row({self.__dict__['whole']!r})"


def _written(value: object) -> str:
    return f"nn.{value.__name__}" if isinstance(value, type) else repr(value)


def _linear(width: int, out: int, first: bool) -> nn.Module:
    return nn.Conv2d(width, out, 1) if first else nn.Linear(width, out)


def _norm(width: int, first: bool) -> nn.Module:
    return nn.GroupNorm(1, width) if first else nn.LayerNorm(width)
