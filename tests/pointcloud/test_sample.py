"""Farthest point sampling against a brute force in float64, on clouds with all kinds of ties."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pointcloud import sample
from pointcloud.checks import check_backend
from pointcloud.operations import padding
from pointcloud.sample import farthest_points, gather, random_points

FEW = settings(max_examples=40, deadline=None)
CLOUDS = {
    "normal": lambda b, n: torch.randn(b, n, 3),
    "sphere": lambda b, n: torch.nn.functional.normalize(torch.randn(b, n, 3), dim=2),
    "duplicated": lambda b, n: torch.randn(b, n // 2, 3).repeat(1, 2, 1),
    "collinear": lambda b, n: torch.rand(b, n, 1) * torch.tensor([1.0, 2.0, 3.0]),
    "lattice": lambda b, n: torch.randint(0, 6, (b, n, 3)).float(),
    "few": lambda b, n: torch.randint(0, 2, (b, n, 3)).float(),
    "same": lambda b, n: torch.ones(b, n, 3),
    "offset 1000": lambda b, n: torch.randn(b, n, 3) + 1000,
    "offset 1e5": lambda b, n: torch.randn(b, n, 3) + 1e5,
    "tiny": lambda b, n: torch.randn(b, n, 3) * 1e-22,  # float32 squares are 0
    "huge": lambda b, n: torch.randn(b, n, 3) * 1e22,  # float32 squares are inf
    "mirrored": lambda b, n: mirrored(b, n),
    "float64": lambda b, n: torch.randn(b, n, 3, dtype=torch.float64) + 1000,
    "float16": lambda b, n: torch.randn(b, n, 3).half(),
    "bfloat16": lambda b, n: torch.randn(b, n, 3).bfloat16(),
}


def mirrored(b: int, n: int) -> Tensor:
    """Each point in six orders of its coordinates: equally far from 0, but for rounding."""
    points = torch.randn(b, n // 6 + 1, 3)
    orders = [[0, 1, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0], [1, 0, 2], [0, 2, 1]]
    all_of_them = torch.cat([points[..., order] for order in orders], dim=1)[:, :n]
    return torch.cat([torch.zeros(b, 1, 3), all_of_them[:, 1:]], dim=1)


def brute(points: Tensor, m: int, start: int = 0, dtype: type = np.float64) -> list[int]:
    """Farthest points of one cloud, from the definition: all distances to all picked, each time."""
    cloud = points.to(torch.float64).numpy().astype(dtype)
    picks = [start]
    with np.errstate(over="ignore", under="ignore"):
        for _ in range(m - 1):
            x, y, z = np.square(cloud[:, None] - cloud[picks]).transpose(2, 0, 1)
            picks.append(int(np.argmax((x + y + z).min(axis=1))))
    return picks


def published(points: Tensor, m: int) -> list[int]:
    """As the published CUDA operation describes itself: from 0, never near the origin."""
    cloud = points.double()
    picks, near = [0], [float("inf")] * len(cloud)
    for _ in range(m - 1):
        best, far = 0, -1.0
        for i, point in enumerate(cloud):
            if float(point.square().sum()) <= 1e-3:
                continue
            near[i] = min(near[i], float((point - cloud[picks[-1]]).square().sum()))
            if near[i] > far:
                best, far = i, near[i]
        picks.append(best)
    return picks


@pytest.mark.parametrize("backend", ["numpy", "torch", "auto"])
@pytest.mark.parametrize("kind", CLOUDS)
def test_indices_are_those_of_a_brute_force_in_float64(kind: str, backend: str) -> None:
    points = CLOUDS[kind](3, 144)
    index = farthest_points(points, 32, backend=backend)
    assert index.dtype == torch.int64
    assert index.tolist() == [brute(cloud, 32) for cloud in points]


def test_float32_alone_would_choose_otherwise() -> None:
    """The clouds above are hard enough: a decision in float32 differs on these."""
    for kind in ("tiny", "huge", "mirrored"):
        points = CLOUDS[kind](3, 144)
        single = [brute(cloud, 32, dtype=np.float32) for cloud in points]
        assert single != farthest_points(points, 32).tolist(), kind


@pytest.mark.parametrize("call", [-(1 << 40), 1 << 40])  # never give float32 up; give it up at once
@pytest.mark.parametrize("kind", ["normal", "duplicated", "mirrored", "lattice", "tiny"])
def test_what_float64_settles_is_what_it_decides(
    monkeypatch: pytest.MonkeyPatch, kind: str, call: int
) -> None:
    monkeypatch.setattr(sample, "CALL", call)
    points = CLOUDS[kind](2, 96)
    assert farthest_points(points, 20).tolist() == [brute(cloud, 20) for cloud in points]


@pytest.mark.parametrize("block", [1, 100, 300, 1 << 20])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    points = torch.randn(7, 100, 3)
    monkeypatch.setattr(sample, "BLOCK", block)
    assert farthest_points(points, 20).tolist() == [brute(cloud, 20) for cloud in points]


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_starts(backend: str) -> None:
    points = torch.randn(3, 50, 3)
    for start in (7, 49):
        index = farthest_points(points, 10, start=start, backend=backend)
        assert index.tolist() == [brute(cloud, 10, start) for cloud in points]
    starts = torch.tensor([3, 0, 49])
    index = farthest_points(points, 10, start=starts, backend=backend)
    assert index.tolist() == [brute(c, 10, s) for c, s in zip(points, starts.tolist(), strict=True)]


def test_random_starts_are_of_the_generator_and_within_each_cloud() -> None:
    points = torch.randn(500, 8, 3)
    lengths = torch.tensor([1, 8]).repeat(250)
    drawn = [
        farthest_points(
            points,
            1,
            start="random",
            lengths=lengths,
            generator=torch.Generator().manual_seed(seed),
        )[:, 0]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert set(drawn[0][::2].tolist()) == {0}
    assert set(drawn[0][1::2].tolist()) == set(range(8))


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("hole", [float("nan"), float("inf"), 1e30, 0.0])
def test_ragged_clouds_are_as_one_at_a_time(backend: str, hole: float) -> None:
    points, lengths = torch.randn(4, 60, 3), torch.tensor([12, 60, 33, 59])
    points[padding(points, lengths)] = hole
    index = farthest_points(points, 12, lengths=lengths, backend=backend)
    alone = [brute(cloud[:n], 12) for cloud, n in zip(points, lengths.tolist(), strict=True)]
    assert index.tolist() == alone


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("scale", [1.0, 0.05, 0.02, 0.001])
def test_skip_origin_is_the_published_rule(backend: str, scale: float) -> None:
    points = torch.randn(4, 40, 3) * scale
    points[0, 0] = points[1, :5] = 0.0
    index = farthest_points(points, 39, skip_origin=True, backend=backend)
    assert index.tolist() == [published(cloud, 39) for cloud in points]


def test_the_start_repeats_where_there_is_no_other_point() -> None:
    points = torch.full((1, 5, 3), 0.001)
    assert farthest_points(points, 4, skip_origin=True, start=2).tolist() == [[2, 2, 2, 2]]
    points[0, 4] = 1.0
    assert farthest_points(points, 4, skip_origin=True, start=2).tolist() == [[2, 4, 4, 4]]
    assert farthest_points(torch.ones(1, 5, 3), 4, start=2).tolist() == [[2, 0, 0, 0]]


@FEW
@given(
    st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 40), st.sampled_from(sorted(CLOUDS))
)
def test_fewer_points_are_the_first_of_more(seed: int, a: int, b: int, kind: str) -> None:
    torch.manual_seed(seed)
    points, few = CLOUDS[kind](2, 40), min(a, b)
    more = farthest_points(points, max(a, b))
    assert torch.equal(farthest_points(points, few), more[:, :few])


@FEW
@given(st.integers(0, 2**31))
def test_permuted_points_give_the_same_points(seed: int) -> None:
    torch.manual_seed(seed)
    points, order = torch.randn(1, 60, 3), torch.randperm(60)
    start = int((order == 0).nonzero())
    index = farthest_points(points[:, order], 20, start=start)
    assert torch.equal(order[index], farthest_points(points, 20))


@FEW
@given(st.integers(0, 2**31), st.tuples(*[st.integers(-1000, 1000)] * 3))
def test_exact_translations_change_nothing(seed: int, by: tuple[int, int, int]) -> None:
    """Coordinates of 1/256, sums below 2^10: no sum is rounded in float32's 24 bits."""
    torch.manual_seed(seed)
    points = torch.randint(-2048, 2049, (2, 60, 3)) / 256
    moved = points + torch.tensor(by, dtype=torch.float32)
    assert torch.equal(moved - torch.tensor(by, dtype=torch.float32), points)
    assert torch.equal(farthest_points(moved, 30), farthest_points(points, 30))


