"""Choosing points of a cloud: farthest point sampling, random choice, and gathering by index."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from .checks import (
    check_backend,
    check_count,
    check_index,
    check_lengths,
    check_points,
    check_start,
    check_values,
)
from .operations import fine, padding, random_device, vmap_into_batch

if TYPE_CHECKING:
    from torch_geometric.data import Data

Start: TypeAlias = "int | Tensor | Literal['random']"
ORIGIN = 1e-3  # |p|^2 up to which the published CUDA operation passes a point over
BLOCK = 1 << 16  # points walked at once on a CPU: their planes stay in its cache
CLOSE = 2.0**-19  # float32 squares are within 5 * 2^-24 of the truth: half of what two may differ
CALL = 1 << 15  # distances whose time it takes to look at one cloud in float64
TINY = 1e-37  # where float32 squares stop to be relatively exact
BACKENDS = ("auto", "torch", "numpy", "pyg")


def farthest_points(
    points: Tensor | Data,
    m: int,
    *,
    start: Start = 0,
    lengths: Tensor | None = None,
    skip_origin: bool = False,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Tensor:
    """Indices (b, m) of `m` points of each cloud, each the farthest from those before it.

    points       (b, n, 3), finite; or a torch-geometric Data or Batch, whose indices are into `pos`
    m            how many, at most the points of the smallest cloud
    start        the first index: one for all, one for each cloud (b,), or "random"
    lengths      (b,): only the first `lengths[i]` points of cloud i exist, the others are padding
    skip_origin  never pick a point with |p|^2 <= 1e-3, but for the start, as the published CUDA
                 operation does; the start repeats where there is no other point
    generator    for a random start
    backend      "numpy" (of points on a CPU), "torch", "pyg" (pyg-lib, through torch-geometric),
                 or "auto": numpy on a CPU; on CUDA pyg if it is installed; or else torch

    The choice is exact: decided by squares of differences in float64, ties for the first index.
    (On Apple's mps, which has no float64, in float32.) pyg-lib promises no index of a tie on a
    GPU, and has neither lengths, skip_origin nor a start but 0: what asks for them is done
    without it. The first of `m` points are those that fewer asked for would be. Where a cloud has
    fewer distinct points than `m`, its first index repeats. A generator does not compile; a
    `start` of drawn indices does.

    Raises ValueError for shapes that do not fit, too few points, and coordinates that are not
    finite; ImportError for a backend that is not installed; TypeError for what is no cloud.

    Source: Eldar et al. 1997; Qi et al. 2017 (PointNet++), section 3.2; `pointnet2_ops` for
    `skip_origin`.

    >>> line = torch.tensor([0.0, 1.0, 2.0, 7.0, 10.0])
    >>> farthest_points(torch.stack([line, 0 * line, 0 * line], dim=-1)[None], 3)
    tensor([[0, 4, 3]])
    """
    if not isinstance(points, Tensor):
        from . import geometric

        geometric.check_no_lengths("farthest_points", lengths)
        clouds = geometric.dense(points)
        options: Any = {"start": start, "generator": generator, "backend": backend}
        options |= {"lengths": clouds.lengths, "skip_origin": skip_origin}
        return clouds.flat(farthest_points(clouds.points, m, **options))
    check_points("farthest_points", points, lengths)
    check_backend("farthest_points", backend, BACKENDS, points)
    check_count("farthest_points", "m", m, points.shape[1])
    first = _first(points, start, lengths, generator)
    index: Tensor = torch.ops.pointcloud.farthest(
        points.detach(), m, first, lengths, skip_origin, backend
    )
    return index


def random_points(
    points: Tensor | Data,
    m: int,
    *,
    lengths: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Of each cloud, `m` points (b, m, 3) drawn without replacement.

    points   (b, n, 3); or a torch-geometric Data or Batch
    lengths  (b,): only the first `lengths[i]` points of cloud i exist, the others are padding

    Raises ValueError for other shapes, and where a cloud has fewer points.

    >>> random_points(torch.randn(2, 1024, 3), 512).shape
    torch.Size([2, 512, 3])
    """
    if not isinstance(points, Tensor):
        from . import geometric

        geometric.check_no_lengths("random_points", lengths)
        points, lengths, _ = geometric.dense(points)
    check_points("random_points", points, lengths)
    check_count("random_points", "m", m, points.shape[1])
    keys = torch.rand(
        points.shape[:2], generator=generator, device=random_device(points, generator)
    )
    if lengths is not None:
        check_lengths("random_points", "m", m, points, lengths)
        keys = keys.masked_fill(padding(points, lengths).to(keys.device), 2.0)
    return gather(points, keys.argsort(dim=1)[:, :m].to(points.device))


def gather(points: Tensor, index: Tensor) -> Tensor:
    """Rows (b, ..., c) of points (b, n, c) at indices (b, ...), cloud by cloud.

    Raises ValueError where there are not as many of both, or indices are no integers.

    >>> gather(torch.arange(6.0).view(1, 3, 2), torch.tensor([[2, 0]]))
    tensor([[[4., 5.],
             [0., 1.]]])
    """
    check_index(points, index)
    rows = repeat(index.flatten(1), "b i -> b i c", c=points.shape[-1])
    return points.gather(1, rows.long()).view(*index.shape, points.shape[-1])


@cache
def installed(package: str) -> bool:
    """Whether a package is there, without importing it."""
    return importlib.util.find_spec(package) is not None


def pyg_has(name: str) -> bool:
    """Whether pyg-lib is there with that search: torch-geometric is imported only to ask of it."""
    if not installed("pyg_lib") or not installed("torch_geometric"):
        return False
    from . import geometric

    return geometric.has(name)


def _first(
    points: Tensor, start: Start, lengths: Tensor | None, generator: torch.Generator | None
) -> Tensor | None:
    """The first index of each cloud, (b,); None is 0 for all."""
    b, n, _ = points.shape
    if isinstance(start, Tensor):
        if start.shape != (b,) or start.is_floating_point():
            raise ValueError(
                f"farthest_points(): start is {start.dtype} {tuple(start.shape)}. Give integers "
                f"({b},), one for each cloud."
            )
        return start.to(points.device, torch.int64)
    if start == "random":
        sizes = torch.full((b,), n) if lengths is None else lengths
        sizes = sizes.to(points.device)
        drawn = torch.rand(b, generator=generator, device=random_device(points, generator))
        return (drawn.to(points.device) * sizes).long().minimum(sizes - 1)
    if isinstance(start, bool) or not hasattr(start, "__index__") or not 0 <= start < n:
        raise ValueError(
            f"farthest_points(start={start!r}): no index of {n} points. "
            f"Give 0 to {n - 1}, a tensor (b,), or 'random'."
        )
    return torch.full((b,), int(start), device=points.device) if start else None


# The operation: opaque to compilers, so that it may read values and use NumPy.


@torch.library.custom_op(
    "pointcloud::farthest",
    mutates_args=(),
    schema="(Tensor points, SymInt m, Tensor? start, Tensor? lengths, bool skip_origin, "
    "str backend) -> Tensor",
)
def _farthest(
    points: Tensor,
    m: int,
    start: Tensor | None,
    lengths: Tensor | None,
    skip_origin: bool,
    backend: str,
) -> Tensor:
    plain = start is None and lengths is None and not skip_origin
    barred = torch.zeros(points.shape[:2], dtype=torch.bool, device=points.device)
    if lengths is not None:
        barred = padding(points, lengths)
        points = points.masked_fill(barred[..., None], 0.0)
    check_values("farthest_points", "m", m, points, lengths)
    if start is None:
        start = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    else:
        check_start(start, points, lengths)
    if plain and _by_pyg(backend, points):
        from . import geometric

        return geometric.fps(fine(points), m)
    if skip_origin:
        barred = barred | (fine(points).square().sum(dim=2) <= ORIGIN)
    if points.device.type == "cpu" and backend != "torch":
        return _blocks(points, m, start, barred)
    return _walk(_planes(fine(points)), m, start, barred, _largest).contiguous()


@_farthest.register_fake
def _(points: Tensor, m: int, *_: object) -> Tensor:
    return points.new_empty((points.shape[0], m), dtype=torch.int64)


@_farthest.register_vmap
def _(info: Any, dims: tuple[int | None, ...], *values: Any) -> tuple[Tensor, int]:
    index = torch.ops.pointcloud.farthest(*vmap_into_batch(info, dims, values))
    return index.unflatten(0, (info.batch_size, -1)), 0


def _by_pyg(backend: str, points: Tensor) -> bool:
    on_gpu = points.device.type == "cuda"  # one kernel there; on a CPU it is slower than NumPy
    return backend == "pyg" or (backend == "auto" and on_gpu and pyg_has("fps"))


Decide: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"


def _walk(planes: Tensor, m: int, start: Tensor, barred: Tensor, decide: Decide) -> Tensor:
    """Farthest points (b, m) of planes (3, b, n): `decide(near, picks)` gives the next index (b,).

    near (b, n) is the squared distance of each point to the nearest of picks (j, b). Barred points
    have -1, a barred start -0.5: it repeats where there is no other.
    """
    most = torch.finfo(planes.dtype).max  # not inf: what overflows is close to what nearly does
    near = torch.full_like(planes[0], most).masked_fill_(barred, -1.0)
    first = rearrange(start, "b -> b 1")
    near.scatter_(1, first, near.gather(1, first).where(~barred.gather(1, first), -0.5))
    steps, picks = torch.empty_like(planes), start.expand(m, -1).clone()
    x, y, z = steps
    for j in range(1, m):
        center = planes.gather(2, picks[j - 1][None, :, None].expand(3, -1, 1))
        torch.sub(planes, center, out=steps).mul_(steps)
        torch.minimum(near, x.add_(y).add_(z), out=near)
        picks[j] = decide(near, picks[:j])
    return rearrange(picks, "m b -> b m")


def _planes(points: Tensor) -> Tensor:
    return rearrange(points, "b n c -> c b n").contiguous()


def _largest(near: Tensor, _: Tensor) -> Tensor:
    return near.argmax(dim=1)


def _largest_by_numpy(near: Tensor, _: Tensor) -> Tensor:
    return torch.from_numpy(near.numpy().argmax(axis=1))  # ten times faster than torch's


def _blocks(points: Tensor, m: int, start: Tensor, barred: Tensor) -> Tensor:
    """On a CPU: some clouds at a time, in float32 where that decides, or else in float64."""
    size = max(1, BLOCK // points.shape[1])
    picked = torch.empty(len(points), m, dtype=torch.int64)
    for i in range(0, len(points), size):
        part = slice(i, i + size)
        picked[part] = _block(points[part], m, start[part], barred[part])
    return picked


def _block(points: Tensor, m: int, start: Tensor, barred: Tensor) -> Tensor:
    if points.dtype != torch.float64:
        try:
            quick = points.float()
            return _walk(_planes(quick), m, start, barred, _settle(quick, m))
        except _Undecided:
            pass
    return _walk(_planes(points.double()), m, start, barred, _largest_by_numpy)


class _Undecided(Exception):
    """So many distances are close to one another that float32 does not pay."""


def _settle(points: Tensor, m: int) -> Decide:
    """Decides by float32 distances, but among close ones by float64 distances, made for them."""
    left = points.shape[0] * points.shape[1] * m // 4  # distances that float64 may take
    rows = np.arange(len(points))

    def decide(near: Tensor, picks: Tensor) -> Tensor:
        nonlocal left
        far = near.numpy()
        best = far.argmax(axis=1)
        top = far[rows, best]
        least = top * (1 - CLOSE) - TINY
        far[rows, best] = -1.0
        second = far[rows, far.argmax(axis=1)]
        far[rows, best] = top
        for row in np.flatnonzero(second >= least):
            close = np.flatnonzero(far[row] >= least[row])
            left -= CALL + 4 * len(close) * len(picks)
            if left < 0:
                raise _Undecided
            cloud = points[row].double()
            steps = rearrange(cloud[close], "i c -> c i 1") - cloud[picks[:, row]].t()[:, None]
            x, y, z = steps.square_()
            best[row] = close[x.add_(y).add_(z).amin(dim=1).numpy().argmax()]
        return torch.from_numpy(best)

    return decide
