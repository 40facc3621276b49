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

from .attention_states import Bits, Core, Maker, Scores, State
from .linear_ops import LinearOp, is_depthwise, linear_op
from .mixing_ops import KERNELS, PRODUCTS, RECURRENT, TORCH, contracts, sums_over_last
from .trace import CONV_OPS, JOINS, MOVES, SCALES, SUMS, Call, Op, Trace, Value, names, upstream

SUMMED = names("sum mean")
GATES = names("sigmoid hardsigmoid tanh hardtanh")
DIVIDES = names("div true_divide divide")


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


_GIVEN = Op("given", None, (), {})  # what an input of the model comes from


class _Reader:
    """Goes through a trace once, from the first operation to the last."""

    def __init__(self) -> None:
        self.states: dict[Value, State] = {}
        self.makers: list[Maker] = []
        self.inner: dict[Op, Bits] = {}
        self.streams: Bits = 0
        self.gates: Bits = 0
        self.cores: dict[int, Core] = {}  # by the number of its bit
        self.absorbed: set[int] = set()  # those that are part of another
        self.used: set[int] = set()  # those whose result becomes features of something

    def read(self, op: Op) -> None:
        outputs = [value for value in op.outputs if value.is_feature]
        if not outputs:
            return
        state = self._after(op, [self._of(value) for value in op.features])
        for value in outputs:
            self.states[value] = state

    def _of(self, value: Value) -> State:
        """What is known of a value; an input of the model makes features itself."""
        if value not in self.states:
            self.states[value] = self._made(Maker(value.op or _GIVEN, None, None), 0)
        return self.states[value]

    def _made(self, maker: Maker, behind: Bits) -> State:
        bit = 1 << len(self.makers)
        self.makers.append(maker)
        return State(bit, behind | bit)

    def _after(self, op: Op, given: list[State]) -> State:
        behind = reduce(or_, (state.behind for state in given), 0)
        linear = linear_op(op)
        if linear or op.name in RECURRENT | SUMS | CONV_OPS:
            self.used.update(core for state in given for core in state.cores)
        if linear:  # of a parameter too, which queries are made of (Perceiver)
            state = self._of(linear.input) if linear.input.is_feature else State(0, 0)
            return self._projected(op, linear, state)
        if (maker := _maker(op, given)) is not None:
            return self._made(maker, behind)
        if op.name in KERNELS or _is_kernel(op, given):
            query, key, value = (state.near for state in (*given, *given[-1:] * 2)[:3])
            return self._core(op, query, key, value, soft=True, behind=behind)
        return self._joined(op, given) if len(given) > 1 else self._passed_on(op, given)

    def _joined(self, op: Op, given: list[State]) -> State:
        """What an operation makes of several features."""
        if op.name in PRODUCTS and contracts(op):
            return reduce(lambda a, b: self._product(op, a, b), given)
        if op.name in SUMS:
            return self._sum(op, given)
        if op.name in SCALES - DIVIDES:
            return self._scaled(op, given)
        return self._passed_on(op, given)

    # projections -------------------------------------------------------------------------------

    def _projected(self, op: Op, linear: LinearOp, state: State) -> State:
        """What a projection makes; scores go through one over heads, queries through a table."""
        if state.scores is not None and linear.width in state.scores.heads:
            return state  # talking heads, re-attention
        if self._is_inside(linear, state):  # relative positions: queries times a raw table
            return state
        for core in state.cores:
            self.cores[core].proj.append(linear)
        self.inner[op] = state.near
        return self._made(Maker(op, linear.owner, linear), state.behind)

    def _is_inside(self, linear: LinearOp, state: State) -> bool:
        """Whether a module multiplies with a parameter of its own what modules in it have made."""
        makers = [m for m in self._named(state.near) if m.linear is not None]
        if not makers or not linear.owner._modules:
            return False
        below = {id(module) for module in linear.owner.modules()} - {id(linear.owner)}
        return all(id(maker.owner) in below for maker in makers)

    # products ----------------------------------------------------------------------------------

    def _product(self, op: Op, a: State, b: State) -> State:
        behind = a.behind | b.behind
        for context, other in ((a, b), (b, a)):
            if inner := self._context(context):  # softmax(q) (softmax(k) v): keys mix values first
                self.absorbed.update(context.cores)
                return self._core(op, other.near, inner.query, inner.value, True, behind)
        if a.scores and b.scores:  # kernels of one another (Nystromformer)
            return State(a.near | b.near, behind, scores=a.scores.join(b.scores))
        if not a.scores and not b.scores:
            query, key = self._opened(a), self._opened(b)
            heads = frozenset(op.outputs[0].shape[:-2])
            scores = Scores(query, key, over_features=sums_over_last(op), heads=heads)
            return State(query | key, behind, scores=scores)
        scored, other = (a, b) if a.scores else (b, a)
        query, key, soft, over_features, _ = scored.scores or Scores(0, 0)
        value = self._opened(other)
        if soft or over_features or (over_features is None and scored is a):
            return self._core(op, query, key, value, soft, behind)
        return self._core(op, value, query, key, False, behind)  # keys times values, then queries

    def _context(self, state: State) -> Core | None:
        """The attention that a value is of, where nothing but a softmax of keys made weights."""
        cores = [self.cores[core] for core in state.cores]
        alone = [core for core in cores if not core.key and not core.proj]
        return alone[0] if len(alone) == 1 == len(cores) else None

    def _scaled(self, op: Op, given: list[State]) -> State:
        """Features times features: a gate; weights, summed up later; or scores, written out."""
        a, b = given[:2]
        weights, other = (a, b) if a.scores else (b, a)
        if (pooled := self._weighed(op, weights, other)) is not None:
            return pooled
        state = self._passed_on(op, given)
        if weights.scores and not other.scores and _widens(op, 0 if weights is a else 1):
            state = replace(state, scores=None)  # they weigh something that is no value (SKNet)
        differ = a.near != b.near and not (a.scores or b.scores)
        return replace(state, pair=(a.near, b.near)) if differ else state

    def _weighed(self, op: Op, weights: State, other: State) -> State | None:
        """The attention in which weights multiply values number by number; None where none does."""
        scores = weights.scores
        if not (scores and scores.soft) or other.scores or other.cores:
            return None
        both = 0 if scores.key else self._chased(weights.near)
        query, key = (both, both) if both else scores[:2]
        if not key or not other.near & ~weights.behind:
            return None
        behind = weights.behind | other.behind
        return self._core(op, query, key, self._opened(other), True, behind)

    def _chased(self, near: Bits) -> Bits:
        """What a network of scores is given, where it is of two things (Point Transformer's)."""
        makers = self._named(near)
        while len(makers) == 1 and makers[0].linear is not None:
            near = self.inner.get(makers[0].op, 0)
            makers = self._named(near)
        return near if sum(maker.linear is not None for maker in makers) > 1 else 0

    def _core(self, op: Op, query: Bits, key: Bits, value: Bits, soft: bool, behind: Bits) -> State:
        state = self._made(Maker(op, None, None), behind)
        number = len(self.makers) - 1
        self.cores[number] = Core(op, query, key, value, soft, [])
        return replace(state, cores=frozenset([number]))

    def _opened(self, state: State) -> Bits:
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

    def _sum(self, op: Op, given: list[State]) -> State:
        for a in given:
            for b in given:
                if not a.scores and self._is_residual(a, b):
                    self.streams |= a.near & ~self._entered(a)
                    return self._made(Maker(op, None, None), a.behind | b.behind)
                if self._is_skip(op, a, b):
                    return self._made(Maker(op, None, None), a.behind | b.behind)
        return self._passed_on(op, given)

    def _is_skip(self, op: Op, a: State, b: State) -> bool:
        """Whether a projects what entered an attention, to be added to what leaves its module.

        (Of torch_geometric's TransformerConv. What is projected there afterwards is no residual.)
        """
        skips, call = self._named(a.near), op.call
        if call is None or not b.cores or a.cores or not all(skip.linear for skip in skips):
            return False
        operands = reduce(or_, (self.cores[core].operands for core in b.cores))
        if not a.near & ~operands:
            return False  # values beside what is mixed of them (Nystromformer)
        same = self._inner_of(skips) == self._inner_of(self._named(operands))
        return same and op.outputs[0] in set(upstream(call.outputs))

    def _inner_of(self, makers: list[Maker]) -> Bits:
        return reduce(or_, (self.inner.get(maker.op, 0) for maker in makers), 0)

    def _is_residual(self, a: State, b: State) -> bool:
        """Whether b was made of a, by projections. (A value beside its attention is not one.)"""
        if not a.near & ~b.near or a.near & ~b.behind:
            return False
        if b.scores and not a.near & self._sources(b.scores):
            return False  # positions that the block before has added too (T5, Graphormer)
        return not any(a.near & ~self.cores[core].operands == 0 for core in b.cores)

    def _sources(self, scores: Scores) -> Bits:
        """What scores are made of, and what that was projected from."""
        made = scores.query | scores.key
        return made | self._inner_of(self._named(made))

    def _entered(self, state: State) -> Bits:
        """What entered the attentions that a value is of. (Queries beside: Set Transformer.)"""
        within = (self.cores[n].operands for n in self.cores if state.near >> n & 1)
        return reduce(or_, within, 0)

    # what passes on ----------------------------------------------------------------------------

    def _passed_on(self, op: Op, given: list[State]) -> State:
        gated = [state for state in given if not state.gate] or given
        near = reduce(or_, (state.near for state in gated))
        behind = reduce(or_, (state.behind for state in gated))
        self._note_gates(given, near)
        cores, one = _cores(op, given), len(given) == 1
        pair = given[0].pair if one else None
        if op.name in SUMMED and one and not cores:
            return State(near, behind, scores=_summed(op, given[0]))
        made = _scores(op, [] if cores else given, near)
        gate = op.name in GATES or (op.name in MOVES and all(state.gate for state in given))
        return State(near, behind, cores, made, pair, gate)

    def _note_gates(self, given: list[State], near: Bits) -> None:
        """Keep what makes a gate, of two layers at most, and not what it multiplies (DAT's)."""
        for gate in (state.near for state in given if state.gate and state.near & ~near):
            self.gates |= (gate | self._inner_of(self._named(gate))) & ~near

    # the end -----------------------------------------------------------------------------------

    def attentions(self) -> Iterator[TracedAttention]:
        for number, core in self.cores.items():
            if number in self.absorbed or not (core.soft or number in self.used):
                continue  # (DeepSeek's indexer chooses tokens, and mixes none)
            query, key, value = map(self._expanded, (core.query, core.key, core.value))
            gates = {maker.op for maker in self._named(self.gates)}
            proj = [linear for linear in core.proj if linear.op not in gates] or core.proj
            found = TracedAttention(
                core.op, core.op.call, query, key, value, core.soft, bool(core.key), proj
            )
            for maker in found.makers:
                made_of = self._named(self.inner.get(maker.op, 0))
                found.inner[maker.op] = [m for m in made_of if not self._is_of_result(m)]
            found.stream = self._named(core.operands & self.streams)
            yield found

    def _is_of_result(self, maker: Maker) -> bool:
        """Whether it is made of nothing but what attention gave, without a residual sum.

        (The gate of a state that the next segment reads: block-recurrent transformers.)
        """
        results = {linear.op for core in self.cores.values() for linear in core.proj}
        made_of = self._named(self.inner.get(maker.op, 0))
        return bool(made_of) and all(m.op in results for m in made_of)

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


