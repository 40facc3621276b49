"""Channel-linear operations of a trace: what multiplies features with a weight."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from torch import nn

from .trace import Op, Value, Weights, names

CONVS = ("conv1d", "conv2d", "conv3d")
MATMULS = names("addmm baddbmm mm bmm matmul rmatmul _grouped_mm grouped_mm")


class LinearOp(NamedTuple):
    """A channel-linear operation: `width` features of `taken`, on `axis`, become `out`.

    Its matrices are made of `weights`, which `owner` holds.
    """

    op: Op
    taken: Value
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
    if op.name in CONVS:
        return _conv(op)
    if op.name == "linear":
        weight = op.arg(1, "weight")
        return _product(op, op.arg(0, "input"), weight, -1, weight.shape[::-1])
    if op.name == "einsum":
        return _einsum(op)
    return _matmul(op) if op.name in MATMULS else None


def _product(
    op: Op, taken: Value, weight: Value, axis: int, sizes: tuple[int, ...]
) -> LinearOp | None:
    """A product with a weight: `sizes` begins with the features in and out."""
    matrices = [w for w in weight.weights or () if len(w.shape) > 1]
    if not matrices or len(sizes) < 2:
        return None
    owner = max(matrices, key=lambda w: prod(w.shape)).owner(op)
    return LinearOp(op, taken, sizes[0], sizes[1], axis, owner, frozenset(matrices))


def _matmul(op: Op) -> LinearOp | None:
    factors = [v for v in op.given if len(v.shape) in (2, 3, 4)]
    if len(factors) < 2:
        return None
    left, right = factors[:2] if "addmm" not in op.name and op.name != "baddbmm" else factors[-2:]
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
    equation, values = op.args[0], op.given
    if not isinstance(equation, str) or len(values) != 2 or "->" not in equation:
        return None
    left, right = equation.replace(" ", "").replace("...", "").split("->")
    terms = left.split(",")
    if values[0].weights:
        values, terms = values[::-1], terms[::-1]
    taken, weight = values
    sizes = dict(zip(terms[1], weight.shape, strict=False))
    inner = [c for c in terms[1] if c in terms[0] and c not in right]
    experts = terms[1][:1] if len(terms[1]) == 3 and terms[1][0] not in inner else ""
    outer = [c for c in terms[1] if c not in terms[0] and c in right and c != experts]
    if not inner or not outer or not weight.weights:
        return None
    axis = -1 if terms[0].endswith(inner[-1]) else 1
    shape = (prod(sizes[c] for c in inner), prod(sizes[c] for c in outer))
    return _product(op, taken, weight, axis, shape)


def is_depthwise(op: Op) -> bool:
    """Whether it is a convolution of each channel by itself."""
    if op.name not in CONVS:
        return False
    return bool(
        op.arg(6, "groups", 1) == op.arg(0, "input").shape[-len(op.arg(1, "weight").shape) + 1]
    )
