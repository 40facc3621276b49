"""The feed-forward networks of a model as they ran: by what feeds what, whoever holds it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile
from math import prod
from typing import NamedTuple

from .dataflow import is_sum, norm_before
from .ffn import FFNs, Projections, is_routed, whole_or_span
from .layers import NARROWEST, Shape, is_list
from .linear_ops import LinearOp, is_depthwise, linear_op
from .module_tree import Site, span
from .trace import MOVES, SCALES, SUMS, Call, Op, Trace, Value, names

FARTHEST = 200  # operations between the two ends of one network

NORMS = {"layer_norm": -1, "rms_norm": -1, "batch_norm": 1, "group_norm": 1, "instance_norm": 1}
ACTS = names(
    "relu relu6 gelu silu mish hardswish sigmoid hardsigmoid tanh hardtanh elu selu celu prelu "
    "leaky_relu rrelu softplus softsign logsigmoid glu erf exp square clamp clamp_min threshold "
    "maximum minimum min max log1p expm1 sin cos _opaque"
)
MIXES = names(  # what carries features from one position to another, or weighs them up
    "softmax log_softmax scaled_dot_product_attention multi_head_attention_forward matmul mm bmm "
    "baddbmm addmm einsum linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d embedding cumsum cumprod sort topk fft rfft irfft lstm gru max_pool1d "
    "max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d interpolate grid_sample fold "
    "unfold deform_conv2d dot outer tensordot cdist"
)


@dataclass(frozen=True)
class TracedFFN:
    """A feed-forward network, as it ran.

    owner          the smallest module that holds both ends
    entry, exit    the modules of its first and last projection; `*` where experts stand side by
                   side, and one and the same module where it holds all experts in one parameter
    width, hidden  features in and between
    gated          whether one half of what goes between multiplies the other
    axis           where features lie: -1 last, 1 after the batch
    kind           "ffn"; "inverted bottleneck" (convolutions with a wider depthwise one between);
                   "fused" (its entry is also that of an attention); "tokens" (what it takes
                   for features are positions)
    inside         whether the sum with the residual happens inside the owner
    norm           the norm nearest upstream of the entry, None where there is none
    direct         whether that norm feeds it without a residual sum between
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
    calls: int = 1


class _Middle(NamedTuple):
    """What lies between the ends of a network."""

    ups: list[LinearOp]  # one for each weight, however many pieces it is used on
    bends: bool  # holds a nonlinearity
    spreads: bool  # holds a depthwise convolution over more than one position


def traced_ffns(trace: Trace) -> list[TracedFFN]:
    """The feed-forward networks of a traced forward, in order of their first run.

    One is a channel-linear operation d -> h (or d -> 2h, or two d -> h) and one h -> d, joined
    only by pointwise, normalising or depthwise operations with a nonlinearity among them, whose
    result is added to another tensor. A mixture of experts is one.
    """
    found: dict[tuple[str, str, int, int], list[tuple[TracedFFN, Value, Call | Op]]] = {}
    for op in trace.ops:
        down = linear_op(op)
        made = _ffn(trace, down) if down and down.out >= NARROWEST else None
        if made is not None:
            feed = made[0]
            found.setdefault((feed.entry, feed.exit, feed.width, feed.hidden), []).append(made)
    sites = []
    for runs in found.values():
        feeds, sources, calls = zip(*runs, strict=True)
        sites.append((replace(feeds[0], calls=len(set(calls))), set(sources)))
    return _experts(sites)


# from the last projection back to the first


def _ffn(trace: Trace, down: LinearOp) -> tuple[TracedFFN, Value, Call | Op] | None:
    """A network, the features it reads, and the call it ran in (several experts may in one)."""
    middle = _between(down)
    if middle is None or not middle.bends or not _fits(middle.ups, down):
        return None
    sources = {_source(up.taken) for up in middle.ups}
    if len(sources) > 1:
        return None
    total = _residual(down)
    if total is None:
        return None
    up = middle.ups[0]
    entry, exit = trace.path(up.owner), trace.path(down.owner)
    owner = _common(entry, exit)
    norm, direct = norm_before(trace, [up.taken])
    feed = TracedFFN(
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
    )
    calls = (call for call in down.op.stack() if call.module is down.owner)
    return feed, sources.pop(), next(calls, down.op)


