"""Operations of a trace that mix tokens by data: products of features, kernels, recurrences."""

from __future__ import annotations

from .trace import Op, names

PRODUCTS = names("matmul rmatmul bmm mm baddbmm einsum")
KERNELS = names("scaled_dot_product_attention flex_attention")
TORCH = "multi_head_attention_forward"
RECURRENT = names("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell")
SAMPLES = names("cumsum cumprod grid_sample fft_fft fft_rfft")
PIECES = names("stack cat")
MANY = 5  # pieces that are put together step by step: a recurrence


def mixes(op: Op) -> bool:
    """Whether it makes features of one token of those of others, by data."""
    if op.name in PRODUCTS:
        return len(op.features) > 1
    return op.name in KERNELS or op.name in RECURRENT or op.name in (TORCH, "_opaque")


def may_mix_unread(ops: list[Op]) -> bool:
    """Whether these may mix tokens by data in a way that `attention_traced` does not read.

    Step by step (RWKV's loop, scans), where others are sampled (Deformable DETR), in a kernel.
    """
    if any(op.name == TORCH or op.name in KERNELS | RECURRENT | SAMPLES for op in ops):
        return True
    if any(op.name in PIECES and len(op.features) >= MANY for op in ops):
        return True
    if any(op.name == "_opaque" and len(op.features) > 1 for op in ops):
        return True
    return sum(op.name == "setitem" for op in ops) >= MANY


def contracts(op: Op) -> bool:
    """Whether a product sums over something. (Not an einsum that keeps every letter.)"""
    left, result = _equation(op)
    return not left or bool(set("".join(left)) - set(result))


def sums_over_last(op: Op) -> bool | None:
    """Whether an einsum sums over the last letter of both, where features mostly are."""
    left, result = _equation(op)
    return all(term[-1] not in result for term in left) if left else None


def _equation(op: Op) -> tuple[list[str], str]:
    """The letters of both sides of an einsum; nothing of another product."""
    if op.name != "einsum" or not isinstance(op.args[0], str):
        return [], ""
    left, _, result = op.args[0].replace(" ", "").replace(".", "").partition("->")
    return [term for term in left.split(",") if term], result
