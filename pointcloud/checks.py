"""What is checked: shapes, where a compiler can see them; values, inside of operations."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

CHANNELS = 16  # at most: coordinates, normals, colours and more; clouds have more points


def check_points(name: str, points: Tensor, lengths: Tensor | None = None) -> None:
    """Clouds are floating-point numbers (b, n, 3); lengths are integers (b,)."""
    if not isinstance(points, Tensor):
        raise TypeError(f"{name}(): {type(points).__name__} is no tensor. Give points (b, n, 3).")
    if points.ndim != 3 or points.shape[2] != 3:
        shape = tuple(points.shape)
        raise ValueError(f"{name}(): points are (b, n, 3), these are {shape}. {_as_points(shape)}")
    if not points.is_floating_point():
        raise ValueError(f"{name}(): points are {points.dtype}. Give points.float().")
    if lengths is None:
        return
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name}(): lengths are a {type(lengths).__name__}. Give a tensor (b,).")
    if lengths.shape != points.shape[:1] or lengths.is_floating_point():
        raise ValueError(
            f"{name}(): lengths are integers (b,), one for each of {points.shape[0]} clouds; these "
            f"are {lengths.dtype} {tuple(lengths.shape)}. Give the points of each cloud."
        )


def _as_points(shape: tuple[int, ...]) -> str:
    """What to give instead of a tensor of another shape."""
    if len(shape) < 2:
        return "Give a batch of clouds, three numbers a point."
    xyz = _coordinates(shape)
    if len(shape) == 2:
        return f"Give a batch of clouds: {xyz}[None] for a single one (n, 3)."
    if len(shape) > 3:
        return "Give all clouds on one axis: points.flatten(0, -3)."
    if xyz.endswith("mT"):
        return f"Channels come first here. Transpose them: {xyz}."
    if xyz != "points":
        return f"Beyond x, y, z they have other columns (normals, colors). Give {xyz}."
    return "Give three coordinates for every point."


def _coordinates(shape: tuple[int, ...]) -> str:
    """How to write x, y, z of points (..., n, c) or, channels first, (..., c, n)."""
    n, c = shape[-2:]
    if c != 3 and (n == 3 or 3 < n <= CHANNELS < c):
        return f"points{'' if n == 3 else '[..., :3, :]'}.mT"
    return "points[..., :3]" if c > 3 else "points"


def check_count(name: str, what: str, count: int, n: int) -> None:
    """A whole number, at least one, at most the points that there are."""
    if isinstance(count, bool) or not hasattr(count, "__index__"):
        raise TypeError(f"{name}({what}={count!r}): not a whole number. Give an int.")
    if not n:
        raise ValueError(f"{name}({what}={count}): a cloud has 0 points. Leave out what is empty.")
    if count < 1:
        raise ValueError(f"{name}({what}={count}): nothing is asked for. Give {what} >= 1.")
    if count > n:
        raise ValueError(
            f"{name}({what}={count}): a cloud has {n} points, fewer than the {count} asked for. "
            f"Give {what} <= {n}, or larger clouds."
        )


def check_backend(name: str, backend: str, backends: Iterable[str], points: Tensor) -> None:
    """A known backend, which works where the points are."""
    if backend not in backends:
        known = ", ".join(backends)
        raise ValueError(f"{name}(backend={backend!r}): there is no such backend. Give {known}.")
    if backend in ("numpy", "scipy") and points.device.type not in ("cpu", "meta"):
        raise ValueError(
            f"{name}(backend={backend!r}): works on a CPU, the points are on {points.device}. "
            "Give backend='torch' or 'auto', or points.cpu()."
        )


def check_lengths(name: str, what: str, count: int, points: Tensor, lengths: Tensor) -> None:
    """From `count` to n."""
    if not lengths.numel():
        return
    check_count(name, what, count, int(lengths.min()))
    if (most := int(lengths.max())) > (n := points.shape[1]):
        raise ValueError(f"{name}(): a length is {most}, of {n} points. Give lengths <= {n}.")


def check_values(name: str, what: str, count: int, points: Tensor, lengths: Tensor | None) -> None:
    """Lengths from `count` to n, and all points finite."""
    if lengths is not None:
        check_lengths(name, what, count, points, lengths)
    if points.numel() and not all(map(math.isfinite, torch.stack(points.aminmax()).tolist())):
        cloud, point, _ = (~points.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"{name}(): point {point} of cloud {cloud} is {points[cloud, point].tolist()}, "
            "not finite. Drop such points, or pass them as padding (lengths=)."
        )


def check_start(start: Tensor, points: Tensor, lengths: Tensor | None) -> None:
    """A start (b,) is an index of each cloud."""
    sizes = points.shape[1] if lengths is None else lengths.to(start.device)
    wrong = (start < 0) | (start >= sizes)
    if wrong.any():
        cloud = int(wrong.nonzero()[0])
        raise ValueError(
            f"farthest_points(): start {int(start[cloud])} is no point of cloud {cloud}. "
            "Give an index of each cloud, or 'random'."
        )


def not_empty(name: str, points: Tensor) -> None:
    """Raise ValueError where clouds (b, n, 3) have no points."""
    if not points.shape[1]:
        shape = tuple(points.shape)
        raise ValueError(f"{name}(): clouds {shape} have no points. Leave out what is empty.")


def check_index(points: Tensor, index: Tensor) -> None:
    """Indices (b, ...) are integers, into clouds (b, n, c)."""
    if points.ndim != 3 or not index.ndim:
        fact = f"points {tuple(points.shape)} and indices {tuple(index.shape)}"
        raise ValueError(f"gather(): {fact}. Give points (b, n, c), and indices (b, ...).")
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"gather(): indices are {index.dtype}. Give integers, as index.long().")
    if index.shape[0] != points.shape[0]:
        raise ValueError(
            f"gather(): indices into {index.shape[0]} clouds, {points.shape[0]} clouds of points. "
            "Give as many of both; one cloud for all is points.expand(b, -1, -1)."
        )
