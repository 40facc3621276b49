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

    def __call__(self, site: Site, norms: Sequence[Site]) -> Site | None:
        """The one of `norms` nearest upstream of the site's input; None where it saw none."""
        for call in self.trace.calls_of(site.entry.module):
            path, _ = norm_before(self.trace, call.given)
            if path is not None:
                module = self.model.get_submodule(path)
                return next((norm for norm in norms if norm.module is module), None)
        return None


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
        if _is_norm(call.module):
            return call.module
    if op.name in NORMS and op.call is not None:
        return op.call.module
    return None


def _is_norm(module: nn.Module) -> bool:
    """A norm, with an activation and a dropout below it too (timm's BatchNormAct2d)."""
    named = "norm" in type(module).__name__.lower()
    return is_norm(module) or (named and all(p.dim() < 2 for p in module.parameters()))


def is_sum(op: Op) -> bool:
    """Whether it adds features to features."""
    return op.name in SUMS and len(op.features) > 1
