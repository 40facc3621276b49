"""Pictures of clouds and of their groups, with y up and equal scales; needs matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat
from torch import Tensor

from .checks import check_points
from .group import Groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

YAW, PITCH = math.radians(30), math.radians(22)  # seen from the right, from above
FADE = 0.5  # how far the farthest points go towards white
GREY = (0.78, 0.79, 0.8)  # of what has a number below 0; no other number is grey
PALETTE = (*range(0, 14, 2), 16, 18, *range(1, 14, 2), 17, 19)  # of tab20 without its greys
STRONG = 9  # the first of them; the others are their pale twins
CELL, HEAD = 2.0, 0.25  # inches of a cloud and of a title
APART = 2.0  # times the distance of centers


def draw_clouds(
    clouds: Tensor,
    path: str | os.PathLike[str],
    titles: Sequence[str] | None = None,
    colors: Tensor | None = None,
    columns: int = 5,
) -> Path:
    """Draw clouds in a grid, row by row, all in one scale, each about its middle.

    clouds   (n, p, 3), y up
    path     of the picture to write, a PNG by its ending; returned
    titles   n of them
    colors   (n, p) whole numbers, such as parts: a color each, of 18 in turn, grey below 0;
             None: by height
    columns  at most so many in a row

    Raises ValueError on shapes that do not fit and on points that are not finite, and ImportError
    without matplotlib.

    >>> import tempfile
    >>> draw_clouds(torch.randn(3, 256, 3), tempfile.mkdtemp() + "/clouds.png", list("abc")).name
    'clouds.png'
    """
    _check(clouds, titles, colors, columns)
    seen = _seen(clouds)
    wide = min(columns, len(clouds))
    high = math.ceil(len(clouds) / wide)
    figure = _figure(wide * CELL, high * (CELL + (HEAD if titles else 0)))
    shades = _by_height(clouds) if colors is None else _by_number(colors)
    for i, cloud in enumerate(seen):
        axes = figure.add_subplot(high, wide, i + 1)
        _scatter(axes, cloud, shades[i], _size(clouds.shape[1]))
        _finish(axes, seen, titles[i] if titles else "")
    figure.savefig(path, dpi=150)
    return Path(path)


def draw_groups(groups: Groups, path: str | os.PathLike[str], cloud: int = 0) -> Path:
    """Draw the patches of one cloud, each in a color, and its centers as black dots.

    groups  of `group_points`: centers (b, g, 3) and patches (b, g, k, 3) about them
    path    of the picture to write, a PNG by its ending; returned
    cloud   which of the b

    A point of several patches has the color of the nearest center; on the right the same patches
    are drawn apart, with all their points. Raises IndexError where there is no such cloud, and
    ImportError without matplotlib.

    >>> import tempfile
    >>> from pointcloud.group import group_points
    >>> groups = group_points(torch.randn(1, 256, 3), 8, 16)
    >>> draw_groups(groups, tempfile.mkdtemp() + "/groups.png").name
    'groups.png'
    """
    centers, patches = (x[cloud].detach().cpu().double() for x in (groups.centers, groups.patches))
    g, k, _ = patches.shape
    inward = rearrange(patches.square().sum(-1), "g k -> (g k)").argsort(descending=True)
    colors = repeat(_far_apart(centers, STRONG), "g -> 1 (g k)", k=k)[:, inward]
    figure = _figure(4 * CELL, 2 * CELL + HEAD)
    titles = (f"{g} centers, {k} points around each", "the same patches, apart")
    for axes, title, apart in zip(figure.subplots(1, 2), titles, (1.0, APART), strict=True):
        points = rearrange(patches + apart * rearrange(centers, "g c -> g 1 c"), "g k c -> (g k) c")
        seen = _seen(torch.cat([apart * centers, points[inward]])[None])[0]
        _scatter(axes, seen[g:], _by_number(colors)[0], 3 * _size(g * k))
        right, up, _ = seen[:g].unbind(-1)
        axes.scatter(right, up, s=20, c="black", edgecolors="white", linewidths=1)
        _finish(axes, seen, title)
    figure.savefig(path, dpi=150)
    return Path(path)


def _check(
    clouds: Tensor, titles: Sequence[str] | None, colors: Tensor | None, columns: int
) -> None:
    check_points("draw_clouds", clouds)
    n, p, _ = clouds.shape
    if not n * p:
        raise ValueError(f"draw_clouds(): clouds {(n, p, 3)} have no points. Give some to draw.")
    if not clouds.isfinite().all():
        raise ValueError("draw_clouds(): a point is not finite. Leave such points out.")
    if titles is not None and len(titles) != n:
        raise ValueError(f"draw_clouds(): {len(titles)} titles for {n} clouds. Give one for each.")
    if colors is not None and (colors.shape != (n, p) or colors.is_floating_point()):
        fact = f"colors {colors.dtype} {tuple(colors.shape)} for clouds {(n, p, 3)}"
        raise ValueError(f"draw_clouds(): {fact}. Give a whole number for each point.")
    if columns < 1:
        raise ValueError(f"draw_clouds(columns={columns}): no room. Give 1 column or more.")


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        fact = "matplotlib, which draws, is not installed"
        raise ImportError(f"{fact}. Run: pip install matplotlib") from error
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.04, wspace=0, hspace=0)
    return figure


def _seen(clouds: Tensor) -> Tensor:
    """Clouds (n, p, 3) about their middle, from the viewer: to the right, up, and nearer."""
    clouds = clouds.detach().cpu().double()
    x, y, z = clouds.unbind(-1)
    right, front = math.cos(YAW) * x - math.sin(YAW) * z, math.sin(YAW) * x + math.cos(YAW) * z
    up = math.cos(PITCH) * y - math.sin(PITCH) * front
    near = math.sin(PITCH) * y + math.cos(PITCH) * front
    seen = torch.stack([right, up, near], -1)
    return seen - (seen.amin(1, keepdim=True) + seen.amax(1, keepdim=True)) / 2


def _scatter(axes: Axes, seen: Tensor, colors: Tensor, size: float) -> None:
    """Points of one cloud, the far ones first and paler; of those in one place the last on top."""
    low, high = seen[:, 2].aminmax()
    near = (seen[:, 2] - low) / (high - low).clamp_min(1e-12)
    order = (near * 1000).round().argsort(stable=True)
    pale = colors + (1 - colors) * FADE * rearrange(1 - near, "p -> p 1")
    right, up, _ = seen[order].unbind(-1)
    axes.scatter(right, up, s=size, c=pale[order].numpy(), linewidths=0)


def _finish(axes: Axes, seen: Tensor, title: str) -> None:
    """No frame, equal scales, all that was seen inside."""
    half = 1.05 * max(float(seen[..., :2].abs().max()), 1e-12)
    axes.set(xlim=(-half, half), ylim=(-half, half), aspect="equal")
    axes.set_axis_off()
    if title:
        axes.set_title(title, fontsize=10, color="#333333", pad=2)


def _size(points: int) -> float:
    """Area of a dot, in square points: the more dots there are, the smaller each."""
    return 125 / math.sqrt(points)


def _by_height(clouds: Tensor) -> Tensor:
    """(n, p, 3) colors from the lowest to the highest point of each cloud."""
    height = clouds[..., 1].detach().cpu().double()
    low, high = height.amin(1, keepdim=True), height.amax(1, keepdim=True)
    return _colors("viridis", 0.9 * (height - low) / (high - low).clamp_min(1e-12))


def _by_number(numbers: Tensor) -> Tensor:
    """(n, p, 3) colors, the same for the same number, grey below 0."""
    numbers = numbers.cpu().long()  # as an index, uint8 would be a mask
    shades = torch.tensor(PALETTE)[numbers % len(PALETTE)]
    grey = torch.tensor(GREY, dtype=torch.float64)
    return torch.where(rearrange(numbers < 0, "n p -> n p 1"), grey, _colors("tab20", shades))


def _far_apart(centers: Tensor, many: int) -> Tensor:
    """A number below `many` for each center (g,), the same only for those far from one another."""
    numbers: list[int] = []
    for i, distance in enumerate(torch.cdist(centers, centers)):
        nearest = torch.full((many,), torch.inf, dtype=distance.dtype)
        nearest.scatter_reduce_(0, torch.tensor(numbers, dtype=torch.int64), distance[:i], "amin")
        numbers.append(int(nearest.argmax()))
    return torch.tensor(numbers)


def _colors(name: str, values: Tensor) -> Tensor:
    from matplotlib import colormaps

    return torch.from_numpy(colormaps[name](values.numpy()))[..., :3]
