"""Pictures, read back as pixels: what is where, how large, and in which color."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pointcloud.draw import draw_clouds, draw_groups
from pointcloud.group import Groups, group_points

pytest.importorskip("matplotlib")

BLUE, ORANGE, GREEN = (31, 119, 180), (255, 127, 14), (44, 160, 44)  # the first of tab10
BLACK, GREY = (0, 0, 0), (199, 201, 204)
CELL, HEAD = 300, 37  # pixels of a cloud and of a title


def pixels(path: Path) -> Tensor:
    """The picture (height, width, 3), 0..255."""
    from matplotlib.image import imread

    values: Tensor = torch.from_numpy(imread(path) * 255).round().long()
    return values[..., :3]


def ink(picture: Tensor) -> Tensor:
    return (picture < 250).any(-1)


def where(picture: Tensor, color: tuple[int, int, int]) -> Tensor:
    """Rows and columns (n, 2) of the pixels of this color."""
    pixels = ((picture - torch.tensor(color)).abs() <= 2).all(-1).nonzero()
    assert len(pixels), f"no {color} is in the picture"
    return pixels


def box(mask: Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left, right."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())


def sphere(points: int = 2000) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(points, 3, generator=draw), dim=-1)


@pytest.mark.parametrize(
    ("end", "axis", "sign"),
    [
        ((0.0, 1.0, 0.0), 0, -1),
        ((1.0, 0.0, 0.0), 1, 1),
        ((1.0, 0.0, 0.0), 0, 1),
        ((0.0, 0.0, 1.0), 0, 1),
        ((0.0, 0.0, 1.0), 1, -1),
    ],
)
def test_axes_of_the_picture(
    end: tuple[float, float, float], axis: int, sign: int, tmp_path: Path
) -> None:
    """y is up; x and z come nearer, which from above is lower, x to the right and z to the left."""
    line = torch.linspace(-1, 1, 9)[:, None] * torch.tensor(end)
    first, last = (_center(tmp_path, line, i)[axis] for i in (0, 8))
    assert sign * (last - first) > 40


def _center(folder: Path, line: Tensor, i: int) -> Tensor:
    """Where point i is: its number alone is not below 0, so that it alone is not grey."""
    numbers = torch.full((1, len(line)), -1)
    numbers[0, i] = 0
    picture = pixels(draw_clouds(line[None], folder / "one.png", colors=numbers))
    return (picture[..., 2] - picture[..., 0] > 60).nonzero().double().mean(0)


def test_a_sphere_is_round_and_fills_its_cell(tmp_path: Path) -> None:
    picture = pixels(draw_clouds(sphere()[None], tmp_path / "s.png"))
    assert picture.shape == (CELL, CELL, 3)
    top, bottom, left, right = box(ink(picture))
    assert abs((bottom - top) - (right - left)) <= 6
    assert 260 <= bottom - top < 300


def test_a_sphere_is_round_under_a_high_title(tmp_path: Path) -> None:
    picture = pixels(draw_clouds(sphere()[None], tmp_path / "s.png", ["\n\n\n\n\n"]))
    top, bottom, left, right = box(ink(picture))
    assert abs((bottom - top) - (right - left)) <= 6
    assert 100 < bottom - top < 250


def test_grid_in_one_scale_and_far_from_the_origin(tmp_path: Path) -> None:
    clouds = torch.stack([sphere(), sphere() / 2, sphere() + 1000])
    picture = pixels(draw_clouds(clouds, tmp_path / "g.png", columns=2))
    assert picture.shape == (2 * CELL, 2 * CELL, 3)
    cells = [picture[:CELL, :CELL], picture[:CELL, CELL:], picture[CELL:, :CELL]]
    whole, half, far = (box(ink(cell)) for cell in cells)
    assert (half[1] - half[0]) / (whole[1] - whole[0]) == pytest.approx(0.5, abs=0.03)
    assert all(abs(i - j) <= 3 for i, j in zip(whole, far, strict=True))
    assert not ink(picture[CELL:, CELL:]).any()


def test_titles_stand_above_and_take_their_room(tmp_path: Path) -> None:
    clouds = torch.stack([sphere(), sphere()])
    picture = pixels(draw_clouds(clouds, tmp_path / "t.png", ["left", ""]))
    assert abs(picture.shape[0] - CELL - HEAD) <= 1
    head = ink(picture[: HEAD - 12])
    assert head[:, :CELL].any()
    assert not head[:, CELL:].any()


def test_numbers_are_colors_and_below_zero_is_grey(tmp_path: Path) -> None:
    blob = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    for number, color in ((0, BLUE), (1, ORANGE), (2, GREEN), (18, BLUE), (-1, GREY), (-7, GREY)):
        path = draw_clouds(blob[None], tmp_path / "c.png", colors=torch.full((1, 40), number))
        where(pixels(path), color)


def test_every_number_up_to_18_has_its_own_color(tmp_path: Path) -> None:
    seen = set()
    for number in [-1, *range(18)]:
        point = torch.zeros(1, 1, 3)
        path = draw_clouds(point, tmp_path / "c.png", colors=torch.tensor([[number]]))
        middle = pixels(path)[CELL // 2, CELL // 2]
        seen.add(tuple(middle.tolist()))
    assert len(seen) == 19


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_numbers_may_be_any_integers(dtype: torch.dtype, tmp_path: Path) -> None:
    clouds, numbers = torch.randn(2, 9, 3), torch.arange(18).view(2, 9)
    want = draw_clouds(clouds, tmp_path / "long.png", colors=numbers)
    drawn = draw_clouds(clouds, tmp_path / "other.png", colors=numbers.to(dtype))
    assert drawn.read_bytes() == want.read_bytes()


def test_near_hides_far_and_far_is_paler(tmp_path: Path) -> None:
    toward = torch.tensor([0.4636, 0.3746, 0.8030])  # the viewer's direction: yaw 30, pitch 22
    faded = (255, 191, 135)  # orange, half way to white
    side = torch.tensor([0.866, 0.0, -0.5])
    pair, numbers = torch.stack([toward, -toward, side]), torch.tensor([0, 1, -1])
    for order in ([0, 1, 2], [1, 2, 0]):
        path = draw_clouds(pair[order][None], tmp_path / "n.png", colors=numbers[order][None])
        picture = pixels(path)
        assert len(where(picture, BLUE)) > 20
        assert not ((picture - torch.tensor(faded)).abs() <= 2).all(-1).any()
    pair[1] += side / 2
    picture = pixels(draw_clouds(pair[None], tmp_path / "n.png", colors=numbers[None]))
    where(picture, BLUE)
    where(picture, faded)


def test_by_height_the_top_is_bright_and_the_bottom_dark(tmp_path: Path) -> None:
    picture = pixels(draw_clouds(sphere(4000)[None], tmp_path / "h.png"))
    marked = ink(picture)
    top, bottom, _, _ = box(marked)
    green = [picture[r][marked[r]][:, 1].double().mean() for r in (top + 8, bottom - 8)]
    assert green[0] > green[1] + 60


@pytest.mark.parametrize("kind", ["one point", "one place", "flat"])
def test_clouds_without_extent(kind: str, tmp_path: Path) -> None:
    shape = {"one point": torch.zeros(1, 1, 3), "one place": torch.full((2, 9, 3), 5.0)}
    flat = torch.randn(1, 30, 3) * torch.tensor([1.0, 0.0, 1.0])
    picture = pixels(draw_clouds(shape.get(kind, flat), tmp_path / "p.png"))
    assert ink(picture).any()
    assert not (picture < 20).all(-1).any()  # black is the color of what is no number


def test_input_stays_and_may_need_a_gradient(tmp_path: Path) -> None:
    clouds = sphere(50)[None].requires_grad_()
    before = clouds.detach().clone()
    draw_clouds(clouds, tmp_path / "a.png")
    draw_groups(group_points(clouds, 4, 8), tmp_path / "b.png")
    assert torch.equal(clouds, before)


def test_groups_show_every_center_and_a_color_for_each_patch(tmp_path: Path) -> None:
    groups = group_points(torch.stack([sphere(), sphere() / 3]), 3, 60)
    picture = pixels(draw_groups(groups, tmp_path / "g.png", cloud=1))
    assert abs(picture.shape[0] - 2 * CELL - HEAD) <= 1
    assert picture.shape[1] == 4 * CELL
    body = picture[HEAD + 5 :]
    for half in (body[:, : 2 * CELL], body[:, 2 * CELL :]):
        black = (half < 40).all(-1)
        assert 3 * 30 < int(black.sum()) < 3 * 140  # three dots
        hue = half.double() - half.double().amin(-1, keepdim=True)
        for color in (BLUE, ORANGE, GREEN):
            pure = torch.tensor(color).double() - min(color)
            like = (hue * pure).sum(-1) / (hue.norm(dim=-1) * pure.norm()).clamp_min(1)
            assert ((like > 0.99) & (hue.norm(dim=-1) > 60)).sum() > 200


def test_groups_of_the_cloud_asked_for(tmp_path: Path) -> None:
    clouds = torch.stack([sphere(), 3 * sphere().flip(0) * torch.tensor([1.0, 0.2, 1.0])])
    groups = group_points(clouds, 3, 60)
    second = pixels(draw_groups(groups, tmp_path / "b.png", cloud=1))
    alone = pixels(draw_groups(group_points(clouds[1:], 3, 60), tmp_path / "a.png"))
    assert torch.equal(second, alone)
    assert not torch.equal(second, pixels(draw_groups(groups, tmp_path / "c.png")))
    with pytest.raises(IndexError):
        draw_groups(groups, tmp_path / "d.png", cloud=2)


def test_patches_are_parted_half_way_and_then_drawn_apart(tmp_path: Path) -> None:
    line = torch.stack([torch.linspace(-1, 1, 21), torch.zeros(21), torch.zeros(21)], -1)
    centers = line[[0, 20]]
    index = torch.stack([torch.arange(16), torch.arange(20, 4, -1)])
    patches = line[index] - centers[:, None]
    groups = Groups(centers[None], patches[None], index[None])
    red, _, blue = pixels(draw_groups(groups, tmp_path / "g.png"))[HEAD + 5 :].unbind(-1)
    gaps = []
    for half in (slice(2 * CELL), slice(2 * CELL, 4 * CELL)):
        difference = (blue - red)[:, half]
        first, second = ((sign * difference > 40).nonzero()[:, 1] for sign in (1, -1))
        gaps.append(int(second.min() - first.max()))
    assert 0 < gaps[0] < 30  # no mixing on the left, from one point to the next
    assert gaps[1] > 100  # and apart on the right


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"titles": ["a"]}, "1 titles for 2 clouds"),
        ({"colors": torch.zeros(2, 9)}, r"colors torch\.float32 \(2, 9\)"),
        ({"colors": torch.zeros(9, dtype=torch.int64)}, r"colors torch\.int64 \(9,\)"),
        ({"columns": 0}, r"columns=0\).*1 column or more"),
        ({"clouds": torch.zeros(9, 3)}, r"points are \(b, n, 3\)"),
        ({"clouds": torch.zeros(0, 9, 3)}, r"clouds \(0, 9, 3\) have no points"),
        ({"clouds": torch.full((1, 9, 3), torch.nan)}, "not finite"),
    ],
)
def test_what_is_refused(options: dict[str, object], said: str, tmp_path: Path) -> None:
    arguments: dict[str, object] = {"clouds": torch.zeros(2, 9, 3), "path": tmp_path / "x.png"}
    with pytest.raises(ValueError, match=said):
        draw_clouds(**(arguments | options))  # type: ignore[arg-type]
    assert not (tmp_path / "x.png").exists()


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_clouds(torch.zeros(1, 9, 3), tmp_path / "x.png")


def test_matplotlib_is_imported_late_and_pyplot_never(tmp_path: Path) -> None:
    code = (
        "import sys, torch, pointcloud.draw as d\n"
        "early = 'matplotlib' in sys.modules\n"
        f"d.draw_clouds(torch.zeros(1, 9, 3), {str(tmp_path / 'x.png')!r})\n"
        "print(early, 'matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]
