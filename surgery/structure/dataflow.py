"""What feeds what, read off a forward: the norm before a place, and the features that come to it.

The module tree does not tell: it keeps the order in which modules were made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from math import prod
from typing import Any, TypeAlias

from torch import nn

from .layers import Shape, is_norm, shape_of
from .module_tree import Site, Tree
from .trace import NORM_AXES, SCALES, SUMS, Op, Trace, Value, is_cheap, upstream
from .trace import trace as run

TURNS = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "T", "mT"}
Around: TypeAlias = Callable[[], AbstractContextManager[object]]


class Dataflow:
    """Says what feeds a site, as one forward of the model on `example` shows it.

    The forward is run when first asked, in a context of `around`; `asked` says whether it was.
    """

    def __init__(self, model: nn.Module, example: Any, around: Around = nullcontext) -> None:
        self.model, self.example, self.asked, self.around = model, example, False, around

    @cached_property
    def trace(self) -> Trace:
        self.asked = True
        with self.around():
            return run(self.model, self.example)

    def __call__(self, site: Site, norms: Sequence[Site], whole: bool) -> Site | None:
        """The one of `norms` that feeds the site, without a residual sum between; None: none does.

        whole  it must lie in the block of the site, and act on the same tokens

        Raises LookupError where the forward does not tell: the site did not run, or the norm
        nearest upstream is none of these.
        """
        calls = self.trace.calls_of(site.entry.module)
        feeding = {norm_before(self.trace, call.inputs) for call in calls}
        by_path = {norm.path: norm for norm in norms}
        if not any(path in by_path for path, _ in feeding):
            raise LookupError(site.path)
        (path, direct), *others = feeding
        if not path or not direct or others:
            return None
        norm = by_path[path]
        return norm if not whole or self._is_beside(norm, site) else None

    def _is_beside(self, norm: Site, site: Site) -> bool:
        block = next((above for above in site.entry.above() if above.is_element), None)
        if block and not block.order <= norm.order < block.end:
            return False
        norm_calls, exit_calls = map(self.trace.calls_of, (norm.module, site.exit.module))
        inputs = [value.shape for call in norm_calls for value in call.inputs[:1]]
        outputs = {value.shape for call in exit_calls for value in call.outputs[:1]}
        alike = [shape for shape in inputs if not outputs.isdisjoint(_layouts(shape))]
        return bool(alike) and not (all(map(_is_square, alike)) and self._is_turned(site))

    def _is_turned(self, site: Site) -> bool:
        """Whether axes change places on the way from a norm to a site."""
        values = [v for call in self.trace.calls_of(site.entry.module) for v in call.inputs[:1]]
        way = upstream(values, lambda op: _norm_module(op) is None and is_cheap(op))
        return any(value.op is not None and value.op.name in TURNS for value in way)


def _is_square(shape: tuple[int, ...]) -> bool:
    """Whether samples and tokens are as many, and shapes do not tell them apart."""
    return len(shape) == 3 and shape[0] == shape[1]


def attach_dataflow(tree: Tree, example: Any, around: Around = nullcontext) -> Dataflow:
    """Let a forward on the example, where there is one, decide what feeds what in this tree."""
    dataflow = Dataflow(tree.model, example, around)
    if example is not None:
        tree.memo["dataflow"] = dataflow
    return dataflow


def dataflow_of(tree: Tree) -> Dataflow | None:
    """What says what feeds what in this tree; None where nothing but the order of modules does."""
    dataflow: Dataflow | None = tree.memo.get("dataflow")
    return dataflow


def _layouts(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """A shape, with features where they lie and where else they may: last, or behind the samples.

    (SpeechBrain turns samples and tokens round before a network: what begins at the norm would be
    added across.)
    """
    if len(shape) < 2:
        return {shape}
    first, second, *rest = shape
    return {shape, (first, *rest, second), (first, shape[-1], *shape[1:-1])}


def norm_before(trace: Trace, values: list[Value]) -> tuple[str | None, bool]:
    """The norm nearest upstream of values, and whether no residual sum lies between."""
    if (norm := _norm(trace, values, over_sums=False)) is not None:
        return norm, True
    return _norm(trace, values, over_sums=True), False


def _norm(trace: Trace, values: list[Value], over_sums: bool) -> str | None:
    def through(op: Op) -> bool:
        if _norm_module(op) is not None:
            return False
        return _modulates(op) or (is_cheap(op) and (over_sums or not is_sum(op)))

    for value in upstream(values, through):
        module = _norm_module(value.op) if value.op else None
        if module is not None:
            return trace.path(module)
    return None


def _norm_module(op: Op) -> nn.Module | None:
    """The norm an operation belongs to; for a norm called as a function, who calls it."""
    for call in op.stack():
        if is_norm(call.module):
            return call.module
    if op.name in NORM_AXES and op.call is not None:
        return op.call.module
    return None


def _modulates(op: Op) -> bool:
    """Whether one of two features, the same for all tokens, scales or shifts the other (adaLN)."""
    if op.name not in SUMS | SCALES or len(op.features) != 2:
        return False
    a, b = (prod(value.shape) for value in op.features)
    return a != b


def is_sum(op: Op) -> bool:
    """Whether it adds features to features."""
    return op.name in SUMS and len(op.features) > 1


def shape_in(trace: Trace, site: Site) -> Shape | None:
    """The features that come to a module and leave it, where its layers tell on which axis.

    None where it did not run, or the first value that it took or gave has none of their widths.
    """
    calls = trace.calls_of(site.module) if not site.is_span else []
    if not calls or not site.shape.width:
        return None
    given, made = (
        [v.shape for v in values if v.floats] for values in (calls[0].inputs, calls[0].outputs)
    )
    widths = {n for s in (site, *site.below()) if (shape := shape_of(s.module)) for n in shape[:2]}
    for axis in (site.axis, -site.axis):
        if given and made and min(len(given[0]), len(made[0])) > 1:
            width, out = given[0][axis], made[0][axis]
            if {width, out} <= widths:
                return Shape(width, out, axis)
    return None


def norm_shape_in(trace: Trace, norm: Site) -> Shape | None:
    """The features that come to a norm that fixes no number of them (RetNet's has one per head).

    None where it fixes one, did not run, or was given several.
    """
    if shape_of(norm.module):
        return None
    calls = trace.calls_of(norm.module)
    widths = {v.shape[norm.axis] for call in calls for v in call.inputs[:1] if v.shape}
    width = widths.pop() if len(widths) == 1 else 0
    return Shape(width, width, norm.axis) if width else None


def keeps_tokens(trace: Trace, site: Site) -> bool:
    """Whether as many tokens leave a module as come to it, as far as a forward shows."""
    calls = trace.calls_of(site.module) if not site.is_span else []
    ends = [[v.shape for v in v_s if v.floats] for c in calls for v_s in (c.inputs, c.outputs)]
    if not ends or not all(ends) or not site.shape.width or not site.shape.out:
        return True
    (given, *_), (made, *_) = ends[:2]
    return prod(given) * site.shape.out == prod(made) * site.shape.width
