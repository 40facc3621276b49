"""What feeds what, read off a forward: the norm before a place, queries, keys and values.

The module tree tells neither: it keeps the order in which modules were made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from torch import nn

from .layers import is_norm
from .module_tree import Site, Tree
from .trace import SUMS, Op, Trace, Value, is_cheap, names, upstream
from .trace import trace as run

OPERANDS = ("query", "key", "value")
PRODUCTS = names("matmul bmm baddbmm einsum")
NORMS = names("layer_norm rms_norm batch_norm group_norm instance_norm")


class Dataflow:
    """Tells what feeds a site, as one forward of the model on `example` shows it.

    The forward is run when first asked; `asked` says whether it was.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example, self.asked = model, example, False

    @cached_property
    def trace(self) -> Trace:
        self.asked = True
        return run(self.model, self.example)

    def __call__(self, site: Site, norms: Sequence[Site], whole: bool) -> Site | None:
        """The one of `norms` that feeds the site, without a residual sum between; None: none does.

        whole  it must lie in the block of the site, and act on the same tokens

        Raises LookupError where the forward does not tell: the site did not run, or the norm
        nearest upstream is none of these.
        """
        calls = self.trace.calls_of(site.entry.module)
        found = {norm_before(self.trace, call.given) for call in calls}
        known = {norm.path: norm for norm in norms}
        if not found or not any(path in known for path, _ in found):
            raise LookupError(site.path)
        path, direct = found.pop()
        if not (path and direct) or found:
            return None
        norm = known[path]
        return norm if not whole or self._is_beside(norm, site) else None

    def _is_beside(self, norm: Site, site: Site) -> bool:
        block = next((above for above in site.entry.above() if above.is_element), None)
        if block and not block.order <= norm.order < block.end:
            return False
        given = {_sizes(value) for c in self.trace.calls_of(norm.module) for value in c.given[:1]}
        made = {
            _sizes(value) for c in self.trace.calls_of(site.exit.module) for value in c.made[:1]
        }
        return bool(given & made)

    def operands(self, attns: Sequence[Site], projections: Sequence[Site]) -> dict[Site, set[str]]:
        """Which of the projections make the query, the key and the value of each attention."""
        made = {id(site.module): site for site in projections}
        modules = {id(site.module) for site in attns}
        found: dict[Site, set[str]] = {}
        for op in self.trace.ops:
            if any(id(call.module) in modules for call in op.stack()):
                for word, value in _operands(op):
                    for module in _makers(value, made):
                        found.setdefault(made[module], set()).add(word)
        return found


def attach_dataflow(tree: Tree, example: Any) -> Dataflow:
    """Let a forward on the example, where there is one, decide what feeds what in this tree."""
    fed = Dataflow(tree.model, example)
    if example is not None:
        tree.memo["fed"] = fed
    return fed


def dataflow_of(tree: Tree) -> Dataflow | None:
    """What tells what feeds what in this tree; None where nothing but the order of modules does."""
    found: Dataflow | None = tree.memo.get("fed")
    return found


def _operands(op: Op) -> Iterator[tuple[str, Value]]:
    """The query, key and value of an attention: of a kernel, or those around a softmax."""
    if op.name == "scaled_dot_product_attention":
        yield from zip(OPERANDS, op.given[:3], strict=True)
    elif op.name == "softmax":
        before = (v.op for v in upstream(op.features, _is_pointwise) if v.op)
        scores = next((each for each in before if _is_product(each)), None)
        weighed = next((use for use in _uses(op.made[0]) if _is_product(use)), None)
        if scores and weighed:
            weights = {v for v in weighed.features if _comes_from(v, op)}
            rest = [v for v in weighed.features if v not in weights]
            yield from zip(OPERANDS, [*scores.features[-2:], *rest[:1]], strict=False)


def _makers(value: Value, made: dict[int, Site]) -> Iterator[int]:
    """The projections nearest upstream of a value: through norms, rotations, heads side by side."""

    def owner(op: Op) -> int | None:
        weights = (weight for given in op.given for weight in given.weights or ())
        return next((id(w.owner(op)) for w in weights if id(w.owner(op)) in made), None)

    for step in upstream([value], lambda op: owner(op) is None and not _is_product(op)):
        if step.op and (module := owner(step.op)):
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
            queue += op.made if is_cheap(op) else []


def _comes_from(value: Value, op: Op) -> bool:
    return any(step.op is op for step in upstream([value], lambda o: o is not op and is_cheap(o)))


def _sizes(value: Value) -> tuple[int, ...]:
    """Its shape, wherever features lie."""
    return tuple(sorted(value.shape))


def norm_before(trace: Trace, values: list[Value]) -> tuple[str | None, bool]:
    """The norm nearest upstream of values, and whether no residual sum lies between."""
    for norm, direct in ((_norm(trace, values, False), True), (_norm(trace, values, True), False)):
        if norm is not None:
            return norm, direct
    return None, False


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
    if op.name in NORMS and op.call is not None:
        return op.call.module
    return None


def is_sum(op: Op) -> bool:
    """Whether it adds features to features."""
    return op.name in SUMS and len(op.features) > 1
