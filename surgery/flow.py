"""Which norm feeds a place, read off a forward: the module tree does not tell what runs first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import nn

from .leaf import is_norm
from .trace import SUMS, Op, Trace, Value, is_cheap, names, upstream
from .trace import trace as run
from .tree import Site

NORMS = names("layer_norm rms_norm batch_norm group_norm instance_norm")


class Fed:
    """Tells which norm feeds a site, as one forward of the model on `example` shows it.

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
