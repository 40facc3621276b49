"""Merge: linear parts become part of the weights that they stand at; and unmerge."""

from __future__ import annotations

import sys
import warnings
from typing import TypeVar

import torch
from torch import nn

from .._shards import into_shards
from .._text import first_few
from ..errors import OperationError
from .apply import named, operated
from .conditions import DISABLED, MAKING, UNMERGING, WRITING, check_state
from .folding import Fold, acting_between, folded, written
from .journal import Journal, completed
from .operation import Operation, additions_of
from .owned import switch
from .plain import Followed, Kept, check_kept, let_go, make_plain
from .trained import check_undoable
from .watched import check_watched

Model = TypeVar("Model", bound=nn.Module)
# The share of a change that rounding may take without a word. Measured on ViTs (LoRA, SSF and
# RepAdapter, bfloat16 and float16): answers are then off by 0.2 to 0.4 of what was learnt.
MOST_LOST = 0.25


def merge(model: Model, *, name: str | None = None, keep: bool = True) -> Model:
    """Merge parts into the base: the same answers at the speed of the base; returns the model.

    What is active is merged, as much as it is; or `name` alone, as if it were the only active one.

    Parts must be linear (nn.Linear, nn.Sequential of these, or a module with a method `affine()`
    that returns weight (out, in), or (out,) where it scales each feature, and bias (out,) or
    None), at an nn.Linear, a convolution, or, where they scale after it, a norm, that shares its
    weight with nothing; or at a parameter itself (`weight`), wherever that is shared.

    A merged model is plain: no hooks, and the keys, parameters and modules of the base alone, so
    that what follows (torch.jit.script, quantising, export, its `state_dict` in a plain model)
    meets the base. Parts and the weights as they were are kept aside, in the attribute `surgery`,
    so that `unmerge` and `revert` are exact. Norms that were frozen stay so. In half precision
    sums are made in float32 and rounded once; where that loses much, a warning says how much.

    keep  False: keep nothing, for good. What was merged and trained stays, `requires_grad` and
          all else is as before `apply`, and the model counts as never operated. Also of a model
          that is merged already

    Raises OperationError where a part cannot be merged, or all are already, model untouched.

    >>> from surgery import apply, at, parallel
    >>> model = apply(nn.Sequential(nn.Linear(2, 2)), at("0", parallel(lambda s: nn.Linear(2, 2))))
    >>> x, y = torch.ones(1, 2), model(torch.ones(1, 2))
    >>> torch.allclose(merge(model)(x), y), torch.equal(unmerge(model)(x), y)
    (True, True)
    >>> hasattr(merge(model, keep=False), "surgery")
    False
    """
    done = operated(model, "merge(model)", merged=False if keep else None)
    check_state(model, "merge(model)", WRITING, MAKING, DISABLED)
    into_shards(model)
    strengths = {operation: operation.strength for operation in done}
    if name is not None:
        one = named(done, [name], f'merge(model, name="{name}")')
        strengths = {operation: float(operation in one) for operation in done}
    for operation in done if not done[-1].merged else ():
        operation.start.check(OperationError, "merge(model)")
        check_watched(operation, "merge(model)")
    exact = [torch.autocast(device, enabled=False) for device in ("cpu", "cuda")]
    with torch.no_grad(), exact[0], exact[1]:
        if done[-1].merged:
            completed(lambda: _let_go(done))
        else:
            _merge(model, done, strengths, keep)
    return model


def _merge(
    model: nn.Module, done: list[Operation], strengths: dict[Operation, float], keep: bool
) -> None:
    journal, additions = done[-1].merge_journal, additions_of(model) or nn.Module()
    try:
        if any(operation.strength != strengths[operation] for operation in done):
            switch(done, strengths, journal)
        _fold(model, done, additions, journal)
        if not keep:
            completed(lambda: _let_go(done))
    except BaseException:
        journal.undo()
        raise


def _fold(model: nn.Module, done: list[Operation], additions: nn.Module, journal: Journal) -> None:
    active = [operation for operation in done if operation.strength]
    hooked_sites = [hooked for operation in active for hooked in operation.hooked_sites]
    besides = set[str]().union(*(operation.read_besides for operation in active))
    folds = folded(model, hooked_sites, besides)
    between = [hooked.path for hooked in hooked_sites if acting_between(hooked)]
    weights = tuple(Kept.of(module, name) for module, name, _ in written(folds))
    journal.entries.append(Followed(additions, model, weights, model.training))
    for operation in done:
        journal.entries.append(operation.frozen.kept())
    for module, name, tensor in written(folds):
        journal.write(module, name, tensor)
    for operation in done:
        journal.set(operation, "merged", True)
    make_plain(model, additions, [operation.journal for operation in done], journal)
    _tell_lost(folds)
    _tell_hooks(between)


def _tell_lost(folds: list[Fold]) -> None:
    """Warn where rounding takes much of what was learnt."""
    lost = sorted((fold for fold in folds if fold.kept < 1 - MOST_LOST), key=lambda f: f.kept)
    if lost:
        dtype = str(next(iter(lost[0].tensors.values())).dtype).removeprefix("torch.")
        warnings.warn(
            f"merge(model): rounding to {dtype} keeps {max(lost[0].kept, 0):.0%} of what was "
            f"learnt at {lost[0].path}; at {len(lost)} of {len(folds)} places less than "
            f"{1 - MOST_LOST:.0%} is left ({first_few([fold.path for fold in lost])}). Merge in "
            "float32, merge(model.float()), or leave the model unmerged.",
            stacklevel=4,
        )


def _tell_hooks(between: list[str]) -> None:
    """Warn where hooks of others met what a module gives before the parts did."""
    if between:
        warnings.warn(
            f"merge(model): hooks of others stand between a module and its parts "
            f"({first_few(between)}). They meet the merged output now; if they change it, the "
            "answer is another. Take them off, or leave the model unmerged.",
            stacklevel=4,
        )


def unmerge(model: Model) -> Model:
    """Take merged parts out again: the operated model it was, bit for bit.

    Raises OperationError where nothing is merged, or what was there cannot be brought back, model
    untouched. For an example see `merge`.

    >>> unmerge(nn.Linear(2, 2))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    surgery.errors.OperationError: unmerge(model): this Linear was never operated...
    """
    done = operated(model, "unmerge(model)", merged=True)
    into_shards(model)
    check_state(model, "unmerge(model)", UNMERGING, WRITING, MAKING, DISABLED)
    journals = [operation.merge_journal for operation in reversed(done)]
    check_undoable(model, journals, call="unmerge(model)")
    check_kept(journals, "unmerge(model)")
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # code that was compiled without hooks does not look for any
    completed(lambda: [journal.undo() for journal in journals])
    return model


def _let_go(done: list[Operation]) -> None:
    for operation in reversed(done):
        operation.undone = True
        let_go(operation.merge_journal)
        let_go(operation.journal)
