"""Labelled clouds as plain tensors, and batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Clouds(NamedTuple):
    """points (n, p, 3) float32, y up; labels (n,) int64; names of the classes, in label order;
    parts (n, p) int64, -1 for background, or None. A plain tuple: `len(clouds.labels)` clouds.

    >>> clouds = Clouds(torch.zeros(2, 1024, 3), torch.tensor([0, 1]), ("bag", "bin"))
    >>> clouds.names[clouds.labels[1]], clouds.parts
    ('bin', None)
    """

    points: Tensor
    labels: Tensor
    names: tuple[str, ...]
    parts: Tensor | None = None


def take(clouds: Clouds, rows: Tensor | slice) -> Clouds:
    """The clouds of these rows: an index, a mask or a slice.

    >>> clouds = Clouds(torch.zeros(9, 1024, 3), torch.arange(9), tuple("abcdefghi"))
    >>> take(clouds, clouds.labels > 5).points.shape
    torch.Size([3, 1024, 3])
    """
    parts = None if clouds.parts is None else clouds.parts[rows]
    return clouds._replace(points=clouds.points[rows], labels=clouds.labels[rows], parts=parts)


def batches(
    clouds: Clouds,
    size: int,
    *,
    shuffle: bool = True,
    drop_last: bool = False,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of (points (b, p, 3), labels (b,)), each cloud once; the last may be smaller.

    size       clouds a batch, at least 1
    shuffle    in random order, of `generator`; False: as they are
    drop_last  leave out the last batch where it is smaller: a batch of one cannot be trained on
               where a model has batch norm

    Raises ValueError on a size below 1. Plain indexing: for clouds that fit in memory it is many
    times faster than a DataLoader.

    >>> clouds = Clouds(torch.zeros(9, 1024, 3), torch.arange(9), tuple("abcdefghi"))
    >>> [len(labels) for points, labels in batches(clouds, 4)]
    [4, 4, 1]
    """
    if size < 1:
        raise ValueError(f"batches(size={size}): a batch has at least one cloud. Give size >= 1.")
    n = len(clouds.labels)
    return _batches(clouds, size, n - n % size if drop_last else n, shuffle, generator)


def _batches(
    clouds: Clouds, size: int, most: int, shuffle: bool, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, Tensor]]:
    n, device = len(clouds.labels), clouds.labels.device
    drawn = torch.device("cpu") if generator is None else generator.device
    order = torch.randperm(n, generator=generator, device=drawn) if shuffle else torch.arange(n)
    for start in range(0, most, size):
        rows = order[start : start + size].to(device)
        yield clouds.points[rows], clouds.labels[rows]