def _maker(op: Op, given: list[State]) -> Maker | None:
    """An operation that makes features of its own, and projects none; None for others."""
    if not given or op.name in RECURRENT or op.name == TORCH:
        return Maker(op, None, None)
    if op.name in CONV_OPS and not is_depthwise(op):
        return Maker(op, _holder_of_weight(op), None)
    return None


def _cores(op: Op, given: list[State]) -> frozenset[int]:
    """The attentions whose result is passed on."""
    if op.name in JOINS and not all(state.cores for state in given):
        return frozenset()  # what is joined with other features has no projection of its own
    return frozenset().union(*(state.cores for state in given))


def _summed(op: Op, state: State) -> Scores | None:
    """A product written out, (q * k).sum(-1), or of two spectra (Autoformer); scores of which a
    mean is taken; not what weights have pooled (Enformer)."""
    heads, scores = frozenset(op.outputs[0].shape[:-2]), state.scores
    scores = Scores(*state.pair, heads=heads) if state.pair else scores
    return None if scores and scores.soft else scores


def _scores(op: Op, given: list[State], near: Bits) -> Scores | None:
    """The scores that are passed on; through a softmax they are weights.

    Without a product before, these are weights that one thing makes (VOLO).
    """
    scores = [state.scores for state in given if state.scores]
    made = reduce(Scores.join, scores) if scores else None
    if op.name == "softmax" or (op.name == "exp" and made):
        return made._replace(soft=True) if made else Scores(near, 0, soft=True)
    return made


def _holder_of_weight(op: Op) -> nn.Module | None:
    weights = (weight for v in op.inputs for weight in v.weights or () if len(weight.shape) > 1)
    weight = next(weights, None)
    return weight.owner(op) if weight else None


def _is_kernel(op: Op, given: list[State]) -> bool:
    """Whether a kernel that shows nothing of itself is given three features, made apart."""
    return op.name == "_opaque" and len({state.near for state in given}) > 2


def _widens(op: Op, place: int) -> bool:
    """Whether a product has more numbers than one of its features has."""
    return prod(op.outputs[0].shape) > prod(op.features[place].shape)
