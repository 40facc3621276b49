"""What a model is, remembered: to be given back, or to see whether anything of it changed."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _rng
from ._shards import cut, is_distributed

Marks = dict[str, Any]


@contextmanager
def preserved(
    model: nn.Module | None = None,
    *,
    modes: bool = False,
    flags: bool = False,
    kept: bool = False,
) -> Iterator[None]:
    """While it lasts all may be changed; then random numbers and settings are as they were.

    modes    those of all modules (train, eval), too
    flags    `requires_grad` of all parameters, too
    kept     what a forward keeps: buffers, which tensors they are, and their values, and what else
             modules have as attributes (how much of a buffer is filled, in rotary embeddings), too

    Settings are torch's default dtype, and whether it may take the fused kernels of attention, and
    keeps gradients.

    >>> model = nn.Linear(2, 2)
    >>> with preserved(model, modes=True):
    ...     _ = model.eval()
    >>> model.training
    True
    """
    ways = [_rng.remember(), _settings()]
    if model is not None:
        ways += [_modes(model)] if modes else []
        ways += [_flags(model)] if flags else []
        ways += [_buffers(model), _attributes(model)] if kept else []

    def give_back() -> None:
        for way in reversed(ways):
            way()

    try:
        yield
        give_back()
    except BaseException:  # one that came while giving back, too
        give_back()
        raise


def _settings() -> Callable[[], None]:
    fused, dtype = torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    gradients = torch.is_grad_enabled()

    def give_back() -> None:
        torch._C._set_grad_enabled(gradients)
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.set_default_dtype(dtype)

    return give_back


def _modes(model: nn.Module) -> Callable[[], None]:
    was = [(module, module.training) for module in model.modules()]

    def give_back() -> None:
        for module, training in was:
            module.training = training

    return give_back


def _flags(model: nn.Module) -> Callable[[], None]:
    was = [(p, p.requires_grad) for p in model.parameters()]

    def give_back() -> None:
        for p, flag in was:
            p.requires_grad_(flag)

    return give_back


def _buffers(model: nn.Module) -> Callable[[], None]:
    tables = [
        (module._buffers, dict(module._buffers))
        for module in model.modules()
        if isinstance(module._buffers, dict)  # TorchScript's are not
    ]
    values = [(b, b.clone()) for b in model.buffers() if not b.is_inference()]

    def give_back() -> None:
        for table, was in tables:
            table.clear()
            table.update(was)
        with torch.no_grad():
            for buffer, value in values:  # batch norms write without counting a version
                if not (buffer.is_meta or same(buffer, value)):
                    buffer.copy_(value)

    return give_back


def _attributes(model: nn.Module) -> Callable[[], None]:
    """Those of modules of the base, and what lies in containers and tensors that are attributes."""
    was = [(module, _plain(module)) for module in _base(model)]
    known = {id(t) for table in (model.parameters(), model.buffers()) for t in table}
    inside = [way for _, plain in was for value in plain.values() for way in _inside(value, known)]

    def give_back() -> None:
        for module, plain in was:
            own = vars(module)
            for name in _plain(module).keys() - plain.keys():
                del own[name]
            own.update(plain)
        for way in inside:
            way()

    return give_back


def _inside(value: Any, known: set[int]) -> Iterator[Callable[[], None]]:
    """What gives back the content of a container, of those in it, and of a tensor; each once."""
    if id(value) in known or not isinstance(value, (*_CONTAINERS, Tensor)):
        return
    known.add(id(value))
    if isinstance(value, Tensor):
        if value.is_leaf and not (value.is_meta or value.is_inference() or value.requires_grad):
            yield partial(_copy_back, value, value.clone())
        return
    before = value.copy()
    yield partial(_refill, value, before)
    for each in before.values() if isinstance(before, dict) else before:
        yield from _inside(each, known)


_CONTAINERS = (list, dict, set, deque)


def _copy_back(tensor: Tensor, before: Tensor) -> None:
    with torch.no_grad():
        if not same(tensor, before):
            tensor.copy_(before)


def _refill(value: Any, before: Any) -> None:
    value.clear()
    if isinstance(value, (list, deque)):
        value.extend(before)
    else:
        value.update(before)


def _base(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that are not ours; without those that become others when they first run."""
    if getattr(type(model), "_is_surgery_additions", False):
        return
    lazy = isinstance(model, nn.modules.lazy.LazyModuleMixin)
    if isinstance(model._buffers, dict) and not lazy:  # TorchScript's are not
        yield model
    for child in model._modules.values():
        if child is not None:
            yield from _base(child)


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that torch's own machinery has no part in."""
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _TORCHS and not name.endswith("_hooks")
    }


