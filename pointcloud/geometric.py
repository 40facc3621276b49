"""Clouds of torch-geometric: Data and Batch as dense tensors, pyg-lib's searches, a transform.

The one module here that imports torch-geometric, which takes seconds: import it where needed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from .operations import padding

with warnings.catch_warnings():  # of torch.jit, which it uses
    warnings.simplefilter("ignore")
    try:
        import torch_geometric.nn.pool as pool
        import torch_geometric.typing
        from torch_geometric.data import Data
        from torch_geometric.transforms import BaseTransform
        from torch_geometric.utils import to_dense_batch
    except ImportError as error:
        raise ImportError(
            "pointcloud.geometric: torch-geometric is not installed. pip install torch-geometric, "
            "or give clouds as tensors (b, n, 3)."
        ) from error


class Dense(NamedTuple):
    """points (b, n, 3); lengths (b,), None if all have n; offsets (b,), of clouds in `pos`."""

    points: Tensor
    lengths: Tensor | None
    offsets: Tensor

    def flat(self, index: Tensor) -> Tensor:
        """Indices (b, ...) into each cloud as indices into `pos`."""
        return index + self.offsets.view(-1, *[1] * (index.ndim - 1))

    def alike(self) -> list[Tensor]:
        """Clouds of one size, (b, n, 3), without padding: all together, or one at a time."""
        if self.lengths is None:
            return [self.points]
        sizes = self.lengths.tolist()
        return [cloud[None, :n] for cloud, n in zip(self.points, sizes, strict=True)]

    def back(self, points: Tensor) -> Tensor:
        """What each point has, (b, n, c), row by row as in `pos`, (total, c)."""
        if self.lengths is None:
            return rearrange(points, "b n c -> (b n) c")
        return points[~padding(points, self.lengths)]


def dense(data: Data) -> Dense:
    """The clouds of a Data (one) or a Batch, equal in size or padded with zeros.

    Raises TypeError for what is neither, ValueError for one without `pos` (n, 3), or whose `batch`
    is not sorted.

    >>> dense(Data(pos=torch.randn(1024, 3))).points.shape
    torch.Size([1, 1024, 3])
    """
    if isinstance(data, Tensor):
        raise TypeError(
            "points are a tensor beside a Data or Batch. Give both as tensors (b, n, 3), or both "
            "as Data."
        )
    if not isinstance(data, Data):
        raise TypeError(
            f"points are a {type(data).__name__}, neither a tensor nor torch-geometric's Data or "
            "Batch. Give a tensor (b, n, 3), or a Data with pos."
        )
    pos, batch = data.pos, data.batch
    if not isinstance(pos, Tensor) or pos.ndim != 2:
        shape = tuple(pos.shape) if isinstance(pos, Tensor) else pos
        raise ValueError(f"{data}: pos is (n, 3), this is {shape}. Give a Data with such a pos.")
    if batch is None:
        return Dense(pos[None], None, torch.zeros(1, dtype=torch.int64, device=pos.device))
    if (batch.diff() < 0).any():
        raise ValueError(f"{data}: batch is not sorted. Give the points cloud by cloud.")
    lengths = batch.bincount(minlength=getattr(data, "num_graphs", None) or 0)
    offsets = lengths.cumsum(0) - lengths
    if (lengths == lengths[:1]).all():
        return Dense(rearrange(pos, "(b n) c -> b n c", b=len(lengths)), None, offsets)
    points, _ = to_dense_batch(pos, batch, batch_size=len(lengths))
    return Dense(points, lengths, offsets)


def check_no_lengths(name: str, lengths: Tensor | None) -> None:
    """Lengths are the Data's own."""
    if lengths is not None:
        raise ValueError(f"{name}(lengths=): a Data has lengths of its own. Give it without them.")


# pyg-lib


def has(name: str) -> bool:
    """Whether pyg-lib is installed with that search, "fps" or "knn"."""
    return bool(getattr(torch_geometric.typing, f"WITH_{name.upper()}", False))


