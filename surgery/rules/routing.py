"""The contract of parts that route: they return gates too, of which a balance loss is made.

A part that routes says `routes = True` and returns `Routed`. Shapes: ``m`` sub-tokens, ``n``
experts. The loss is that of Switch (Fedus et al. 2021), as Adapter-X has it (Li et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Coefficient: TypeAlias = "float | Callable[[], float]"


class Routed(NamedTuple):
    """What a part that routes returns: its output, and gates ``(m, n)`` of sub-tokens, experts."""

    output: Tensor
    gates: Tensor


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
