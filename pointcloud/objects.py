"""Objects of ScanObjectNN's fifteen classes, of random proportions, as parametric surfaces.

Lengths are metres; an object stands on the floor y = 0 and its front is towards +z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .surfaces import BALL, PATCH, RING, ROUND, SQUARE, Surface, Triple, Value, move, surface, turn

NAMES = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed",
    "pillow", "sink", "sofa", "toilet",
)  # fmt: skip
PARTS = ("body", "top", "seat", "back", "leg", "arm", "handle", "cushion", "board", "bowl")
BODY, TOP, SEAT, BACK, LEG, ARM, HANDLE, CUSHION, BOARD, BOWL = range(len(PARTS))
ORIGIN = (0.0, 0.0, 0.0)

Surfaces: TypeAlias = "list[Surface]"


class Draw:
    """Random numbers, one a cloud: draw(low, high) is uniform, coin(probability) is 0 or 1."""

    def __init__(self, clouds: int, generator: torch.Generator | None = None) -> None:
        self.clouds, self.generator = clouds, generator

    def __call__(self, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(self.clouds, generator=self.generator)

    def coin(self, probability: float = 0.5) -> Tensor:
        return (self(0, 1) < probability).float()


# Solids and sheets stand on their base `at`; `size` is width, height and depth. Size 0: nothing.


def times(size: Triple, factor: Value) -> Triple:
    return size[0] * factor, size[1] * factor, size[2] * factor


def sheet(part: int, at: Triple, w: Value, d: Value, puff: Value = 0.0) -> Surfaces:
    """A rectangle that lies, seen from both sides, its middle raised by `puff`."""
    return [surface(PATCH, part, at, (w, puff, d), solid=False)]


def upright(part: int, at: Triple, w: Value, h: Value, puff: Value = 0.0) -> Surfaces:
    """A rectangle that stands and faces the front."""
    lying = sheet(part, (0.0, 0.0, -h / 2), w, h, puff)
    return move(turn(lying, 0, math.pi / 2), at)


def disc(
    part: int, at: Triple, w: Value, d: Value, hole: Value = 0.0, kind: Value = ROUND
) -> Surfaces:
    return [surface(kind, part, at, (w / 2, 0.0, d / 2), k=hole, solid=False)]


def wall(
    part: int,
    at: Triple,
    size: Triple,
    taper: Value = 1.0,
    kind: Value = SQUARE,
    *,
    solid: bool = True,
) -> Surfaces:
    """The sides of a box, or of a cylinder: kind=ROUND; the top is `taper` times the bottom."""
    w, h, d = size
    return [surface(kind, part, at, (w / 2, h, d / 2), k=taper, solid=solid)]


def box(part: int, at: Triple, size: Triple, taper: Value = 1.0, kind: Value = SQUARE) -> Surfaces:
    """A closed box or cylinder."""
    (x, y, z), (w, h, d) = at, size
    top = surface(kind, part, (x, y + h, z), (taper * w / 2, 0.0, taper * d / 2), k=0.0)
    bottom = surface(kind, part, at, (w / 2, 0.0, -d / 2), k=0.0)
    return [*wall(part, at, size, taper, kind), top, bottom]


def post(part: int, at: Triple, thick: Value, h: Value, taper: Value = 1.0) -> Surfaces:
    return wall(part, at, (thick, h, thick), taper, ROUND)


def pad(part: int, at: Triple, size: Triple, puff: Value) -> Surfaces:
    """A box with a top that swells by `puff`: a mattress."""
    (x, y, z), (w, h, d) = at, size
    return [*wall(part, at, size), surface(PATCH, part, (x, y + h, z), (w, puff, d))]


def legs(w: Value, h: Value, d: Value, thick: Value, taper: Value = 1.0) -> Surfaces:
    """Four legs within the corners of w x d."""
    surfaces, x, z = [], (w - thick) / 2, (d - thick) / 2
    for i, j in ((x, z), (x, -z), (-x, z), (-x, -z)):
        surfaces += wall(LEG, (i, 0.0, j), (thick, h, thick), taper)
    return surfaces


def arch(part: int, at: Triple, w: Value, h: Value, thick: float, lean: Value = 0.0) -> Surfaces:
    """Half a ring that stands on the x axis, and leans to the front by an angle."""
    ring = surface(RING, part, ORIGIN, (w / 2, w / 2, h), k=thick, arc=0.5)
    return move(turn([ring], 0, lean - math.pi / 2), at)


# The fifteen classes.


def bag(d: Draw) -> Surfaces:
    w, h, t, puff = d(0.3, 0.5), d(0.25, 0.45), d(0.1, 0.2), d(0.04, 0.1)
    surfaces = box(BODY, ORIGIN, (w, h, t), d(0.75, 0.95))
    surfaces += upright(BODY, (0.0, 0.0, t * 0.47), w * 0.9, h * 0.95, puff)
    surfaces += box(BODY, (0.0, h * 0.08, t / 2), times((w * 0.6, h * 0.4, puff * 2), d.coin()))
    reach, rise = d(0.4, 0.65), d(0.2, 0.8)
    for side in (-1, 1):
        surfaces += arch(HANDLE, (0.0, h, side * t * 0.25), w * reach, h * rise, 0.07, side * 0.12)
    return surfaces


def bin_(d: Draw) -> Surfaces:
    w, h, kind = d(0.25, 0.4), d(0.35, 0.6), ROUND + d.coin(0.4) * (SQUARE - ROUND)
    t, taper = w * d(0.85, 1.0), d(1.1, 1.4)
    surfaces = wall(BODY, ORIGIN, (w, h, t), taper, kind)
    surfaces += wall(
        BODY, (0.0, h * 0.03, 0.0), (w * 0.93, h * 0.97, t * 0.93), taper, kind, solid=False
    )
    surfaces += disc(BODY, (0.0, h * 0.03, 0.0), w, t, 0.0, kind)
    rim = (w * taper * 1.1, h * 0.06, t * taper * 1.1)
    return surfaces + wall(TOP, (0.0, h * 0.95, 0.0), rim, 1.0, kind, solid=False)


def box_(d: Draw) -> Surfaces:
    w, h, t, opened = d(0.3, 0.6), d(0.2, 0.45), d(0.25, 0.45), d.coin(0.7)
    surfaces = wall(BODY, ORIGIN, (w, h, t), solid=False) + sheet(BODY, (0.0, 0.005, 0.0), w, t)
    surfaces += sheet(TOP, (0.0, h, 0.0), w * (1 - opened), t * (1 - opened))
    for quarter in range(4):  # flaps: hinged half a width from the middle, half as long
        half, along = (w, t) if quarter % 2 == 0 else (t, w)
        length = half / 2 * opened
        flap = turn(sheet(TOP, (length / 2, 0.0, 0.0), length, along * opened), 2, d(-0.9, 1.0))
        surfaces += turn(move(flap, (half / 2, h, 0.0)), 1, quarter * math.pi / 2)
    return surfaces


def cabinet(d: Draw) -> Surfaces:
    w, h, t, foot, drawers = d(0.7, 1.1), d(0.8, 1.5), d(0.35, 0.55), d(0.08, 0.16), d.coin()
    surfaces = box(BODY, (0.0, foot, 0.0), (w, h, t)) + legs(w * 0.95, foot, t * 0.95, 0.06)
    rise = h / 3
    for row in range(3):
        y = foot + rise * row
        for side in (-1, 1):
            panel = (w / 2 - 0.05, rise - 0.05 * drawers, 0.03)
            surfaces += box(BOARD, (side * w / 4, y + 0.02, t / 2 + 0.015), panel)
            x = side * (drawers * w / 4 + (1 - drawers) * 0.07)
            bar = (0.03 + 0.12 * drawers, 0.2 - 0.17 * drawers, 0.05)
            shown = drawers if row != 1 else 1.0
            surfaces += box(HANDLE, (x, y + rise * 0.4, t / 2 + 0.05), times(bar, shown))
    return surfaces


def chair(d: Draw) -> Surfaces:
    w, t, h, tall, arms = d(0.4, 0.52), d(0.4, 0.5), d(0.38, 0.48), d(0.4, 0.6), d.coin(0.35)
    back = box(BACK, (0.0, h, -t / 2), (w, tall, 0.04), d(0.8, 1.0))
    surfaces = box(SEAT, (0.0, h, 0.0), (w, d(0.04, 0.09), t))
    surfaces += legs(w, h, t, d(0.03, 0.06), d(0.6, 1.3))
    surfaces += turn(back, 0, -d(0.05, 0.3), (0.0, h, -t / 2))
    for x in (-w / 2, w / 2):
        surfaces += box(ARM, (x, h + 0.22, -0.02), times((0.05, 0.03, t * 0.85), arms))
        surfaces += wall(ARM, (x, h, t * 0.35), times((0.03, 0.22, 0.03), arms))
    return surfaces


def desk(d: Draw) -> Surfaces:
    w, t, h, side = d(1.2, 1.7), d(0.6, 0.8), d(0.7, 0.78), 1 - 2 * d.coin()
    pedestal, rise = w * d(0.25, 0.33), (h - 0.06) / 3
    x = side * (w - pedestal) / 2
    surfaces = box(TOP, (0.0, h, 0.0), (w, 0.04, t))
    surfaces += box(BODY, (x, 0.06, 0.0), (pedestal, h - 0.06, t * 0.9))
    surfaces += box(LEG, (side * (0.02 - w / 2), 0.0, 0.0), (0.04, h, t * 0.9))
    surfaces += upright(BACK, (0.0, h * 0.45, -t * 0.4), w * 0.95, h * 0.55)
    for row in range(3):
        y = 0.08 + rise * row
        surfaces += box(BOARD, (x, y, t * 0.45 + 0.015), (pedestal * 0.95, rise - 0.05, 0.03))
        surfaces += box(HANDLE, (x, y + 0.08, t * 0.45 + 0.05), (0.14, 0.03, 0.05))
    return surfaces


def display(d: Draw) -> Surfaces:
    w, neck, kind = d(0.45, 0.7), d(0.08, 0.16), ROUND + d.coin()
    h, foot = w * d(0.56, 0.7), w * d(0.35, 0.5)
    screen = box(BODY, (0.0, neck, 0.0), (w, h, 0.03))
    screen += box(BACK, (0.0, neck + h * 0.25, -0.035), (w * 0.5, h * 0.5, 0.05))
    surfaces = turn(screen, 0, -d(0.0, 0.2), (0.0, neck, 0.0))
    surfaces += box(LEG, (0.0, 0.0, -0.05), (0.07, neck + h * 0.3, 0.03))
    return surfaces + box(LEG, (0.0, 0.0, -0.02), (foot, 0.015, foot * 0.65), 0.95, kind)


def door(d: Draw) -> Surfaces:
    w, h, jamb, angle = d(0.75, 1.0), d(1.9, 2.2), d(0.07, 0.12), d(0.0, 0.9) * d.coin(0.6)
    leaf = box(BODY, ORIGIN, (w, h, 0.045))
    for z in (-0.08, 0.08):
        leaf += [surface(BALL, HANDLE, (w * 0.42, h * 0.48, z), (0.045, 0.045, 0.045))]
    surfaces = turn(leaf, 1, -angle, (-w / 2, 0.0, 0.0))
    for x in (-(w + jamb) / 2, (w + jamb) / 2):
        surfaces += box(BOARD, (x, 0.0, 0.0), (jamb, h, 0.13))
    return surfaces + box(BOARD, (0.0, h, 0.0), (w + 2 * jamb, jamb, 0.13))


def shelf(d: Draw) -> Surfaces:
    w, h, t, backed = d(0.6, 1.1), d(1.1, 1.9), d(0.25, 0.4), d.coin(0.6)
    surfaces = upright(BACK, (0.0, 0.0, -t / 2), w * backed, h * backed)
    for x in (-w / 2, w / 2):
        surfaces += box(BODY, (x, 0.0, 0.0), (0.03, h, t))
    for row in range(5):
        surfaces += box(BOARD, (0.0, h * (0.04 + 0.235 * row), 0.0), (w, 0.025, t))
    return surfaces


def table(d: Draw) -> Surfaces:
    h, w, round_, central = d(0.5, 0.8), d(0.8, 1.4), d.coin(), d.coin()
    t, kind = w * (round_ + (1 - round_) * d(0.6, 1.0)), SQUARE + round_ * (ROUND - SQUARE)
    thick, foot, inset = w * d(0.06, 0.1), w * d(0.4, 0.6) * central, 0.98 - 0.3 * round_
    surfaces = box(TOP, (0.0, h, 0.0), (w, 0.045, t), 1.0, kind)
    surfaces += post(LEG, ORIGIN, thick * central, h * central)
    surfaces += box(LEG, ORIGIN, (foot, 0.05 * central, foot), 0.6, ROUND)
    other = 1 - central
    return surfaces + legs(w * inset, h * other, t * inset, thick * 0.7 * other)


def bed(d: Draw) -> Surfaces:
    w, t, h, foot = d(0.9, 1.7), d(1.9, 2.1), d(0.25, 0.4), d.coin()
    surfaces = box(BODY, (0.0, 0.12, 0.0), (w, h * 0.5, t)) + legs(w, 0.12, t, 0.08)
    surfaces += pad(CUSHION, (0.0, 0.12 + h * 0.5, 0.0), (w * 0.97, h * 0.55, t * 0.97), 0.03)
    surfaces += box(BACK, (0.0, 0.0, -t / 2), (w * 1.04, d(0.75, 1.1), 0.06))
    surfaces += box(BACK, (0.0, 0.0, t / 2), times((w, d(0.45, 0.6), 0.06), foot))
    for x in (-w / 4, w / 4):
        at = (x, 0.15 + h * 1.05, -t * 0.36)
        surfaces += turn(sheet(CUSHION, at, w * 0.42, 0.42, 0.16), 0, 0.15, at)
    return surfaces


def pillow(d: Draw) -> Surfaces:
    w, t, puff = d(0.4, 0.7), d(0.35, 0.45), d(0.1, 0.18)
    halves = [surface(PATCH, CUSHION, ORIGIN, (w, i * puff, i * t)) for i in (1, -1)]
    return turn(halves, 0, d(0.0, 1.2))


def sink(d: Draw) -> Surfaces:
    w, t, deep, rise, column = d(0.5, 0.75), d(0.42, 0.55), d(0.14, 0.2), d(0.14, 0.24), d.coin()
    round_, slab = d.coin(), d(0.03, 0.08)
    kind, z = SQUARE + round_ * (ROUND - SQUARE), t * 0.1
    surfaces = wall(BOWL, (0.0, -deep, z), (w * 0.5, deep, t * 0.46), 1.56, kind, solid=False)
    surfaces += disc(BOWL, (0.0, -deep, z), w * 0.5, t * 0.46, 0.0, kind)
    surfaces += sheet(TOP, (0.0, 0.0, -t * 0.38), w, t * 0.24)
    surfaces += sheet(TOP, (0.0, 0.0, t * 0.48), w, t * 0.04)
    for x in (-w * 0.445, w * 0.445):
        surfaces += sheet(TOP, (x, 0.0, z), w * 0.11, t * 0.72)
    surfaces += wall(BODY, (0.0, -slab, 0.0), (w, slab, t))
    surfaces += post(HANDLE, (0.0, 0.0, -t * 0.36), 0.04, rise)
    spout = turn(arch(HANDLE, ORIGIN, t * 0.3, t * 0.15, 0.15), 1, math.pi / 2)
    surfaces += move(spout, (0.0, rise, -t * 0.21))
    for side in (-1, 1):
        surfaces += box(HANDLE, (side * 0.1, 0.0, -t * 0.36), (0.04, 0.07, 0.04))
    high = d(0.3, 0.6) * column
    return surfaces + post(LEG, (0.0, -deep - high, z), w * 0.25 * column, high, 1.3)


def sofa(d: Draw) -> Surfaces:
    w, t, h, arm, tall = d(1.3, 2.2), d(0.75, 0.95), d(0.25, 0.35), d(0.14, 0.24), d(0.4, 0.55)
    inner, rise = w - 2 * arm, d(0.18, 0.26)
    back = box(BACK, (0.0, h, 0.1 - t / 2), (w * 0.98, tall, 0.18))
    surfaces = box(BODY, (0.0, 0.05, 0.0), (w, h, t))
    surfaces += turn(back, 0, -0.12, (0.0, h, 0.1 - t / 2))
    for side in (-1, 1):
        surfaces += box(ARM, (side * (w - arm) / 2, 0.05, 0.0), (arm, h + rise, t))
        at = (side * inner / 4, h + 0.05, 0.08)
        surfaces += pad(CUSHION, at, (inner * 0.48, 0.1, t * 0.72), 0.05)
    return surfaces


def toilet(d: Draw) -> Surfaces:
    w, t, h, tank = d(0.36, 0.42), d(0.45, 0.55), d(0.36, 0.42), d(0.3, 0.42)
    foot, back = d(0.5, 0.7), -t / 2 - 0.1
    surfaces = wall(BODY, (0.0, 0.0, -0.02), (w * foot, h, t * foot), 1 / foot, ROUND)
    surfaces += box(BODY, (0.0, 0.0, -t * 0.45), (w * 0.5, h * 0.9, t * 0.4))
    surfaces += disc(SEAT, (0.0, h, 0.0), w * 1.02, t * 1.02, 0.62)
    bowl = surface(BALL, BOWL, (0.0, h, 0.0), (w * 0.31, h * 0.5, t * 0.31), k=0.0, solid=False)
    lid = disc(TOP, (0.0, h + 0.03, 0.0), w, t)
    surfaces += [bowl, *turn(lid, 0, -1.75 * d.coin(0.7), (0.0, h + 0.03, -t / 2))]
    surfaces += box(BACK, (0.0, h * 0.85, back), (w * 1.15, tank, 0.18))
    return surfaces + box(BACK, (0.0, h * 0.85 + tank, back), (w * 1.22, 0.035, 0.21))


CLASSES: tuple[Callable[[Draw], Surfaces], ...] = (
    bag, bin_, box_, cabinet, chair, desk, display, door, shelf, table, bed, pillow, sink, sofa,
    toilet,
)  # fmt: skip
