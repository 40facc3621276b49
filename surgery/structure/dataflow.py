"""What feeds what, read off a forward: the norm before a place, queries, keys and values.

The module tree tells neither: it keeps the order in which modules were made.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, TypeAlias

from torch import nn

from .layers import is_norm
from .module_tree import Site, Tree
from .trace import NORM_AXES, SUMS, Op, Trace, Value, is_cheap, names, upstream
from .trace import trace as run

OPERANDS = ("query", "key", "value")
Around: TypeAlias = Callable[[], AbstractContextManager[object]]
PRODUCTS = names("matmul bmm baddbmm einsum")


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
        inputs = {_sizes(value) for call in norm_calls for value in call.inputs[:1]}
        outputs = {_sizes(value) for call in exit_calls for value in call.outputs[:1]}
        return bool(inputs & outputs)

    def operands(self, attns: Sequence[Site], projections: Sequence[Site]) -> dict[Site, set[str]]:
        """Which of the projections make the query, the key and the value of each attention."""
        by_module = {id(site.module): site for site in projections}
        attentions = {id(site.module) for site in attns}
        words: dict[Site, set[str]] = {}
        for op in self.trace.ops:
            if any(id(call.module) in attentions for call in op.stack()):
                for word, value in _operands(op):
                    for module in _makers(value, by_module):
                        words.setdefault(by_module[module], set()).add(word)
        return words


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


def _operands(op: Op) -> Iterator[tuple[str, Value]]:
    """The query, key and value of an attention: of a kernel, or those around a softmax."""
    if op.name == "scaled_dot_product_attention":
        yield from zip(OPERANDS, op.inputs[:3], strict=True)
    elif op.name == "softmax":
        yield from _around_softmax(op)


def _around_softmax(softmax: Op) -> Iterator[tuple[str, Value]]:
    """The factors of the product before a softmax, and what the product after it weighs up."""
    before = (v.op for v in upstream(softmax.features, _is_pointwise) if v.op)
    scores = next((op for op in before if _is_product(op)), None)
    weighed = next((op for op in _uses(softmax.outputs[0]) if _is_product(op)), None)
    if scores and weighed:
        weights = {v for v in weighed.features if _comes_from(v, softmax)}
        values = [v for v in weighed.features if v not in weights]
        yield from zip(OPERANDS, [*scores.features[-2:], *values[:1]], strict=False)


def _makers(value: Value, projections: Collection[int]) -> Iterator[int]:
    """The projections nearest upstream of a value: through norms, rotations, heads side by side."""

    def owner(op: Op) -> int | None:
        owners = (id(weight.owner(op)) for v in op.inputs for weight in v.weights or ())
        return next((module for module in owners if module in projections), None)

    for source in upstream([value], lambda op: owner(op) is None and not _is_product(op)):
        if source.op and (module := owner(source.op)):
            yield module


def _is_product(op: Op) -> bool:
    """Whether it multiplies features with features as matrices."""
    return op.name in PRODUCTS and len(op.features) > 1


def _is_pointwise(op: Op) -> bool:
    return not _is_product(op) and op.name != "softmax"


def _uses(value: Value) -> Iterator[Op]:
    """What reads a value, or what becomes of it by cheap operations."""
    queue = [value]
    for value in queue:
        for op in value.uses:
            yield op
            queue += op.outputs if is_cheap(op) else []


def _comes_from(value: Value, op: Op) -> bool:
    sources = upstream([value], lambda other: other is not op and is_cheap(other))
    return any(source.op is op for source in sources)


def _sizes(value: Value) -> tuple[int, ...]:
    """Its shape, wherever features lie."""
    return tuple(sorted(value.shape))


def norm_before(trace: Trace, values: list[Value]) -> tuple[str | None, bool]:
    """The norm nearest upstream of values, and whether no residual sum lies between."""
    if (norm := _norm(trace, values, over_sums=False)) is not None:
        return norm, True
    return _norm(trace, values, over_sums=True), False


def _norm(trace: Trace, values: list[Value], over_sums: bool) -> str | None:
    def through(op: Op) -> bool:
        return is_cheap(op) and _norm_module(op) is None and (over_sums or not is_sum(op))

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


def is_sum(op: Op) -> bool:
    """Whether it adds features to features."""
    return op.name in SUMS and len(op.features) > 1
