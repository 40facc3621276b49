"""Whether tensors fit the places that they are for: all of them are looked at before one is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from .._text import first_few
from ..errors import FileError


class Shaped(Protocol):
    """A tensor, or what the header of a file says of one."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> Any: ...


def check_keys(
    required: set[str], tensors: Collection[str], places: Mapping[str, Tensor], kind: str
) -> None:
    """Raise FileError where a key is missing or one too many, or its place has no memory."""
    if lost := [key for key in tensors if key in places and places[key].is_meta]:
        raise FileError(
            "load",
            f"this {kind} has {first_few(lost)} on the meta device: the values would be lost.",
            'Give it memory first, model.to_empty(device="cpu"), and its base; then load.',
        )
    missing, extra = sorted(required - set(tensors)), sorted(set(tensors) - set(places))
    if missing or extra:
        facts = [
            f"{word} {first_few(keys)}"
            for word, keys in (("lacks", missing), ("has", extra))
            if keys
        ]
        raise FileError(
            "load",
            f"the file does not fit this {kind}: it {', and '.join(facts)}"
            + (", which the model has no place for." if extra else "."),
            "Load it into the model it was made for: the same architecture, depth and head.",
        )


def check_alike(tensors: Mapping[str, Shaped], places: Mapping[str, Tensor]) -> None:
    """Raise FileError where a tensor is of another shape or dtype than its place."""
    for key, tensor in tensors.items():
        if (tensor.shape, tensor.dtype) != (places[key].shape, places[key].dtype):
            raise FileError(
                "load",
                f"{key} is {tuple(tensor.shape)} {tensor.dtype} in the file, and "
                f"{tuple(places[key].shape)} {places[key].dtype} in the model.",
                "Load it into the model it was made for, in the dtype it was saved in.",
            )


def check_indices(parts: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Raise FileError where positions in a file lead out of what a part says by `indices_below`.

    A GPU would not refuse them before a forward, and not by an exception.
    """
    for path, module in parts.named_modules():
        for name, size in getattr(module, "indices_below", {}).items():
            found = tensors.get(key := f"{prefix}{path}.{name}")
            if found is not None and found.numel() and not 0 <= found.min() <= found.max() < size:
                fact = f"{key} has {found.min()} to {found.max()}, and there are 0 to {size - 1}."
                raise FileError("load", fact, "Save it again.")
