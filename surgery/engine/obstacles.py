"""Why a value cannot be written back to where it was: the tensor is gone, or another now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from .._shards import is_distributed
from .._text import first_few
from ..errors import OperationError


class Obstacle(NamedTuple):
    """What stands in the way of a tensor of a module, found by its name; and what to do.

    remedy  with {module} for an expression that gives the module
    """

    module: nn.Module
    name: str
    fact: str
    remedy: str

    @property
    def without_memory(self) -> bool:
        """Whether the tensor is there, and its values are nowhere."""
        tensor = tensor_of(self.module, self.name)
        return tensor is not None and tensor.is_meta


REMOVE = "torch.nn.utils.{}({{module}}, {!r})"


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of that name."""
    parameter = module._parameters.get(name)
    return parameter if parameter is not None else module._buffers.get(name)


def in_the_way(module: nn.Module, name: str, value: Tensor) -> Obstacle | None:
    """Why the tensor of that name cannot be given a value that it had; None where it can."""
    now = tensor_of(module, name)
    if now is None:
        return Obstacle(module, name, *_gone(module, name, value))
    if any(n > 1 and step == 0 for n, step in zip(now.shape, now.stride(), strict=True)):
        fact = "is expanded now: many of its numbers share one place in memory"
        return Obstacle(module, name, fact, "Give it memory of its own, by .data.clone()")
    kinds = {type(each.detach()) for each in (now, value) if not is_distributed(each)}
    if now.shape != value.shape:
        fact = f"is {(*now.shape,)}, and was {(*value.shape,)}"
        return Obstacle(module, name, fact, "Give it the shape that it had")
    if now.dtype != value.dtype and not (now.is_floating_point() and value.is_floating_point()):
        fact = f"is {now.dtype} now, and was {value.dtype}"
        return Obstacle(module, name, fact, "Give it the dtype that it had")
    if len(kinds) > 1:
        fact = f"is a {type(now.detach()).__name__} now, and was a {type(value).__name__}"
        return Obstacle(module, name, fact, "Make it again what it was")
    if now.is_meta and not value.is_meta:
        fact = "has no memory now (it is on the meta device; offloaded?)"
        return Obstacle(module, name, fact, "Bring it back into memory")
    return None


def _gone(module: nn.Module, name: str, value: Tensor) -> tuple[str, str]:
    """Fact and remedy where there is no tensor of that name: what others made of it."""
    if name in getattr(module, "parametrizations", ()):
        return "was re-parametrised", REMOVE.format("parametrize.remove_parametrizations", name)
    if f"{name}_mask" in module._buffers:
        return "was pruned", REMOVE.format("prune.remove", name)
    if f"{name}_g" in module._parameters:
        return "was re-parametrised by weight_norm", REMOVE.format("remove_weight_norm", name)
    if f"{name}_orig" in module._parameters:
        return "was re-parametrised by spectral_norm", REMOVE.format("remove_spectral_norm", name)
    shape = (*value.shape,)
    again = f"{{module}}.register_parameter({name!r}, torch.nn.Parameter(torch.empty({shape})))"
    return "was deleted", again


def refuse(
    call: str, obstacles: Iterable[Obstacle], paths: Mapping[int, str], remedy: str = ""
) -> None:
    """Raise OperationError if there are any in modules that are there: `paths` has theirs by id.

    remedy  where it is too late for the one of the first of them
    """
    found = {(id(it.module), it.name): it for it in obstacles if id(it.module) in paths}.values()
    if not found:
        return
    facts = [f"{dotted(paths[id(it.module)], it.name)} {it.fact}" for it in found]
    first = next(iter(found))
    module = f'model.get_submodule("{paths[id(first.module)]}")'
    mend = f"{first.remedy.replace('{module}', module)}, and call it again."
    fact = f"what was there cannot be brought back: {first_few(facts)}."
    raise OperationError(call, fact, remedy or mend)


def dotted(path: str, name: str) -> str:
    """The path of a tensor in a model.

    >>> dotted("head", "weight"), dotted("", "pos_embed")
    ('head.weight', 'pos_embed')
    """
    return f"{path}.{name}".lstrip(".")