@FEW
@given(st.integers(0, 2**31), st.lists(st.integers(5, 40), min_size=1, max_size=6))
def test_any_lengths_are_as_one_at_a_time(seed: int, lengths: list[int]) -> None:
    torch.manual_seed(seed)
    points = torch.randint(-3, 4, (len(lengths), 40, 3)).float()
    index = farthest_points(points, 5, lengths=torch.tensor(lengths))
    for cloud, n, row in zip(points, lengths, index, strict=True):
        assert torch.equal(row, farthest_points(cloud[None, :n], 5)[0])


def test_a_batch_of_no_clouds() -> None:
    assert farthest_points(torch.zeros(0, 5, 3), 2).shape == (0, 2)


def test_gather_takes_rows_and_gives_their_gradient() -> None:
    points = torch.randn(2, 5, 4, requires_grad=True)
    index = torch.tensor([[[0, 4], [4, 4]], [[1, 2], [3, 0]]])
    rows = gather(points, index)
    assert torch.equal(
        rows, torch.stack([cloud[i] for cloud, i in zip(points, index, strict=True)])
    )
    rows.sum().backward()
    counts = torch.stack([i.flatten().bincount(minlength=5) for i in index])
    assert torch.equal(points.grad, counts[..., None].expand(2, 5, 4).float())


