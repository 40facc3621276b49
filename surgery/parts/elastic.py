"""Parts of which the first `active` units run: weight-entangled slices (NOAH, Zhang et al. 2022).

`surgery.training` sets the sizes and searches for them. `active` is no tensor: what is loaded from
a file runs whole until sizes are chosen again. At 0 a part adds nothing, and inserts no token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import repeat
from torch import Tensor, nn

from ..rules.part import part, usually
from ..structure.module_tree import Site
from .adapters import Adapter, QuickGELU
from .arguments import positive
from .low_rank import LoRA
from .prompts import Prompt


class ElasticPrompt(Prompt):
    """The first `active` of `tokens` trained vectors: (b, n, width) to (b, active, width).

    >>> prompt = ElasticPrompt(768, tokens=10)
    >>> prompt.active = 4
    >>> prompt(torch.randn(2, 197, 768)).shape
    torch.Size([2, 4, 768])
    """

    def __init__(self, width: int, tokens: int = 10, *, dropout: float = 0.0) -> None:
        super().__init__(width, tokens, dropout=dropout)
        self.most = self.active = tokens

    def forward(self, x: Tensor) -> Tensor:
        active = self.tokens[: self.active]
        inserted: Tensor = self.drop(repeat(active, "p d -> b p d", b=x.shape[0]))
        return inserted


class ElasticLora(LoRA):
    """B_k A_k drop(x), k = active: the first k rows of A (1, rank, width), columns of B.

    >>> ElasticLora(768, 2304, rank=10)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 2304])
    """

    ranks: ClassVar = {}  # those that are used are chosen otherwise

    def __init__(self, width: int, out: int, rank: int = 10, *, dropout: float = 0.0) -> None:
        super().__init__(width, out, rank, dropout=dropout)
        self.most = self.active = rank

    def maps(self) -> tuple[Tensor, Tensor]:
        return self.joined(self.A[:, : self.active], self.B[..., : self.active])


class ElasticAdapter(Adapter):
    """A bottleneck adapter of the first `active` of `rank` hidden units; at 0 without its bias.

    >>> ElasticAdapter(768, rank=10)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    def __init__(
        self,
        width: int,
        rank: int = 10,
        *,
        out: int | None = None,
        activation: type[nn.Module] = QuickGELU,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(width, rank, out=out, activation=activation, dropout=dropout)
        self.most = self.active = rank

    def forward(self, x: Tensor) -> Tensor:
        k, up = self.active, self.up
        if not k:
            return x.new_zeros(*x.shape[:-1], up.out_features)
        hidden = self.act(torch.nn.functional.linear(x, self.down.weight[:k], self.down.bias[:k]))
        return torch.nn.functional.linear(hidden, up.weight[:, :k], up.bias)


@part
@usually("insert")
def elastic_prompt(site: Site, tokens: int = 10, dropout: float = 0.0) -> nn.Module:
    """Trained tokens, of which the first `active` are inserted.

    tokens   how many at most; dropout on them

    Parameters: tokens * width. Source: Zhang et al. 2022 (NOAH).

    >>> elastic_prompt(tokens=100)
    elastic_prompt(tokens=100)
    """
    positive("elastic_prompt", tokens=tokens)
    return ElasticPrompt(site.width, tokens, dropout=dropout)


@part
@usually("parallel")
def elastic_lora(site: Site, rank: int = 10, dropout: float = 0.0) -> nn.Module:
    """A low-rank sum beside a linear, of which the first `active` ranks run; scale 1.

    rank     at most; dropout on the input

    Starts by adding nothing. Parameters: rank * (width + out). Merges, at the rank that is active.
    Source: Zhang et al. 2022 (NOAH).

    >>> elastic_lora(rank=100)
    elastic_lora(rank=100)
    """
    positive("elastic_lora", rank=rank)
    return ElasticLora(site.width, site.out, rank, dropout=dropout)


@part
def elastic_adapter(
    site: Site, rank: int = 10, activation: type[nn.Module] = QuickGELU, dropout: float = 0.0
) -> nn.Module:
    """A bottleneck adapter, of whose hidden units the first `active` run.

    rank        hidden units at most
    activation  a module class; dropout on the hidden units

    Starts by adding nothing. Parameters: width * rank + rank + rank * out + out.
    Source: Zhang et al. 2022 (NOAH).

    >>> elastic_adapter(rank=100)
    elastic_adapter(rank=100)
    """
    positive("elastic_adapter", rank=rank)
    return ElasticAdapter(site.width, rank, out=site.out, activation=activation, dropout=dropout)
