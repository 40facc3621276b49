"""Channel-linear operations of a trace: what multiplies features with a weight."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import nn

from .layers import linear_shape
from .trace import CONV_OPS, Op, Value, Weights, names

MATMULS = names("addmm baddbmm mm bmm matmul rmatmul _grouped_mm grouped_mm")


class LinearOp(NamedTuple):
    """A channel-linear operation: `width` features of `input`, on `axis`, become `out`.

    Its matrices are made of `weights`, which `owner` holds.
    """

    op: Op
    input: Value
    width: int
    out: int
    axis: int
    owner: nn.Module
    weights: Weights

    @property
    def is_conv(self) -> bool:
        return self.op.name.startswith("conv")


def linear_op(op: Op) -> LinearOp | None:
    """What a channel-linear operation does; None for any other."""
    if op.name in CONV_OPS:
        return _conv(op)
    if op.name == "linear":
        weight = op.arg(1, "weight")
        return _product(op, op.arg(0, "input"), weight, -1, weight.shape[::-1])
    if op.name == "einsum":
        return _einsum(op)
    return _matmul(op) if op.name in MATMULS else None


def _product(
    op: Op, input: Value, weight: Value, axis: int, sizes: tuple[int, ...]
) -> LinearOp | None:
    """A product with a weight: `sizes` begins with the features in and out."""
    matrices = [w for w in weight.weights or () if len(w.shape) > 1]
    if not matrices or len(sizes) < 2:
        return None
    owner = _layer(op) or max(matrices, key=lambda w: prod(w.shape)).owner(op)
    return LinearOp(op, input, sizes[0], sizes[1], axis, owner, frozenset(matrices))


def _layer(op: Op) -> nn.Module | None:
    """The layer that runs an operation, whatever its weight is made of (a parametrization)."""
    module = op.call.module if op.call else None
    return module if module is not None and linear_shape(module) else None


def _matmul(op: Op) -> LinearOp | None:
    factors = [v for v in op.inputs if len(v.shape) in (2, 3, 4)]
    if len(factors) < 2:
        return None
    adds = "addmm" in op.name or op.name == "baddbmm"  # then the first is what it adds to
    left, right = factors[-2:] if adds else factors[:2]
    if right.weights:
        return _product(op, left, right, -1, right.shape[-2:])
    return _product(op, right, left, -2, left.shape[:-3:-1])


def _conv(op: Op) -> LinearOp | None:
    weight, stride = op.arg(1, "weight"), op.arg(3, "stride", 1)
    strides = stride if isinstance(stride, list) else [stride]
    out, width, *kernel = weight.shape
    if width < 2 or prod(kernel) != 1 or any(s != 1 for s in strides):
        return None
    sizes = (width * op.arg(6, "groups", 1), out)
    return _product(op, op.arg(0, "input"), weight, 1, sizes)


def _einsum(op: Op) -> LinearOp | None:
    equation, operands = op.args[0], op.inputs
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    left, result = equation.replace(" ", "").replace("...", "").split("->")
    terms = left.split(",")
    if operands[0].weights:
        operands, terms = operands[::-1], terms[::-1]
    (features, weight), (kept, matrix) = operands, terms
    summed, added = _in_and_out(kept, matrix, result)
    if not summed or not added or not weight.weights:
        return None
    axis = -1 if kept.endswith(summed[-1]) else 1
    sizes = dict(zip(matrix, weight.shape, strict=False))
    shape = (prod(sizes[c] for c in summed), prod(sizes[c] for c in added))
    return _product(op, features, weight, axis, shape)


def _in_and_out(features: str, weight: str, result: str) -> tuple[list[str], list[str]]:
    """The letters of a weight over which a product sums, and those that it gives to the result.

    Of three, the first may count experts: each has a matrix of its own.
    """
    summed = [c for c in weight if c in features and c not in result]
    experts = weight[:1] if len(weight) == 3 and weight[0] not in summed else ""
    added = [c for c in weight if c not in features and c in result and c != experts]
    return summed, added


def is_depthwise(op: Op) -> bool:
    """Whether it is a convolution of each channel by itself."""
    if op.name not in CONV_OPS:
        return False
    return bool(
        op.arg(6, "groups", 1) == op.arg(0, "input").shape[-len(op.arg(1, "weight").shape) + 1]
    )
