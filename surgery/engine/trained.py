"""The one set of what is trained of the base: handed out, saved, counted, and brought back.

Rules unfreeze tensors as they are applied. Others come later: unfrozen by hand, of a module that
was put in, made by a parametrization. `adopt` writes these into the journal of the last operation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._preserve import same
from .._text import first_few
from ..structure.layers import named_modules
from .journal import Flag, Journal, Key, Value
from .norm_statistics import METHODS
from .obstacles import Obstacle, dotted, refuse, tensor_of
from .operation import Operation, operations


class Place(NamedTuple):
    """A tensor of the base: its path, the module that holds it, and its name there."""

    path: str
    module: nn.Module
    name: str
    tensor: Tensor


def parameters_of(model: nn.Module) -> Iterator[Place]:
    """The parameters of the base, a tied one once."""
    return _places(model, "_parameters")


def buffers_of(model: nn.Module) -> Iterator[Place]:
    """The buffers of the base that a state holds, each once."""
    return (
        place
        for place in _places(model, "_buffers")
        if place.name not in place.module._non_persistent_buffers_set
    )


def _places(model: nn.Module, table: str) -> Iterator[Place]:
    seen: set[int] = set()
    for path, module in named_modules(model):
        for name, tensor in getattr(module, table).items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield Place(dotted(path, name), module, name, tensor)


def by_hand(model: nn.Module) -> list[Place]:
    """What asks for a gradient, and no operation knows: neither a rule nor `adopt` took it up.

    What has no values yet (of a lazy module) is none of it.
    """
    known = _known(operations(model))
    asking = (p for p in parameters_of(model) if p.tensor.requires_grad and not is_lazy(p.tensor))
    return [place for place in asking if id(place.tensor) not in known]


def _known(done: Iterable[Operation]) -> set[int]:
    return {id(value.tensor) for operation in done for value in operation.journal.values}


def adopt(model: nn.Module, places: Iterable[Place] | None = None) -> None:
    """Let the last operation know of what is trained by hand, with its value as it is now.

    places  these, which are trained from now on; None: what asks for a gradient already
    """
    for last in operations(model)[-1:]:
        known, there = _known([last]), _there(last)
        for place in by_hand(model) if places is None else places:
            where, tensor = (place.module, place.name), place.tensor
            if not isinstance(tensor, nn.Parameter) or id(tensor) in known:
                continue
            last.adopted.append(where)
            if (id(place.module), place.name) in there:
                last.journal.keep_flag(*where, trained=False)
            last.journal.keep_gradient(*where, tensor)
            last.journal.keep_value(*where)
            tensor.requires_grad_(True)


def trained_of(model: nn.Module, operation: Operation) -> list[Place]:
    """The parameters of the base that an operation trains; the last one what is new, too."""
    claims = [module._parameters.get(name) for module, name in operation.claims]
    adopted = [module._parameters.get(name) for module, name in operation.adopted]
    known = {id(tensor) for tensor in (*claims, *adopted)}
    mine = [place for place in parameters_of(model) if id(place.tensor) in known]
    return mine + (by_hand(model) if operation is operations(model)[-1] else [])


def beyond_rules(model: nn.Module, operation: Operation) -> list[Place]:
    """Those of them that no rule unfroze, and the buffers of modules that are new."""
    adopted = {(id(module), name) for module, name in operation.adopted}
    ours = [p for p in trained_of(model, operation) if (id(p.module), p.name) in adopted]
    if operation is operations(model)[-1]:
        ours += [*by_hand(model), *_new_buffers(model, operation)]
    return ours


def changed_buffers(
    model: nn.Module, operation: Operation, own: Mapping[tuple[nn.Module, str], Tensor]
) -> list[Place]:
    """The buffers that are not what they were, and those of modules that are new.

    own  what an operation has made of them, where others are active
    """
    was = {(id(v.module), v.name): v.value for v in operation.journal.buffers}
    by_id = {id(v.buffer): v.value for v in operation.journal.buffers}
    changed = []
    for place in buffers_of(model):
        before = was.get((id(place.module), place.name), by_id.get(id(place.tensor)))
        now = own.get((place.module, place.name), place.tensor)
        if before is not None and not (now.is_meta or same(now, before)):
            changed.append(place)
    new = _new_buffers(model, operation) if operation is operations(model)[-1] else []
    return changed + new


def _new_buffers(model: nn.Module, operation: Operation) -> list[Place]:
    known, there = {id(v.tensor) for v in operation.journal.buffers}, _there(operation)
    return [
        place
        for place in buffers_of(model)
        if (id(place.module), place.name) not in there and id(place.tensor) not in known
    ]


def _there(operation: Operation) -> set[tuple[int, str]]:
    """Where the base had tensors when the rules were applied: id of the module, and name."""
    return {(id(known.module), name) for known in operation.known for name in known.names}


def changed_frozen(model: nn.Module) -> list[str]:
    """The paths of what is frozen, was written to since, and is in no set: trained by hand, once.

    What was merged into is looked after there.
    """
    done = operations(model)
    changed = set[int]().union(*(operation.frozen.changed() for operation in done))
    merged = {id(value.tensor) for op in done for value in op.merge_journal.values}
    changed -= _known(done) | merged
    places = parameters_of(model) if changed else ()
    return [p.path for p in places if id(p.tensor) in changed and not p.tensor.requires_grad]


def lost_module(model: nn.Module, operation: Operation) -> nn.Module | None:
    """A module that is not in the model any more, and held what nothing there holds now.

    That is a part, statistics that are frozen, or a trained tensor where nothing is trained now.
    """
    here = {id(module) for module in model.modules()}
    entries = operation.journal.entries
    guarded = [it.module for it in entries if isinstance(it, Key) and it.key in METHODS]
    frozen = [module for module in guarded if module not in operation.norms]
    ends = [end for hooked in operation.hooked_sites for end in (hooked.entry, hooked.exit)]
    held = (*ends, *frozen, *_trained_then(model, operation))
    return next((module for module in held if id(module) not in here), None)


def _trained_then(model: nn.Module, operation: Operation) -> list[nn.Module]:
    """The modules of which a tensor is in the journal, and none is trained at their path now."""
    trained = {path for path, m in named_modules(model) if any(map(_asks, m.parameters()))}
    tensors = {id(place.tensor) for place in parameters_of(model)}
    values = (value for value in operation.journal.values if value.buffer is None)
    of = {id(value.module) for value in values if id(value.tensor) not in tensors}
    return [it.module for it in operation.known if id(it.module) in of and it.path not in trained]


def _asks(tensor: Tensor) -> bool:
    return tensor.requires_grad


def expect_frozen(model: nn.Module) -> None:
    """Let what was unfrozen by hand, and was there, be frozen as the last operation is undone."""
    for last in operations(model)[-1:]:
        there = _there(last)
        for place in by_hand(model):
            if (id(place.module), place.name) in there:
                last.journal.keep_flag(place.module, place.name, trained=False)


# on the way back -------------------------------------------------------------------------------


def check_undoable(model: nn.Module, journals: Collection[Journal], call: str) -> None:
    """Raise OperationError, the model untouched, where something cannot be brought back.

    What was in a module that is not in the model any more is left out: nobody could mend it. So is
    what was not there when the rules were applied: it may go as it came; and what has no memory, in
    a model that has none anywhere.
    """
    theirs = {where for operation in operations(model) for where in _came_later(operation)}
    on_meta = all(place.tensor.is_meta for place in parameters_of(model))
    found = [
        it
        for journal in journals
        for it in journal.obstacles
        if (id(it.module), it.name) not in theirs and not (on_meta and it.without_memory)
    ]
    refuse(call, [*found, *_tied_since(model, journals)], paths_of(model))


def _tied_since(model: nn.Module, journals: Collection[Journal]) -> Iterator[Obstacle]:
    """Of tensors to be written back, those that a place of the base holds whose own was another."""
    done = operations(model)
    adopted = {(id(m), name) for operation in done for m, name in operation.adopted}
    values = [v for journal in journals for v in journal.values if v.buffer is None]
    kept = {(id(value.module), value.name) for value in values}
    there = set[tuple[int, str]]().union(*map(_there, done)) - kept - adopted
    others = {
        id(tensor): dotted(path, name)
        for path, module in named_modules(model)
        for name, tensor in module._parameters.items()
        if tensor is not None and (id(module), name) in there
    }
    for value in values:
        if id(value.tensor) in others and (id(value.module), value.name) not in adopted:
            fact = f"is tied to {others[id(value.tensor)]} now"
            yield Obstacle(value.module, value.name, fact, UNTIE.format(value.name))


UNTIE = (
    "Give it a tensor of its own, {{module}}.{0} = torch.nn.Parameter({{module}}.{0}.detach()"
    ".clone())"
)


def _came_later(operation: Operation) -> set[tuple[int, str]]:
    """What it adopted that was not there when its rules were applied."""
    return {(id(module), name) for module, name in operation.adopted} - _there(operation)


def paths_of(model: nn.Module) -> dict[int, str]:
    """The path of each module of the base, by its id."""
    return {id(module): path for path, module in named_modules(model)}


def first_paths(model: nn.Module) -> dict[int, str]:
    """The path of each module of the base, by its id; of what was wrapped since: its first one.

    So a file fits the plain model, though the blocks of this one were compiled one by one, or put
    into wrappers that checkpoint them.
    """
    now = dict(named_modules(model))
    known = {id(it.module): it.path for op in reversed(operations(model)) for it in op.known}
    paths = {id(module): path for path, module in now.items()}
    for path, module in now.items():
        first = known.get(id(module), path)
        wrapper = now.get(first)
        free = wrapper is None or (
            id(wrapper) not in known and not _names(wrapper) & _names(module)
        )
        if free and _is_within(first.split("."), path.split(".")):
            paths[id(module)] = first
    return paths


def _names(module: nn.Module) -> set[str]:
    return {*module._parameters, *module._buffers}


def _is_within(steps: list[str], longer: list[str]) -> bool:
    """Whether some steps are those of a longer path, in order, between others.

    >>> _is_within(["blocks", "0", "mlp"], ["blocks", "0", "_orig_mod", "mlp"])
    True
    """
    rest = iter(longer)
    return all(step in rest for step in steps)


def stays(model: nn.Module, chosen: list[Operation]) -> str:
    """What cannot be brought back though nothing stands in the way, in words; "" where all can."""
    kept = {id(value.tensor) for value in _values(chosen)}  # in a merge, too
    unknown = [p for p in by_hand(model) if not (p.tensor.is_meta or id(p.tensor) in kept)]
    ways = {
        "trained without a rule, and never handed out by surgery.parameters(model), so what "
        "they were is not known": [place.path for place in unknown],
        "frozen now, and written to since the rules were applied, so what they were is not "
        "known": changed_frozen(model),
        "of modules that were put in since": _put_in(model, chosen),
        "in modules that were replaced by others, which stay": _replaced(model, chosen),
        "without memory when the rules were applied": _without_memory(model, chosen),
        "no longer there to be given back their requires_grad": _flags_lost(model, chosen),
    }
    return "; ".join(f"{first_few(paths)}: {why}" for why, paths in ways.items() if paths)


def _put_in(model: nn.Module, chosen: list[Operation]) -> list[str]:
    there, later = _there(chosen[0]), set().union(*map(_came_later, chosen))
    places = [(p.path, (id(p.module), p.name)) for p in parameters_of(model)]
    return [path for path, where in places if where in later - there]


def _replaced(model: nn.Module, chosen: list[Operation]) -> list[str]:
    here = {id(module) for _, module in named_modules(model)}
    ids = {id(place.tensor) for place in parameters_of(model)}
    named = {*_put_in(model, chosen), *(place.path for place in by_hand(model))}
    gone = {
        id(known.module): known.path
        for operation in chosen
        for known in operation.known
        if id(known.module) not in here
    }
    lost = [
        dotted(gone[id(value.module)], value.name)
        for value in _values(chosen)
        if id(value.module) in gone and id(value.tensor) not in ids
    ]
    return [path for path in dict.fromkeys(lost) if path not in named]


def _values(chosen: list[Operation]) -> Iterator[Value]:
    """The values of parameters that are to come back."""
    for operation in chosen:
        for journal in (operation.journal, operation.merge_journal):
            yield from (value for value in journal.values if value.buffer is None)


def _without_memory(model: nn.Module, chosen: list[Operation]) -> list[str]:
    kept = {id(value.tensor) for value in _values(chosen) if value.value.is_meta}
    places = parameters_of(model)
    return [p.path for p in places if id(p.tensor) in kept and not p.tensor.is_meta]


def _flags_lost(model: nn.Module, chosen: list[Operation]) -> list[str]:
    paths = paths_of(model)
    entries = (entry for operation in chosen for entry in operation.journal.entries)
    lost = [
        dotted(paths[id(flag.module)], flag.name)
        for flag in entries
        if isinstance(flag, Flag) and flag.trained and id(flag.module) in paths
        if tensor_of(flag.module, flag.name) is None
    ]
    return list(dict.fromkeys(lost))
