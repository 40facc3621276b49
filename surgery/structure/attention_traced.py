"""Attention as it ran: what mixes tokens by data, what enters it, and what its result goes into.

Scores are a product of features with features; weights that are a product of scores with features
mix them. A softmax between says that they are weights; kernels do without one, and multiply keys
and values first. What enters is whatever projects features nearest before the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from math import prod
from operator import or_
from typing import NamedTuple

from torch import nn

from .linear_ops import LinearOp, is_depthwise, linear_op
from .trace import CONV_OPS, MOVES, SCALES, SUMS, Call, Op, Trace, Value, names

PRODUCTS = names("matmul rmatmul bmm mm baddbmm einsum")
KERNELS = names("scaled_dot_product_attention flex_attention")
TORCH = "multi_head_attention_forward"
JOINS = names("cat concat concatenate hstack vstack")
SUMMED = names("sum mean")
RECURRENT = names("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell")
GATES = names("sigmoid hardsigmoid tanh hardtanh")
DIVIDES = names("div true_divide divide")

Bits = int  # a set of operations: the n-th bit for the n-th that makes features of its own


class Maker(NamedTuple):
    """An operation that makes features of its own, and the module that holds its weights.

    linear  what it multiplies with; None for a convolution over positions, a table, a sum
    """

    op: Op
    owner: nn.Module | None
    linear: LinearOp | None


@dataclass(eq=False)
class TracedAttention:
    """What mixed tokens in one run.

    call             the innermost call in which it did
    query, key, value  the makers of what entered; those of both where it does not show which
    proj             the projections of what came out, none or several
    inner            for a maker, those of what it was itself made of
    stream           the makers of what the result, or another, is added to: what was not projected
    soft, scored     whether a softmax makes weights; whether scores are made of two things
    """

    op: Op
    call: Call | None
    query: list[Maker]
    key: list[Maker]
    value: list[Maker]
    soft: bool
    scored: bool
    proj: list[LinearOp] = field(default_factory=list)
    inner: dict[Op, list[Maker]] = field(default_factory=dict)
    stream: list[Maker] = field(default_factory=list)

    @property
    def makers(self) -> list[Maker]:
        """All that made what entered, each once."""
        return list(dict.fromkeys((*self.query, *self.key, *self.value)))


class _Scores(NamedTuple):
    """What scores are made of, and whether they have been through a softmax.

    over_features  whether the product sums over features, and not over tokens; None: unknown
    """

    query: Bits
    key: Bits
    soft: bool = False
    over_features: bool | None = None

    def join(self, other: _Scores) -> _Scores:
        return self._replace(
            query=self.query | other.query,
            key=self.key | other.key,
            soft=self.soft or other.soft,
        )


_NONE = _Scores(0, 0)


@dataclass(frozen=True)
class _State:
    """What is known of a value.

    near, behind  what made it, nearest upstream, and all upstream
    cores         the attentions whose result it is, not projected yet
    scores        where it is scores or weights, of what
    pair          where it is an elementwise product, of what
    gate          whether it is squeezed between two numbers, to multiply something
    """

    near: Bits
    behind: Bits
    cores: frozenset[int] = frozenset()
    scores: _Scores | None = None
    pair: tuple[Bits, Bits] | None = None
    gate: bool = False


_NOTHING = _State(0, 0)


class _Core(NamedTuple):
    """An attention while the trace is read: what entered it, as bits, and the bit of itself."""

    op: Op
    query: Bits
    key: Bits
    value: Bits
    soft: bool
    proj: list[LinearOp]

    @property
    def operands(self) -> Bits:
        return self.query | self.key | self.value


class Mixing(NamedTuple):
    """What a forward shows of attention, and of projections.

    attentions  in the order in which they ran, as often as they did; not those of
                nn.MultiheadAttention, which is one operation: `torch_attentions`
    feeding     by the id of a module that projects, those of what made its input, nearest upstream
    """

    attentions: list[TracedAttention]
    feeding: dict[int, set[int]]


def traced_attentions(trace: Trace) -> Mixing:
    """Read a traced forward, from the first operation to the last."""
    reader = _Reader()
    for op in trace.ops:
        reader.read(op)
    return Mixing(list(reader.attentions()), reader.feeding())


def torch_attentions(trace: Trace) -> list[Call]:
    """The calls in which torch's own function for attention ran."""
    return [op.call for op in trace.ops if op.name == TORCH and op.call is not None]


