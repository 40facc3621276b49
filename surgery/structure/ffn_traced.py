"""The feed-forward networks of a model as they ran: by what feeds what, whoever holds it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile
from math import prod
from typing import NamedTuple

from .dataflow import is_sum, norm_before
from .ffn_widths import widens
from .layers import NARROWEST
from .linear_ops import LinearOp, is_depthwise, linear_op
from .trace import CONV_OPS, JOINS, MOVES, NORM_AXES, SCALES, SUMS, Call, Op, Trace, Value, names

FARTHEST = 200  # operations between the two ends of one network

NONLINEAR = names(
    "relu relu6 gelu silu mish hardswish sigmoid hardsigmoid tanh hardtanh elu selu celu prelu "
    "leaky_relu rrelu softplus softsign logsigmoid glu erf exp square clamp clamp_min threshold "
    "maximum minimum min max log1p expm1 sin cos _opaque"
)
MIXES = CONV_OPS | names(  # what moves features from one position to another, or weighs them up
    "softmax log_softmax scaled_dot_product_attention multi_head_attention_forward matmul mm bmm "
    "baddbmm addmm einsum linear bilinear conv_transpose1d conv_transpose2d conv_transpose3d "
    "embedding cumsum cumprod sort topk fft rfft irfft lstm gru max_pool1d "
    "max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d interpolate grid_sample fold "
    "unfold deform_conv2d dot outer tensordot cdist"
)
CARRIES = MOVES - JOINS


@dataclass(frozen=True)
class TracedFFN:
    """A feed-forward network, as it ran.

    owner          the smallest module that holds both ends
    entry, exit    the modules of its first and last projection; `*` where experts stand side by
                   side, and one and the same module where it holds all experts in one parameter
    width, hidden  features in and between
    out            features that it gives: fewer than it takes where it reads two tensors joined
    layers         the modules of its projections, the last of them the exit
    spreads        whether a depthwise convolution over positions lies in between
    gated          whether one half of what goes between multiplies the other
    axis           where features lie: -1 last, 1 after the batch
    kind           "ffn"; "inverted bottleneck" (convolutions with a wider depthwise one between);
                   "fused" (its entry is also that of an attention); "tokens" (what it takes
                   for features are positions)
    inside         whether the sum with the residual happens inside the owner
    norm           the norm nearest upstream of the entry, None where there is none
    direct         whether that norm feeds it without a residual sum between
    prenormed      whether what it is added to is what that norm took
    calls          how often it ran
    """

    owner: str
    entry: str
    exit: str
    width: int
    hidden: int
    gated: bool
    axis: int
    kind: str
    inside: bool
    norm: str | None
    direct: bool
    out: int
    layers: tuple[str, ...]
    spreads: bool
    prenormed: bool
    calls: int = 1


class _Run(NamedTuple):
    """A network in one run, the features it reads, and the call it ran in (experts share one)."""

    ffn: TracedFFN
    source: Value
    call: Call | Op


class _Middle(NamedTuple):
    """What lies between the ends of a network."""

    ups: list[LinearOp]  # one for each weight, however many pieces it is used on
    acts: bool  # holds a nonlinearity
    spreads: bool  # holds a depthwise convolution over more than one position


def traced_ffns(trace: Trace) -> list[TracedFFN]:
    """The feed-forward networks of a traced forward, in order of their first run.

    One is a channel-linear operation d -> h (or d -> 2h, or two d -> h) and one h -> d, joined
    only by pointwise, normalising or depthwise operations with a nonlinearity among them, whose
    result is added to another tensor. A mixture of experts is one.
    """
    return _experts_merged(single_ffns(trace))


def single_ffns(trace: Trace) -> list[tuple[TracedFFN, set[Value]]]:
    """The same, each of the experts that stand side by side for itself, with the features read."""
    grouped: dict[tuple[str, str, int, int], list[_Run]] = {}
    for op in trace.ops:
        down = linear_op(op)
        run = _run(trace, down) if down and down.out >= NARROWEST else None
        if run is not None:
            ffn = run.ffn
            grouped.setdefault((ffn.entry, ffn.exit, ffn.width, ffn.hidden), []).append(run)
    ffns = []
    for runs in grouped.values():
        calls = {run.call for run in runs}
        ffns.append((replace(runs[0].ffn, calls=len(calls)), {run.source for run in runs}))
    return ffns


# from the last projection back to the first


def _run(trace: Trace, down: LinearOp) -> _Run | None:
    """The network that ends in this operation; None where none does."""
    middle = _between(down)
    if middle is None or not middle.acts:
        return None
    if len(middle.ups) > 1 and not widens([up.out for up in middle.ups], down.width):
        return None
    sources = {_source(up.input) for up in middle.ups}
    total = _residual(down) if len(sources) == 1 else None
    if total is None:
        return None
    ffn = _described(trace, middle, down, total)
    calls = (call for call in down.op.stack() if call.module is down.owner)
    return _Run(ffn, sources.pop(), next(calls, down.op))


def _described(trace: Trace, middle: _Middle, down: LinearOp, total: Op) -> TracedFFN:
    up = middle.ups[0]
    entry, exit = trace.path(up.owner), trace.path(down.owner)
    owner = _common_path(entry, exit)
    norm, direct = norm_before(trace, [up.input])
    return TracedFFN(
        owner,
        entry,
        exit,
        up.width,
        down.width,
        gated=len(middle.ups) > 1 or up.out > down.width,
        axis=1 if up.axis == 1 else -1,
        kind=_kind(middle, down),
        inside=any(trace.path(call.module) == owner for call in total.stack()),
        norm=norm,
        direct=direct,
        out=down.out,
        layers=(*(trace.path(each.owner) for each in middle.ups), exit),
        spreads=middle.spreads,
        prenormed=direct and _takes_any(trace, norm, total.features),
    )


def _takes_any(trace: Trace, norm: str | None, values: list[Value]) -> bool:
    calls = trace.calls_of(norm) if norm and norm in trace.paths.values() else []
    return any(value in values for call in calls for value in call.inputs)


def _kind(middle: _Middle, down: LinearOp) -> str:
    if not widens([up.out for up in middle.ups], down.width):
        return "fused"  # the rest of its first projection is that of an attention
    if _acts_on_tokens(middle.ups[0]):
        return "tokens"
    if middle.spreads and down.is_conv:
        return "inverted bottleneck"
    return "ffn"


def _between(down: LinearOp) -> _Middle | None:
    """All that feeds the last projection, back to the first; None where anything else does."""
    ups: dict[Op, LinearOp] = {}
    acts = spreads = False
    queue, seen = [down.input], {down.input}
    while queue and len(seen) < FARTHEST:
        value = queue.pop()
        op = value.op
        if op is None:
            return None
        linear = linear_op(op)
        if linear is not None and _is_up(linear, down):
            ups[op] = linear
            continue
        over_positions = linear is not None and _is_over_positions(linear, down)
        sources = [linear.input] if linear and over_positions else _passed_through(op, value)
        if not sources:
            return None
        acts |= op.name in NONLINEAR
        spreads |= is_depthwise(op) and prod(op.arg(1, "weight").shape[2:]) > 1
        queue += [v for v in sources if v not in seen]
        seen.update(sources)
    first = {ups[op].weights: ups[op] for op in sorted(ups, key=_number, reverse=True)}
    return _Middle(list(first.values())[::-1], acts, spreads) if ups else None


def _number(op: Op) -> int:
    return op.outputs[0].number


def _is_up(linear: LinearOp, down: LinearOp) -> bool:
    joined = linear.width == 2 * down.out and _is_joined(linear)
    return (joined or linear.width == down.out) and linear.out >= down.width


def _is_joined(linear: LinearOp) -> bool:
    """Whether it reads two tensors joined, feature to feature (LoFTR, LightGlue)."""
    value, op = linear.input, linear.input.op
    while op is not None and op.name in CARRIES and len(op.features) == 1:
        value, op = op.features[0], op.features[0].op
    halves = {v.shape[linear.axis] for v in op.features} if op and op.name in JOINS else set()
    return halves == {linear.width // 2} and value.shape[linear.axis] == linear.width


def _is_over_positions(linear: LinearOp, down: LinearOp) -> bool:
    """Whether it may be the inner projection over positions of a spatial gate (gMLP)."""
    return linear.width == linear.out and linear.width not in (down.width, down.out)


def _passed_through(op: Op, value: Value) -> list[Value]:
    """The features that a pointwise, normalising or depthwise operation passes on, or none."""
    features = op.features
    if op.name in MOVES or op.name == "glu":
        return features
    if op.name in NORM_AXES or is_depthwise(op):
        return features[:1]
    if op.name in MIXES:
        return []
    return [v for v in features if prod(v.shape) == prod(value.shape)]


def _source(value: Value) -> Value:
    """The value that views, gathers and dropout have made this one of."""
    while value.op is not None and value.op.name in MOVES:
        if not value.op.features:
            break
        value = value.op.features[0]
    return value


# from the last projection on to the residual


def _residual(down: LinearOp) -> Op | None:
    """The sum of the result with a tensor that does not come from it; None where there is none."""
    queue, seen = list(down.op.outputs), set(down.op.outputs)
    while queue and len(seen) < FARTHEST:
        value = queue.pop(0)
        for op in value.uses:
            if is_sum(op) and _adds_another(op, value, seen, down):
                return op
            if _keeps(op, value):
                queue += [v for v in op.outputs if v not in seen]
                seen.update(op.outputs)
    return None


def _adds_another(op: Op, value: Value, seen: set[Value], down: LinearOp) -> bool:
    others = [v for v in op.features if v is not value and v not in seen]
    return any(v.shape == value.shape and not _depends(v, down) for v in others)


def _depends(value: Value, down: LinearOp) -> bool:
    """Whether a value is made of the result of a projection, by whatever operations."""
    start = down.op.outputs[0]
    queue, seen = [value], {value}
    while queue:
        op = queue.pop().op
        if op is not None and op is down.op:
            return True
        fresh = [v for v in op.inputs if v.number >= start.number and v not in seen] if op else []
        seen.update(fresh)
        queue += fresh
    return False


def _keeps(op: Op, value: Value) -> bool:
    """Whether a result stays itself: moved, normed, scaled or spread, not bent or projected."""
    if op.name in MOVES or op.name in NORM_AXES or op.name == "sum" or is_depthwise(op):
        return True  # a sum is over experts, or a stack
    if op.name in SCALES:  # by a number for each of several streams, too
        return any(prod(result.shape) % prod(value.shape) == 0 for result in op.outputs)
    return op.name in SUMS and any(prod(v.shape) == prod(value.shape) for v in op.outputs)


# on which axis


def _acts_on_tokens(up: LinearOp) -> bool:
    """Whether a projection mixes positions: its axis is another than that of the norm before it."""
    value, axis = up.input, up.axis % len(up.input.shape)
    while value.op is not None:
        op = value.op
        if op.name in NORM_AXES:
            return axis != NORM_AXES[op.name] % len(value.shape)
        features = op.features
        if op.name not in MOVES or len(features) != 1:
            return False
        before = _axis_before(op, features[0].shape, value.shape, axis)
        if before is None:
            return False
        value, axis = features[0], before
    return False


def _axis_before(op: Op, old: tuple[int, ...], new: tuple[int, ...], axis: int) -> int | None:
    """Where an axis of the result was in what a move took; None where it was no axis of its own."""
    if op.name in ("transpose", "swapaxes", "swapdims", "permute", "mT", "T", "t"):
        return _order(op, len(new))[axis]
    if old == new:
        return axis
    after = prod(new[axis + 1 :])
    same = (i for i, size in enumerate(old) if size == new[axis] and prod(old[i + 1 :]) == after)
    return next(same, None)


def _order(op: Op, dims: int) -> list[int]:
    order = list(range(dims))
    if op.name == "permute":
        axes = op.args[1:] or op.kwargs.get("dims", ())
        flat = axes[0] if axes and isinstance(axes[0], list) else axes
        return [int(i) % dims for i in flat]
    if op.name == "T":
        return order[::-1]
    a, b = -2, -1  # of mT and t
    if op.name in ("transpose", "swapaxes", "swapdims"):
        a, b = op.arg(1, "dim0", -2), op.arg(2, "dim1", -1)
    order[a], order[b] = order[b], order[a]
    return order


# experts


def _experts_merged(ffns: list[tuple[TracedFFN, set[Value]]]) -> list[TracedFFN]:
    """Experts that stand side by side in a list and read the same features are one network."""
    merged: list[tuple[TracedFFN, set[Value]]] = []
    for ffn, sources in ffns:
        for i, (other, others) in enumerate(merged):
            if sources & others and (both := _merged(other, ffn)) is not None:
                merged[i] = (both, sources | others)
                break
        else:
            merged.append((ffn, sources))
    return [ffn for ffn, _ in merged]


def _merged(a: TracedFFN, b: TracedFFN) -> TracedFFN | None:
    if (a.width, a.hidden, a.kind) != (b.width, b.hidden, b.kind):
        return None
    entry, exit = _common_address(a.entry, b.entry), _common_address(a.exit, b.exit)
    if entry is None or exit is None:
        return None
    owner = _common_path(entry.partition("*")[0].rstrip("."), exit)
    return replace(a, owner=owner, entry=entry, exit=exit, calls=max(a.calls, b.calls))


def _common_address(a: str, b: str) -> str | None:
    """The address of both paths, where they differ in the number of one step."""
    steps = _step_by_step(a, b)
    differ = [i for i, (x, y) in enumerate(steps) if x != y]
    if len(differ) != 1 or a.count(".") != b.count("."):
        return None
    x, y = steps[differ[0]]
    if x != "*" and x.rstrip("0123456789") != y.rstrip("0123456789"):
        return None
    return ".".join("*" if i == differ[0] else x for i, (x, _) in enumerate(steps))


def _common_path(a: str, b: str) -> str:
    return ".".join(x for x, _ in takewhile(lambda xy: xy[0] == xy[1], _step_by_step(a, b)))


def _step_by_step(a: str, b: str) -> list[tuple[str, str]]:
    return list(zip(a.split("."), b.split("."), strict=False))
