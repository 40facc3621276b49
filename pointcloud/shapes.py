"""Procedural clouds of fifteen classes, scanned as ScanObjectNN's variants are.

Nothing is downloaded: `objects` of random proportions, seen from one side, with holes and noise;
then among other things; then cropped. A task to learn and to test on, not a stand-in for the
numbers of the data set (Uy et al. 2019).
"""

from __future__ import annotations

import math

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor

from .clouds import Clouds
from .objects import CLASSES, NAMES, Draw, box, sheet, upright
from .surfaces import rotation, sample, scale

BACKGROUND = -1  # the part of a point that is not of the object
DIFFICULTIES = ("OBJ_ONLY", "OBJ_BG", "PB_T50_RS")

STRETCH = (0.75, 1.35)  # of an object along each axis
NOISE = 0.008  # sigma of a point, in radii of the object
HOLES, HOLE = 2, (0.1, 0.3)  # how many balls are missing, and their radii
HIDDEN = 0.85  # of what faces away from the scanner
SHIFT, SCALE = 0.5, (0.75, 1.25)  # of the crop, in sizes of the object: "T50", and "S"
_OVERSAMPLE, _LEAST = 4, 512  # candidates a point; of a cloud, for its box to be known
_CHUNK = 32  # clouds at once, few enough for the cache


def procedural(
    difficulty: str = "PB_T50_RS",
    clouds: int = 1500,
    points: int = 1024,
    *,
    train: bool = True,
    seed: int = 0,
) -> Clouds:
    """Clouds of the fifteen classes, as many of each (but for a remainder), shuffled.

    difficulty  OBJ_ONLY   an object of radius 1 about the origin, turned about y, seen from one
                           side, with two holes and noise
                OBJ_BG     with a floor, a wall and a piece of something else: part -1
                PB_T50_RS  cropped by a box moved by up to half of the object's size, centred
                           there, turned about y and scaled by 0.75 to 1.25
    clouds      how many; points in each
    train       the test clouds are of another random stream
    seed        the same seed gives the same clouds to the last bit

    Raises ValueError on another difficulty, or numbers that are too small. The protocol is that
    of the variants of Uy et al. 2019 (ScanObjectNN); parts are named in `objects.PARTS`.

    >>> few = procedural("OBJ_BG", clouds=30, points=256)
    >>> few.points.shape, few.names[0], int(few.labels.bincount().max())
    (torch.Size([30, 256, 3]), 'bag', 2)
    """
    _check(difficulty, clouds, points, seed)
    generator = torch.Generator().manual_seed(2 * seed + train)
    labels = torch.arange(clouds) % len(CLASSES)
    labels = labels[torch.randperm(clouds, generator=generator)]
    x, parts = torch.empty(clouds, points, 3), torch.empty(clouds, points, dtype=torch.int64)
    for label in range(min(clouds, len(CLASSES))):
        members = (labels == label).nonzero()[:, 0]
        for start in range(0, len(members), _CHUNK):
            rows = members[start : start + _CHUNK]
            x[rows], parts[rows] = _scan(label, difficulty, Draw(len(rows), generator), points)
    return Clouds(x, labels, NAMES, parts)


