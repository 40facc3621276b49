"""A mixture of sparse adapters (Zhang et al. 2023, MoSA)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RuleError
from ..rules.part import part, usually
from ..structure.module_tree import Site
from .arguments import positive


class SparseExperts(nn.Module):
    """up(drop(gelu(down(norm(x))))) whose `up` is one of some sparse experts in training.

    The entries of `up` are dealt at random, each to one expert, as evenly as can be; an expert
    trains its own entries and a bias of its own. Each training forward runs one of them, drawn by
    torch's generator for all its tokens. In eval mode runs what a draw gives on average, the mean
    of the experts: up = 1/E sum_i up_i, where up_i is zero but at its own entries, and the bias is
    the mean of the biases. (A sum of them would add E times what training has seen.)

    owner  (out, rank): the expert that trains each entry; a buffer, none for one expert

    >>> SparseExperts(768, rank=16)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    starts_at_zero = True  # apply(..., example=x) holds it to that
    owner: Tensor | None

    def __init__(
        self,
        width: int,
        rank: int = 16,
        *,
        out: int | None = None,
        experts: int = 4,
        activation: type[nn.Module] = nn.GELU,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        out = width if out is None else out
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.down = nn.Linear(width, rank)  # Kaiming uniform, a = sqrt 5
        nn.init.zeros_(self.down.bias)
        self.act, self.drop = activation(), nn.Dropout(dropout)
        self.up = nn.Parameter(torch.zeros(experts, out, rank))
        self.up_bias = nn.Parameter(torch.zeros(experts, out))
        dealt = torch.randperm(out * rank) % experts
        self.register_buffer("owner", dealt.view(out, rank).byte() if experts > 1 else None)
        self.indices_below = {"owner": experts}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.act(self.down(self.norm(x))))
        return F.linear(hidden, *(self.drawn() if self.training else self.merged()))

    def drawn(self) -> tuple[Tensor, Tensor]:
        """Weight (out, rank) and bias (out,) of an expert at random."""
        if self.owner is None:
            return self.up[0], self.up_bias[0]
        i = torch.randint(len(self.up), (1,), device=self.up.device)
        return self.up[i][0] * (self.owner == i), self.up_bias[i][0]

    def merged(self) -> tuple[Tensor, Tensor]:
        """Weight (out, rank) and bias (out,): the mean of the experts."""
        return merged(self.up, self.owner), self.up_bias.mean(0)

    def extra_repr(self) -> str:
        experts, out, rank = self.up.shape
        return f"{self.down.in_features}, {out}, rank={rank}, experts={experts}"


def merged(up: Tensor, owner: Tensor | None) -> Tensor:
    """The mean of sparse experts `up` (experts, out, rank), zero but where they are the owner."""
    if owner is None:
        return up[0]
    trained = up.gather(0, owner.long()[None])[0]  # every entry has one owner: no sum is needed
    return trained / len(up)


def deployed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is left to keep when training is over, of `surgery.state_dict` of a trained model.

    The experts are merged, and the rest is as it was. It fits a model operated with one expert,
    mosa(experts=1), which answers as the trained one does in eval mode.

    >>> from surgery import apply, at, load_state_dict, parallel, state_dict
    >>> def build(experts):
    ...     rule = at("0", parallel(sparse_experts(rank=2, experts=experts)))
    ...     return apply(nn.Sequential(nn.Linear(8, 8)), rule)
    >>> small = deployed(state_dict(build(experts=4)))
    >>> load_state_dict(build(experts=1), small)
    >>> sum(tensor.numel() for tensor in small.values())
    58
    """
    out = dict(tensors)
    for key in [key for key in tensors if key.endswith(".owner")]:
        part = key.removesuffix(".owner")
        owner = out.pop(key)
        out[f"{part}.up"] = merged(out[f"{part}.up"], owner)[None]
        out[f"{part}.up_bias"] = out[f"{part}.up_bias"].mean(0, keepdim=True)
    return out


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2 of two answers, logits (..., classes): a mean over samples.

    Added to the loss, with weight 1, where a and b are two training forwards of one input, which
    draw other experts. Each answer is drawn to the other as it is (which has no gradient there).

    Source: Zhang et al. 2023 (MoSA).

    >>> symmetric_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor(0.)
    """
    p, q = (x.flatten(0, -2).log_softmax(-1) for x in (a, b))
    return (_kl(p.detach(), q) + _kl(q.detach(), p)) / 2


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of logarithms of probabilities (samples, classes)."""
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


@part
@usually("parallel")
def sparse_experts(
    site: Site,
    rank: int = 16,
    experts: int = 4,
    activation: type[nn.Module] = nn.GELU,
    dropout: float = 0.1,
) -> nn.Module:
    """An adapter with a norm of its own, whose up-projection is trained by sparse experts.

    rank        hidden units
    experts     among which the entries of the up-projection are dealt; one is drawn at each
                training forward, and their mean runs in eval mode; 1: a plain adapter
    activation  a module class such as nn.GELU
    dropout     probability, on the hidden units

    Starts by adding nothing. Raises RuleError for more than 255 experts. Parameters:
    2 * width + width * rank + rank + experts * (rank * out + out); `deployed` leaves one expert.
    Source: Zhang et al. 2023 (MoSA).

    >>> sparse_experts(rank=8)
    sparse_experts(rank=8)
    """
    positive("sparse_experts", rank=rank, experts=experts)
    if experts > 255:
        raise RuleError(f"sparse_experts(experts={experts})", "they are too many.", "255 at most.")
    return SparseExperts(
        site.width, rank, out=site.out, experts=experts, activation=activation, dropout=dropout
    )
