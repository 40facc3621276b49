"""What every function of clouds says of points that are none: the remedy is the right one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pointcloud as pc

TAKE: dict[str, Callable[[Tensor], Any]] = {
    "chamfer": lambda x: pc.chamfer(x, x),
    "draw_clouds": lambda x: pc.draw_clouds(x, "never.png"),
    "drop": pc.drop,
    "farthest_points": lambda x: pc.farthest_points(x, 4),
    "flip": pc.flip,
    "group_points": lambda x: pc.group_points(x, 4, 4),
    "jitter": pc.jitter,
    "nearest_points": lambda x: pc.nearest_points(x, x, 4),
    "normalize": pc.normalize,
    "random_points": lambda x: pc.random_points(x, 4),
    "rotate": pc.rotate,
    "scale_translate": pc.scale_translate,
    "vote": lambda x: pc.vote(lambda y: y.mean(1), x),
}
ODD = [
    ((20, 3), "points[None] for a single one"),
    ((3, 20), "points.mT[None] for a single one"),
    ((20, 6), "points[..., :3][None]"),
    ((6, 100), "points[..., :3, :].mT[None]"),
    ((2, 20, 6), "(normals, colors). Give points[..., :3]."),
    ((2, 20, 9), "Give points[..., :3]."),
    ((2, 3, 20), "Channels come first here. Transpose them: points.mT."),
    ((2, 3, 6), "Transpose them: points.mT."),
    ((2, 6, 1024), "Transpose them: points[..., :3, :].mT."),
    ((2, 20, 2), "Give three coordinates for every point."),
    ((2, 5, 20, 3), "points.flatten(0, -3)"),
    ((3,), "Give a batch of clouds, three numbers a point."),
]


@pytest.mark.parametrize("name", TAKE)
@pytest.mark.parametrize(("shape", "told"), ODD, ids=[str(shape) for shape, _ in ODD])
def test_the_remedy_is_of_the_cause(name: str, shape: tuple[int, ...], told: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\(\)") as error:
        TAKE[name](torch.zeros(shape))
    assert told in str(error.value)
    assert f"these are {shape}" in str(error.value)


@pytest.mark.parametrize(
    ("shape", "code"),
    [
        ((20, 3), "points[None]"),
        ((3, 20), "points.mT[None]"),
        ((20, 6), "points[..., :3][None]"),
        ((6, 100), "points[..., :3, :].mT[None]"),
        ((2, 20, 6), "points[..., :3]"),
        ((2, 3, 20), "points.mT"),
        ((2, 6, 1024), "points[..., :3, :].mT"),
        ((2, 5, 20, 3), "points.flatten(0, -3)"),
    ],
)
def test_the_remedy_works(shape: tuple[int, ...], code: str) -> None:
    with pytest.raises(ValueError, match=re.escape(code)):
        pc.normalize(torch.zeros(shape))
    points = eval(code, {"points": torch.zeros(shape)})
    assert pc.normalize(points).shape == (len(points), max(shape[-2:]), 3)


@pytest.mark.parametrize("name", [name for name in TAKE if name != "draw_clouds"])
def test_half_precision_is_taken_and_integers_are_told(name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        TAKE[name](torch.randn(2, 20, 3).to(dtype))
    with pytest.raises(ValueError, match=r"points\.float\(\)"):
        TAKE[name](torch.ones(2, 20, 3, dtype=torch.int64))
    with pytest.raises(TypeError):
        TAKE[name]([[0.0, 0.0, 0.0]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("points", "index", "told"),
    [
        (torch.zeros(2, 8, 3), torch.zeros(2, 4), "indices are torch.float32. Give integers"),
        (torch.zeros(2, 8, 3), torch.zeros(2, 8, dtype=torch.bool), "indices are torch.bool"),
        (torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64), "Give points (b, n, c)"),
        (torch.zeros(2, 8, 3), torch.tensor(1), "and indices (b, ...)"),
    ],
)
def test_gather_says_what_is_no_index(points: Tensor, index: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        pc.gather(points, index)


def test_gather_takes_integers_of_any_size() -> None:
    points = torch.randn(2, 8, 3)
    assert torch.equal(
        pc.gather(points, torch.tensor([[1], [2]], dtype=torch.int32))[1, 0], points[1, 2]
    )
