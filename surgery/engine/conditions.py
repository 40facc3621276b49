"""States of a model in which a call cannot be right: what each is seen by, and what to do instead.

A fact is a function of a model: a sentence, "" where it is not so. A table has the facts that a
kind of call cannot bear, each with its remedy; it is looked through before the call changes
anything, and finds the same on all ranks.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._inputs import tensors_in
from .._shards import is_distributed
from .._text import first_few
from ..errors import OperationError
from ..structure.module_tree import ADDITIONS
from .hooks import is_replaced
from .journal import owner_of
from .operation import Operation, additions_of, operations

Fact: TypeAlias = Callable[[nn.Module], str]
Table: TypeAlias = dict[Fact, str]


def check_state(model: nn.Module, call: str, *tables: Table) -> None:
    """Raise OperationError where the model is in a state that such a call cannot bear."""
    for table in tables:
        for find, remedy in table.items():
            if fact := find(model):
                raise OperationError(call, fact, remedy)


# in pieces -------------------------------------------------------------------------------------


def in_shards(model: nn.Module) -> str:
    """By fully_shard, which gathers and cuts them around each forward; or past finding."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    modules = modules_of(model) if kind is not None else []
    if any(isinstance(module, kind) for module in modules if kind is not None):
        held = {id(p) for m in modules if _is_managed(m) for p in m._parameters.values()}
        name = _named(model, lambda p: id(p) in held)
        return f"{name or 'what is in it'} {IN_SHARDS}"
    return out_of_reach(model)


def out_of_reach(model: nn.Module) -> str:
    """In pieces that have no shape: FullyShardedDataParallel's, which are marked.

    A linear whose weight was emptied is looked after by a library that torch does not know of.
    """
    if name := _named(model, lambda p: hasattr(p, "_fsdp_flattened")):
        return f"{name} {IN_SHARDS}"
    modules = modules_of(model)
    if any(isinstance(module, nn.Linear) and _was_emptied(module) for module in modules):
        emptied = next(
            n for n, m in model.named_modules() if isinstance(m, nn.Linear) and _was_emptied(m)
        )
        return f"{emptied}.weight was emptied: a library keeps it elsewhere, perhaps in shards."
    return ""


IN_SHARDS = "is in shards: each process holds a piece of it."


def modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, each once, in no order: much faster than with their names."""
    found, todo = {id(model): model}, [model]
    while todo:
        for child in todo.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                todo.append(child)
    return list(found.values())


def _named(model: nn.Module, test: Callable[[Tensor], bool]) -> str:
    """The name of a parameter that a test finds, "" where it finds none."""
    tensors = (p for module in modules_of(model) for p in module._parameters.values())
    if not any(p is not None and test(p) for p in tensors):
        return ""
    return next(name for name, p in model.named_parameters() if test(p))


def merged_in_shards(model: nn.Module) -> str:
    """It was merged first, and sharded then: its parts were aside, and are not in shards."""
    parts = [p for operation in operations(model) for p in operation.parameters()]
    fact = in_shards(model) if parts and not any(map(is_distributed, parts)) else ""
    return f"its parts were merged when it was sharded, and are not: {fact}" if fact else ""


def in_columns(model: nn.Module) -> str:
    """By tensor parallelism: distributed tensors that nothing gathers around a forward."""
    name = _named(model, is_distributed)
    told = "is a distributed tensor (tensor parallel): the features there are split."
    return f"{name} {told}" if name else ""


def _is_managed(module: nn.Module) -> bool:
    return "_is_fsdp_managed_module" in vars(module)


def _was_emptied(linear: nn.Linear) -> bool:
    if not linear.in_features * linear.out_features:  # a lazy one, whose weight tells no size
        return False
    weight = linear._parameters.get("weight")
    return weight is not None and not weight.numel()


# reduced by another ----------------------------------------------------------------------------


def holds_ddp(model: nn.Module) -> str:
    """A part of it is wrapped, and reduces the gradients of what it had when it was wrapped."""
    kinds = _kinds_of_ddp()
    if not any(isinstance(module, kinds) for module in modules_of(model)):
        return ""
    wrapped = [name for name, m in model.named_modules() if name and isinstance(m, kinds)]
    return f"{wrapped[0]} is wrapped in DistributedDataParallel." if wrapped else ""


def held_by_ddp(model: nn.Module) -> str:
    """It is marked by torch's `replicate`, or a wrapper among all objects has its parameters."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ""
    kinds, own = _kinds_of_ddp(), {id(p) for p in model.parameters()}
    things = gc.get_objects()
    found = {each for each in set(map(type, things)) if issubclass(each, kinds)}
    wrappers = [thing for thing in things if type(thing) in found] if found else []
    if any(w is model or any(id(p) in own for p in w.parameters()) for w in wrappers):
        return (
            "a DistributedDataParallel holds this model: it reduces the gradients of the "
            "parameters that there were when it was made."
        )
    return ""


