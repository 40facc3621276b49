"""Any mergeable operation as LoRA: what each weight has become, as near as a rank allows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._table import Table
from .._text import first_few
from ..engine.apply import apply, operated, revert
from ..engine.conditions import APPLYING, DISABLED, MAKING, UNCUT, WRITING, check_state
from ..engine.folding import folded, written
from ..engine.hooked_weights import HookedWeight
from ..engine.hooks import HookedSite
from ..engine.obstacles import tensor_of
from ..engine.operation import Operation, operations
from ..engine.planning import plan
from ..engine.trained import first_paths, trained_of
from ..errors import OperationError, RuleError, is_integer
from ..parts.base_weight import wide
from ..parts.low_rank import lora
from ..rules.edits import unfreeze
from ..rules.rule import Rule, at
from ..rules.weights import weight
from ..structure.layers import CONVS, is_turned, linear_shape, named_modules
from ..structure.module_tree import ADDITIONS


class Factors(NamedTuple):
    """B (out, r) and A (r, in) of the change D of one weight; error: |D - B A| / |D|."""

    B: Tensor
    A: Tensor
    error: float


def as_lora(
    model: nn.Module, *, rank: int | None = None, share: float | None = None, example: Any = None
) -> Table:
    """Make the operation on a model a LoRA of least error, in place; the table tells it by place.

    Each weight that parts change becomes W + B A, with B A the truncated singular value
    decomposition of the change (Eckart & Young 1936). Biases, and vectors of norms, that parts
    change are unfrozen and hold the very values. What was unfrozen stays so, as trained.

    rank     of all; where a change has less, its own is the same
    share    instead of a rank, the share of the squared change that each keeps, such as 0.99
    example  as `apply` takes it; needed where the operation needed one

    Raises RuleError unless one of both is given; OperationError where the operation cannot be
    merged, is not the only one, or stands at a stack of experts, the model untouched.

    >>> from surgery import apply, at
    >>> from surgery.parts import loha
    >>> model = apply(nn.Sequential(nn.Linear(6, 4)), at("0", loha(rank=1)))
    >>> print(as_lora(model, rank=2))
    As LoRA
    weight    shape  rank  relative error
    0.weight  4 x 6     2             0.0
    """
    _check(rank, share)
    (operation, *others) = operated(model, "as_lora(model, ...)", merged=False)
    check_state(model, "as_lora(model, ...)", APPLYING, UNCUT, WRITING, MAKING, DISABLED)
    if others:
        raise OperationError(
            "as_lora(model, ...)",
            f"there are {len(others) + 1} operations on this {type(model).__name__}.",
            "Revert the others first, or merge(model, keep=False) those that are to stay.",
        )
    _check_example(operation, example)
    with torch.no_grad():
        at_weights = {h.path.partition("[")[0] for h in operation.hooked_sites if _is_weight(h)}
        factors, values = _changes(model, operation, at_weights, rank, share)
        kernels = {path for path in factors if model.get_parameter(path).dim() > 2}
        rules = _rules(factors, values, at_weights | kernels)
        plan(model, rules, name=f"{operation.name} as LoRA")  # what cannot be, cannot be now
        if example is not None:  # nor what a forward does not bear
            apply(revert(copy.deepcopy(model)), rules, name=operation.name, example=example)
        with _as_trained(model):
            revert(model)
            apply(model, rules, name=operation.name, example=example)
            _fill(model, factors, values)
    rows: list[tuple[object, ...]] = [
        (path, f"{len(f.B)} x {f.A.shape[1]}", len(f.A), float(f"{f.error:.3g}"))
        for path, f in factors.items()
    ]
    return Table("As LoRA", ("weight", "shape", "rank", "relative error"), rows)


@contextmanager
def _as_trained(model: nn.Module) -> Iterator[None]:
    """Modes of modules, and buffers (the statistics of norms), are at the end what they are now."""
    modes = [(module, module.training) for _, module in named_modules(model)]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    yield
    for module, training in modes:
        module.training = training
    for name, buffer in model.named_buffers():
        if name in buffers and not name.startswith(ADDITIONS):
            buffer.copy_(buffers[name])


def _check_example(operation: Operation, example: Any) -> None:
    uncalled = [h.path for h in operation.hooked_sites if _is_read(h)]
    if example is None and uncalled:
        raise OperationError(
            "as_lora(model, ...)",
            f"a forward told that the model reads {first_few(uncalled)} without calling the layer.",
            "Give as_lora(model, ..., example=inputs).",
        )


def _check(rank: int | None, share: float | None) -> None:
    number = isinstance(share, (int, float)) and 0 < share <= 1
    if not (is_integer(rank, least=1) if share is None else rank is None and number):
        raise RuleError(
            f"as_lora(rank={rank!r}, share={share!r})",
            "one of both says how much is kept.",
            "Give rank=8, or share=0.99.",
        )


def _changes(
    model: nn.Module,
    operation: Operation,
    at_weights: set[str],
    rank: int | None,
    share: float | None,
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """By path: the factors of each weight that changes, and the values of all else that does."""
    names, seen = first_paths(model), set[int]()
    values = {p.path: p.tensor.detach().clone() for p in trained_of(model, operation)}
    factors: dict[str, Factors] = {}
    for module, name, new in written(folded(model, operation.hooked_sites, operation.read_besides)):
        old = tensor_of(module, name)
        path = f"{names[id(module)]}.{name}".strip(".")
        if old is None or id(old) in seen:
            continue  # one that modules share is changed in all of them
        seen.add(id(old))
        if old.dim() < 2:
            values |= {} if torch.equal(new, old) else {path: new.detach().clone()}
        elif new.dim() == 3 and not isinstance(module, CONVS):
            raise OperationError(
                "as_lora(model, ...)", f"{path} is a stack of experts.", "Leave it as it is."
            )
        else:
            change = wide(new) - wide(old)
            turned = path not in at_weights and is_turned(module)
            factors[path] = _factors(change.t() if turned else change.flatten(1), rank, share)
    return factors, values


def _factors(change: Tensor, rank: int | None, share: float | None) -> Factors:
    """Of the least error at a rank, or of the least rank that keeps a share of the squares."""
    U, S, V = torch.linalg.svd(change, full_matrices=False)
    squares = S.square()
    left = squares.sum() - squares.cumsum(0)  # by rank 1, 2, ...
    whole = squares.sum().clamp_min(torch.finfo(S.dtype).tiny)
    if rank is None:
        enough = (left <= (1 - (share or 1)) * whole).nonzero()
        rank = int(enough[0]) + 1 if len(enough) else len(S)
    rank = min(rank, len(S))
    root = S[:rank].sqrt()
    error = float((left[rank - 1].clamp_min(0) / whole).sqrt())
    return Factors(U[:, :rank] * root, root[:, None] * V[:rank], error)


def _rules(
    factors: dict[str, Factors], values: dict[str, Tensor], at_weights: set[str]
) -> list[Rule]:
    """A LoRA at each weight, or at the layer that has it, and what else is trained."""
    rules = []
    for path, f in factors.items():
        place = weight(path) if path in at_weights else path.rpartition(".")[0]
        rules.append(at(place, lora(rank=len(f.A))))
    for path in values:
        holder, _, name = path.rpartition(".")
        rules.append(at(holder, unfreeze(name)))
    return rules


def _is_weight(hooked: HookedSite) -> bool:
    return isinstance(hooked, HookedWeight)


def _is_read(hooked: HookedSite) -> bool:
    """Whether it is the weight of a layer that another module computes with."""
    if not isinstance(hooked, HookedWeight):
        return False
    reader, holder, *_ = hooked.reads[0]
    torchs = isinstance(reader, nn.MultiheadAttention)
    return reader is not holder and linear_shape(holder) is not None and not torchs


def _fill(model: nn.Module, factors: dict[str, Factors], values: dict[str, Tensor]) -> None:
    """Put the values into a model that the rules have just been applied to."""
    for hooked in operations(model)[-1].hooked_sites:
        path = hooked.path if _is_weight(hooked) else f"{hooked.path}.weight".strip(".")
        for action in hooked.actions:
            part: Any = action.part
            part.A.copy_(factors[path].A)
            part.B.copy_(factors[path].B)
    for path, value in values.items():
        holder, _, name = path.rpartition(".")
        tensor_of(model.get_submodule(holder), name).copy_(value)  # type: ignore[union-attr]
