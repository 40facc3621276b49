"""The features in what a module takes or gives: which tensor, and how another comes there."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.fx
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import GraftError

OPERATE_ON_THE_GRAPH = (
    "Make the graph first, of the base (create_feature_extractor, symbolic_trace), and operate on "
    "that: surgery.apply(graph, rules). A graph has no blocks: rules there stand at its modules "
    "(linear layers, norms, feed-forward layers)."
)


class Place(Protocol):
    """Where a module stands, and the names of what its forward takes."""

    path: str
    names: tuple[str, ...]


@lru_cache(maxsize=1000)
def declared(forward: Any) -> tuple[str, ...]:
    """The names of what a forward takes, in the order of its signature."""
    try:
        return tuple(inspect.signature(forward).parameters)
    except (TypeError, ValueError):
        return ()


def input_of(args: Any, kwargs: Any, place: Place) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor that is the input, and a way to put another there: everywhere it was given.

    Self-attention is given one tensor as query, key and value.
    """
    first = [kwargs[name] for name in place.names if name in kwargs] if not args else args[:1]
    x = next((value for value in first if isinstance(value, Tensor)), None)
    if x is None:
        return first_tensor((args, kwargs), place.path)

    def put(tensor: Tensor) -> Any:
        positional = tuple(tensor if value is x else value for value in args)
        return positional, {k: tensor if value is x else value for k, value in kwargs.items()}

    return x, put


def first_tensor(values: Any, path: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The first tensor in any nest of tuples, lists and dicts, and a way to put another there."""
    if isinstance(values, Tensor):
        return values, lambda tensor: tensor
    leaves, spec = pytree.tree_flatten(values)
    for i, value in enumerate(leaves):
        if isinstance(value, Tensor):

            def put(tensor: Tensor, i: int = i) -> Any:
                return pytree.tree_unflatten([*leaves[:i], tensor, *leaves[i + 1 :]], spec)

            return value, put
    if any(isinstance(value, torch.fx.Proxy) for value in leaves):
        fact = "it met a torch.fx Proxy: the graph that is traced would not hold the parts."
        raise GraftError(f"the graft at {path or 'the model'}", fact, OPERATE_ON_THE_GRAPH)
    raise GraftError(
        f"the graft at {path or 'the model'}",
        "it met no tensor in what the module takes or gives.",
        "Put the rule on a module that takes and gives tensors.",
    )
