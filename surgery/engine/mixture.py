"""One batch, many operations: each row runs its own, or none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import GraftError, OperationError
from ..rules.layout import map_readers
from ..structure.layers import CONVS, is_norm
from .apply import named, operated
from .conditions import DISABLED, WRITING, check_state
from .features import input_of
from .hooked_weights import HookedWeight
from .hooks import HookedSite
from .journal import Journal
from .operation import Operation
from .owned import Slot, composed, put_by, slots_of
from .rows import Group, Rows
from .tokens import Action

BY_ROWS = ("before", "after", "beside")  # what acts on features alone, row by row


@contextmanager
def mixed(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """While it lasts, each row of a batch runs an operation of its own, or none.

    names  that of each row, in order; None: the base answers

    Parts meet their own rows, low-rank ones at a place all at once (Sheng et al. 2023, S-LoRA);
    layers that were unfrozen (norms, heads) have the values that each operation gave them. Where
    an operation puts tokens in, replaces modules, hears others or stands at weights that are read
    by what is no linear layer, the model runs once for each operation, on its rows. Parts are
    trained so; what was unfrozen is not, where more than one made something of it.

    Raises OperationError where there is no such operation, inside `disabled`, and where unfrozen
    tensors would have to be trained; GraftError, in a forward, where rows are not to be told.

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
    slots = list(slots_of(done))
    values = [_values(slots, op) for op in (*used, None)]
    _check_trained(model, slots, used, call)
    if all(map(_acts_by_rows, used)) and all(_is_layer(slot) for slot in slots):
        for op in done:
            journal.set(op, "strength", float(op in used))
        _group(used, rows, journal)
        for module in dict.fromkeys(module for slot in slots for module, _ in slot.places):
            journal.set(module, "forward", Layer(module, rows, values).forward)
    else:
        apart = Apart(model, done, used, rows, slots, values)
        journal.set(model, "forward", apart.forward)


def _acts_by_rows(op: Operation) -> bool:
    """Whether all that it does is done to features of each row."""
    return all(
        each.is_small and len(each.reads) == 1 and _only(each.entry)
        if isinstance(each, HookedWeight)
        else not each.ends and all(_is_by_rows(action) for action in each.actions)
        for each in op.hooked_sites
    )


def _is_by_rows(action: Action) -> bool:
    """Whether a part takes rows as they come, of a map that was made of a whole batch, too."""
    plain = action.place in BY_ROWS and not action.hears
    return plain and not any(map_readers(action.part))


def _only(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding))


def _is_layer(slot: Slot) -> bool:
    """Whether a tensor is of layers that are given features, and give some."""
    layers = (nn.Linear, nn.Embedding, *CONVS)
    return all(isinstance(module, layers) or is_norm(module) for module, _ in slot.places)


def _values(slots: list[Slot], op: Operation | None) -> dict[tuple[nn.Module, str], Tensor]:
    """What tensors are where one operation alone is active; the tensor itself, where it is that."""
    values = {}
    for slot in slots:
        value, tensor = composed(slot, {op: 1.0} if op else {}), slot.tensor
        if tensor is not None:
            same = tensor.shape == value.shape and torch.equal(tensor, value)
            values.update(dict.fromkeys(slot.places, tensor if same else value))
    return values


def _check_trained(model: nn.Module, slots: list[Slot], used: list[Operation], call: str) -> None:
    """Raise OperationError where what only one tensor can be would have to be trained."""
    if not (model.training and torch.is_grad_enabled()):
        return
    for slot in slots:
        asks = slot.tensor is not None and slot.tensor.requires_grad
        several = [c.operation.name for c in slot.claims if c.operation in used]
        if asks and len(several) > 1:
            raise OperationError(
                call,
                f"{slot.name} of a {type(slot.module).__name__} is trained by {several}, and only "
                "one of these would be.",
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


class Layer:
    """The forward of a layer whose tensors are others for each of the rows."""

    def __init__(
        self, module: nn.Module, rows: Rows, values: list[dict[tuple[nn.Module, str], Tensor]]
    ) -> None:
        self.module, self.rows, self.path = module, rows, type(module).__name__
        self.values = [{name: v for (m, name), v in each.items() if m is module} for each in values]
        self.names: tuple[str, ...] = ()
        self.base = vars(module).get("forward")

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x, _ = input_of(args, kwargs, self)
        axis = self.rows.axis(x, self.path)
        pieces = self.rows.taken(x, axis)
        outs = [self._run(p, values) for p, values in zip(pieces, self.values, strict=True)]
        return self.rows.joined(outs, axis, x.shape[axis])

    def _run(self, x: Tensor, values: dict[str, Tensor]) -> Tensor:
        own = vars(self.module)
        try:
            own.update(values)
            y: Tensor = self.base(x) if self.base else type(self.module).forward(self.module, x)
        finally:
            for name in values:
                own.pop(name, None)
        return y


class Apart:
    """The forward of a model that runs once for each operation, on its rows."""

    def __init__(
        self,
        model: nn.Module,
        done: list[Operation],
        used: list[Operation],
        rows: Rows,
        slots: list[Slot],
        values: list[dict[tuple[nn.Module, str], Tensor]],
    ) -> None:
        self.model, self.done, self.rows = model, done, rows
        self.used, self.values = [*used, None], values
        self.base = vars(model).get("forward")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        indices = (*self.rows.each, self.rows.rest)
        runs = [
            (index, self._run(k, index, args, kwargs))
            for k, index in enumerate(indices)
            if len(index)
        ]
        leaves, spec = pytree.tree_flatten(runs[0][1])
        each = [pytree.tree_leaves(out) for _, out in runs]
        back = torch.cat([index for index, _ in runs]).argsort()
        joined = [self._joined([out[i] for out in each], runs, back) for i in range(len(leaves))]
        return pytree.tree_unflatten(joined, spec)

    def _run(self, k: int, index: Tensor, args: Any, kwargs: Any) -> Any:
        """The answer for some rows, where one operation alone is active."""
        journal = Journal()
        try:
            for op in self.done:
                journal.set(op, "strength", float(op is self.used[k]))
            for (module, name), value in self.values[k].items():
                vars(module)[name] = value
            some = pytree.tree_map_only(Tensor, lambda t: self._some(t, index), (args, kwargs))
            run = self.base or type(self.model).forward.__get__(self.model)
            return run(*some[0], **some[1])
        finally:
            for module, name in self.values[k]:
                vars(module).pop(name, None)
            journal.undo()

    def _some(self, tensor: Tensor, index: Tensor) -> Tensor:
        rows = tensor.dim() > 0 and tensor.shape[0] == self.rows.of
        return tensor.index_select(0, index) if rows else tensor

    def _joined(self, outs: list[Any], runs: list[tuple[Tensor, Any]], back: Tensor) -> Any:
        if all(out is None for out in outs):
            return None
        sizes = [len(index) for index, _ in runs]
        by_rows = [
            isinstance(out, Tensor) and out.dim() > 0 and len(out) == n
            for out, n in zip(outs, sizes, strict=True)
        ]
        if not all(by_rows):
            kind = type(outs[0]).__name__
            raise GraftError(
                "mixed(model, ...)",
                f"the model gives a {kind} that is not of rows (a loss, a cache).",
                "Ask for what is of rows: no labels=, use_cache=False.",
            )
        return torch.cat(outs).index_select(0, back)
