"""Parametric surfaces, batched over clouds, and points that lie uniformly by area on them.

A surface is a canonical one of five (`PATCH` ... `RING`) in an affine frame. With f(u, v) the
canonical point and m = f_u x f_v, the frame A, t gives the point A f + t and the area element
|cof(A) m|, so one rejection step makes any of them uniform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from einops import einsum, rearrange
from torch import Tensor

PATCH, ROUND, SQUARE, BALL, RING = range(5)
Value: TypeAlias = "float | Tensor"  # one number for all clouds, or (b,): one a cloud
Triple: TypeAlias = "tuple[Value, Value, Value]"


class Surface(NamedTuple):
    """A canonical surface: kind, frame (..., 3, 4) = axes x, y, z and origin, k, arc, part, solid.

    PATCH   x, z in +-1/2; y = 1 in the middle and 0 at the edges (flat where the axis y is 0)
    ROUND   a tube along y from 0 to 1, of radius 1 at 0 and k at 1 (a disc where the axis y is 0)
    SQUARE  the same with a square cross-section, half of its side 1 and k
    BALL    of radius 1, cut off above y = k
    RING    a torus about y, of radius 1, its tube of radius k
    arc     the fraction of the full turn that ROUND, BALL and RING make, from x to z
    solid   closed: seen from outside alone, unlike a sheet
    """

    kind: Value
    frame: Tensor
    k: Value
    arc: Value
    part: int
    solid: bool


class Sample(NamedTuple):
    """points (b, 3, n), coordinates first (faster); normals (b, 3, n), not of unit length, 0 on
    sheets; parts (b, n); kept (b, n): the points to keep, which are uniform by area."""

    points: Tensor
    normals: Tensor
    parts: Tensor
    kept: Tensor


def surface(
    kind: Value,
    part: int,
    at: Triple,
    size: Triple,
    k: Value = 1.0,
    arc: Value = 1.0,
    *,
    solid: bool = True,
) -> Surface:
    """A surface at the origin `at`, its axes of lengths `size` along x, y, z.

    >>> surface(BALL, part=0, at=(0.0, 1.0, 0.0), size=(0.5, 0.5, 0.5)).frame.shape
    torch.Size([3, 4])
    """
    zero = 0 * (vector(*at) + vector(*size))  # as many clouds as either has
    axes = torch.diag_embed(vector(*size) + zero)
    frame = torch.cat([axes, (vector(*at) + zero)[..., None]], -1)
    return Surface(kind, frame, k, arc, part, solid)


def vector(x: Value, y: Value, z: Value) -> Tensor:
    """(..., 3) of three numbers or tensors."""
    values = [torch.as_tensor(value, dtype=torch.float32) for value in (x, y, z)]
    zero = 0 * (values[0] + values[1] + values[2])
    return torch.stack([value + zero for value in values], -1)


def turn(
    surfaces: Sequence[Surface], axis: int, angle: Value, pivot: Triple = (0.0, 0.0, 0.0)
) -> list[Surface]:
    """The surfaces rotated by `angle` radians about the axis 0, 1 or 2 through `pivot`.

    >>> flat = surface(PATCH, 0, at=(0.0, 0.0, 0.0), size=(1.0, 0.0, 2.0))
    >>> turn([flat], 0, math.pi / 2)[0].frame[:, 2].round() + 0.0  # the axis z points down
    tensor([ 0., -2.,  0.])
    """
    x, y, z = pivot
    matrix, centred = rotation(axis, angle), move(surfaces, (-x, -y, -z))
    return move([s._replace(frame=matrix @ s.frame) for s in centred], pivot)


def move(surfaces: Sequence[Surface], by: Triple) -> list[Surface]:
    """The surfaces moved by (x, y, z).

    >>> move([surface(BALL, 0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))], (1.0, 2.0, 3.0))[0].frame[:, 3]
    tensor([1., 2., 3.])
    """
    offset = torch.nn.functional.pad(vector(*by)[..., None], (3, 0))
    return [s._replace(frame=s.frame + offset) for s in surfaces]


def scale(surfaces: Sequence[Surface], by: Triple) -> list[Surface]:
    """The surfaces stretched along x, y and z about the origin.

    >>> scale([surface(BALL, 0, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))], (1.0, 2.0, 3.0))[0].frame[:, 3]
    tensor([1., 2., 3.])
    """
    return [s._replace(frame=vector(*by)[..., None] * s.frame) for s in surfaces]


def rotation(axis: int, angle: Value) -> Tensor:
    """(..., 3, 3), by `angle` radians about the axis 0, 1 or 2, right-handed."""
    angle = torch.as_tensor(angle, dtype=torch.float32)
    c, s, i, j = angle.cos(), angle.sin(), (axis + 1) % 3, (axis + 2) % 3
    matrix = torch.eye(3).repeat(*angle.shape, 1, 1)
    matrix[..., i, i], matrix[..., j, j] = c, c
    matrix[..., i, j], matrix[..., j, i] = -s, s
    return matrix


def sample(
    surfaces: Sequence[Surface], b: int, n: int, *, generator: torch.Generator | None = None
) -> Sample:
    """n points on each of b objects; those `kept` are uniform by area, in random order.

    >>> ball = surface(BALL, part=3, at=(0.0, 0.0, 0.0), size=(1.0, 1.0, 1.0))
    >>> points, normals, parts, kept = sample([ball], b=2, n=100)
    >>> points.shape, kept.shape, bool(parts.eq(3).all())
    (torch.Size([2, 3, 100]), torch.Size([2, 100]), True)
    """
    table, mass = _table(surfaces, b)
    pick, u, v, height = torch.rand(4, b, n, generator=generator)
    which = torch.searchsorted(mass.cumsum(-1), pick * mass.sum(-1, keepdim=True))
    which = which.clamp_(max=len(surfaces) - 1) + torch.arange(b)[:, None] * len(surfaces)
    rows = rearrange(table.flatten(0, 1)[which.flatten()], "(b n) c -> b c n", b=b).contiguous()
    x, y, z, origin, dx, dy, dz, shape = rows.split_with_sizes([3] * 7 + [6], 1)
    kind, k, arc, bound, part, solid = shape.unbind(1)
    f, m = _canonical(u, v, kind, k, arc)
    points = origin + x * f[0] + y * f[1] + z * f[2]
    normals = dx * m[0] + dy * m[1] + dz * m[2]
    area = normals.square().sum(1).sqrt_()
    return Sample(points, normals * solid[:, None], part.long(), height * bound < area)


def _table(surfaces: Sequence[Surface], b: int) -> tuple[Tensor, Tensor]:
    """Rows (b, s, 27): axes, origin, cofactor columns, kind, k, arc, bound, part, solid; bounds."""
    frame = torch.stack([s.frame.expand(b, 3, 4) for s in surfaces], 1)
    kind, k, arc = (
        torch.stack([torch.as_tensor(s[i], dtype=torch.float32).expand(b) for s in surfaces], 1)
        for i in (0, 2, 3)
    )
    x, y, z = frame[..., :3].unbind(-1)
    cofactor = torch.stack([y.cross(z, -1), z.cross(x, -1), x.cross(y, -1)], -2)
    bound = _bound(kind, k, arc, cofactor)
    flags = torch.tensor([(s.part, s.solid) for s in surfaces]).float().expand(b, -1, 2)
    columns = rearrange(frame, "b s i j -> b s (j i)"), rearrange(cofactor, "b s j i -> b s (j i)")
    scalars = torch.stack([kind, k, arc, bound], -1)
    return torch.cat([*columns, scalars, flags], -1), bound


def _bound(kind: Tensor, k: Tensor, arc: Tensor, cofactor: Tensor) -> Tensor:
    """No less than |cof(A) m| at any u, v. cofactor (b, s, 3, 3): the columns of cof(A)."""
    x, y, z = cofactor.square().sum(-1).unbind(-1)
    cross = einsum(cofactor[..., 0, :], cofactor[..., 2, :], "b s i, b s i -> b s")
    side = (x + z + ((x - z).square() + 4 * cross.square()).sqrt()) / 2  # the norm of (x z)
    tube = (1 + k) / 2 * (side.sqrt() + (1 - k).abs() * y.sqrt())
    ball, turn = (side + y).sqrt(), 2 * math.pi * arc
    return _choose(
        (kind == PATCH, 4 * side.sqrt() + y.sqrt()),
        (kind == ROUND, turn * tube),
        (kind == SQUARE, 8 * tube),
        (kind == BALL, turn * (1 + k) * ball),
        (kind == RING, 2 * math.pi * turn * k * (1 + k) * ball),
    )


def _canonical(
    u: Tensor, v: Tensor, kind: Tensor, k: Tensor, arc: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The point f and m = f_u x f_v (out, or up) of u, v (b, n) in 0..1; each (b, 1, n)."""
    turn = 2 * math.pi * arc
    c, s = (turn * u).cos(), (turn * u).sin()
    # Profiles (radius, y) and the part of m along them. Tubes: v has a density like the radius.
    radius, length = (1 + (k.square() - 1) * v).sqrt(), torch.where(kind == SQUARE, 8.0, turn)
    rise, slope = v * (1 + k) / (radius + 1), length * (1 + k) / 2
    height, span = (1 + k) * v - 1, turn * (1 + k)
    round_ = (1 - height.square()).clamp_(min=0).sqrt_()
    cv, sv = (2 * math.pi * v).cos(), (2 * math.pi * v).sin()
    outer = 1 + k * cv
    around = 2 * math.pi * turn * k * outer
    tube, ball, ring = kind <= SQUARE, kind == BALL, kind == RING
    r = _choose((tube, radius), (ball, round_), (ring, outer))
    y = _choose((tube, rise), (ball, height), (ring, k * sv))
    mr = _choose((tube, slope), (ball, span * round_), (ring, around * cv))
    my = _choose((tube, slope * (1 - k)), (ball, span * height), (ring, around * sv))
    # On a square the direction of a point and of its normal differ.
    side = (4 * u).floor()
    along, sign = 2 * (4 * u - side) - 1, 1 - 2 * (side % 2)
    first, square = side < 2, kind == SQUARE
    px = torch.where(square, torch.where(first, sign, along), c)
    pz = torch.where(square, torch.where(first, along, sign), s)
    nx = torch.where(square, torch.where(first, sign, 0.0), c)
    nz = torch.where(square, torch.where(first, 0.0, sign), s)
    flat, a, d = kind == PATCH, 4 * u * (1 - u), 4 * v * (1 - v)
    f = (
        torch.where(flat, u - 0.5, r * px),
        torch.where(flat, a * d, y),
        torch.where(flat, v - 0.5, r * pz),
    )
    m = (
        torch.where(flat, (8 * u - 4) * d, mr * nx),
        torch.where(flat, 1.0, my),
        torch.where(flat, (8 * v - 4) * a, mr * nz),
    )
    return [p[:, None] for p in f], [p[:, None] for p in m]


def _choose(*cases: tuple[Tensor, Tensor]) -> Tensor:
    """The value of the case that is true; of the last where none is."""
    chosen = cases[-1][1]
    for condition, value in cases[:-1]:
        chosen = torch.where(condition, value, chosen)
    return chosen
