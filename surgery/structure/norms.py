"""What a module of vectors does, found out by trying it: whether it normalises, and which axis.

Neither the name of its class nor those of its parameters tell: they are called g, gamma, scale,
and are of shape (width,), (1, width, 1, 1) or (width, 1, 1).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._preserve import preserved

WIDEST = 1 << 16  # features that a norm without vectors may have been made for
MANY = 8  # numbers that a result holds: a sign, or a mask, holds fewer
COLOURS = 3  # of an image, whose statistics the input is scaled by


class Normed(NamedTuple):
    """How many features a norm takes, 0 where any number will do, and the axis they lie on."""

    width: int
    axis: int


def tried_as_norm(module: nn.Module) -> Normed | None:
    """What a module that holds vectors normalises; None where it does something else.

    It is tried on a few numbers, in eval mode and on a copy, once for all that are like it. Where
    no trial runs (a kernel of another device, a second input) the name of its class decides.
    """
    key = (type(module), *_marks(module))
    if key not in _KNOWN:
        _KNOWN[key] = _tried(module)
    return _KNOWN[key]


_KNOWN: dict[tuple[Any, ...], Normed | None] = {}


def _marks(module: nn.Module) -> tuple[Any, ...]:
    """What may decide what it does: its vectors, its words (ConvNeXt's data_format), its sizes."""
    vectors = tuple((name, tuple(t.shape)) for name, t in _tensors(module))
    kinds = (str, bool) if vectors else (str, bool, int, tuple, list)
    settings = (v for name, v in vars(module).items() if name not in _NO_SETTING)
    return vectors, tuple(str(v) for v in settings if isinstance(v, kinds))


_NO_SETTING = {"training", "call_super_init", "dump_patches"}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in chain(module._parameters.items(), module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _tried(module: nn.Module) -> Normed | None:
    runs = False
    for normed, sizes in _trials(module):
        normalises = _normalises(module, sizes)
        if normalises:
            return normed
        runs = runs or normalises is not None
    untold = not runs and "norm" in type(module).__name__.lower()
    return next(_trials(module))[0] if untold else None


# what it may be given -------------------------------------------------------------------------


def _trials(module: nn.Module) -> Iterator[tuple[Normed, tuple[int, ...]]]:
    """What it may take, and how large such an input is: the likeliest first."""
    tensors = (t for _, t in _tensors(module) if t.is_floating_point())
    vectors = (t for t in tensors if t.numel() == max(t.shape, default=1))
    vector = max(vectors, key=torch.numel, default=torch.empty(()))
    width = vector.numel()
    behind = vector.dim() - 1 - vector.shape.index(width) if width > 1 else 0
    if behind:  # (width, 1, 1)
        yield Normed(width, 1), (2, width, *(3, 2, 1)[:behind])
    elif width > 1:
        yield from _layouts(width, width)
    else:
        yield from _layouts(0, 32)
        for width in _sizes(module):
            yield from _layouts(width, width)


def _layouts(told: int, width: int) -> Iterator[tuple[Normed, tuple[int, ...]]]:
    yield Normed(told, -1), (2, 5, width)
    yield Normed(told, 1), (2, width, 3, 2)
    yield Normed(told, -1), (2, 3, 2, width)
    yield Normed(told, 1), (2, width, 5)
    yield Normed(told, 1), (2, width, 3, 2, 1)
    yield Normed(told, -1), (6, width)


def _sizes(module: nn.Module) -> list[int]:
    """Numbers of features that a norm without vectors may have been made for (OLMo's)."""
    last = (v[-1] if isinstance(v, (tuple, list)) and v else v for v in vars(module).values())
    sizes = dict.fromkeys(v for v in last if isinstance(v, int) and 1 < v < WIDEST)
    return list(sizes)[:4]


# what it does ---------------------------------------------------------------------------------


def _normalises(module: nn.Module, sizes: tuple[int, ...]) -> bool | None:
    """Whether it does, given so many numbers; None where it cannot be given these.

    In training too: a norm of running statistics normalises by those of the batch only there, and
    one that is frozen nowhere.
    """
    generator = torch.Generator().manual_seed(0)
    x, other = (2 * torch.randn(sizes, generator=generator, device="cpu") for _ in range(2))
    try:
        with preserved(module, kept=True), torch.device("cpu"), torch.no_grad():
            return _is_frozen(module, x) or any(
                _forgets_scale(_twin(module, training), x, other) for training in (False, True)
            )
    except Exception:  # it takes something else
        return None


def _twin(module: nn.Module, training: bool = False) -> nn.Module:
    """A copy whose vectors hold ones, wherever those of the module lie and whatever they hold."""
    twin = copy.copy(module)
    parameters = {
        n: p if p is None else nn.Parameter(_ones(p)) for n, p in module._parameters.items()
    }
    buffers = {n: b if b is None else _ones(b) for n, b in module._buffers.items()}
    twin.__dict__.update(_parameters=parameters, _buffers=buffers, training=training)
    return twin


def _ones(tensor: Tensor) -> Tensor:
    kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.ones(tensor.shape, dtype=kind, device="cpu")


def _given(twin: nn.Module, x: Tensor) -> Tensor:
    y = type(twin).forward(twin, x.clone())
    if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
        raise TypeError("no features of this shape")
    return y


def _forgets_scale(twin: nn.Module, x: Tensor, other: Tensor) -> bool:
    """Whether x and 3 x give the same, which is many numbers, and others than `other` gives."""
    once, thrice, others = (_given(twin, each) for each in (x, 3 * x, other))
    many = len(set(once.flatten()[:99].tolist())) > MANY
    return many and _close(once, thrice) and not _close(once, others)


def _is_frozen(module: nn.Module, x: Tensor) -> bool:
    """Whether it shifts and scales by statistics that are kept for good (DETR's frozen norm).

    Not by those of colours, which the input is scaled by.
    """
    kept = [b for b in module._buffers.values() if b is not None and b.numel() > COLOURS]
    if len(kept) < 2 or any(p is not None for p in module._parameters.values()):
        return False
    twin = _twin(module)
    zero, y = _given(twin, 0 * x), _given(twin, x)
    return _close(y - zero, (y - zero).abs().mean() / x.abs().mean() * x)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 0.02 * a.abs().max())
