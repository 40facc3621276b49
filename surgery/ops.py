"""Sharing Mixture of Adapters (Adapter-X, Li et al. 2024) as pure tensor functions.

Shapes: ``m`` sub-tokens of ``c`` features, ``n`` experts with ``r`` hidden units each, a router
of ``e`` features. Expert i is the bottleneck ``E_i(u) = U_i f(D_i u + b_i) + k_i``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Coefficient: TypeAlias = "float | Callable[[], float]"


class Routed(NamedTuple):
    """What a part that routes returns: its output, and gates ``(m, n)`` of sub-tokens, experts."""

    output: Tensor
    gates: Tensor


class Experts(NamedTuple):
    """down ``(n, r, c)``, down_bias ``(n, r)``, up ``(n, c, r)``, up_bias ``(n, c)``."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor


def split(x: Tensor, heads: int) -> Tensor:
    """Sub-tokens ``(m, c)`` of tokens ``(..., heads * c)``: chunks of features, token-major."""
    return rearrange(x, "... (h c) -> (... h) c", h=heads)


def merge(u: Tensor, x: Tensor) -> Tensor:
    """Sub-tokens ``(m, c)`` back in the shape of the tokens `split` took them from."""
    return u.reshape(x.shape)


def route(u: Tensor, reduction: Tensor, embeddings: Tensor) -> Tensor:
    """Gates ``(m, n)`` of sub-tokens ``(m, c)``, in float32 or finer.

    reduction ``(e, c)`` and the unit embeddings ``(n, e)`` are first folded into one router
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
    load = winner.flatten().bincount(minlength=gates.shape[1]).tolist()
    groups = u.index_select(0, order).split_with_sizes(load)
    run = zip(groups, *experts, strict=True)
    mixed = torch.cat([F.linear(act(F.linear(v, d, b)), w, k) for v, d, b, w, k in run])
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


def top1(gates: Tensor) -> Tensor:
    """One-hot ``(m, n)`` of the largest gate of each row, without gradient."""
    winner = gates.argmax(dim=1, keepdim=True)
    return torch.zeros_like(gates).scatter(1, winner, 1.0)


def balance(gates: Tensor) -> Tensor:
    """Switch balance loss of gates ``(m, n)``: the scalar ``n sum_p t_p mean(g_p)``.

    ``t_p``, the fraction of sub-tokens whose likeliest expert is p, carries no gradient.
    """
    return (gates * balance_slope(gates)).sum()


def balance_slope(gates: Tensor) -> Tensor:
    """Slope ``(n,)`` of `balance` in the gates of any one sub-token: ``n t_p / m``."""
    m, n = gates.shape
    return top1(gates).sum(dim=0) * (n / max(m, 1) ** 2)


def load(gates: Tensor) -> Tensor:
    """Fraction ``(n,)`` of sub-tokens whose likeliest expert each one is; sums to 1."""
    return top1(gates).sum(dim=0) / max(len(gates), 1)


class _WithBalance(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, gates: Tensor, coefficient: Coefficient) -> Tensor:
        return output.clone()  # a view made here could not be changed in place afterwards

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, gates, ctx.coefficient = inputs
        ctx.save_for_backward(gates)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (gates,) = ctx.saved_tensors
        scale = ctx.coefficient() if callable(ctx.coefficient) else ctx.coefficient
        return grad, (scale * balance_slope(gates)).expand_as(gates), None


def with_balance(output: Tensor, gates: Tensor, coefficient: Coefficient) -> Tensor:
    """The output as it is; its backward also descends ``coefficient * balance(gates)``.

    A callable coefficient is called in backward, such as the scale of a ``GradScaler``.
    """
    result: Tensor = _WithBalance.apply(output, gates, coefficient)
    return result
