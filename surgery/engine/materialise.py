"""Values for parts that were made on the meta device, once their base has memory."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._preserve import preserved
from .._shards import cut
from .._text import first_few
from ..errors import OperationError
from .apply import operated
from .build import BuiltParts
from .conditions import DISABLED, MAKING, check_state
from .operation import Operation
from .placement import PartNames, name_all
from .start import tensors_of

Model = TypeVar("Model", bound=nn.Module)


def materialise(model: Model) -> Model:
    """Give parts that were made on the meta device the values that `apply` gives; the model back.

    By the seed of `apply`, to the bit what they would have been had the model had memory then. So a
    model is operated on meta, sharded, given memory (`to_empty`) and its base, and then its parts.
    Those that a state or a file has filled, and those of models in memory, stay as they are. Parts
    that are sharded (DTensor) get their shards; parts that are on meta still, memory.

    Raises OperationError where the base around a part is on meta still, and for copies of a model
    that was operated on meta, which do not know their rules.

    >>> from surgery import apply, at, lora
    >>> with torch.device("meta"):
    ...     model = nn.Sequential(nn.Linear(8, 8))
    >>> model = apply(model, at("0", lora(rank=2))).to_empty(device="cpu")
    >>> _ = model[0].load_state_dict(nn.Linear(8, 8).state_dict())
    >>> materialise(model)(torch.ones(1, 8)).shape
    torch.Size([1, 8])
    """
    call = "materialise(model)"
    done = operated(model, call)
    check_state(model, call, DISABLED, MAKING)
    for operation in done:
        bare = [name for name, tensor in tensors_of(operation) if tensor.is_meta]
        if missing := [*dict.fromkeys([*operation.start.lost(), *bare])]:
            _fill(operation, missing, call)
    return model


def _fill(operation: Operation, missing: list[str], call: str) -> None:
    if (plan := operation.start.plan) is None:
        raise OperationError(
            call,
            f'the values of "{operation.name}" are lost: it was moved to meta later, or was copied '
            "since it was made there.",
            "Operate a model on meta, materialise it, and copy that; or load its values.",
        )
    for p in plan.placements:
        p.settle()
    if bare := [p.site.path for p in plan.placements if p.device.type == "meta"]:
        raise OperationError(
            call,
            f"the base is on the meta device still, at {first_few(dict.fromkeys(bare))}.",
            'Give it memory, model.to_empty(device="cpu"), and its weights first.',
        )
    if any(hasattr(p, "_fsdp_flattened") for p in operation.parameters()):
        fact = "parts lie in flat pieces (FullyShardedDataParallel)."
        raise OperationError(call, fact, "Materialise before it wraps, or shard by fully_shard.")
    with preserved(), torch.no_grad():
        names = PartNames(plan.tree)  # which go by devices, too
        name_all(plan.placements, names)
        built = BuiltParts(plan.placements, names, plan.seed)
        values = {
            f"{key}.{name}": tensor
            for key, part in built.parts.items()
            for name, tensor in (*part.named_parameters(), *part.named_buffers())
        }
        for name in [*missing, *_counts(operation, missing)]:
            _put(operation, name, values[name])
    operation.start.given(missing)


def _counts(operation: Operation, missing: list[str]) -> list[str]:
    """The counters of norms beside these: torch takes what they are for what an older state has."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in missing)
    counters = [f"{path}.num_batches_tracked" for path in modules]
    buffers = dict(operation.named_buffers())
    return [name for name in counters if name in buffers and name not in missing]


def _put(operation: Operation, name: str, value: Tensor) -> None:
    """Let a tensor of a part be this: in its memory, in its shards, or in memory that is new."""
    path, _, attribute = name.rpartition(".")
    module = operation.get_submodule(path)
    table: dict[str, Any] = module._parameters
    if attribute not in table:
        table = module._buffers
    tensor: Any = table[attribute]
    if tensor.is_meta:
        is_parameter = isinstance(tensor, nn.Parameter)
        table[attribute] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
    else:
        tensor.copy_(cut(value, tensor))
