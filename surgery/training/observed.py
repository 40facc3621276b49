"""Parts of one kind in an operated model, and what comes to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._inputs import call
from .._preserve import preserved
from ..engine.apply import operated
from ..errors import OperationError, RuleError

Kind = TypeVar("Kind", bound=nn.Module)


def moments(
    model: nn.Module,
    parts: dict[Kind, str],
    batches: Iterable[Any],
    name: str,
    silent: bool = False,
    centred: bool = False,
) -> dict[Kind, Tensor]:
    """The mean of x x^T (width, width) of what comes to each part, in double precision.

    silent   the parts give zeros meanwhile
    centred  x is counted from its mean
    """
    sums: dict[Kind, tuple[Tensor, Tensor, int]] = {}

    def see(part: Kind, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        x = args[0].detach().flatten(0, -2).double()
        new = x.t() @ x, x.sum(0), len(x)
        old = sums.get(part, (0, 0, 0))
        sums[part] = old[0] + new[0], old[1] + new[1], old[2] + new[2]
        return torch.zeros_like(out) if silent else None

    with watching(model, parts, see):
        run_each(batches, name, lambda batch: call(model, batch))
    check_seen(parts, sums, name)
    means = {part: (s / max(n, 1), x / max(n, 1)) for part, (s, x, n) in sums.items()}
    return {part: s - x.outer(x) if centred else s for part, (s, x) in means.items()}


@contextmanager
def watching(model: nn.Module, parts: dict[Kind, str], see: Callable[..., Any]) -> Iterator[None]:
    """In eval mode, with a look at what comes to parts; then as it was."""
    with preserved(model, modes=True):
        model.eval()
        handles = [part.register_forward_hook(see) for part in parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def run_each(batches: Iterable[Any], name: str, run: Callable[[Any], object]) -> None:
    """Run every batch. Raises RuleError where there is none."""
    count = 0
    for count, batch in enumerate(batches, 1):  # noqa: B007
        run(batch)
    if not count:
        raise RuleError(f"{name}(batches=...)", "it holds no batch.", "Give one at least.")


def parts_of(model: nn.Module, kind: type[Kind], name: str, rules: str) -> dict[Kind, str]:
    """The parts of a kind, and where they are. Raises OperationError where there are none."""
    found = {
        action.part: hooked.path
        for operation in operated(model, f"{name}(model, ...)")
        for hooked in operation.hooked_sites
        for action in hooked.actions
        if isinstance(action.part, kind)
    }
    if not found:
        raise OperationError(
            f"{name}(model, ...)",
            f"this {type(model).__name__} has no part of the kind {kind.__name__}.",
            f'Operate it first: apply(model, "{rules}").',
        )
    return found


def check_seen(parts: dict[Kind, str], seen: Mapping[Kind, Any], name: str) -> None:
    if lost := [path for part, path in parts.items() if part not in seen]:
        raise OperationError(
            f"{name}(model, ...)",
            f"nothing came to the part at {lost[0]} (at a parameter, or never run).",
            "Join it to a module that is called.",
        )