def _check(difficulty: str, clouds: int, points: int, seed: int) -> None:
    if difficulty not in DIFFICULTIES:
        raise ValueError(
            f"procedural(difficulty={difficulty!r}): there are {', '.join(DIFFICULTIES)}. "
            "Give one of these."
        )
    for name, value, least in (("clouds", clouds, 1), ("points", points, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"procedural({name}={value}): the least is {least}. Give more.")


def _scan(label: int, difficulty: str, d: Draw, n: int) -> tuple[Tensor, Tensor]:
    """(b, n, 3), (b, n) of one class: candidates, which of them are seen, then n of those."""
    surfaces = scale(CLASSES[label](d), (d(*STRETCH), d(*STRETCH), d(*STRETCH)))
    candidates = max(_OVERSAMPLE * n, _LEAST)
    x, normals, parts, kept = sample(surfaces, d.clouds, candidates, generator=d.generator)
    x = _unit(x)
    kept = kept & _faces(normals, d) & _outside_holes(x, d)
    if difficulty != "OBJ_ONLY":
        x, parts, kept = _among_others(x, parts, kept, d)
    x = _about_y(x, d)
    if difficulty == "PB_T50_RS":
        x, kept = _crop(x, parts, kept, d)
        x = _about_y(x, d) * d(*SCALE)[:, None, None]
    index = _first(kept, n)[:, torch.randperm(n, generator=d.generator)]
    x = x.gather(2, repeat(index, "b n -> b c n", c=3))
    x = x + NOISE * torch.randn(x.shape, generator=d.generator)
    return rearrange(x, "b c n -> b n c"), parts.gather(1, index)


# Below, x (b, 3, n) are candidates, `kept` (b, n) those that are seen.


def _unit(x: Tensor) -> Tensor:
    """The box about a cloud centred, its half diagonal 1: an object whole has radius <= 1."""
    low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
    radius: Tensor = torch.linalg.vector_norm(high - low, dim=1, keepdim=True) / 2
    return (x - (low + high) / 2) / radius


def _about_y(x: Tensor, d: Draw) -> Tensor:
    turned: Tensor = rotation(1, d(0, 2 * math.pi)) @ x
    return turned


def _faces(normals: Tensor, d: Draw) -> Tensor:
    """What faces a scanner that looks from anywhere, a little from above, and some of the rest."""
    angle, up = d(0, 2 * math.pi), d(0.2, 0.6)
    eye = torch.stack([angle.cos(), up, angle.sin()], -1)
    facing: Tensor = einsum(normals, eye, "b c n, b c -> b n") >= 0
    spared = torch.rand(facing.shape, generator=d.generator) > HIDDEN
    return facing.logical_or(spared)


def _outside_holes(x: Tensor, d: Draw) -> Tensor:
    kept = torch.ones_like(x[:, 0], dtype=torch.bool)
    for i in range(HOLES):  # about candidates, which are in random order
        kept &= (x - x[..., i : i + 1]).square().sum(1) > d(*HOLE).square()[:, None]
    return kept


def _among_others(x: Tensor, parts: Tensor, kept: Tensor, d: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Every eighth candidate is of a floor, a wall or a neighbour: about 15 % of those kept."""
    (left, low, back), (right, high, front) = x.amin(2).unbind(1), x.amax(2).unbind(1)
    wide, deep, tall, middle = right - left, front - back, high - low, (left + right) / 2
    others = sheet(0, (middle, low, (front + back) / 2), 1.2 * wide, 1.2 * deep)
    others += upright(0, (middle, low, back - 0.1), 1.2 * wide * d.coin(), tall)
    beside = (right + d(-0.1, 0.2), low, back + d(0, 1) * deep)
    others += box(0, beside, (d(0.1, 0.4), tall * d(0.3, 1.0), d(0.2, 0.8)))
    every = slice(None, None, 8)
    y = sample(others, d.clouds, len(x[0, 0, every]), generator=d.generator)
    shown = torch.rand(y.kept.shape, generator=d.generator) < d(0.2, 1)[:, None]
    x, parts, kept = x.clone(), parts.clone(), kept.clone()
    x[..., every], parts[:, every], kept[:, every] = y.points, BACKGROUND, y.kept & shown
    return x, parts, kept


def _crop(x: Tensor, parts: Tensor, kept: Tensor, d: Draw) -> tuple[Tensor, Tensor]:
    """Only what is in a moved copy of the box about the object, whose centre becomes the origin.

    Where fewer than a tenth of the points would stay, the move is halved until more do.
    """
    object_points = (kept & (parts != BACKGROUND))[:, None]
    low = torch.where(object_points, x, math.inf).amin(2, keepdim=True)
    high = torch.where(object_points, x, -math.inf).amax(2, keepdim=True)
    half, x = (high - low) / 2, x - (high + low) / 2
    move = torch.stack([d(-SHIFT, SHIFT) for _ in "xyz"], -1)[..., None] * 2 * half
    for _ in range(8):
        inside = kept & ((x - move).abs_() <= half).all(1)
        few = inside.sum(1) < kept.sum(1) / 10
        if not few.any():
            break
        move = torch.where(few[:, None, None], move / 2, move)
    return x - move, inside


def _first(kept: Tensor, n: int) -> Tensor:
    """Indices (b, n) of the first n kept, over again from the first where there are fewer."""
    count = kept.cumsum(1)
    rank = torch.arange(n) % count[:, -1:] + 1
    return torch.searchsorted(count, rank)