def test_random_points_are_drawn_without_replacement_and_evenly() -> None:
    points = torch.arange(12.0).view(1, 4, 3).expand(4000, 4, 3)
    drawn = random_points(points, 2, generator=torch.Generator().manual_seed(0))
    rows = (drawn[..., 0] / 3).long()
    assert torch.equal(drawn, gather(points, rows))
    assert (rows[:, 0] != rows[:, 1]).all()
    times = rows.flatten().bincount(minlength=4)
    assert (times - 2000).abs().max() < 5 * 4000**0.5 / 2  # 5 deviations of a fair draw
    again = random_points(points, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    everything = random_points(torch.randn(2, 9, 3), 9)
    assert everything.shape == (2, 9, 3)


def test_random_points_are_of_each_ragged_cloud() -> None:
    points, lengths = torch.randn(3, 9, 3), torch.tensor([4, 9, 6])
    drawn = random_points(points, 4, lengths=lengths)
    for cloud, n, rows in zip(points, lengths, drawn, strict=True):
        same = (rows[:, None] == cloud[:n]).all(-1)
        assert same.any(1).all()
        assert same.sum(0).max() == 1
    other = random_points(points, 4, lengths=lengths)
    assert not torch.equal(other[1], drawn[1])


NAN = torch.zeros(2, 8, 3).index_fill(1, torch.tensor([5]), float("nan"))
FLAT = torch.zeros(2, 8, 3)
WRONG = [
    (
        FLAT,
        {"m": 9},
        "farthest_points(m=9): a cloud has 8 points, fewer than the 9 asked for. Give",
    ),
    (FLAT, {"m": 0}, "m=0"),
    (FLAT[:, :0], {"m": 1}, "(m=1): a cloud has 0 points. Leave out what is empty."),
    (FLAT, {"m": 4, "lengths": torch.tensor([8, 3])}, "(m=4): a cloud has 3 points"),
    (FLAT, {"m": 1, "lengths": torch.tensor([8, 0])}, "a cloud has 0 points"),
    (FLAT, {"m": 1, "lengths": torch.tensor([8, 9])}, "a length is 9, of 8 points"),
    (FLAT, {"m": 1, "lengths": torch.tensor([8])}, "lengths are integers (b,)"),
    (FLAT, {"m": 1, "lengths": torch.tensor([8.0, 8.0])}, "lengths are integers (b,)"),
    (FLAT[0], {"m": 1}, "points are (b, n, 3), these are (8, 3). Give a batch"),
    (FLAT[..., :2], {"m": 1}, "these are (2, 8, 2)"),
    (FLAT.long(), {"m": 1}, "points are torch.int64. Give points.float()"),
    (NAN, {"m": 1}, "point 5 of cloud 0 is [nan, nan, nan], not finite"),
    (NAN.nan_to_num(float("inf")), {"m": 1}, "not finite"),
    (FLAT, {"m": 1, "backend": "cuda"}, "there is no such backend. Give auto, torch, numpy, pyg"),
    (FLAT, {"m": 1, "start": 8}, "start=8): no index of 8 points. Give 0 to 7"),
    (FLAT, {"m": 1, "start": -1}, "no index of 8 points"),
    (FLAT, {"m": 1, "start": "first"}, "'random'"),
    (FLAT, {"m": 1, "start": True}, "start=True): no index of 8 points"),
    (FLAT, {"m": 1, "start": 2.0}, "start=2.0): no index of 8 points"),
    (FLAT, {"m": 1, "start": torch.tensor([0, 8])}, "start 8 is no point of cloud 1"),
    (FLAT, {"m": 1, "start": torch.tensor([0])}, "Give integers (2,)"),
    (
        FLAT,
        {"m": 1, "start": torch.tensor([0, 5]), "lengths": torch.tensor([8, 5])},
        "start 5 is no point of cloud 1",
    ),
]


@pytest.mark.parametrize(("points", "given", "says"), WRONG)
def test_errors_say_what_is_wrong(points: Tensor, given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        farthest_points(points, **given)


def test_any_index_is_a_start_or_a_count() -> None:
    points = torch.randn(2, 8, 3)
    want = farthest_points(points, 3, start=2)
    assert torch.equal(farthest_points(points, np.int64(3), start=np.int64(2)), want)
    assert random_points(points, np.int32(3)).shape == (2, 3, 3)


def test_other_errors() -> None:
    for m in (5.0, "5", True, None):
        with pytest.raises(TypeError, match=rf"farthest_points\(m={m!r}\): not a whole number"):
            farthest_points(FLAT, m)
    with pytest.raises(TypeError, match=r"lengths are a list\. Give a tensor \(b,\)"):
        farthest_points(FLAT, 2, lengths=[5, 5])
    with pytest.raises(ValueError, match=r"gather\(\): indices into 1 clouds, 2 clouds of points"):
        gather(FLAT, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"indices into 3 clouds"):
        gather(FLAT, torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=re.escape("random_points(m=4): a cloud has 3 points")):
        random_points(FLAT, 4, lengths=torch.tensor([8, 3]))
    with pytest.raises(ValueError, match=re.escape("random_points(m=9): a cloud has 8 points")):
        random_points(FLAT, 9)
    with pytest.raises(TypeError, match="neither a tensor nor"):
        farthest_points(np.zeros((1, 8, 3)), 2)
    there = SimpleNamespace(device=torch.device("cuda", 1))
    with pytest.raises(ValueError, match="works on a CPU, the points are on cuda:1"):
        check_backend("farthest_points", "numpy", sample.BACKENDS, there)