def fps(points: Tensor, m: int) -> Tensor:
    """Farthest points (b, m) of (b, n, 3) by pyg-lib, from index 0.

    PyG asks for a ratio and takes ceil(ratio * n) in float32, which (m / n) can make m + 1: half a
    point less cannot.
    """
    _require("fps")
    b, n, _ = points.shape
    flat, batch = _flat(points)
    index: Tensor = pool.fps(flat, batch, (m - 0.5) / n, random_start=False, batch_size=b)
    return index.view(b, m) - n * torch.arange(b, device=points.device)[:, None]


def knn(queries: Tensor, points: Tensor, k: int, lengths: Tensor | None) -> Tensor:
    """Nearest points (b, m, k) of queries (b, m, 3) in (b, n, 3) by pyg-lib, the nearest first."""
    _require("knn")
    (b, m, _), n = queries.shape, points.shape[1]
    (centers, of_centers), (flat, batch) = _flat(queries), _flat(points)
    real = torch.arange(b * n, device=points.device)
    if lengths is not None:
        real = real[~padding(points, lengths).flatten()]
    pairs = pool.knn(flat[real], centers, k, batch[real], of_centers, batch_size=b)
    index = real[pairs[1]].view(b * m, k)
    square = (flat[index] - centers[:, None]).square().sum(dim=2)
    order = square.argsort(dim=1, stable=True)  # nearest first is not promised
    first = n * torch.arange(b, device=points.device)[:, None, None]
    return index.gather(1, order).view(b, m, k) - first


def _flat(points: Tensor) -> tuple[Tensor, Tensor]:
    clouds = torch.arange(points.shape[0], device=points.device)
    batch = repeat(clouds, "b -> (b n)", n=points.shape[1])
    return rearrange(points, "b n c -> (b n) c").contiguous(), batch


def _require(name: str) -> None:
    if not has(name):
        raise ImportError(
            f"backend='pyg': {name} takes torch-geometric >= 2.8 and pyg-lib >= 0.6, which are not "
            "both installed. pip install torch-geometric, then pyg-lib as on https://data.pyg.org, "
            "or give backend='auto'."
        )


class Augment(BaseTransform):  # type: ignore[misc]
    """A transform of torch-geometric of a function of batches, (b, n, 3) -> (b, n, 3).

    function   as in `pointcloud.augment`, its arguments by functools.partial; of a Batch, each
               cloud is one of the batch
    generator  given to the function, if not None

    >>> Augment(functools.partial(torch.clamp, min=0.0))(Data(pos=-torch.ones(4, 3))).pos.sum()
    tensor(0.)
    """

    def __init__(
        self, function: Callable[..., Tensor], generator: torch.Generator | None = None
    ) -> None:
        self.function, self.generator = function, generator

    def forward(self, data: Data) -> Data:
        """`data` (a copy, by torch-geometric's own __call__) with new `pos`."""
        changed = [rearrange(self._of(x), "b n c -> (b n) c") for x in dense(data).alike()]
        data.pos = torch.cat(changed)
        return data

    def _of(self, points: Tensor) -> Tensor:
        options: dict[str, Any] = {} if self.generator is None else {"generator": self.generator}
        changed = self.function(points, **options)
        if changed.shape != points.shape:
            raise ValueError(
                f"{self!r}: gave {tuple(changed.shape)} for {tuple(points.shape)}. "
                "Give a function that keeps the shape."
            )
        return changed

    def __repr__(self) -> str:
        if not isinstance(self.function, functools.partial):
            return f"Augment({_name(self.function)})"
        arguments = [repr(value) for value in self.function.args]
        arguments += [f"{name}={value!r}" for name, value in self.function.keywords.items()]
        return f"Augment({', '.join([_name(self.function.func), *arguments])})"


def _name(function: Callable[..., Tensor]) -> str:
    return getattr(function, "__name__", repr(function))