_TORCHS = {*vars(nn.Module()), "_forward_impl", "_compiled_call_impl", "forward", "train"}


# to see whether anything changed ----------------------------------------------------------------


def fingerprint(model: nn.Module) -> Marks:
    """All that surgery must leave, or bring back, bit for bit; equal dicts mean equal models.

    Holds the classes, attributes, order of children, hooks and training flags of all modules; of
    every parameter and buffer its identity, place in memory, `requires_grad`, bytes and gradient;
    the random numbers of torch, Python and numpy, and torch's modes.

    >>> model = nn.Linear(2, 2)
    >>> before = fingerprint(model)
    >>> model.weight.data[0, 0] += 1
    >>> [mark for mark, value in fingerprint(model).items() if value != before[mark]]
    ['weight: value']
    """
    marks: Marks = {
        "random numbers of torch": torch.get_rng_state().numpy().tobytes(),
        "random numbers of Python": random.getstate(),
        "random numbers of numpy": np.random.get_state()[1].tobytes(),  # type: ignore[index]
        "keys": tuple(model.state_dict()),
        "modes": (torch.is_grad_enabled(), torch.empty(0).device.type, torch.get_default_dtype()),
    }
    for path, module in model.named_modules(remove_duplicate=False):
        place = path or "the model"
        marks[f"{place}: identity"] = (id(module), type(module))
        marks[f"{place}: training"] = module.training
        marks[f"{place}: attributes"] = tuple(vars(module))
        marks[f"{place}: numbers"] = {
            name: value
            for name, value in _plain(module).items()
            if type(value) in (int, float, str)
        }
        marks[f"{place}: children"] = tuple(module._modules)
        marks[f"{place}: hooks"] = [
            (k, list(map(id, v.values() if isinstance(v, Mapping) else v)))
            for k, v in vars(module).items()
            if "_hooks" in k and isinstance(v, (Mapping, list))
        ]
        for name, tensor in {**module._parameters, **module._buffers}.items():
            place = f"{path}.{name}".strip(".")
            for mark, value in _tensor_marks(tensor).items():
                marks[f"{place}: {mark}"] = value
    return marks


def _tensor_marks(tensor: Tensor | None) -> Marks:
    if tensor is None:
        return {"value": None}
    return {
        "identity": (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.shape),
        "requires_grad": tensor.requires_grad,
        "gradient": None if tensor.grad is None else (id(tensor.grad), _bytes(tensor.grad)),
        "value": _bytes(tensor),
    }


def _inner(tensor: Tensor) -> list[Tensor]:
    """What a tensor wraps, where its class does: a shard, quantised numbers."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    inner = [getattr(tensor, name) for name in flatten()[0]] if flatten else []
    return [each for each in inner if isinstance(each, Tensor)]


def _bytes(tensor: Tensor) -> bytes:
    if inner := _inner(tensor):
        return b"".join(map(_bytes, inner))
    return b"" if tensor.is_meta else bytes(_as_bytes(tensor).cpu().numpy().tobytes())


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, in dtype and in place."""
    if a.dtype != b.dtype or a.device != b.device or a.shape != b.shape:
        return False
    if is_distributed(a) or is_distributed(b):  # of the piece that this process holds
        a, b = (a, cut(b, a)) if is_distributed(a) else (cut(a, b), b)
    if inner := _inner(a):
        return type(a) is type(b) and all(map(same, inner, _inner(b)))
    return torch.equal(_as_bytes(a), _as_bytes(b))
