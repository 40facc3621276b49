"""Attention that a model writes out, q k^T, softmax, times v: the prefix's scores ride along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

PRODUCTS = {"matmul", "__matmul__", "bmm"}
OF_KEYS = {"add", "__add__", "__radd__", "__iadd__", "add_", "masked_fill", "masked_fill_", "where"}
OF_ALL = {
    "mul", "__mul__", "__rmul__", "__imul__", "mul_", "div", "__truediv__", "true_divide", "div_",
    "__itruediv__", "to", "float", "type", "type_as", "contiguous", "clone", "dropout", "tanh",
}  # fmt: skip
SHAPES = {"view", "reshape", "unsqueeze", "squeeze"}
PER_NUMBER = {"mul", "__mul__", "__rmul__", "div", "__truediv__", "true_divide"}
TURNS = {
    "transpose",
    "permute",
    "contiguous",
    "swapaxes",
    "to",
    "float",
    "__get__",
    "expand",
} | SHAPES
KNOWN = OF_KEYS | OF_ALL | SHAPES | PRODUCTS | {"size", "dim", "softmax", "__get__", "detach"}


class Ride(NamedTuple):
    """Scores or weights (..., l, s) of a model, and (..., l, p) of the prefix beside them."""

    carrier: Tensor
    rider: Tensor
    are_weights: bool


class Riders:
    """What rides on the tensors of one attention, from its scores to the product with values.

    heads  a prefix, as queries or values (..., heads, n, d) are; None where it does not fit
    """

    def __init__(self, prefix: Any, heads: Callable[[Tensor, Tensor], Tensor | None]) -> None:
        self.prefix, self.heads = prefix, heads
        self.rides: list[Ride] = []
        self.scaled: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = []  # and how
        self.open = 0  # softmaxes whose weights no values were multiplied with
        self.ran = False

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a function gives, with the prefix in it."""
        name, ride = getattr(func, "__name__", ""), self._of(args)
        if name in PRODUCTS:
            return self._product(func, args, kwargs, ride)
        if ride is None:
            return self._elsewhere(func, name, args, kwargs)
        if ride.are_weights and name not in KNOWN:
            self.open += 1  # something makes more of the weights: of those of the prefix, too?
        if name == "softmax" and not ride.are_weights:
            return self._softmax(func, args, kwargs, ride)
        answer = func(*args, **kwargs)
        if name in OF_KEYS and _fits_keys(args, ride):
            self._board(answer, ride.rider, ride.are_weights)
        elif (name in OF_ALL and not _fits_keys(args, ride)) or name in OF_KEYS:
            self._board(answer, func(*_with(args, ride), **kwargs), ride.are_weights)
        elif name in SHAPES:
            self._board(
                answer, func(ride.rider, *_sizes(args[1:], ride), **kwargs), ride.are_weights
            )
        return answer

    def _elsewhere(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """What is done to queries and keys: of keys that are scaled, how."""
        answer = func(*args, **kwargs)
        if name in PER_NUMBER and len(args) == 2 and isinstance(args[0], Tensor):
            by = args[1]
            if not isinstance(by, Tensor) or by.dim() == 0:
                self.scaled.append((answer, lambda keys: func(keys, by)))
        elif name in TURNS and args and isinstance(answer, Tensor):
            for tensor, scale in self.scaled:
                if tensor is args[0]:
                    self.scaled.append((answer, scale))
                    break
        return answer

    def _of(self, args: Any) -> Ride | None:
        """What rides on an argument, the latest first."""
        for ride in reversed(self.rides):
            for arg in args:
                if arg is ride.carrier:
                    return ride
        return None

    def _board(self, carrier: Tensor, rider: Tensor, are_weights: bool) -> None:
        self.rides.append(Ride(carrier, rider, are_weights))

    def _product(self, func: Any, args: Any, kwargs: Any, ride: Ride | None) -> Any:
        answer = func(*args, **kwargs)
        if ride is not None and ride.are_weights:
            values = self.heads(self.prefix.values, args[1])
            if values is not None:
                self.ran, self.open = True, self.open - 1
                return answer + ride.rider.to(values.dtype) @ values
        elif len(args) == 2 and args[0].dim() > 2 and args[1].dim() > 2:
            keys = self.heads(self.prefix.keys, args[0])
            for tensor, scale in self.scaled:
                if keys is not None and tensor is args[1]:
                    keys = scale(keys)
            if keys is not None:
                self._board(answer, args[0] @ keys.mT, False)
        return answer

    def _softmax(self, func: Any, args: Any, kwargs: Any, ride: Ride) -> Any:
        """Over scores of the prefix and of the keys at once."""
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dim not in (-1, ride.carrier.dim() - 1):
            return func(*args, **kwargs)
        p = ride.rider.shape[-1]
        both = func(
            torch.cat([ride.rider.to(ride.carrier.dtype), args[0]], -1), *args[1:], **kwargs
        )
        answer = both[..., p:]
        self.open += 1
        self._board(answer, both[..., :p], True)
        return answer


def _fits_keys(args: Any, ride: Ride) -> bool:
    """Whether it is given something for each key: a mask, a bias of positions."""
    others = [arg for arg in args if isinstance(arg, Tensor) and arg is not ride.carrier]
    return any(t.dim() and t.shape[-1] == ride.carrier.shape[-1] for t in others)


def _with(args: Any, ride: Ride) -> list[Any]:
    return [ride.rider if arg is ride.carrier else arg for arg in args]


def _sizes(args: Any, ride: Ride) -> list[Any]:
    """Sizes of a view, with the number of tokens of the prefix in place of that of keys."""
    sizes = [*args[0]] if args and isinstance(args[0], (tuple, list)) else [*args]
    if len(sizes) > 1 and sizes[-1] == ride.carrier.shape[-1]:
        sizes[-1] = ride.rider.shape[-1]
    return sizes
