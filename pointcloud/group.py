"""Nearest neighbours, and clouds cut into groups of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from . import sample
from .checks import check_backend, check_count, check_points, check_values
from .operations import fine, padding, vmap_into_batch
from .sample import Start, farthest_points, gather

if TYPE_CHECKING:
    from torch_geometric.data import Data

BACKENDS = ("auto", "torch", "scipy", "pyg")
ALL_BACKENDS = tuple(dict.fromkeys(sample.BACKENDS + BACKENDS))
TREE = 512  # points from which a tree is faster than all distances
CPU_TILE, TILE = 1 << 18, 1 << 26  # distances at once: 2 MiB on a CPU, 512 MiB elsewhere


class Nearest(NamedTuple):
    """index (b, m, k), the nearest first; square (b, m, k), the squares of their distances."""

    index: Tensor  # type: ignore[assignment]
    square: Tensor


class Groups(NamedTuple):
    """centers (b, g, 3); patches (b, g, k, 3), points minus their center; index (b, g, k)."""

    centers: Tensor
    patches: Tensor
    index: Tensor  # type: ignore[assignment]


def nearest_points(
    queries: Tensor | Data,
    points: Tensor | Data,
    k: int,
    *,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Nearest:
    """The `k` points of each cloud nearest to each query of the same cloud, the nearest first.

    queries   (b, m, 3), finite
    points    (b, n, 3), finite
    k         how many, at most the points of the smallest cloud
    lengths   (b,): only the first `lengths[i]` points of cloud i exist, the others are padding
    backend   "scipy" (a k-d tree for each cloud, on a CPU), "torch" (all distances, tile by tile),
              "pyg" (pyg-lib, through torch-geometric), or "auto": on a CPU the first of scipy, pyg
              and torch that is there, elsewhere torch

    Squares are of differences in float64 (on Apple's mps in float32), rounded to the points'
    dtype: all backends give the same, far from the origin too. Which of several points at the same
    distance is taken, and their order, is the backend's choice. Squares have a gradient.

    Of two torch-geometric Batches (or one and itself) index and square are (total, k), a row for
    each row of the queries' `pos`, and the indices are into the `pos` of the points.

    Raises ValueError for shapes that do not fit, too few points, and coordinates that are not
    finite; ImportError for a backend that is not installed.

    >>> line = torch.tensor([0.0, 1.0, 3.0, 7.0])
    >>> points = torch.stack([line, 0 * line, 0 * line], dim=-1)[None]
    >>> nearest_points(points[:, 1:2], points, 2)
    Nearest(index=tensor([[[1, 0]]]), square=tensor([[[0., 1.]]]))
    """
    if not (isinstance(queries, Tensor) and isinstance(points, Tensor)):
        from . import geometric

        geometric.check_no_lengths("nearest_points", lengths)
        clouds, centers = geometric.dense(points), geometric.dense(queries)
        options: Any = {"lengths": clouds.lengths, "backend": backend}
        near = nearest_points(centers.points, clouds.points, k, **options)
        return Nearest(centers.back(clouds.flat(near.index)), centers.back(near.square))
    index = _index(queries, points, k, lengths, backend)
    square = _square(fine(queries), fine(points), index)
    return Nearest(index, square.to(points.dtype))


def group_points(
    points: Tensor | Data,
    groups: int,
    size: int,
    *,
    start: Start = 0,
    lengths: Tensor | None = None,
    skip_origin: bool = False,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Groups:
    """Patches of `size` points around `groups` farthest points, each minus its center.

    points    (b, n, 3), finite; or a torch-geometric Data or Batch, whose indices are into `pos`
    groups    how many, and `size` points in each: at most the points of the smallest cloud
    start, lengths, skip_origin, generator    as of `farthest_points`
    backend   as of `farthest_points` and of `nearest_points`; "auto" for the one that lacks it

    Centers and patches have a gradient to the points; which points they are does not depend on it.

    Raises what those two raise.

    Source: Yu et al. 2022 (Point-BERT), section 3.1; Pang et al. 2022 (Point-MAE), section 3.1.

    >>> centers, patches, index = group_points(torch.randn(2, 1024, 3), 64, 32)
    >>> centers.shape, patches.shape, index.shape
    (torch.Size([2, 64, 3]), torch.Size([2, 64, 32, 3]), torch.Size([2, 64, 32]))
    """
    options: Any = {"start": start, "skip_origin": skip_origin, "generator": generator}
    if not isinstance(points, Tensor):
        from . import geometric

        geometric.check_no_lengths("group_points", lengths)
        clouds = geometric.dense(points)
        options |= {"lengths": clouds.lengths, "backend": backend}
        grouped = group_points(clouds.points, groups, size, **options)
        return grouped._replace(index=clouds.flat(grouped.index))
    check_points("group_points", points, lengths)
    check_backend("group_points", backend, ALL_BACKENDS, points)
    check_count("group_points", "groups", groups, points.shape[1])
    check_count("group_points", "size", size, points.shape[1])
    sampler, searcher = (
        backend if backend in known else "auto" for known in (sample.BACKENDS, BACKENDS)
    )
    chosen = farthest_points(points, groups, lengths=lengths, backend=sampler, **options)
    centers = gather(points, chosen)
    index = _index(centers, points, size, lengths, searcher)
    return Groups(centers, gather(points, index) - rearrange(centers, "b g c -> b g 1 c"), index)


def _index(queries: Tensor, points: Tensor, k: int, lengths: Tensor | None, backend: str) -> Tensor:
    check_points("nearest_points", points, lengths)
    check_points("nearest_points", queries)
    if queries.shape[0] != points.shape[0]:
        raise ValueError(
            f"nearest_points(): {queries.shape[0]} clouds of queries, {points.shape[0]} of points. "
            "Give as many of both; one cloud for all queries is points.expand(b, -1, -1)."
        )
    check_backend("nearest_points", backend, BACKENDS, points)
    check_count("nearest_points", "k", k, points.shape[1])
    index: Tensor = torch.ops.pointcloud.nearest(
        queries.detach(), points.detach(), k, lengths, backend
    )
    return index


def _square(queries: Tensor, points: Tensor, index: Tensor) -> Tensor:
    """Squared distances (b, m, k), axis by axis: summing over a dimension of three is slow."""
    axes = zip(queries.unbind(2), points.unbind(2), strict=True)
    near = ((p.gather(1, index.flatten(1)).view(index.shape), q) for q, p in axes)
    x, y, z = ((p - rearrange(q, "b m -> b m 1")).square() for p, q in near)
    return x + y + z


# The operation: opaque to compilers, so that it may read values and use SciPy.


@torch.library.custom_op(
    "pointcloud::nearest",
    mutates_args=(),
    schema="(Tensor queries, Tensor points, SymInt k, Tensor? lengths, str backend) -> Tensor",
)
def _nearest(
    queries: Tensor, points: Tensor, k: int, lengths: Tensor | None, backend: str
) -> Tensor:
    if lengths is not None:
        lengths = lengths.to(points.device)
        points = points.masked_fill(padding(points, lengths)[..., None], 0.0)
    check_values("nearest_points", "k", k, points, lengths)
    check_values("nearest_points", "k", k, queries, None)
    searcher = {"scipy": _scipy, "pyg": _pyg, "torch": _torch}[_choice(points, backend)]
    return searcher(fine(queries), fine(points), k, lengths)


@_nearest.register_fake
def _(queries: Tensor, points: Tensor, k: int, *_: object) -> Tensor:
    return queries.new_empty((*queries.shape[:2], k), dtype=torch.int64)


@_nearest.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *values: Any) -> tuple[Tensor, int]:
    index = torch.ops.pointcloud.nearest(*vmap_into_batch(info, dims, values))
    return index.unflatten(0, (info.batch_size, -1)), 0


def _choice(points: Tensor, backend: str) -> str:
    if backend != "auto":
        return backend
    if points.device.type != "cpu" or points.shape[1] < TREE:
        return "torch"
    if sample.installed("scipy"):
        return "scipy"
    return "pyg" if sample.pyg_has("knn") else "torch"


def _scipy(queries: Tensor, points: Tensor, k: int, lengths: Tensor | None) -> Tensor:
    try:
        from scipy.spatial import cKDTree
    except ImportError as error:
        raise ImportError(
            "nearest_points(backend='scipy'): scipy is not installed. pip install scipy, "
            "or give backend='torch'."
        ) from error
    index = np.empty((*queries.shape[:2], k), np.int64)
    sizes = [points.shape[1]] * len(points) if lengths is None else lengths.tolist()
    workers = torch.get_num_threads()
    options: Any = {"leafsize": 32, "balanced_tree": False, "compact_nodes": False}
    pairs = zip(points.numpy(), queries.numpy(), sizes, strict=True)
    for i, (cloud, centers, size) in enumerate(pairs):
        nearest = cKDTree(cloud[:size], **options).query(centers, k, workers=workers)[1]
        index[i] = nearest.reshape(-1, k)  # of one neighbour, SciPy drops the dimension
    return torch.from_numpy(index)


def _pyg(queries: Tensor, points: Tensor, k: int, lengths: Tensor | None) -> Tensor:
    from . import geometric

    return geometric.knn(queries, points, k, lengths)


def _torch(queries: Tensor, points: Tensor, k: int, lengths: Tensor | None) -> Tensor:
    """All distances, in tiles of some clouds by some queries by all points, in the same memory."""
    (b, m, _), n = queries.shape, points.shape[1]
    most = CPU_TILE if points.device.type == "cpu" else TILE
    q = max(1, min(m, most // n))
    c = max(1, min(b, most // (n * q)))
    barred = None if lengths is None else padding(points, lengths)[:, None]
    centers, planes = rearrange(queries, "b m c -> c b m 1"), rearrange(points, "b n c -> c b 1 n")
    memory = queries.new_empty((2, c, q, n))
    index = queries.new_empty((b, m, k), dtype=torch.int64)
    for clouds in _slices(b, c):
        cloud = planes[:, clouds].contiguous()
        for rows in _slices(m, q):
            square = _squares(centers[:, clouds, rows], cloud, memory)
            if barred is not None:
                square.masked_fill_(barred[clouds], torch.inf)
            index[clouds, rows] = square.topk(k, largest=False).indices
    return index


def _slices(n: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _squares(centers: Tensor, planes: Tensor, memory: Tensor) -> Tensor:
    """Squared distances (b, m, n) of (3, b, m, 1) to (3, b, 1, n), in the first of two memories."""
    square: Tensor
    square, step = memory[:, : centers.shape[1], : centers.shape[2]]
    torch.sub(centers[0], planes[0], out=square).square_()
    for center, plane in zip(centers[1:], planes[1:], strict=True):
        square += torch.sub(center, plane, out=step).square_()
    return square
