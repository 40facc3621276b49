"""One batch, many operations: each row runs its own, or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._preserve import same
from ..errors import OperationError
from ..rules.layout import map_readers
from ..structure.layers import CONVS, is_norm
from .apply import named, operated
from .conditions import DISABLED, OWN, UNCUT, WRITING, check_state
from .hooked_weights import HookedWeight, only_reads
from .hooks import HookedSite
from .journal import Journal
from .mixed_forward import Layer, MixedForward, Values
from .operation import Operation, Own
from .owned import Slot, composed, learnt, put_by, shows, slots_of
from .rows import Group, Rows
from .tokens import Action

BY_ROWS = ("before", "after", "beside")  # what acts on features alone, row by row


@contextmanager
def mixed(
    model: nn.Module, names: Sequence[str | None], rows: Tensor | None = None
) -> Iterator[nn.Module]:
    """While it lasts, each row of a batch runs an operation of its own, or none.

    names  that of each row, in order; None: the base answers
    rows   (rows,) or (rows, tokens): the position in names of that of each row, or of each token
           where several sequences are packed into one row; -1: the base answers. Other numbers may
           be written into it, also for compiled code, which reads it in each forward

    Parts meet their own rows, low-rank ones at a place all at once (Sheng et al. 2023, S-LoRA);
    layers that were unfrozen (norms, heads) have the values that each operation gave them. The
    first forward of a kind shows whether rows stay rows at all these places: two samples of it run
    twice, in either order. Where they do not, and where an operation puts tokens in, replaces
    modules, hears others or stands at weights that are read by what is no linear layer, the model
    runs once for each operation, on its rows. Parts are trained so, and what was unfrozen where an
    optimizer has `parameters(model, names)`. Threads take turns; checkpoints are refused; compiled
    code does not look whether numbers in rows are right, nor at what an optimizer has just made of
    parameters that each operation has of its own.

    Tokens of packed sequences are told by where they lie: (rows, tokens, ...) at each place.

    Raises OperationError where there is no such operation, inside `disabled` or `mixed`, and where
    unfrozen tensors would have to be trained; GraftError, in a forward, where rows are not to be
    told.

    >>> from surgery import activate, apply, at, lora
    >>> model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    >>> for name in ("a", "b"):
    ...     model = apply(model, at("0", lora(rank=2)), name=name)
    >>> with mixed(model, ["b", None, "a"]):
    ...     y = model(x)
    >>> torch.allclose(y[2], activate(model, "a")(x)[2])
    True
    """
    call = f"mixed(model, {[*names]!r})" if len(names) < 5 else "mixed(model, ...)"
    done = operated(model, call)
    check_state(model, call, DISABLED, UNCUT, WRITING)
    used = named(done, {name for name in names if name is not None}, call)
    if rows is not None:
        _check_rows(model, rows, names, call)
        used.sort(key=lambda operation: names.index(operation.name))
    journal = Journal()
    put_by(done)
    slots = [slot for slot in slots_of(done, norms=True) if _is_met(slot, used)]
    values = [_values(slots, op, used) for op in (*used, None)]
    try:
        _join(model, done, used, _rows(model, names, used, rows), slots, values, journal, call)
        yield model
    finally:
        journal.undo()
        _keep_statistics(slots, done, used, values)


def _check_rows(model: nn.Module, rows: Tensor, names: Sequence[str | None], call: str) -> None:
    if not isinstance(rows, Tensor) or rows.dtype not in (torch.int64, torch.int32):
        kind = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
        remedy = "Give a tensor of whole numbers, torch.tensor([...])."
        raise OperationError(call, f"rows is {kind}, no tensor of int64 or int32.", remedy)
    if rows.device != _device(model):
        fact = f"rows is on {rows.device}, and the model on {_device(model)}."
        raise OperationError(
            call, fact, f'Make it there, torch.tensor(..., device="{_device(model)}").'
        )
    if rows.dim() not in (1, 2):
        fact = f"rows is {tuple(rows.shape)}."
        raise OperationError(call, fact, "Give (rows,) or (rows, tokens).")
    if None in names or len({*names}) != len(names):
        fact = "with rows=, names are those of operations, each once."
        raise OperationError(call, fact, "Write -1 into rows where the base is to answer.")


def _rows(
    model: nn.Module, names: Sequence[str | None], used: list[Operation], rows: Tensor | None
) -> Rows:
    torch_attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    tokens_first = any(not m.batch_first for m in torch_attentions)
    device = _device(model)
    if rows is not None:
        return Rows(rows, len(used), tokens_first, True, device)
    number = {op.name: k for k, op in enumerate(used)}
    index = torch.tensor([-1 if name is None else number[name] for name in names])
    return Rows(index, len(used), tokens_first, False, device)


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _join(
    model: nn.Module,
    done: list[Operation],
    used: list[Operation],
    rows: Rows,
    slots: list[Slot],
    values: list[Values],
    journal: Journal,
    call: str,
) -> None:
    """Let places and layers act by rows, or the model as a whole."""
    _check_trained(model, slots, used, call)
    layers: list[Layer] = []
    by_rows = all(map(_acts_by_rows, used)) and all(map(_is_layer, slots))
    if rows.are_tokens and not by_rows:
        whole = [op.name for op in used if not _acts_by_rows(op)] or [op.name for op in used]
        fact = f"{whole} do not act on each token by itself (they put tokens in, hear others, ...)."
        raise OperationError(call, fact, "Give whose each row is, (rows,), and one sequence in it.")
    if by_rows:
        _group(used, rows, journal)
        modules = dict.fromkeys(module for slot in slots for module, _ in slot.places)
        layers = [Layer(module, rows, values, used) for module in modules]
    for layer in layers:
        journal.set(layer.module, "forward", layer.forward)
        journal.hook(layer.module, layer.seen)  # no fused kernel reads the weights of one
    for op in done:
        journal.set(op, "is_mixed", True)
        journal.set(op, "has_rows", op in used)
    forward = MixedForward(model, done, used, rows, values, layers, by_rows)
    journal.set(model, "forward", forward)


def _is_met(slot: Slot, used: list[Operation]) -> bool:
    """Whether a tensor is another for some row than it is now, or may be: not by what is off."""
    return any(claim.operation in used or claim.operation.strength for claim in slot.claims)


def _acts_by_rows(op: Operation) -> bool:
    """Whether all that it does is done to features of each row."""
    return not op.read_besides and all(
        each.is_small and len(each.reads) == 1 and only_reads(each.reads[0])
        if isinstance(each, HookedWeight)
        else not each.ends and all(_is_by_rows(action) for action in each.actions)
        for each in op.hooked_sites
    )


def _is_by_rows(action: Action) -> bool:
    """Whether a part takes rows as they come, of a map that was made of a whole batch, too."""
    plain = action.place in BY_ROWS and not action.hears
    return plain and not any(map_readers(action.part))


def _is_layer(slot: Slot) -> bool:
    """Whether a tensor is of layers that are given features, and give some."""
    layers = (nn.Linear, *CONVS)
    return all(isinstance(module, layers) or is_norm(module) for module, _ in slot.places)


def _values(slots: list[Slot], op: Operation | None, used: list[Operation]) -> Values:
    """What tensors are where one operation alone is active; themselves, where it made them."""
    values: Values = {}
    for slot in slots:
        value, tensor = composed(slot, {op: 1.0} if op else {}), slot.tensor
        if tensor is not None:
            value = value.to(tensor)
            mine = op is not None and any(claim.operation is op for claim in slot.claims)
            live = same(value, tensor.detach()) and mine and isinstance(tensor, nn.Parameter)
            shown = tensor if live else value.detach().clone()
            if mine and tensor.requires_grad and (names := [o.name for o in _sharing(slot, used)]):
                shown = _untrained(value, slot, names)
            if op is not None and slot.key in op.own_parameters:
                shown = _own(op, slot.key, value)
            values.update(dict.fromkeys(slot.places, shown))
    return values


def _untrained(value: Tensor, slot: Slot, names: list[str]) -> Tensor:
    """A value that is trained by several, and would be one tensor: an error where it is trained."""
    shown: Any = value.detach().clone().requires_grad_(torch.is_grad_enabled())

    def refuse(gradient: Tensor) -> None:
        raise _shared("mixed(model, ...)", slot, names)

    if shown.requires_grad:
        shown.register_hook(refuse)
    own: Tensor = shown
    return own


def _shared(call: str, slot: Slot, names: list[str]) -> OperationError:
    return OperationError(
        call,
        f"{slot.name} of a {type(slot.module).__name__} is trained by {names}, and is one tensor: "
        "not all of these would be.",
        f"Let the optimizer have surgery.parameters(model, {names}), of which each has its own; or "
        "train each by itself, activate(model, name).",
    )


def _own(op: Operation, key: tuple[nn.Module, str], value: Tensor) -> nn.Parameter:
    """The parameter that an operation trains of its own, which is now this."""
    own = op.own_parameters[key].parameter
    if (own.dtype, own.device) != (value.dtype, value.device):
        own.data = own.data.to(value)
    if not same(own.detach(), value):
        with torch.no_grad():
            own.copy_(value)
    op.own_parameters[key] = Own(own, value.detach().clone())
    own.requires_grad_(op.is_trained)
    return own


def _keep_statistics(
    slots: list[Slot], done: list[Operation], used: list[Operation], values: list[Values]
) -> None:
    """What norms have counted of the rows of an operation is its own."""
    for slot in slots:
        mine = [c for c in slot.claims if c.operation in used and not slot.is_parameter]
        for claim in mine:
            op = claim.operation
            value = values[used.index(op)][slot.key]
            if not same(value, composed(slot, {op: 1.0}).to(value)):
                op.own[slot.key] = learnt(slot, claim, {op: 1.0}, value.detach().clone())
        if mine and slot.tensor is not None:
            now = composed(slot, {op: op.strength for op in done})
            slot.tensor.copy_(now)


def _check_trained(model: nn.Module, slots: list[Slot], used: list[Operation], call: str) -> None:
    """Raise OperationError where what only one tensor can be would have to be trained."""
    if torch.is_grad_enabled() and any(op.own_parameters for op in used):
        check_state(model, call, OWN)
    if not (model.training and torch.is_grad_enabled()):
        return
    for slot in slots:
        names = [op.name for op in _sharing(slot, used)]
        if names and slot.tensor is not None and slot.tensor.requires_grad:
            raise _shared(call, slot, names)


def _sharing(slot: Slot, used: list[Operation]) -> list[Operation]:
    """Which would train one tensor: unless it shows what the only one made, or each has its own."""
    mine = [claim.operation for claim in slot.claims if claim.operation in used]
    if all(slot.key in op.own_parameters for op in mine if op.is_trained):
        return []
    return [] if len(mine) == 1 and shows(slot, {mine[0]: 1.0}) else mine


def _group(used: list[Operation], rows: Rows, journal: Journal) -> None:
    """Let those that act at one place act as one, each on its own rows."""
    places: dict[tuple[int, ...], list[tuple[HookedSite, int]]] = {}
    for k, op in enumerate(used):
        for hooked in op.hooked_sites:
            key = id(hooked.entry), id(hooked.exit), isinstance(hooked, HookedWeight)
            places.setdefault((*key, hooked.enters, hooked.leaves), []).append((hooked, k))
    for there in places.values():
        members, whose = [hooked for hooked, _ in there], [k for _, k in there]
        group = Group(rows, members, whose)
        for hooked in members:
            journal.set(hooked, "group", group)
