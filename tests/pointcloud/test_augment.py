"""Augmentation: the formulae, the ranges, one draw a cloud, seeds, dtypes, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Generator, Tensor

from pointcloud.augment import drop, flip, jitter, normalize, rotate, scale_translate

Change = Callable[..., Tensor]
RANDOM: list[Change] = [scale_translate, rotate, jitter, partial(flip, axis="x"), drop]
EVERY = [*RANDOM, lambda x, generator=None: normalize(x)]
every_change = pytest.mark.parametrize("change", EVERY)
each_random = pytest.mark.parametrize("change", RANDOM)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def clouds(b: int = 6, n: int = 50, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(b, n, 3, generator=seeded(99), dtype=dtype)


@every_change
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shape_dtype_and_input_stay(change: Change, dtype: torch.dtype) -> None:
    x = clouds(dtype=dtype)
    before = x.clone()
    y = change(x, generator=seeded())
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert torch.equal(x, before)
    assert not torch.equal(y, x)


@each_random
def test_a_seed_is_a_change_and_the_global_generator_is_left_alone(change: Change) -> None:
    x = clouds()
    state = torch.get_rng_state()
    once, again, other = (change(x, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    first = change(x)
    torch.manual_seed(5)
    assert torch.equal(first, change(x))
    assert not torch.equal(first, change(x))


@each_random
def test_the_same_change_in_every_dtype(change: Change) -> None:
    x = clouds(dtype=torch.float32)
    single = change(x, generator=seeded()).double()
    double = change(x.double(), generator=seeded())
    # a few roundings of numbers below 16: 16 eps of float32 each
    torch.testing.assert_close(single, double, rtol=0, atol=4 * 16 * 2**-24)


@each_random
def test_every_cloud_has_its_own(change: Change) -> None:
    x = clouds(1).expand(64, -1, -1)
    assert len({tuple(y.flatten().tolist()) for y in change(x, generator=seeded())}) > 1


@every_change
def test_differentiable(change: Change) -> None:
    x = clouds(2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: change(t, generator=seeded()), (x,))


@each_random
def test_draws_are_made_where_the_generator_is(change: Change) -> None:
    """The meta device stands for a GPU, where a generator of the CPU cannot draw."""
    generator = seeded()
    start = generator.get_state()
    assert change(torch.empty(4, 8, 3, device="meta"), generator=generator).device.type == "meta"
    meta, cpu = generator.get_state(), seeded()
    change(torch.zeros(4, 8, 3), generator=cpu)
    assert torch.equal(meta, cpu.get_state())
    assert not torch.equal(meta, start)


@every_change
@pytest.mark.parametrize(
    ("points", "said"),
    [
        (torch.zeros(8, 3), r"points are \(b, n, 3\), these are \(8, 3\)"),
        (torch.zeros(2, 8, 6), r"points are \(b, n, 3\), these are \(2, 8, 6\)"),
        (torch.zeros(2, 8, 3, dtype=torch.int64), r"torch\.int64.*Give points\.float\(\)"),
    ],
)
def test_what_is_no_cloud_is_refused(change: Change, points: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        change(points, generator=seeded())


@every_change
def test_no_clouds_give_none(change: Change) -> None:
    assert change(torch.zeros(0, 8, 3)).shape == (0, 8, 3)


# --- each one


def test_scale_translate_is_one_scale_and_shift_per_cloud_and_axis() -> None:
    x = torch.zeros(4000, 2, 3, dtype=torch.float64)
    x[:, 1] = 1
    y = scale_translate(x, generator=seeded())
    shift, scale = y[:, 0], y[:, 1] - y[:, 0]
    assert -0.2 <= shift.min() < -0.195 < 0.195 < shift.max() <= 0.2
    assert 2 / 3 - 1e-7 <= scale.min() < 0.67 < 1.49 < scale.max() <= 1.5 + 1e-7
    # means of 4000 uniforms: five standard errors
    assert (shift.mean(0).abs() < 5 * 0.4 / math.sqrt(12 * 4000)).all()
    assert ((scale.mean(0) - 13 / 12).abs() < 5 * (5 / 6) / math.sqrt(12 * 4000)).all()
    drawn = torch.cat([shift, scale], 1).T
    assert (torch.corrcoef(drawn) - torch.eye(6)).abs().max() < 5 / math.sqrt(4000)
    line = clouds(3)
    moved = scale_translate(line, generator=seeded())
    slope = (moved - moved[:, :1])[:, 1:] / (line - line[:, :1])[:, 1:]
    torch.testing.assert_close(slope, slope[:, :1].expand_as(slope), rtol=1e-10, atol=0)


def test_scale_translate_does_what_it_is_told() -> None:
    x = clouds()
    assert torch.equal(scale_translate(x, 1.0, 1.0, 0.0), x)
    assert torch.equal(scale_translate(x, low=2.0, high=2.0, shift=0.0), 2 * x)


def test_rotate_about_y_is_the_published_matrix() -> None:
    x = clouds(8)
    y = rotate(x, "y", generator=seeded(3))
    uniform = torch.rand(8, 1, generator=seeded(3)).double()[:, 0] - 0.5
    for cloud, turned, u in zip(x, y, uniform.tolist(), strict=True):
        c, s = math.cos(2 * math.pi * u), math.sin(2 * math.pi * u)
        matrix = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=torch.float64)
        torch.testing.assert_close(turned, cloud @ matrix, rtol=0, atol=1e-14)


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_rotate_keeps_the_axis_lengths_and_handedness(axis: str) -> None:
    x = torch.eye(3, dtype=torch.float64).expand(200, 3, 3)
    y = rotate(x, axis, generator=seeded())
    coordinate = "xyz".index(axis)
    assert torch.equal(y[..., coordinate], x[..., coordinate])
    torch.testing.assert_close(y @ y.mT, x, rtol=0, atol=4 * 2**-52)
    torch.testing.assert_close(torch.linalg.det(y), torch.ones(200).double(), rtol=0, atol=1e-14)


def test_rotate_axes_are_one_formula_under_the_cycle() -> None:
    x = clouds()
    about_y = rotate(x, "y", generator=seeded())
    for axis, turns in (("z", 1), ("x", 2)):
        cycled = rotate(x.roll(turns, -1), axis, generator=seeded())
        assert torch.equal(cycled.roll(-turns, -1), about_y)


@pytest.mark.parametrize("degrees", [360.0, 90.0, 10.0])
def test_rotate_range(degrees: float) -> None:
    x = torch.tensor([0.0, 0.0, 1.0]).expand(4000, 1, 3)
    x, _, z = rotate(x, degrees=degrees, generator=seeded()).unbind(-1)
    angle = torch.rad2deg(torch.atan2(x, z))
    assert degrees * 0.498 < angle.max() <= degrees * 0.50001
    assert degrees * 0.498 < -angle.min() <= degrees * 0.50001
    assert angle.mean().abs() < 5 * degrees / math.sqrt(12 * 4000)


def test_jitter_is_a_clipped_gaussian_of_its_own_for_every_coordinate() -> None:
    moved = jitter(torch.zeros(20, 1000, 3), generator=seeded())
    assert moved.abs().max() <= 0.05
    assert abs(moved.std().item() - 0.01) < 5 * 0.01 / math.sqrt(2 * 60000)
    assert len(set(moved.flatten().tolist())) > 59000
    wide = jitter(torch.zeros(20, 1000, 3), sigma=1.0, clip=0.5, generator=seeded())
    clipped = (wide.abs() == 0.5).float().mean().item()
    assert abs(clipped - math.erfc(0.5 / math.sqrt(2))) < 5 * 0.5 / math.sqrt(60000)


@pytest.mark.parametrize("axis", ["x", "y", "z"])
def test_flip_mirrors_some_clouds_as_a_whole(axis: str) -> None:
    x = clouds(400)
    y = flip(x, axis, 0.25, generator=seeded())
    sign = torch.ones(3, dtype=torch.float64)
    sign["xyz".index(axis)] = -1
    mirrored = (y == x * sign).flatten(1).all(1)
    assert ((y == x).flatten(1).all(1) ^ mirrored).all()
    assert abs(mirrored.double().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 400)
    assert torch.equal(flip(x, axis, 0.0), x)
    assert torch.equal(flip(x, axis, 1.0), x * sign)


def test_drop_leaves_points_in_place_or_makes_them_the_first() -> None:
    x = clouds(2000, 64, torch.float32)
    y = drop(x, generator=seeded())
    stay, first = (y == x).all(-1), (y == x[:, :1]).all(-1)
    assert (stay | first).all()
    ratio = first[:, 1:].double().mean(1)
    assert abs(ratio.mean().item() - 0.875 / 2) < 5 * 0.875 / math.sqrt(12 * 2000)
    assert ratio.std().item() > 0.8 * 0.875 / math.sqrt(12)  # a ratio of its own for each cloud
    assert torch.equal(drop(x, 0.0), x)
    assert torch.equal(drop(x, 1.0, generator=seeded())[:, 0], x[:, 0])


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_normalize_fits_the_unit_sphere(offset: float) -> None:
    x = 5 * clouds(dtype=torch.float32) + offset
    y = normalize(x)
    # the mean of 50 numbers near `offset` is rounded a few times at that size
    slack = (offset + 20) * 2**-23
    assert y.mean(1).abs().max() < slack
    torch.testing.assert_close(y.norm(dim=-1).amax(1), torch.ones(6), rtol=0, atol=4 * 2**-23)
    torch.testing.assert_close(normalize(y), y, rtol=0, atol=4 * slack)
    centred = x.double() - x.double().mean(1, keepdim=True)
    exact = centred / centred.norm(dim=-1).amax(1)[:, None, None]
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=slack)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e25, 1e35])
def test_normalize_of_any_size(size: float) -> None:
    x = clouds(dtype=torch.float64)
    # one rounding of each point to float32, at most 5 of the largest radius, and those of a mean
    torch.testing.assert_close(
        normalize((size * x).float()).double(), normalize(x), rtol=0, atol=16 * 2**-23
    )


def test_empty_clouds() -> None:
    empty = torch.zeros(2, 0, 3)
    for change in RANDOM:
        assert change(empty).shape == empty.shape
    with pytest.raises(ValueError, match=r"normalize\(\): clouds \(2, 0, 3\) have no points"):
        normalize(empty)


def test_normalize_one_place_gives_zeros() -> None:
    assert torch.equal(normalize(torch.full((2, 4, 3), 7.0)), torch.zeros(2, 4, 3))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (partial(scale_translate, low=2, high=1), r"low=2, high=1.*low is above high"),
        (partial(scale_translate, low=math.nan), "low=nan"),
        (partial(scale_translate, shift=-1), "shift is -1"),
        (partial(rotate, axis="w"), "no axis 'w'"),
        (partial(rotate, axis="xy"), "no axis 'xy'"),
        (partial(rotate, axis=""), "no axis ''"),
        (partial(rotate, degrees=-5), "degrees is -5"),
        (partial(jitter, sigma=-0.5), r"sigma is -0\.5"),
        (partial(jitter, clip=-0.5), r"clip is -0\.5"),
        (partial(flip, axis="up"), "no axis 'up'"),
        (partial(flip, probability=1.5), r"probability is 1\.5, not a fraction"),
        (partial(drop, most=-0.1), r"most is -0\.1, not a fraction"),
    ],
)
def test_wrong_numbers_are_refused(call: Change, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(clouds())