class _Reader:
    """Goes through a trace once, from the first operation to the last."""

    def __init__(self) -> None:
        self.states: dict[Value, _State] = {}
        self.makers: list[Maker] = []
        self.inner: dict[Op, Bits] = {}
        self.streams: Bits = 0
        self.cores: dict[int, _Core] = {}  # by the number of its bit
        self.absorbed: set[int] = set()  # those that are part of another

    def read(self, op: Op) -> None:
        outputs = [value for value in op.outputs if value.is_feature]
        if not outputs:
            return
        state = self._after(op, [self._of(value) for value in op.features])
        for value in outputs:
            self.states[value] = state

    def _of(self, value: Value) -> _State:
        """What is known of a value; an input of the model makes features itself."""
        if value not in self.states:
            self.states[value] = self._made(Maker(value.op or _GIVEN, None, None), 0)
        return self.states[value]

    def _made(self, maker: Maker, behind: Bits) -> _State:
        bit = 1 << len(self.makers)
        self.makers.append(maker)
        return _State(bit, behind | bit)

    def _after(self, op: Op, given: list[_State]) -> _State:
        behind = reduce(or_, (state.behind for state in given), 0)
        if linear := linear_op(op):  # of a parameter too, which queries are made of (Perceiver)
            source = linear.input
            return self._projected(op, linear, self._of(source) if source.is_feature else _NOTHING)
        if not given or op.name in RECURRENT or op.name == TORCH:
            return self._made(Maker(op, None, None), behind)
        if op.name in CONV_OPS and not is_depthwise(op):
            owner = _holder_of_weight(op)
            return self._made(Maker(op, owner, None), behind)
        if op.name in KERNELS or _is_kernel(op, given):
            query, key, value = (state.near for state in (*given, *given[-1:] * 2)[:3])
            return self._core(op, query, key, value, soft=True, behind=behind)
        if op.name in PRODUCTS and len(given) > 1 and _contracts(op):
            return reduce(lambda a, b: self._product(op, a, b), given)
        if len(given) > 1 and op.name in SUMS:
            return self._sum(op, given)
        if len(given) > 1 and op.name in SCALES - DIVIDES:
            return self._scaled(op, given)
        return self._passed_on(op, given)

    # projections -------------------------------------------------------------------------------

    def _projected(self, op: Op, linear: LinearOp, state: _State) -> _State:
        """What a projection makes; scores go through one over heads, queries through a table."""
        if state.scores is not None and linear.width == linear.out:  # talking heads, re-attention
            return state
        if self._is_inside(linear, state):  # relative positions: queries times a raw table
            return state
        for core in state.cores:
            self.cores[core].proj.append(linear)
        self.inner[op] = state.near
        return self._made(Maker(op, linear.owner, linear), state.behind)

    def _is_inside(self, linear: LinearOp, state: _State) -> bool:
        """Whether a module multiplies with a parameter of its own what modules in it have made."""
        makers = [m for m in self._named(state.near) if m.linear is not None]
        if not makers or not linear.owner._modules:
            return False
        below = {id(module) for module in linear.owner.modules()} - {id(linear.owner)}
        return all(id(maker.owner) in below for maker in makers)

    # products ----------------------------------------------------------------------------------

    def _product(self, op: Op, a: _State, b: _State) -> _State:
        behind = a.behind | b.behind
        for context, other in ((a, b), (b, a)):
            if inner := self._context(context):  # softmax(q) (softmax(k) v): keys mix values first
                self.absorbed.update(context.cores)
                return self._core(op, other.near, inner.query, inner.value, True, behind)
        if a.scores and b.scores:  # kernels of one another (Nystromformer)
            return _State(a.near | b.near, behind, scores=a.scores.join(b.scores))
        if not a.scores and not b.scores:
            query, key = self._opened(a), self._opened(b)
            scores = _Scores(query, key, over_features=_sums_over_last(op))
            return _State(query | key, behind, scores=scores)
        scored, other = (a, b) if a.scores else (b, a)
        (query, key, soft, over_features), value = scored.scores or _NONE, self._opened(other)
        if soft or over_features or (over_features is None and scored is a):
            return self._core(op, query, key, value, soft, behind)
        return self._core(op, value, query, key, False, behind)  # keys times values, then queries

    def _context(self, state: _State) -> _Core | None:
        """The attention that a value is of, where nothing but a softmax of keys made weights."""
        cores = [self.cores[core] for core in state.cores]
        alone = [core for core in cores if not core.key and not core.proj]
        return alone[0] if len(alone) == 1 == len(cores) else None

    def _scaled(self, op: Op, given: list[_State]) -> _State:
        """Features times features: a gate; weights, summed up later; or scores, written out."""
        a, b = given[:2]
        weights, other = (a, b) if a.scores else (b, a)
        scores = weights.scores
        if scores and scores.soft and not other.scores and not other.cores:
            both = 0 if scores.key else self._chased(weights.near)
            query, key = (both, both) if both else scores[:2]
            if key and other.near & ~weights.behind:
                behind, value = a.behind | b.behind, self._opened(other)
                return self._core(op, query, key, value, True, behind)
        state = self._passed_on(op, given)
        if scores and not other.scores and _widens(op, 0 if weights is a else 1):
            state = replace(state, scores=None)  # they weigh something that is no value (SKNet)
        differ = a.near != b.near and not (a.scores or b.scores)
        return replace(state, pair=(a.near, b.near)) if differ else state

    def _chased(self, near: Bits) -> Bits:
        """What a network of scores is given, where it is of two things (Point Transformer's)."""
        makers = self._named(near)
        while len(makers) == 1 and makers[0].linear is not None:
            near = self.inner.get(makers[0].op, 0)
            makers = self._named(near)
        return near if sum(maker.linear is not None for maker in makers) > 1 else 0

    def _core(
        self, op: Op, query: Bits, key: Bits, value: Bits, soft: bool, behind: Bits
    ) -> _State:
        state = self._made(Maker(op, None, None), behind)
        number = len(self.makers) - 1
        self.cores[number] = _Core(op, query, key, value, soft, [])
        return replace(state, cores=frozenset([number]))

    def _opened(self, state: _State) -> Bits:
        """What made a value; where an attention did that nothing has projected, what entered it.

        (Agent attention, Nystromformer.)
        """
        near = state.near
        for core in state.cores:
            if not self.cores[core].proj:
                near = near & ~(1 << core) | self.cores[core].operands
                self.absorbed.add(core)
        return near

    # sums --------------------------------------------------------------------------------------

    def _sum(self, op: Op, given: list[_State]) -> _State:
        for a in given:
            for b in given:
                if not a.scores and self._is_residual(a, b):
                    self.streams |= a.near & ~self._entered(a)
                    return self._made(Maker(op, None, None), a.behind | b.behind)
        return self._passed_on(op, given)

    def _is_residual(self, a: _State, b: _State) -> bool:
        """Whether b was made of a, by projections. (A value beside its attention is not one.)"""
        if not a.near & ~b.near or a.near & ~b.behind:
            return False
        if b.scores and not a.near & self._sources(b.scores):
            return False  # positions that the block before has added too (T5, Graphormer)
        return not any(a.near & ~self.cores[core].operands == 0 for core in b.cores)

    def _sources(self, scores: _Scores) -> Bits:
        """What scores are made of, and what that was projected from."""
        made = scores.query | scores.key
        return reduce(or_, (self.inner.get(m.op, 0) for m in self._named(made)), made)

    def _entered(self, state: _State) -> Bits:
        """What entered the attentions that a value is of. (Queries beside them: Set Transformer.)"""
        within = (self.cores[n].operands for n in self.cores if state.near >> n & 1)
        return reduce(or_, within, 0)

    # what passes on ----------------------------------------------------------------------------

    def _passed_on(self, op: Op, given: list[_State]) -> _State:
        gated = [state for state in given if not state.gate] or given
        near = reduce(or_, (state.near for state in gated))
        behind = reduce(or_, (state.behind for state in given))
        cores = frozenset().union(*(state.cores for state in given))
        if op.name in JOINS and not all(state.cores for state in given):
            cores = frozenset()  # what is joined with other features has no projection of its own
        scores = [state.scores for state in given if state.scores]
        made = None if cores or not scores else reduce(_Scores.join, scores)
        if op.name == "softmax" or (op.name == "exp" and made):
            made = replace_soft(made, near)
        pair = given[0].pair if len(given) == 1 else None
        gate = op.name in GATES or (op.name in MOVES and all(state.gate for state in given))
        if op.name in SUMMED and len(given) == 1 and not cores:
            # a product written out, (q * k).sum(-1); or what weights have pooled (Enformer)
            return _State(near, behind, scores=_Scores(*pair) if pair else None)
        return _State(near, behind, cores, made, pair, gate)

    # the end -----------------------------------------------------------------------------------

    def attentions(self) -> Iterator[TracedAttention]:
        whole = (core for number, core in self.cores.items() if number not in self.absorbed)
        for core in whole:
            query, key, value = map(self._expanded, (core.query, core.key, core.value))
            found = TracedAttention(
                core.op, core.op.call, query, key, value, core.soft, bool(core.key), core.proj
            )
            for maker in found.makers:
                found.inner[maker.op] = self._named(self.inner.get(maker.op, 0))
            found.stream = self._named(core.operands & self.streams)
            yield found

    def feeding(self) -> dict[int, set[int]]:
        feeding: dict[int, set[int]] = {}
        for maker in self.makers:
            if maker.linear is not None:
                makers = self._named(self.inner.get(maker.op, 0))
                feeding.setdefault(id(maker.owner), set()).update(id(m.owner) for m in makers)
        return feeding

    def _expanded(self, bits: Bits) -> list[Maker]:
        return [maker for maker in self._named(bits) if maker.owner is not None]

    def _named(self, bits: Bits) -> list[Maker]:
        found = []
        while bits:
            low = bits & -bits
            found.append(self.makers[low.bit_length() - 1])
            bits ^= low
        return found


