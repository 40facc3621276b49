"""Which of several operations are active, how much, and which are trained; none touches another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias, TypeVar

from torch import nn

from ..errors import OperationError
from .apply import named, operated
from .conditions import DISABLED, UNCUT, WRITING, check_state
from .journal import Journal
from .norm_statistics import follow
from .operation import Operation
from .owned import claimed_by, put_by, slots_of, switch
from .tokens import Action
from .trained import check_undoable

Model = TypeVar("Model", bound=nn.Module)
Names: TypeAlias = "str | Iterable[str] | Mapping[str, float] | None"
WHOLE = ("into", "among", "instead", "attended", "aside", "along")  # all of it runs, or nothing


def activate(model: Model, names: Names) -> Model:
    """Let these operations act, and no others: their parts run, and what they trained of the base
    (a head, norms) is what they made of it. Returns the model.

    names  one, several, or how much of each, {"a": 0.7, "b": 0.3}: the change that it makes is so
           much of what it was, for parts that are added the product, not its factors; None: the
           base answers

    What is active is neither trained nor frozen by that, and parts keep their values. Raises
    OperationError where there is no such operation, where one that puts tokens in or replaces a
    module is to act in part, and inside `disabled`; the model is untouched then.

    >>> from surgery import apply, at, lora
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> for name in ("a", "b"):
    ...     model = apply(model, at("0", lora(rank=2)), name=name)
    >>> [op.strength for op in activate(model, {"a": 0.7, "b": 0.3}).surgery.operations]
    [0.7, 0.3]
    """
    done = operated(model, "activate(model, ...)")
    check_state(model, "activate(model, ...)", DISABLED)
    strengths = _strengths(done, names, f"activate(model, {names!r})")
    if any(op.strength != strengths[op] for op in done):
        if any(op.claims for op in done) or any(True for _ in slots_of(done)):
            check_state(model, "activate(model, ...)", UNCUT, WRITING)
            check_undoable(model, [op.journal for op in done], call="activate(model, ...)")
        journal = Journal()
        try:
            switch(done, strengths, journal)
        except BaseException:
            journal.undo()
            raise
    return model


def train_only(model: Model, names: str | Iterable[str]) -> Model:
    """Let these operations be trained, and no others: what they added and unfroze, as they left it.

    Which are active stays as it is, and so do all values. Raises OperationError where there is no
    such operation. `parameters(model)` gives what is trained then.

    >>> from surgery import apply, at, lora, parameters
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> for name in ("a", "b"):
    ...     model = apply(model, at("0", lora(rank=2)), name=name)
    >>> len(parameters(model)), len(parameters(train_only(model, "a")))
    (4, 2)
    """
    done = operated(model, "train_only(model, ...)")
    check_state(model, "train_only(model, ...)", DISABLED, UNCUT, WRITING)
    strengths = _strengths(done, names, f"train_only(model, {names!r})")
    chosen = {op for op, strength in strengths.items() if strength}
    wanted = claimed_by(chosen)
    if len(done) > 1:
        put_by(done)  # what was learnt until now is of those that learnt it
    for op in done:
        op.is_trained = op in chosen
        for name, parameter in op.named_parameters():
            parameter.requires_grad_(op in chosen and name in op.trains)
        for module, name in [*op.claims, *op.adopted]:
            tensor = module._parameters.get(name)
            if tensor is not None and tensor.requires_grad != (id(tensor) in wanted):
                op.journal.train(module, name, tensor, id(tensor) in wanted)
    follow(done, Journal())
    return model


def _strengths(done: list[Operation], names: Names, call: str) -> dict[Operation, float]:
    """How much each is to act. Raises OperationError."""
    asked = _by_name(names)
    known = {op.name: op for op in done}
    named(done, asked, call)
    for name, strength in asked.items():
        if isinstance(strength, bool) or not isinstance(strength, (int, float)):
            raise OperationError(call, f"{strength!r} is no number.", "Give 1.0, or 0.5 for half.")
        if strength not in (0, 1) and (whole := _whole(known[name])):
            path, action = whole
            raise OperationError(
                call,
                f"{type(action.part).__name__} at {path} acts as a whole or not at all.",
                f'Give {{"{name}": 1.0}}.',
            )
    return {op: float(asked.get(op.name, 0.0)) for op in done}


def _by_name(names: Names) -> dict[str, float]:
    if names is None:
        return {}
    if isinstance(names, Mapping):
        return dict(names)
    return dict.fromkeys([names] if isinstance(names, str) else names, 1.0)


def _whole(operation: Operation) -> tuple[str, Action] | None:
    """A place and what cannot act in part there."""
    actions = ((each.path, action) for each in operation.hooked_sites for action in each.actions)
    return next(((path, action) for path, action in actions if action.place in WHOLE), None)
