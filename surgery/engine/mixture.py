"""One batch, many operations: each row runs its own, or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .._preserve import same
from ..errors import OperationError
from ..rules.layout import map_readers
from ..structure.layers import CONVS, is_norm
from .apply import named, operated
from .conditions import DISABLED, WRITING, check_state
from .hooked_weights import HookedWeight, only_reads
from .hooks import HookedSite
from .journal import Journal
from .mixed_forward import Layer, MixedForward, Values
from .operation import Operation
from .owned import Slot, composed, put_by, shows, slots_of
from .rows import Group, Rows
from .tokens import Action

BY_ROWS = ("before", "after", "beside")  # what acts on features alone, row by row


@contextmanager
def mixed(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """While it lasts, each row of a batch runs an operation of its own, or none.

    names  that of each row, in order; None: the base answers

    Parts meet their own rows, low-rank ones at a place all at once (Sheng et al. 2023, S-LoRA);
    layers that were unfrozen (norms, heads) have the values that each operation gave them. The
    first forward of a kind shows whether rows stay rows at all these places: two samples of it run
    twice, in either order. Where they do not, and where an operation puts tokens in, replaces
    modules, hears others or stands at weights that are read by what is no linear layer, the model
    runs once for each operation, on its rows. Parts are trained so; what was unfrozen is not, where
    more than one made something of it.

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
    check_state(model, call, DISABLED, WRITING)
    used = named(done, {name for name in names if name is not None}, call)
    journal = Journal()
    try:
        _join(model, done, used, _rows(model, names, used), journal, call)
        yield model
    finally:
        journal.undo()


def _rows(model: nn.Module, names: Sequence[str | None], used: list[Operation]) -> Rows:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    positions = [[i for i, name in enumerate(names) if name == op.name] for op in used]
    rest = [i for i, name in enumerate(names) if name is None]
    each, other = [torch.tensor(p, device=device) for p in positions], torch.tensor(rest).long()
    torch_attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    tokens_first = any(not m.batch_first for m in torch_attentions)
    return Rows(len(names), tuple(each), other.to(device), tokens_first)


def _join(
    model: nn.Module,
    done: list[Operation],
    used: list[Operation],
    rows: Rows,
    journal: Journal,
    call: str,
) -> None:
    """Let places and layers act by rows, or the model as a whole."""
    put_by(done)
    slots = [slot for slot in slots_of(done) if _is_met(slot, used)]
    values = [_values(slots, op) for op in (*used, None)]
    _check_trained(model, slots, used, call)
    layers: list[Layer] = []
    by_rows = all(map(_acts_by_rows, used)) and all(map(_is_layer, slots))
    if by_rows:
        _group(used, rows, journal)
        modules = dict.fromkeys(module for slot in slots for module, _ in slot.places)
        layers = [Layer(module, rows, values) for module in modules]
    for layer in layers:
        journal.set(layer.module, "forward", layer.forward)
        journal.hook(layer.module, layer.seen)  # no fused kernel reads the weights of one
    for op in done:
        journal.set(op, "is_mixed", True)
        journal.set(op, "has_rows", op in used)
    forward = MixedForward(model, done, used, rows, values, layers, by_rows)
    journal.set(model, "forward", forward.forward)


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


def _values(slots: list[Slot], op: Operation | None) -> Values:
    """What tensors are where one operation alone is active; themselves, where it made them."""
    values: Values = {}
    for slot in slots:
        value, tensor = composed(slot, {op: 1.0} if op else {}), slot.tensor
        if tensor is not None:
            value = value.to(tensor)
            mine = op is not None and any(claim.operation is op for claim in slot.claims)
            live = same(value, tensor.detach()) and mine and isinstance(tensor, nn.Parameter)
            shown = tensor if live else value.detach().clone()
            values.update(dict.fromkeys(slot.places, shown))
    return values


def _check_trained(model: nn.Module, slots: list[Slot], used: list[Operation], call: str) -> None:
    """Raise OperationError where what only one tensor can be would have to be trained."""
    if not (model.training and torch.is_grad_enabled()):
        return
    for slot in slots:
        asks = slot.tensor is not None and slot.tensor.requires_grad
        own = [c.operation for c in slot.claims if c.operation in used]
        shown = [op for op in own if shows(slot, {op: 1.0})]
        if asks and own and not (own == shown and len(own) == 1):
            raise OperationError(
                call,
                f"{slot.name} of a {type(slot.module).__name__} is trained by "
                f"{[op.name for op in own]}, and is one tensor: not all of these would be.",
                "Train each by itself, activate(model, name); or freeze it, train_only(model, b).",
            )


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
