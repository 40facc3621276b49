"""Random changes of batches of clouds ``(b, n, 3)``, each cloud its own, and `normalize`.

In place of a tensor all take a torch-geometric Data or Batch as well, ragged or not, and give a
shallow copy of it with new `pos`; in the docstrings points are tensors.

All are pure, keep dtype and device, and are differentiable in the points. Random numbers are
drawn in float32 on the device of the generator (of the points where there is none), then moved: a
seed of a CPU generator means the same change on every device and, but for rounding, in every
dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from einops import rearrange, reduce
from torch import Generator, Tensor

from .checks import check_points, not_empty
from .operations import random_device

AXES = "xyz"
T = TypeVar("T")  # a Tensor, Data or Batch
P = ParamSpec("P")


def of_clouds(
    change: Callable[Concatenate[Tensor, P], Tensor],
) -> Callable[Concatenate[T, P], T]:
    """`change` of tensors, made one of a torch-geometric Data or Batch as well."""

    @functools.wraps(change)
    def either(points: Any, *args: P.args, **options: P.kwargs) -> Any:
        if isinstance(points, Tensor):
            return change(points, *args, **options)
        from . import geometric

        return geometric.Augment(lambda x: change(x, *args, **options))(points)

    return cast("Callable[Concatenate[T, P], T]", either)


@of_clouds
def scale_translate(
    points: Tensor,
    low: float = 2 / 3,
    high: float = 3 / 2,
    shift: float = 0.2,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """Stretch every axis of a cloud on its own, then move it: x * s + t.

    points     (b, n, 3)
    low, high  s ~ U(low, high), three numbers a cloud
    shift      t ~ U(-shift, shift), three numbers a cloud, in units of the points

    Raises ValueError where low > high or shift < 0. Source: Pang et al. 2022 (Point-MAE), whose
    pre-training, fine-tuning and voting all use the defaults.

    >>> scale_translate(torch.randn(4, 1024, 3)).shape
    torch.Size([4, 1024, 3])
    """
    rule = f"scale_translate(low={low:g}, high={high:g}, shift={shift:g})"
    check_points("scale_translate", points)
    if not low <= high:
        raise ValueError(f"{rule}: low is above high. Give the smaller factor first.")
    _at_least_zero(rule, shift=shift)
    per_cloud = (len(points), 1, 3)
    scale = low + (high - low) * _uniform(points, per_cloud, generator)
    return points * scale + shift * (2 * _uniform(points, per_cloud, generator) - 1)


@of_clouds
def rotate(
    points: Tensor,
    axis: str = "y",
    degrees: float = 360.0,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """Turn every cloud about one axis through the origin by an angle of its own.

    points   (b, n, 3)
    axis     "x", "y" (up, in ScanObjectNN, ModelNet40 and ShapeNet) or "z"
    degrees  width of the range of the angle: theta ~ U(-degrees / 2, degrees / 2)

    Raises ValueError on another axis or a negative width. Source: about y, a row is multiplied
    by [[c, 0, s], [0, 1, 0], [-s, 0, c]] with c = cos(theta), s = sin(theta), as in Point-MAE's
    (Pang et al. 2022) rotation; the other axes follow by the cycle x, y, z.

    >>> turned = rotate(torch.eye(3)[None], degrees=90.0)
    >>> turned[0, 1]  # the axis itself stays
    tensor([0., 1., 0.])
    """
    rule = f"rotate(axis={axis!r}, degrees={degrees:g})"
    check_points("rotate", points)
    _known_axis(rule, axis)
    _at_least_zero(rule, degrees=degrees)
    theta = math.radians(degrees) * (_uniform(points, (len(points), 1), generator) - 0.5)
    c, s = theta.cos(), theta.sin()
    planes = list(points.unbind(-1))
    j, k = (AXES.index(axis) + 1) % 3, (AXES.index(axis) + 2) % 3
    planes[j], planes[k] = c * planes[j] + s * planes[k], c * planes[k] - s * planes[j]
    return torch.stack(planes, -1)


@of_clouds
def jitter(
    points: Tensor, sigma: float = 0.01, clip: float = 0.05, *, generator: Generator | None = None
) -> Tensor:
    """Move every point a little: x + clamp(sigma * N(0, 1), -clip, clip) in each coordinate.

    points       (b, n, 3)
    sigma, clip  in units of the points

    Raises ValueError where one is negative. Source: Qi et al. 2017 (PointNet), section 5.1; the
    numbers are those of its published code.

    >>> x = torch.randn(4, 1024, 3)
    >>> float((jitter(x) - x).abs().max()) < 0.051
    True
    """
    rule = f"jitter(sigma={sigma:g}, clip={clip:g})"
    check_points("jitter", points)
    _at_least_zero(rule, sigma=sigma, clip=clip)
    device = random_device(points, generator)
    noise = torch.randn(points.shape, generator=generator, device=device).to(points)
    return points + (sigma * noise).clamp(-clip, clip)


@of_clouds
def flip(
    points: Tensor, axis: str = "x", probability: float = 0.5, *, generator: Generator | None = None
) -> Tensor:
    """Mirror a cloud along one axis, with a probability: that coordinate changes its sign.

    points       (b, n, 3)
    axis         "x", "y" or "z"
    probability  0..1, that a cloud is mirrored

    Raises ValueError on another axis or probability.

    >>> flip(torch.tensor([[[1.0, 2.0, 3.0]]]), "x", probability=1.0)
    tensor([[[-1.,  2.,  3.]]])
    """
    rule = f"flip(axis={axis!r}, probability={probability:g})"
    check_points("flip", points)
    _known_axis(rule, axis)
    _fraction(rule, probability=probability)
    coordinate = torch.arange(3, device=points.device) == AXES.index(axis)
    mirrored = _uniform(points, (len(points), 1, 1), generator) < probability
    return torch.where(mirrored & coordinate, -points, points)


@of_clouds
def drop(points: Tensor, most: float = 0.875, *, generator: Generator | None = None) -> Tensor:
    """Drop points at random: each one that goes becomes a copy of its cloud's first point.

    points  (b, n, 3)
    most    0..1: a cloud's ratio is r ~ U(0, most), and each of its points goes with probability r

    Raises ValueError on another `most`. Source: Qi et al. 2017 (PointNet++), section 3.3; the
    number, and that a dropped point becomes the first so that n stays, are its published code's.

    >>> drop(torch.randn(4, 1024, 3)).shape
    torch.Size([4, 1024, 3])
    """
    rule = f"drop(most={most:g})"
    check_points("drop", points)
    _fraction(rule, most=most)
    ratio = most * _uniform(points, (len(points), 1), generator)
    gone = _uniform(points, (len(points), points.shape[1]), generator) < ratio
    return torch.where(rearrange(gone, "b n -> b n 1"), points[:, :1], points)


@of_clouds
def normalize(points: Tensor) -> Tensor:
    """Centre every cloud on the mean of its points and divide by the largest norm: a unit sphere.

    points  (b, n, 3); a cloud whose points are all the same becomes zeros

    Not what torch_geometric.transforms.NormalizeScale does, which divides by the largest
    coordinate. Source: the loaders of Qi et al. 2017 (PointNet++) and Pang et al. 2022
    (Point-MAE).

    >>> normalize(torch.tensor([[[5.0, 0.0, 1.0], [5.0, 0.0, 5.0]]]))
    tensor([[[ 0.,  0., -1.],
             [ 0.,  0.,  1.]]])
    """
    check_points("normalize", points)
    not_empty("normalize", points)
    centred = points - reduce(points, "b n c -> b 1 c", "mean")
    size = reduce(centred.abs(), "b n c -> b 1 1", "max")  # squares of 1e25 or 1e-30 are no numbers
    centred = centred / torch.where(size > 0, size, 1.0)
    radius = reduce(torch.linalg.vector_norm(centred, dim=-1), "b n -> b 1 1", "max")
    fitted: Tensor = centred / radius.clamp_min(1.0)  # it is 1 to sqrt(3), or 0
    return fitted


def _uniform(points: Tensor, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    device = random_device(points, generator)
    return torch.rand(shape, generator=generator, device=device).to(points)


def _known_axis(rule: str, axis: str) -> None:
    if len(axis) != 1 or axis not in AXES:
        raise ValueError(f"{rule}: there is no axis {axis!r}. Give 'x', 'y' or 'z'.")


def _at_least_zero(rule: str, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{rule}: {name} is {value:g}. Give 0 or more.")


def _fraction(rule: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{rule}: {name} is {value:g}, not a fraction. Give 0 to 1.")