def _kinds_of_ddp() -> tuple[type, ...]:
    """Wrappers, and what torch's `replicate` makes of the class of a module: if ever imported."""
    composed = sys.modules.get("torch.distributed._composable.replicate")
    marked = getattr(composed, "DDP", None)
    return (nn.parallel.DistributedDataParallel, *([marked] if marked else []))


# without memory --------------------------------------------------------------------------------


def offloaded(model: nn.Module) -> str:
    """Weights are on meta, and a forward that was put in the place of a module's own fetches them.

    (accelerate's hooks stand on the module itself or on one around it, under `_hf_hook`.)
    """
    return next((f"{name} {OFFLOADED}" for name, _ in _offloaded(model)), "")


def trained_offloaded(model: nn.Module) -> str:
    """What is trained is among them: what is frozen of the base is kept by nobody."""
    trained = (name for name, p in _offloaded(model) if p.requires_grad)
    return next((f"{name} {OFFLOADED}" for name in trained), "")


OFFLOADED = "is offloaded: it is on the meta device until a forward fetches it."


def _offloaded(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if not any(map(_has_other_forward, modules_of(model))):
        return
    for path, module in model.named_modules():
        if _has_other_forward(module):
            inner = module.named_parameters(path, recurse="_hf_hook" in vars(module))
            yield from ((name, p) for name, p in inner if p.is_meta)


def _has_other_forward(module: nn.Module) -> bool:
    own = vars(module)
    return "_hf_hook" in own or ("forward" in own and not is_replaced(module))


def on_meta(model: nn.Module) -> str:
    """Some tensor has a shape and no memory."""
    names = [name for name, p in model.named_parameters() if p.is_meta]
    kind = f"this {type(model).__name__} has {first_few(names)}"
    return f"{kind} on the meta device, without memory." if names else ""


def check_example(model: nn.Module, example: Any, call: str) -> None:
    """Raise OperationError where one of model and example has memory, and the other has none."""
    weights = [p for name, p in model.named_parameters() if not name.startswith(f"{ADDITIONS}.")]
    given = list(tensors_in(example))
    without = [all(tensor.is_meta for tensor in both) for both in (weights, given)]
    if not (weights and given) or without[0] is without[1] or offloaded(model):
        return
    kinds = (f"this {type(model).__name__}", "the example")
    bare, other = kinds if without[0] else kinds[::-1]
    raise OperationError(
        call,
        f"{bare} is on the meta device, and {other} is not.",
        "Give both memory, or both none; without an example a model on meta is planned as it is.",
    )


def unshaped(model: nn.Module) -> str:
    """Parameters of lazy modules, which a first forward makes."""
    if not _named(model, is_lazy):
        return ""
    names = [name for name, p in model.named_parameters() if is_lazy(p)]
    return f"{first_few(names)} are lazy: without a shape until a first forward."


# for a while ------------------------------------------------------------------------------------


def inside_disabled(model: nn.Module) -> str:
    """Inside of `disabled` the model stands for its base."""
    if all(operation.enabled for operation in operations(model)):
        return ""
    return "inside disabled(model) the model is its base, and this would act on that."


def inside_mixed(model: nn.Module) -> str:
    """Inside of `mixed` each row of a batch is another operation's."""
    if not any(operation.is_mixed for operation in operations(model)):
        return ""
    return "inside mixed(model, ...) each row of a batch runs an operation of its own."


# one in another --------------------------------------------------------------------------------


def operated_below(model: nn.Module) -> str:
    """A module below is operated as a model of its own: its parts are not in this one's set."""
    roots, modules = _roots(model), modules_of(model)
    inner = next((m for m in modules if m is not model and id(m) in roots), None)
    if inner is None:
        return ""
    path = next(path for path, module in model.named_modules() if module is inner)
    return f'its model.get_submodule("{path}") is operated as a model of its own.'


def operated_around(model: nn.Module) -> str:
    """A model that is none of its modules is operated, and has its parts or its hooks in here."""
    modules = {id(module) for module in modules_of(model)}
    around = (root for key, root in _roots(model).items() if key not in modules)
    root = next(around, None)
    kind = type(model).__name__
    return f"parts of a larger {type(root).__name__} run in this {kind}." if root else ""


def hosts_another(model: nn.Module) -> str:
    """What is kept in it was added to a model that it is a module of."""
    roots = [operation.model[0] for operation in operations(model)]
    if not any(root is not model and model in modules_of(root) for root in roots):
        return ""
    kind = type(roots[0]).__name__
    return f"this {type(model).__name__} was never operated: the {kind} that holds it was."


def _roots(model: nn.Module) -> dict[int, nn.Module]:
    """The models whose operations keep parts or act in this one, by id; itself is none of them."""
    roots = {
        id(operation.model[0]): operation.model[0]
        for module in modules_of(model)
        if not isinstance(module, torch.jit.ScriptModule)
        for operation in _acting(module)
        if operation.model and not operation.undone
    }
    roots.pop(id(model), None)
    return roots


def _acting(module: nn.Module) -> Iterator[Operation]:
    """The operations that are kept in a module, or act there by a hook or a method."""
    if (additions := additions_of(module)) is not None:
        yield from additions.operations
    own = vars(module)
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    for method in (*hooks, own.get("forward"), own.get("train")):
        owner = owner_of(method) or method
        of = getattr(owner, "switch", None) or getattr(owner, "operation", None)
        if isinstance(of, Operation):
            yield of


# made where nothing is trained -----------------------------------------------------------------


def in_inference(model: nn.Module) -> str:
    """Parameters made under torch.inference_mode(): torch lets no one train or change them."""
    name = _named(model, lambda p: not is_lazy(p) and p.is_inference())
    told = "was made in torch.inference_mode(): torch lets no one change or train it."
    return f"{name} {told}" if name else ""


# what calls cannot bear ------------------------------------------------------------------------

_GATHER = (
    "Gather it on all ranks, get_model_state_dict(model, options=StateDictOptions("
    "full_state_dict=True)) of torch.distributed.checkpoint.state_dict (of the wrapper, where "
    "there is one); load that into a plain model, operated by the same rules if this one was, and "
    "call it on that."
)
_BRING_BACK = (
    "Bring the weights back first: accelerate.hooks.remove_hook_from_submodules(model), or load "
    "the model without offloading."
)
_CLONE = (
    "Make them anew outside of it: for p in model.parameters(): p.data = p.data.clone(); or build "
    "the model outside."
)

_ONE_SET = (
    "Call surgery.revert on that module first (surgery.save keeps what was trained there), and "
    "give one surgery.apply on the whole model all rules, with addresses from its root. Towers of "
    "a model that is not operated itself are operated each alone."
)

_APPLY_FIRST = "Apply the rules to the whole model first, and {} what comes back."

# new parts, or other parameters that are trained
APPLYING: Table = {
    unshaped: "Run the model once on an example, and apply the rules then.",
    in_shards: _APPLY_FIRST.format("shard"),
    in_columns: "Apply the rules to the whole model, and shard what comes back by fully_shard.",
    holds_ddp: _APPLY_FIRST.format("wrap"),
    held_by_ddp: _APPLY_FIRST.format("wrap"),
    in_inference: _CLONE,
    operated_below: _ONE_SET,
    operated_around: "Call surgery.apply on that larger model, with addresses from its root; or "
    "surgery.revert it first.",
}
# operations that are all that act in the model
ALONE: Table = {
    hosts_another: "Give that model.",
    operated_below: _ONE_SET,
}
# new parts, or others that are trained, where a weight is on meta
MAKING: Table = {offloaded: _BRING_BACK}
# values that are read of what is trained: of what is in pieces, gathered one by one
READING: Table = {out_of_reach: _GATHER, trained_offloaded: _BRING_BACK}
# values that are written, too
WRITING: Table = {**READING, in_inference: _CLONE}
# parts that act again
UNMERGING: Table = {
    merged_in_shards: "Nobody would reduce their gradients: unmerge it first, and shard it then.",
}
# values that must be here as a whole
UNCUT: Table = {in_shards: _GATHER, in_columns: _GATHER}
# values that must be there
FILLING: Table = {
    on_meta: 'Give it memory first, model.to_empty(device="cpu"), and load the base.',
}
# parameters that an optimiser is given
TRAINING: Table = {
    holds_ddp: "Parts are outside of it, and no one would reduce their gradients: unwrap it, and "
    "wrap the whole model.",
}
# parameters that are in no module
OWN: Table = {
    held_by_ddp: "Parameters that each operation has of its own would not be: train each by "
    "itself, activate(model, name), or without DistributedDataParallel."
}
# members of the model, and not of its base
MIXED: Table = {inside_mixed: "Call it outside of mixed(model, ...)."}
DISABLED: Table = {inside_disabled: "Call it outside of disabled(model).", **MIXED}