def _kind(middle: _Middle, down: LinearOp) -> str:
    if sum(up.out for up in middle.ups) not in (down.width, 2 * down.width):
        return "fused"
    if _acts_on_tokens(middle.ups[0]):
        return "tokens"
    if middle.spreads and down.is_conv:
        return "inverted bottleneck"
    return "ffn"


def _fits(ups: list[LinearOp], down: LinearOp) -> bool:
    outs = [up.out for up in ups]
    if len(outs) == 1:
        return outs[0] >= down.width
    return outs == [down.width] * 2


def _between(down: LinearOp) -> _Middle | None:
    """All that feeds the last projection, back to the first; None where anything else does."""
    ups: dict[Op, LinearOp] = {}
    bends = spreads = False
    queue, seen = [down.taken], {down.taken}
    while queue and len(seen) < FARTHEST:
        value = queue.pop()
        op = value.op
        if op is None:
            return None
        found = linear_op(op)
        if found is not None and _is_up(found, down):
            ups[op] = found
            continue
        sources = [found.taken] if found and _is_spatial(found, down) else _passed(op, value)
        if not sources:
            return None
        bends |= op.name in ACTS
        spreads |= is_depthwise(op) and prod(op.arg(1, "weight").shape[2:]) > 1
        queue += [v for v in sources if v not in seen]
        seen.update(sources)
    first = {ups[op].weights: ups[op] for op in sorted(ups, key=_number, reverse=True)}
    return _Middle(list(first.values())[::-1], bends, spreads) if ups else None


def _number(op: Op) -> int:
    return op.made[0].number


def _is_up(found: LinearOp, down: LinearOp) -> bool:
    return found.width == down.out and found.out >= down.width


def _is_spatial(found: LinearOp, down: LinearOp) -> bool:
    """Whether it may be the inner projection over positions of a spatial gate (gMLP)."""
    return found.width == found.out and found.width not in (down.width, down.out)


def _passed(op: Op, value: Value) -> list[Value]:
    """The values that a pointwise, normalising or depthwise operation hands on; none for others."""
    features = op.features
    if op.name in MOVES or op.name == "glu":
        return features
    if op.name in NORMS or is_depthwise(op):
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
    queue, seen = list(down.op.made), set(down.op.made)
    while queue and len(seen) < FARTHEST:
        value = queue.pop(0)
        for op in value.uses:
            if is_sum(op) and _has_other(op, value, seen, down):
                return op
            if _carries(op, value):
                queue += [v for v in op.made if v not in seen]
                seen.update(op.made)
    return None


def _has_other(op: Op, value: Value, seen: set[Value], down: LinearOp) -> bool:
    others = [v for v in op.features if v is not value and v not in seen]
    return any(v.shape == value.shape and not _comes_from(v, down) for v in others)


def _comes_from(value: Value, down: LinearOp) -> bool:
    start = down.op.made[0]
    queue, seen = [value], {value}
    while queue:
        op = queue.pop().op
        if op is not None and op is down.op:
            return True
        fresh = [v for v in op.given if v.number >= start.number and v not in seen] if op else []
        seen.update(fresh)
        queue += fresh
    return False


def _carries(op: Op, value: Value) -> bool:
    """Whether a result stays itself: moved, normed, scaled or spread, not bent or projected."""
    if op.name in MOVES or op.name in NORMS or op.name == "sum" or is_depthwise(op):
        return True  # a sum is over experts, or a stack
    if op.name in SCALES:  # by a number for each of several streams, too
        return any(prod(made.shape) % prod(value.shape) == 0 for made in op.made)
    return op.name in SUMS and any(prod(made.shape) == prod(value.shape) for made in op.made)


# on which axis


