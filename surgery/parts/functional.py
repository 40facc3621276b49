"""Sharing Mixture of Adapters (Adapter-X, Li et al. 2024) as pure tensor functions.

Shapes: ``m`` sub-tokens of ``c`` features, ``n`` experts with ``r`` hidden units each, a router
of ``e`` features. Expert i is the bottleneck ``E_i(u) = U_i f(D_i u + b_i) + k_i``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..rules.routing import Coefficient, Routed, balance, balance_slope, load, top1, with_balance

__all__ = [
    "Coefficient", "Experts", "Routed", "balance", "balance_slope", "load", "may_sort",
    "merge_heads", "mix", "mix_dense", "mix_top1", "route", "split_heads", "top1", "with_balance",
]  # fmt: skip


class Experts(NamedTuple):
    """down ``(n, r, c)``, down_bias ``(n, r)``, up ``(n, c, r)``, up_bias ``(n, c)``."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Sub-tokens ``(m, c)`` of tokens ``(..., heads * c)``: chunks of features, token-major."""
    return rearrange(x, "... (h c) -> (... h) c", h=heads)


def merge_heads(u: Tensor, x: Tensor) -> Tensor:
    """Sub-tokens ``(m, c)`` back in the shape of the tokens `split_heads` took them from."""
    return u.reshape(x.shape)


def route(u: Tensor, reduction: Tensor, embeddings: Tensor) -> Tensor:
    """Gates ``(m, n)`` of sub-tokens ``(m, c)``, in float32 or finer.

    reduction ``(e, c)`` and the unit embeddings ``(n, e)`` are first merged into one router
    ``(n, c)``; logits ``(n, m)`` lie expert by expert, where a softmax over few experts is fast.
    """
    router = F.normalize(embeddings, dim=1) @ reduction
    fine = torch.promote_types(u.dtype, torch.float32)
    return (router @ u.t()).softmax(dim=0, dtype=fine).t()


def mix(
    u: Tensor,
    gates: Tensor,
    experts: Experts,
    act: Callable[[Tensor], Tensor],
    top_k: int | None = None,
) -> Tensor:
    """Gated sum ``(m, c)`` of all experts (``top_k=None``), or of the likeliest one (``1``).

    u ``(m, c)``, gates ``(m, n)``; act is elementwise.
    """
    if top_k is None:
        return mix_dense(u, gates, experts, act)
    if may_sort(u):
        return mix_top1(u, gates, experts, act)
    return mix_dense(u, gates * top1(gates), experts, act)


def mix_dense(
    u: Tensor, gates: Tensor, experts: Experts, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """``sum_i g_i E_i(u)`` in two products, the gates scaling the hidden units in between.

    The gates themselves are the hidden units of the biases ``up_bias``.
    """
    down = rearrange(experts.down, "n r c -> (n r) c")
    down_bias = rearrange(experts.down_bias, "n r -> (n r)")
    up = torch.cat([rearrange(experts.up, "n c r -> (n r) c"), experts.up_bias])
    hidden = rearrange(act(F.linear(u, down, down_bias)), "m (n r) -> m n r", n=gates.shape[1])
    gates = gates.to(hidden.dtype)
    gated = rearrange(hidden * gates.unsqueeze(-1), "m n r -> m (n r)")
    return torch.cat([gated, gates], dim=1) @ up


def mix_top1(u: Tensor, gates: Tensor, experts: Experts, act: Callable[[Tensor], Tensor]) -> Tensor:
    """``g_i E_i(u)`` of the likeliest expert i, each expert run on its own sub-tokens alone.

    Sub-tokens are sorted by expert, so the sizes depend on the data; `mix_dense` with gates
    ``gates * top1(gates)`` is the same map in static shapes.
    """
    gate, winner = gates.max(dim=1, keepdim=True)
    order = winner.flatten().argsort()
    sizes = winner.flatten().bincount(minlength=gates.shape[1]).tolist()
    groups = u.index_select(0, order).split_with_sizes(sizes)
    by_expert = zip(groups, *experts, strict=True)
    mixed = torch.cat([F.linear(act(F.linear(v, d, b)), w, k) for v, d, b, w, k in by_expert])
    return torch.empty_like(mixed).index_copy_(0, order, mixed) * gate.to(mixed.dtype)


def may_sort(u: Tensor) -> bool:
    """Whether sizes may depend on data: a plain CPU tensor, no compiler, trace or transform."""
    return (
        type(u) is Tensor
        and u.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
    )
