"""What each of several operations has made of the base tensors that it trains.

There is one tensor, and each operation that trains it has a value of its own: what the tensor is
depends on which are active. Their parts stand side by side, and need none of this.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._preserve import same
from .._shards import cut
from .journal import Journal, Value
from .norm_statistics import follow
from .obstacles import tensor_of
from .operation import Operation, Own, operations


class Claim(NamedTuple):
    """An operation that trains a tensor, and what that was when its rules were applied."""

    operation: Operation
    before: Tensor


class Slot(NamedTuple):
    """A tensor of the base, a module's of a name, and all that claim it, the oldest first.

    tied  where modules share it: its other places
    """

    module: nn.Module
    name: str
    claims: list[Claim]
    tied: list[tuple[nn.Module, str]]

    @property
    def key(self) -> tuple[nn.Module, str]:
        """Where it is kept, first of all."""
        return self.module, self.name

    @property
    def places(self) -> list[tuple[nn.Module, str]]:
        """All of its places."""
        return [self.key, *self.tied]

    @property
    def tensor(self) -> Tensor | None:
        """What it is now."""
        return tensor_of(self.module, self.name)

    @property
    def is_parameter(self) -> bool:
        return self.name in self.module._parameters

    def own(self, operation: Operation) -> Tensor | None:
        """What an operation has made of it, if that was ever put by."""
        own = operation.own.get(self.key)
        return None if own is None else self.cut(own)

    def cut(self, value: Tensor) -> Tensor:
        """A value as the tensor lies: that may have been sharded since."""
        now = self.tensor
        return value if now is None else cut(value, now)


def slots_of(done: Sequence[Operation], norms: bool = False) -> Iterator[Slot]:
    """The tensors of the base that operations train; buffers that have changed, or once had.

    norms  also the other buffers of modules of which they train something: statistics
    """
    found: dict[tuple[int, str], Slot] = {}
    for operation in done:
        for value in _claimed(operation):
            key = id(value.module), value.name
            slot = found.setdefault(key, Slot(value.module, value.name, [], []))
            if not slot.claims or slot.claims[-1].operation is not operation:
                slot.claims.append(Claim(operation, slot.cut(value.value)))
    counting = _counting(done) if norms else set()
    firsts: dict[int, Slot] = {}
    for slot in found.values():
        first = firsts.setdefault(id(slot.tensor), slot)
        if first is not slot:
            first.tied.append((slot.module, slot.name))
    for slot in firsts.values():
        if slot.tensor is None or slot.tensor.is_meta:
            continue
        if _is_in_use(slot) or id(slot.module) in counting:
            yield slot


def _counting(done: Sequence[Operation]) -> set[int]:
    """Modules of which operations train something, and which may count what runs."""
    trained = {id(module) for operation in done for module, _ in operation.claims}
    return trained | {id(norm) for operation in done for norm in operation.norms}


def _claimed(operation: Operation) -> Iterator[Value]:
    """What an operation keeps of tensors that it trains, and of all buffers."""
    trained = {(id(module), name) for module, name in operation.claims}
    for value in operation.journal.values:
        if value.buffer is not None or (id(value.module), value.name) in trained:
            yield value


def _is_in_use(slot: Slot) -> bool:
    if slot.name not in slot.module._buffers:
        return True
    before, now = slot.claims[0].before, slot.tensor
    put_by = any(slot.own(claim.operation) is not None for claim in slot.claims)
    return put_by or (now is not None and not same(now, before))


def composed(slot: Slot, strengths: Mapping[Operation, float]) -> Tensor:
    """What a tensor is where operations are so active: W + sum of strength * (own - before).

    One that is alone, or goes on from what the one below it made, is what it made to the bit.
    """
    value = slot.claims[0].before
    for operation, before in slot.claims:
        strength, own = strengths.get(operation, 0.0), slot.own(operation)
        if not strength or own is None:
            continue
        if (strength == 1 and same(value, before)) or not own.is_floating_point():
            value = own
        else:
            value = value + strength * (own - before).to(value)
    return value


def own_parameters(
    model: nn.Module, done: Sequence[Operation], operation: Operation
) -> list[nn.Parameter]:
    """What an operation trains of the base, each a parameter of its own, for mixed batches."""
    put_by(done)
    mine = [slot for slot in slots_of(done) if operation in {c.operation for c in slot.claims}]
    mine = [slot for slot in mine if isinstance(slot.tensor, nn.Parameter)]
    own = operation.own_parameters
    if mine and operation.is_trained and not own:
        operation.journal.hook(model, tell, before=True)
        operation.told = tell
    for slot in mine if operation.is_trained else ():
        if slot.key not in own:
            own[slot.key] = Own.of(composed(slot, {operation: 1.0}).to(slot.tensor))
    return [own[slot.key].parameter for slot in mine if slot.key in own]


def tell(model: nn.Module, args: Any = ()) -> None:
    """Before a forward, and a state, what optimizers made of such parameters is told."""
    if not torch.compiler.is_compiling():
        pull(operations(model))


def pull(done: Sequence[Operation]) -> None:
    """What parameters of their own have learnt, operations have made of the base."""
    if not any(operation.own_parameters for operation in done):
        return
    now = {operation: operation.strength for operation in done}
    for slot in slots_of(done):
        taken = [_take(slot, claim) for claim in slot.claims]
        if any(taken) and slot.tensor is not None:
            with torch.no_grad():
                slot.tensor.copy_(composed(slot, now))


def _take(slot: Slot, claim: Claim) -> bool:
    """Keep what the parameter of a claim has learnt, if it has."""
    op = claim.operation
    own = op.own_parameters.get(slot.key)
    if own is None or slot.tensor is None or same(own.parameter.detach(), own.seen):
        return False
    value = own.parameter.detach().clone()
    made = learnt(slot, claim, {op: 1.0}, value.to(slot.tensor))
    op.own[slot.key] = made.clone()  # a file is filled into it, and the other tells what changed
    op.own_parameters[slot.key] = own._replace(seen=value)
    return True


def base_values(done: Sequence[Operation]) -> dict[int, Tensor]:
    """What tensors of the base are without any operation, by id; of those that one trains."""
    put_by(done)
    return {id(slot.tensor): composed(slot, {}) for slot in slots_of(done)}


def own_values(
    done: Sequence[Operation], operation: Operation
) -> dict[tuple[nn.Module, str], Tensor]:
    """What an operation has made of tensors that now show, or may show, what others made."""
    alone = all(other.strength == 1 for other in done)
    if alone and all(len(slot.claims) == 1 for slot in slots_of(done)):
        return {}
    put_by(done)
    for (module, name), value in operation.own.items():
        tensor = tensor_of(module, name)
        if tensor is not None and (value.dtype, value.device) != (tensor.dtype, tensor.device):
            operation.own[module, name] = value.to(tensor)
    return operation.own


def put_by(done: Sequence[Operation]) -> None:
    """Keep for each operation what it has made of the tensors that it trains.

    What was learnt since the last time is of the latest that is active and trained.
    """
    now = {operation: operation.strength for operation in done}
    for slot in slots_of(done):
        for (operation, _), later in zip(slot.claims, slot.claims[1:], strict=False):
            if slot.own(operation) is None:  # it was on until the next was applied
                operation.own[slot.key] = later.before
        active = [claim for claim in slot.claims if claim.operation.strength]
        if active:
            _put_by(slot, active, now)
        else:
            _put_by_idle(slot, now)


def _put_by(slot: Slot, active: list[Claim], now: Mapping[Operation, float]) -> None:
    trained = [claim for claim in active if claim.operation.is_trained]
    last = (trained or active)[-1]
    if slot.own(last.operation) is None or not shows(slot, now):
        last.operation.own[slot.key] = _learnt(slot, last, now)


def _put_by_idle(slot: Slot, now: Mapping[Operation, float]) -> None:
    """Where none that claims a tensor is active. A warning where it was trained all the same."""
    last = slot.claims[-1].operation
    if slot.own(last) is None:
        last.own[slot.key] = _copy(slot)
    elif slot.is_parameter and not shows(slot, now):
        names = [claim.operation.name for claim in slot.claims]
        warnings.warn(
            f"{slot.name} of a {type(slot.module).__name__} was trained while none of {names}, "
            "whose it is, was active: what it learnt is lost. Train what is active, "
            "surgery.train_only(model, name).",
            stacklevel=5,
        )


def _learnt(slot: Slot, last: Claim, now: Mapping[Operation, float]) -> Tensor:
    """What the latest that is active has made of a tensor, of which it is so much."""
    return learnt(slot, last, now, _copy(slot))


def learnt(slot: Slot, claim: Claim, now: Mapping[Operation, float], value: Tensor) -> Tensor:
    """What an operation has made of a tensor that is this where operations are so active."""
    below, strength = composed(slot, {**now, claim.operation: 0.0}), now[claim.operation]
    if not value.is_floating_point() or (strength == 1 and same(below, claim.before)):
        return value
    return claim.before + (value - below) / strength


def shows(slot: Slot, now: Mapping[Operation, float]) -> bool:
    """Whether a tensor is what its operations make of it, in the dtype that it has now."""
    tensor = _copy(slot)
    return same(tensor, composed(slot, now).to(tensor))


def _copy(slot: Slot) -> Tensor:
    tensor: Any = slot.tensor
    copy: Tensor = tensor.detach().clone()
    return copy


def switch(
    done: Sequence[Operation], strengths: Mapping[Operation, float], journal: Journal
) -> None:
    """Let operations be so active; what they trained of the base is what that makes of it."""
    put_by(done)
    show(done, strengths, journal)


def show(done: Sequence[Operation], strengths: Mapping[Operation, float], journal: Journal) -> None:
    """As `switch`, of what is put by already."""
    written = set[int]()
    for slot in slots_of(done):
        if (tensor := slot.tensor) is not None:
            for module, name in slot.tied:
                journal.keep_value(module, name)
            journal.write(slot.module, slot.name, composed(slot, strengths))
            written.add(id(tensor))
    for operation in done:
        journal.set(operation, "strength", strengths[operation])
        operation.frozen.again(written)
    follow(done, journal)


def is_alone(done: Sequence[Operation], operation: Operation) -> bool:
    """Whether an operation began with the base, and not with what one below it had made of that."""
    return all(
        same(claim.before, slot.claims[0].before)
        for slot in slots_of(done)
        for claim in slot.claims
        if claim.operation is operation and slot.is_parameter
    )


def claimed_by(operations: Iterable[Operation]) -> set[int]:
    """The parameters of the base that operations train, by id."""
    places = [place for op in operations for place in (*op.claims, *op.adopted)]
    tensors = [module._parameters.get(name) for module, name in places]
    return {id(tensor) for tensor in tensors if tensor is not None}