def _acts_on_tokens(up: LinearOp) -> bool:
    """Whether a projection mixes positions: its axis is another than that of the norm before it."""
    value, axis = up.taken, up.axis % len(up.taken.shape)
    while value.op is not None:
        op = value.op
        if op.name in NORMS:
            return axis != NORMS[op.name] % len(value.shape)
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
    fits = (i for i, size in enumerate(old) if size == new[axis] and prod(old[i + 1 :]) == after)
    return next(fits, None)


def _order(op: Op, dims: int) -> list[int]:
    order = list(range(dims))
    if op.name == "permute":
        given = op.args[1:] or op.kwargs.get("dims", ())
        flat = given[0] if given and isinstance(given[0], list) else given
        return [int(i) % dims for i in flat]
    a = op.arg(1, "dim0", -2) if "s" in op.name else -2
    b = op.arg(2, "dim1", -1) if "s" in op.name else -1
    if op.name == "T":
        return order[::-1]
    order[a], order[b] = order[b], order[a]
    return order


# experts


def _experts(found: list[tuple[TracedFFN, set[Value]]]) -> list[TracedFFN]:
    """Experts that stand side by side in a list and read the same features are one network."""
    merged: list[tuple[TracedFFN, set[Value]]] = []
    for feed, sources in found:
        for i, (other, others) in enumerate(merged):
            if sources & others and (joined := _join(other, feed)) is not None:
                merged[i] = (joined, sources | others)
                break
        else:
            merged.append((feed, sources))
    return [feed for feed, _ in merged]


def _join(a: TracedFFN, b: TracedFFN) -> TracedFFN | None:
    if (a.width, a.hidden, a.kind) != (b.width, b.hidden, b.kind):
        return None
    entry, exit = _either(a.entry, b.entry), _either(a.exit, b.exit)
    if entry is None or exit is None:
        return None
    owner = _common(entry.partition("*")[0].rstrip("."), exit)
    return replace(a, owner=owner, entry=entry, exit=exit, calls=max(a.calls, b.calls))


def _either(a: str, b: str) -> str | None:
    """The address of both paths, where they differ in the number of one step."""
    pairs = _steps(a, b)
    differ = [i for i, (x, y) in enumerate(pairs) if x != y]
    if len(differ) != 1 or a.count(".") != b.count("."):
        return None
    x, y = pairs[differ[0]]
    if x != "*" and x.rstrip("0123456789") != y.rstrip("0123456789"):
        return None
    return ".".join("*" if i == differ[0] else x for i, (x, _) in enumerate(pairs))


def _common(a: str, b: str) -> str:
    return ".".join(x for x, _ in takewhile(lambda pair: pair[0] == pair[1], _steps(a, b)))


def _steps(a: str, b: str) -> list[tuple[str, str]]:
    return list(zip(a.split("."), b.split("."), strict=False))


# as sites


def find_traced_ffns(trace: Trace, leaves: Projections, found: FFNs) -> FFNs:
    """The networks that modules alone do not show: no activation among them, experts in one matrix.

    found  what structure found, which was no network
    """
    at = {site.path: site for site in leaves.tree.sites}
    sites: dict[str, Site] = {}
    for feed in traced_ffns(trace):
        site = _site(feed, at, leaves) if feed.kind == "ffn" else None
        if site is not None and site.path not in sites:
            site._shape = Shape(feed.width, feed.width, feed.axis)
            sites[site.path] = site
    taken = {leaf for site in sites.values() for leaf in leaves.below(site)}
    return found._replace(sites=sorted(sites.values(), key=lambda s: s.order), taken=taken)


def _site(feed: TracedFFN, at: dict[str, Site], leaves: Projections) -> Site | None:
    """The module that holds both ends and nothing else, or the span; of experts the layer."""
    owner, entry, exit = (at.get(path) for path in (feed.owner, feed.entry, feed.exit))
    if owner is None:
        return None
    if entry is None or exit is None or entry is exit:
        while owner.parent and not owner.is_element and is_routed(owner.parent, leaves, set()):
            owner = owner.parent
        return owner
    made = span(entry, exit)
    alone = leaves.below(owner) == leaves.below(made) and not is_list(owner.module)
    return whole_or_span(owner, [entry, exit]) if alone else made
