"""Apply, revert, and what a training loop asks of an operated model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from .._preserve import same
from .._shards import into_shards
from .._text import first_few
from ..errors import OperationError
from ..rules.rule import Rules
from .conditions import (
    ALONE,
    APPLYING,
    DISABLED,
    MIXED,
    OWN,
    TRAINING,
    WRITING,
    check_example,
    check_state,
)
from .journal import InShards, Journal, Value, completed
from .norm_statistics import follow
from .obstacles import dotted, refuse
from .operation import Operation, check_operable, operations
from .owned import claimed_by, composed, own_parameters, pull, put_by, slots_of
from .plain import check_kept
from .planning import Plan
from .removal import take_out, went_on
from .trained import adopt, by_hand, check_undoable, expect_frozen, paths_of, stays

Model = TypeVar("Model", bound=nn.Module)
AFTER = "Its trained values are lost: change shapes outside of disabled(model)."


def apply(
    model: Model,
    rules: Rules,
    *,
    example: Any = None,
    seed: int = 0,
    name: str = "default",
    balance: float | Callable[[], float] | None = None,
    room: int | None = None,
) -> Model:
    """Rewrite `model` in place by `rules`, all or nothing, and return it.

    What the rules add and unfreeze is trained; everything else is frozen: norms with running
    statistics, too, which then stay in eval mode. (Convert to SyncBatchNorm before, not after.)

    rules    the name of a rule set, a rule, or a list of either
    example  inputs (a tensor, tuple or dict) for a few forwards, in eval mode on copies, that show
             which norm feeds what, and prove that every site runs, that gradient comes to what is
             trained, and that the output is the base's where all parts start at zero; without it
             the first forward of the model shows that every site runs
    seed     parts start from (seed, edit, path), whatever the order of calls
    name     of this operation; another name operates on top of an earlier one
    balance  a coefficient: the gradient of coefficient * balance loss is added on the way back,
             with no side effect, so that it is right under reentrant checkpointing and under
             torch.compile with checkpointing too. It is not scaled with the loss: with a
             GradScaler give a function, lambda: 0.01 * scaler.get_scale(). Nor is it divided as a
             loss is over k accumulated micro-batches: lambda: 0.01 * scaler.get_scale() / k, or
             0.01 / k, which is the mean over these (one large batch has another balance than the
             mean of its parts). None: keep the gates for `balance_loss`
    room     how many ranks low-rank parts have at most, which files for `swap` may use; what the
             rules do not use of them is zero, not trained, and not saved

    Raises RuleError, MatchError, ConflictError, OperationError or GraftError, model untouched.

    >>> from surgery import adapter, at, parallel
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    >>> model = apply(model, at(nn.Linear, parallel(adapter(rank=2))), example=torch.zeros(1, 8))
    >>> sum(p.numel() for p in parameters(model))
    124
    """
    check_operable(model)
    check_state(model, "apply(model, ...)", APPLYING)
    check_example(model, example, "apply(model, example=...)")
    plan = Plan(model, rules, seed=seed, name=name, balance=balance, example=example, room=room)
    plan.apply(example)
    return model


def revert(model: Model, *, name: str | None = None) -> Model:
    """Take all operations off, or one by its name: the model is what it was, bit for bit.

    One under others leaves them as they are; where a later one went on from values that it had
    made of the base, a warning names them, and that one keeps what it changed in them.

    Values of unfrozen parameters and of buffers, `requires_grad`, training flags and hooks come
    back; gradients of unfrozen parameters are dropped. What was trained without a rule (unfrozen by
    hand, a new head) is what it was when `parameters` handed it out; what it never did stays as it
    is, new modules stay in the model, and a warning names both.

    All or nothing. Raises OperationError where there is nothing to take off, or nothing of that
    name, inside `disabled`, and where a trained tensor cannot be written back (it was pruned,
    re-parametrised, deleted, or has another shape now): the model is untouched then.

    >>> from surgery import at, unfreeze
    >>> model = apply(nn.Sequential(nn.Linear(8, 8)), at("0", unfreeze))
    >>> hasattr(revert(model), "surgery")
    False
    """
    done = operated(model, "revert(model)", merged=None)
    check_state(model, "revert(model)", WRITING, DISABLED)
    into_shards(model)
    chosen = done if name is None else named(done, [name], f'revert(model, name="{name}")')
    journals = [*(op.merge_journal for op in done), *(op.journal for op in chosen)]
    check_undoable(model, journals, call="revert(model)")
    check_kept(journals, "revert(model)")
    left = stays(model, chosen)
    expect_frozen(model)
    own = {id(value.tensor) for operation in chosen for value in operation.journal.values}
    last = chosen[-1] is done[-1] and all(operation.strength == 1 for operation in done)
    if name is None or last or len(done) == 1:
        completed(lambda: _take_off(done, chosen, own))
    else:
        _take_out(done, chosen[0])
    follow([op for op in done if op not in chosen], Journal())
    if left:
        warnings.warn(f"surgery.revert(model) left some as they are. {left}.", stacklevel=2)
    return model


def _take_off(done: list[Operation], chosen: list[Operation], own: set[int]) -> None:
    """own  the tensors, by id, that are then what they were"""
    for operation in done:
        operation.merge_journal.undo()
    for operation in reversed(chosen):
        operation.undo()
    for operation in done:
        operation.frozen.again(own)


def _take_out(done: list[Operation], chosen: Operation) -> None:
    """Take one off that is under others, or is not all that acts."""
    for operation in reversed(done):
        completed(operation.merge_journal.undo)
    later = done[done.index(chosen) + 1 :]
    if values := went_on(chosen, later):
        paths = paths_of(chosen.model[0])
        names = [dotted(paths.get(id(value.module), ""), value.name) for value in values]
        warnings.warn(
            f'surgery.revert(model, name="{chosen.name}"): {first_few(names)} of later operations '
            f"began as {chosen.name} had made them: what they changed since is kept.",
            stacklevel=3,
        )
    written = take_out(chosen, done)
    for operation in done:
        operation.frozen.again(written)


@contextmanager
def disabled(model: nn.Module, *names: str) -> Iterator[nn.Module]:
    """While it lasts, the base model answers: no part runs, and unfrozen tensors are as they were.

    With names, those operations are off and the others answer. It answers without gradients, as
    under torch.no_grad(). It is the model that is disabled, for all threads that run it; two that
    overlap must be nested. What is trained without a rule, and was never handed out by
    `parameters`, answers as it is, with a warning.

    Raises OperationError on a model that was never operated, and, before anything is changed, where
    an unfrozen tensor cannot be written (it was pruned, re-parametrised, deleted, or has another
    shape now); also after the body where that happened in it. Inside it the model cannot be saved,
    loaded, copied, merged, reverted or operated.

    >>> from surgery import append, at
    >>> model = apply(nn.Sequential(nn.Identity()), at("0", append(lambda site: nn.Linear(2, 2))))
    >>> with disabled(model):
    ...     model(torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    done = operated(model, "disabled(model)")
    check_state(model, "disabled(model)", WRITING, MIXED)
    into_shards(model)
    check_undoable(model, [operation.journal for operation in done], call="disabled(model)")
    off = named(done, names, "disabled(model, ...)") if names else done
    if theirs := by_hand(model):
        paths = first_few([place.path for place in theirs])
        warnings.warn(
            f"surgery.disabled(model): {paths} were trained without a rule, and answer as they "
            "are: what they were is not known. surgery.parameters(model), called before training, "
            "lets it be known.",
            stacklevel=3,
        )
    journal = Journal()
    try:
        _lend(done, off, journal)
        journal.entries.append(InShards(model))
        with torch.no_grad():
            yield model
        obstacles = journal.undo()
    except BaseException:  # one that came while undoing, too
        journal.undo()
        raise
    refuse("disabled(model), at its end", obstacles, paths_of(model), AFTER)


def _lend(done: list[Operation], off: list[Operation], journal: Journal) -> None:
    """Turn some operations off, and lend the base the values that it has without them."""
    left = {operation: operation.strength for operation in done if operation not in off}
    if left:
        put_by(done)
    for operation in off:
        journal.set(operation, "enabled", False)
    for operation in done:
        for buffer in operation.journal.buffers:
            journal.keep_value(buffer.module, buffer.name, lent=True)
    for slot in slots_of(done) if left else ():
        journal.write(slot.module, slot.name, composed(slot, left), lent=True)
    for value in [] if left else _changed(done):
        journal.write(value.module, value.name, value.value, lent=True)


def parameters(model: nn.Module, names: str | Iterable[str] | None = None) -> list[nn.Parameter]:
    """What to optimise: the trainable parameters of the parts and of what was unfrozen.

    names  operations that batches are to train together, each its own rows (`mixed`): what they
           unfroze is a parameter of each of them then, which acts, and learns, in `mixed` alone

    What only operations that are not active train of the base is not among them. What was
    unfrozen by hand, and the parameters of new modules, are; they are known
    from now on, as they are now, to `save`, `report`, `disabled` and `revert`.

    Raises OperationError on a model that was never operated.

    >>> from surgery import at, unfreeze
    >>> model = apply(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), at("1", unfreeze))
    >>> torch.optim.AdamW(parameters(model), lr=1e-3).param_groups[0]["params"][0].shape
    torch.Size([2, 4])
    """
    done = operated(model, "parameters(model)")
    check_state(model, "parameters(model)", TRAINING)
    into_shards(model)
    adopt(model)
    if names is not None:
        check_state(model, "parameters(model, names)", MIXED, OWN)
        asked = [names] if isinstance(names, str) else [*names]
        chosen = named(done, asked, f"parameters(model, {asked!r})")
        parts = [p for op in chosen for p in op.parameters() if p.requires_grad]
        return [
            *dict.fromkeys(parts),
            *(p for op in chosen for p in own_parameters(model, done, op)),
        ]
    idle = claimed_by([op for op in done if not op.strength])
    idle -= claimed_by([op for op in done if op.strength])
    return [p for p in model.parameters() if p.requires_grad and id(p) not in idle]


def operated(
    model: nn.Module, call: str, merged: bool | None = False, alone: bool = True
) -> list[Operation]:
    """All operations on a model, oldest first; merged or not, as asked (None: either).

    alone  whether it is to be looked for others that act in the model

    Raises OperationError where there are none, or not such.
    """
    check_operable(model)
    done = operations(model)
    if not done:
        inner = next((path for path, m in model.named_modules() if path and operations(m)), None)
        raise OperationError(
            call,
            f"this {type(model).__name__} was never operated.",
            "Call surgery.apply(model, rules) first, and give that same model, not a wrapper."
            if inner is None
            else f"Its .{inner} was: give that model, not what holds it.",
        )
    if alone:
        check_state(model, call, ALONE)
    if merged is not None and done[-1].merged is not merged:
        raise OperationError(
            call,
            f"the parts of this {type(model).__name__} are {'not ' * merged}merged.",
            "Call surgery.merge(model) first." if merged else "Call surgery.unmerge(model) first.",
        )
    pull(done)
    return done


def named(done: list[Operation], names: Iterable[str], call: str) -> list[Operation]:
    """The operations of these names, oldest first. Raises OperationError where there is no such."""
    known = [operation.name for operation in done]
    if missing := [name for name in names if name not in known]:
        raise OperationError(
            call,
            f'there is no operation "{missing[0]}"; there are, in order: {", ".join(known)}.',
            "Give one of these, the name that apply(..., name=) was given.",
        )
    return [operation for operation in done if operation.name in {*names}]


def _changed(done: list[Operation]) -> list[Value]:
    """Values before the first operation of all that is not the same any more."""
    first: dict[int, Value] = {}
    for value in (value for operation in done for value in operation.journal.values):
        if value.tensor is not None and not (value.tensor.is_meta or value.value.is_meta):
            first.setdefault(id(value.tensor), value)
    return [v for v in first.values() if v.tensor is not None and not same(v.tensor, v.value)]