_GIVEN = Op("given", None, (), {})


def replace_soft(scores: _Scores | None, near: Bits) -> _Scores:
    """Scores through a softmax; without a product before, weights that one thing makes (VOLO)."""
    return scores._replace(soft=True) if scores else _Scores(near, 0, soft=True)


def _holder_of_weight(op: Op) -> nn.Module | None:
    weights = (weight for v in op.inputs for weight in v.weights or () if len(weight.shape) > 1)
    weight = next(weights, None)
    return weight.owner(op) if weight else None


def _is_kernel(op: Op, given: list[_State]) -> bool:
    """Whether a kernel that shows nothing of itself is given three features, made apart."""
    return op.name == "_opaque" and len({state.near for state in given}) > 2


def _widens(op: Op, place: int) -> bool:
    """Whether a product has more numbers than one of its features has."""
    return prod(op.outputs[0].shape) > prod(op.features[place].shape)


def _contracts(op: Op) -> bool:
    """Whether a product sums over something. (Not an einsum that keeps every letter.)"""
    left, result = _equation(op)
    return not left or bool(set("".join(left)) - set(result))


def _sums_over_last(op: Op) -> bool | None:
    """Whether an einsum sums over the last letter of both, where features mostly are."""
    left, result = _equation(op)
    return all(term[-1] not in result for term in left) if left else None


def _equation(op: Op) -> tuple[list[str], str]:
    """The letters of both sides of an einsum; nothing of another product."""
    if op.name != "einsum" or not isinstance(op.args[0], str):
        return [], ""
    left, _, result = op.args[0].replace(" ", "").replace(".", "").partition("->")
    return [term for term in left.split(",") if term], result
