"""Stretches that nobody calls: where the values come to be that such a block takes and gives.

A block may be a list whose elements a loop calls, and add up, one by one (all of vit-pytorch,
x-transformers, FT-Transformer). A forward tells between which two values it runs, and at which
calls of modules around it these can be met.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cached_property
from typing import NamedTuple

from torch import nn

from .dataflow import is_sum
from .layers import forward_of
from .module_tree import Site, elements_of
from .trace import MOVES, NORM_AXES, SCALES, SUMS, Call, Op, Trace, Value, is_cheap, names

FAR = 8  # operations from the output of a module to a value that they make, at most


class End(NamedTuple):
    """Where a value is met: as what a module takes, what it gives, or what is made of that.

    before  as what it takes
    ops     the operations that make the value of what the module gives, but those of `carries`;
            of what the model takes, where no module runs before
    """

    module: nn.Module
    before: bool = False
    ops: tuple[str, ...] = ()


class Stretch(NamedTuple):
    """Where the value is met that a stretch takes, and that which it gives.

    shape    of what it takes
    beside   the shapes of what it is given besides: masks, positions, other features
    modules  those that are called in it, the outermost
    """

    entry: End
    exit: End
    shape: tuple[int, ...]
    beside: list[tuple[int, ...]]
    modules: list[nn.Module]


def is_called(site: Site) -> bool:
    """Whether both ends of a site are modules with a forward of their own."""
    ends = site.entry.module, site.exit.module
    return all(forward_of(module) is not nn.Module.forward for module in ends)


def is_met(trace: Trace, site: Site) -> bool:
    """Whether no sum adds what a module gives, with which a site begins, to what that takes.

    Outside of that module; what reads the same tokens in another tower is no sum of it.
    """
    calls = trace.calls_of(site.entry.module)
    made = _below(trace, (v for call in calls for v in call.outputs))
    sums = [op for call in calls for v in call.inputs[:1] for op in v.uses if is_sum(op)]
    outside = [op for op in sums if not any(call in calls for call in op.stack())]
    return all(made.isdisjoint(op.inputs) for op in outside)


def stretch_of(trace: Trace, site: Site) -> Stretch:
    """Between which values a site runs that nobody calls. Raises LookupError that says why not."""
    run = _Run(trace, site)
    taken, given = run.bounds
    early = trace.calls[: trace.calls.index(run.members[0])]
    ends = _met(trace, taken, early), _left(trace, given, run.owners) or _met(trace, given, ())
    modules = [member.module for member in run.members]
    return Stretch(*ends, taken.shape, run.beside, modules)


def carries(name: str) -> bool:
    """Whether what an operation gives of one tensor is that tensor still: scaled, cast, dropped."""
    return name in SCALES or name in _CARRIES


_CARRIES = names(
    "contiguous clone to float half bfloat16 double type type_as dropout dropout1d dropout2d "
    "dropout3d feature_dropout alpha_dropout feature_alpha_dropout identity clamp clip nan_to_num "
    "as_subclass"
)
_BETWEEN = MOVES | SUMS | SCALES  # what takes tensors that may be made for a number of tokens


class _Run:
    """One run of the modules of a site in a forward: the outermost calls of what lies in it.

    owners  the calls that go on around all of them
    """

    def __init__(self, trace: Trace, site: Site) -> None:
        self.trace = trace
        made_of = elements_of(site) or [site.entry, site.exit]
        modules = {id(module) for each in made_of for module in each.module.modules()}
        calls = [c for c in trace.calls if id(c.module) in modules]
        within = set(calls)
        outermost = [c for c in calls if within.isdisjoint(_around(c))]
        self.members = _its_own(outermost, made_of)
        self._check()
        self.inside = set(self.members)
        around = (set(_around(member)) for member in self.members)
        self.owners = set.intersection(*around)

    def _check(self) -> None:
        if not self.members:
            raise LookupError("nothing in it runs with this example")
        times = min(len(self.trace.calls_of(c.module)) for c in self.members)
        if times > 1:
            raise LookupError(f"it runs {times} times in one forward")

    def is_inside(self, op: Op) -> bool:
        return any(call in self.inside for call in op.stack())

    @cached_property
    def bounds(self) -> tuple[Value, Value]:
        """The value that it takes, and the value that it gives."""
        why = "the forward does not show one value that it takes, and one that it gives"
        made = _below(self.trace, self._made_inside())
        given = next((v for v in self.members[-1].outputs if v.is_feature), None)
        while given is not None:
            if (taken := self._taken(given, made)) is not None:
                reading = self._reading_inside(taken, given)
                if reading is None:
                    return taken, given
                where = self.trace.path(reading.call.module) if reading.call else ""
                why = f"{reading.name} in {where or 'the model'} reads a value that lies inside of "
                why += "it, or at its beginning"
            given = self._next(given)
        raise LookupError(why)

    def _made_inside(self) -> Iterator[Value]:
        for op in self.trace.ops:
            yield from op.outputs if self.is_inside(op) else ()
        for member in self.members:
            yield from member.outputs

    def _next(self, value: Value) -> Value | None:
        """What the one operation makes of a value that reads it, outside of any module but ours."""
        ops = [op for op in value.uses if op.outputs]
        if len(ops) != 1 or not all(call in self.owners for call in ops[0].stack()):
            return None
        return ops[0].outputs[0]

    def _taken(self, given: Value, made: set[Value]) -> Value | None:
        """The residual stream where the stretch begins, of which it makes the value that it gives.

        Of all that the stretch takes it is what comes to `given` by sums, scales and norms alone:
        features, or else what is made of weights (CaiT's class tokens, which hear the others as
        something given besides). Without a residual sum it is the only features that are alike.
        """
        alike = [v for v in _above([given], made) if v not in made and _alike(v, given)]
        features = [v for v in alike if v.is_feature]
        stream = [v for v in _above([given], made, _passes) if v in alike]
        found = [v for v in stream if v in features] or stream or features
        first = {_first(v, alike) for v in found}
        return first.pop() if len(first) == 1 else None

    def _reading_inside(self, taken: Value, given: Value) -> Op | None:
        """What reads, of all between two values, what does not come to the second of them."""
        self._within = _below(self.trace, [taken])
        self._leading = set(_above([given], self._within))
        for value in self._within:
            if value is given or value.number > given.number:
                continue
            for op in value.uses:
                leads = any(v in self._leading for v in op.outputs)
                if not leads and not self.is_inside(op) and op.outputs:
                    return op
                if any(v.number > given.number for v in op.outputs):
                    return op
        return None

    @property
    def beside(self) -> list[tuple[int, ...]]:
        """The shapes of what modules in it, and operations between them, are given besides."""
        taken, _ = self.bounds
        given = [v for member in self.members for v in member.inputs]
        inner = (self._leading & self._within) - {taken}
        for op in self.trace.ops:
            leads = not inner.isdisjoint(op.outputs)
            if leads and op.name in _BETWEEN and not self.is_inside(op):
                given += op.inputs
        return list(dict.fromkeys(v.shape for v in given if v not in self._within))


def _its_own(calls: list[Call], made_of: list[Site]) -> list[Call]:
    """The calls by what holds a place, or else of modules that no other place lists.

    (Performer's blocks have one activation, which each calls in its attention.)
    """
    own = {id(s.module) for each in made_of for s in (each, *each.below()) if not s.aliases}
    above = {id(holder.module) for holder in made_of[0].above()}
    alone = [c for c in calls if id(c.module) in own]
    held = [c for c in alone or calls if all(id(outer.module) in above for outer in _around(c))]
    return held or alone or calls


def _around(call: Call) -> Iterator[Call]:
    outer = call.outer
    while outer is not None:
        yield outer
        outer = outer.outer


def _below(trace: Trace, values: Iterable[Value]) -> set[Value]:
    """All that is made of values, and they themselves."""
    found = set(values)
    for op in trace.ops:
        if not found.isdisjoint(op.inputs):
            found.update(op.outputs)
    return found


def _above(
    values: list[Value], within: set[Value], through: Callable[[Op], bool] = lambda op: True
) -> Iterator[Value]:
    """All of a set that values are made of, they themselves, and what comes into it from outside.

    through  the operations by which alone
    """
    todo, seen = [*values], {*values}
    for value in todo:
        yield value
        op = value.op if value in within else None
        for source in op.inputs if op and through(op) else ():
            if source.floats and source not in seen:
                seen.add(source)
                todo.append(source)


def _passes(op: Op) -> bool:
    return is_cheap(op) or op.name in NORM_AXES


def _first(value: Value, those: list[Value]) -> Value:
    """The first of some values that another is, scaled or cast (DeepNorm: x * alpha + attn(x))."""
    first, made = value, value
    while made.op is not None and carries(made.op.name) and len(made.op.features) == 1:
        made = made.op.features[0]
        first = made if made in those else first
    return first


def _alike(a: Value, b: Value) -> bool:
    """Whether two values are of one shape, but for the number of tokens."""
    ends = [(v.shape[0], v.shape[-1], len(v.shape)) if v.shape else () for v in (a, b)]
    return ends[0] == ends[1]


def _met(trace: Trace, value: Value, early: Collection[Call]) -> End:
    """Where a value is met by all that read it. Raises LookupError where nowhere.

    Before the one module that reads it, or behind the one that gives it, or else where what a
    module gives becomes the value.

    early  calls that may hand it on as it is (a dropout in eval mode), for all that follow
    """
    if (reading := _reader(trace, value)) is not None:
        return End(reading.module, before=True)
    if (giving := _giver(trace, value, early)) is not None:
        return End(giving.module)
    todo: list[tuple[Value, tuple[str, ...]]] = [(value, ())]
    for made, ops in todo:
        if ops and (giving := _giver(trace, made, trace.calls)) is not None:
            return End(giving.module, ops=ops)
        if ops and trace.calls[0].inputs[:1] == [made]:  # patches by an einsum, no module before
            return End(trace.model, before=True, ops=ops)
        if made.op is None or len(made.op.outputs) != 1 or len(ops) == FAR:
            continue
        name = made.op.name
        rest = ops if ops and carries(name) else (name, *ops)
        todo += [(v, rest) for v in _sources(made.op) if len(v.uses) == 1]
    raise LookupError("no module that is called once gives what it begins or ends with")


def _left(trace: Trace, value: Value, owners: Iterable[Call]) -> End | None:
    """Where a value leaves the innermost module that runs a stretch, and is what that gives.

    (Perceiver's blocks, in which others lie: what reads it next is behind all of the block.)
    """
    calls = [c for c in trace.calls if c in owners and c.outputs[:1] == [value] and c.outer]
    return End(calls[-1].module) if calls and _is_once(trace, calls[-1]) else None


def _sources(op: Op) -> list[Value]:
    """What it makes features of: features, or numbers of tokens."""
    return [value for value in op.inputs if value.weights is None]


def _reader(trace: Trace, value: Value) -> Call | None:
    """The innermost call that takes a value first, and inside of which all is that reads it."""
    stacks = [list(op.stack()) for op in value.uses]
    common = [c for c in stacks[0] if all(c in s for s in stacks)] if stacks else []
    return next((c for c in common if c.inputs[:1] == [value] and _is_once(trace, c)), None)


def _giver(trace: Trace, value: Value, early: Collection[Call]) -> Call | None:
    """The last call that gives a value, and outside of which all is that reads it; not the model's.

    Of calls one in another it is the outer.
    """
    making = {*early, *(value.op.stack() if value.op else ())}
    reading = {call for op in value.uses for call in op.stack()}
    calls = [c for c in trace.calls if c.outputs[:1] == [value] and c.outer and _is_once(trace, c)]
    found = {c: None for c in calls if c in making - reading}
    outer = [c for c in found if found.keys().isdisjoint(_around(c))]
    return outer[-1] if outer else None


def _is_once(trace: Trace, call: Call) -> bool:
    return len(trace.calls_of(call.module)) == 1
