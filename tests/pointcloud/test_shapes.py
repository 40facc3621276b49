"""The procedural set: uniform by area, deterministic, and three difficulties that differ."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pointcloud import surfaces as sf
from pointcloud.objects import BODY, CLASSES, NAMES, PARTS, Draw, bed, box
from pointcloud.shapes import BACKGROUND, DIFFICULTIES, procedural


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Each canonical surface again, from its definition: (u, v in 0..1, k, arc) to x, y, z.


def patch(u, v, k, arc):
    return u - 0.5, 16 * u * (1 - u) * v * (1 - v), v - 0.5


def tube(u, v, k, arc):
    r, phi = 1 + (k - 1) * v, 2 * math.pi * arc * u
    return r * phi.cos(), v, r * phi.sin()


def square(u, v, k, arc):
    s, r = 4 * u, 1 + (k - 1) * v  # round the corners (1, -1), (1, 1), (-1, 1), (-1, -1)
    x = torch.where(s < 1, 1.0, torch.where(s < 2, 3 - 2 * s, torch.where(s < 3, -1.0, 2 * s - 7)))
    z = torch.where(s < 1, 2 * s - 1, torch.where(s < 2, 1.0, torch.where(s < 3, 5 - 2 * s, -1.0)))
    return r * x, v, r * z


def ball(u, v, k, arc):
    theta, phi = math.acos(k) + (math.pi - math.acos(k)) * v, 2 * math.pi * arc * u
    return theta.sin() * phi.cos(), theta.cos(), theta.sin() * phi.sin()


def ring(u, v, k, arc):
    phi, theta = 2 * math.pi * arc * u, 2 * math.pi * v
    r = 1 + k * theta.cos()
    return r * phi.cos(), k * theta.sin(), r * phi.sin()


CASES = [
    (sf.PATCH, patch, 1.0, 1.0, (0.5, 0.7, 1.3)),
    (sf.PATCH, patch, 1.0, 1.0, (0.5, 0.0, 1.3)),
    (sf.ROUND, tube, 0.3, 1.0, (0.5, 1.1, 0.8)),
    (sf.ROUND, tube, 1.7, 0.4, (0.5, 1.1, 0.8)),
    (sf.ROUND, tube, 0.0, 1.0, (0.5, 0.0, 0.8)),
    (sf.SQUARE, square, 0.6, 1.0, (0.5, 1.1, 0.8)),
    (sf.BALL, ball, 1.0, 1.0, (0.5, 1.1, 0.8)),
    (sf.BALL, ball, 0.0, 0.7, (0.5, 1.1, 0.8)),
    (sf.RING, ring, 0.3, 0.5, (0.5, 1.1, 0.8)),
]
SHEAR = torch.tensor([[1.0, 0.4, 0.0], [0.0, 1.0, -0.3], [0.2, 0.0, 1.0]])


def mesh(formula, k: float, arc: float, frame: Tensor, cells: int = 600) -> tuple[Tensor, Tensor]:
    """Centres (cells^2, 3) and areas (cells^2,) of a fine mesh of a surface."""
    u = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    grid = torch.stack(torch.broadcast_tensors(*formula(u[:, None], u[None], k, arc)), -1)
    grid = grid @ frame[:, :3].double().T + frame[:, 3].double()
    a, b, c, d = grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]
    area = torch.linalg.cross(c - a, d - b).norm(dim=-1) / 2
    return ((a + b + c + d) / 4).flatten(0, 1), area.flatten()


@pytest.mark.parametrize(("kind", "formula", "k", "arc", "size"), CASES)
def test_points_are_uniform_by_area(kind, formula, k, arc, size) -> None:
    """Kolmogorov-Smirnov against a mesh, along seven directions, in a sheared frame."""
    bent = sf.surface(kind, 0, (0.1, 0.2, 0.3), size, k, arc)
    bent = bent._replace(frame=SHEAR @ bent.frame)
    drawn = sf.sample([bent], 1, 30_000, generator=seeded(1))
    points = drawn.points[0].T[drawn.kept[0]].double()
    centres, areas = mesh(formula, k, arc, bent.frame)
    assert len(points) > 5_000
    directions = torch.cat([torch.eye(3), torch.randn(4, 3, generator=seeded(2))]).double()
    for direction in directions:
        at, order = (centres @ direction).sort()
        share = areas[order].cumsum(0) / areas.sum()
        line = (points @ direction).sort().values
        index = torch.searchsorted(at, line).clamp(max=len(at) - 1)
        empirical = torch.arange(1, len(line) + 1).double() / len(line)
        # p = 0.001 is 1.95 / sqrt(n); the mesh adds less than the share of two of its rows.
        rise = line.max() - line.min()
        if rise > 1e-5:
            assert (share[index] - empirical).abs().max() < 1.95 / len(line) ** 0.5 + 2 / 600


def test_several_surfaces_share_the_points_by_area() -> None:
    one = sf.surface(sf.PATCH, 0, (0.0, 0.0, 0.0), (1.0, 0.0, 3.0))
    other = sf.surface(sf.BALL, 1, (5.0, 0.0, 0.0), (0.5, 0.5, 0.5))
    drawn = sf.sample([one, other], 1, 40_000, generator=seeded())
    share = drawn.parts[drawn.kept].double().mean()
    wanted = math.pi / (math.pi + 3)  # the ball's area is 4 pi / 4
    spread = (wanted * (1 - wanted) / int(drawn.kept.sum())) ** 0.5
    assert abs(float(share) - wanted) < 4 * spread


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("k", [0.2, 1.0])
def test_no_area_element_exceeds_its_bound(kind: int, k: float) -> None:
    stretched = sf.surface(kind, 0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), k)
    frames = torch.randn(500, 3, 4, generator=seeded(kind))
    stretched = stretched._replace(frame=frames)
    bound = sf._table([stretched], 500)[1]
    area = sf.sample([stretched], 500, 400, generator=seeded()).normals.norm(dim=1)
    assert (area <= bound * (1 + 1e-5)).all()  # 1e-5: some 80 eps of float32, for its rounding
    assert (area.amax(1) > bound[:, 0] * 0.4).all()  # nor is it so loose that most is thrown away


def test_normals_of_a_closed_box_and_a_ball_point_outwards() -> None:
    solids = box(BODY, (1.0, 0.0, 2.0), (0.5, 1.0, 0.7), 0.8)
    solids = sf.turn(solids, 0, 0.7, (1.0, 0.5, 2.0))
    centre = torch.tensor([1.0, 0.5, 2.0])[:, None]
    lump = sf.surface(sf.BALL, 0, (1.0, 0.5, 2.0), (0.3, 0.4, 0.5))
    for surfaces in (solids, [lump], sf.turn([lump], 2, 1.0, (1.0, 0.5, 2.0))):
        drawn = sf.sample(surfaces, 1, 2_000, generator=seeded())
        assert ((drawn.points[0] - centre) * drawn.normals[0]).sum(0).min() > 0


def test_a_sheet_has_no_side_and_a_part_of_size_zero_has_no_points() -> None:
    sheet = sf.surface(sf.PATCH, 0, (0.0, 0.0, 0.0), (1.0, 0.0, 1.0), solid=False)
    nothing = sf.surface(sf.SQUARE, 1, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    drawn = sf.sample([nothing, sheet, nothing], 4, 500, generator=seeded())
    assert drawn.normals.eq(0).all()
    assert drawn.parts[drawn.kept].eq(0).all()
    assert drawn.kept.all()


def test_objects_stand_on_the_floor_and_are_of_known_size() -> None:
    """A bed is 1.9 to 2.1 m long, by its own words; everything made is finite."""
    x = sf.sample(bed(Draw(64, seeded())), 64, 3_000, generator=seeded()).points
    long = x[:, 2].amax(1) - x[:, 2].amin(1)
    assert ((long > 1.85) & (long < 2.3)).all()
    for build in CLASSES:
        drawn = sf.sample(build(Draw(8, seeded())), 8, 500, generator=seeded())
        assert drawn.points.isfinite().all()
        assert drawn.kept.float().mean() > 0.4


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_clouds_have_the_shapes_told(difficulty: str) -> None:
    clouds = procedural(difficulty, clouds=45, points=200)
    assert clouds.points.shape == (45, 200, 3)
    assert clouds.points.dtype == torch.float32
    assert clouds.points.is_contiguous()
    assert clouds.labels.bincount().tolist() == [3] * 15
    assert clouds.labels[:15].tolist() != list(range(15))  # shuffled
    assert clouds.names == NAMES
    assert clouds.parts is not None
    assert clouds.parts.min() >= BACKGROUND
    assert clouds.parts.max() < len(PARTS)
    assert clouds.points.isfinite().all()
    for cloud in clouds.points:
        assert len(cloud.unique(dim=0)) == 200


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_seed_decides_every_byte_and_nothing_else_does(difficulty: str) -> None:
    def data(seed: int, train: bool = True) -> bytes:
        drawn = procedural(difficulty, clouds=20, points=64, train=train, seed=seed)
        return b"".join(t.numpy().tobytes() for t in (drawn.points, drawn.labels, drawn.parts))

    state = torch.random.get_rng_state()
    first = data(0)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is left alone
    torch.rand(7)
    assert data(0) == first
    others = [data(1), data(2), data(0, train=False), data(1, train=False)]
    assert len({first, *others}) == 5


def test_train_and_test_share_no_cloud() -> None:
    train = procedural("OBJ_ONLY", clouds=60, points=32)
    test = procedural("OBJ_ONLY", clouds=60, points=32, train=False)
    seen = {cloud.numpy().tobytes() for cloud in train.points}
    assert len(seen) == 60
    assert not seen & {cloud.numpy().tobytes() for cloud in test.points}


def test_an_object_alone_is_of_radius_one_and_turned_about_y() -> None:
    clouds = procedural("OBJ_ONLY", clouds=300, points=256)
    assert clouds.points.norm(dim=-1).max() < 1 + 6 * 0.008
    assert clouds.points.norm(dim=-1).amax(1).median() > 0.8
    assert clouds.parts is not None
    assert clouds.parts.min() >= 0
    doors = clouds.points[clouds.labels == NAMES.index("door")]
    height = doors.amax(1) - doors.amin(1)
    assert (height[:, 1] > 0.7).all()  # upright
    assert height[:, 0].min() < 0.5 * height[:, 0].max()  # some are seen along x, some across


def test_a_scan_is_seen_from_one_side() -> None:
    """Of a bin, points face the scanner: their normals about the axis are not balanced."""
    clouds = procedural("OBJ_ONLY", clouds=150, points=512)
    boxes = clouds.points[clouds.labels == NAMES.index("cabinet")]
    centre = boxes.mean(1)[:, [0, 2]].norm(dim=-1)
    assert centre.mean() > 0.05  # of a cabinet seen all round it is about 0.01


def test_background_is_about_15_percent() -> None:
    clouds = procedural("OBJ_BG", clouds=300, points=256)
    assert clouds.parts is not None
    share = (clouds.parts == BACKGROUND).float().mean(1)
    assert 0.12 < share.mean() < 0.19
    assert share.min() > 0
    assert share.max() < 0.5


def test_perturbed_clouds_are_cropped_and_scaled() -> None:
    whole = procedural("OBJ_ONLY", clouds=300, points=256).points
    partial = procedural("PB_T50_RS", clouds=300, points=256).points

    def size(points: Tensor) -> Tensor:
        return (points.amax(1) - points.amin(1)).prod(-1)

    # A box moved by U(-1/2, 1/2) of the size along each axis keeps 27/64 of the volume on average.
    assert 0.2 < float(size(partial).mean() / size(whole).mean()) < 0.75
    assert partial.norm(dim=-1).max() < 1.25 * (1 + 6 * 0.008) * 1.6  # with the rest of the box


def features(points: Tensor) -> Tensor:
    """Histograms of the height, of the distance to the axis and to the centre, and extents."""
    x = points - (points.amax(1, keepdim=True) + points.amin(1, keepdim=True)) / 2
    lines = [x[..., 1], x[..., [0, 2]].norm(dim=-1), x.norm(dim=-1)]
    histograms = [
        torch.stack(
            [((line >= a / 8) & (line < (a + 1) / 8)).float().mean(1) for a in range(-8, 8)], 1
        )
        for line in lines
    ]
    return torch.cat([*histograms, x.std(1)], 1)


def test_the_difficulties_differ_for_a_cheap_classifier() -> None:
    from sklearn.ensemble import RandomForestClassifier

    score = {}
    for difficulty in ("OBJ_ONLY", "PB_T50_RS"):
        train = procedural(difficulty, clouds=450, points=256)
        test = procedural(difficulty, clouds=300, points=256, train=False)
        forest = RandomForestClassifier(60, random_state=0)
        forest.fit(features(train.points).numpy(), train.labels.numpy())
        score[difficulty] = forest.score(features(test.points).numpy(), test.labels.numpy())
    assert score["OBJ_ONLY"] > 0.7
    assert 0.2 < score["PB_T50_RS"] < score["OBJ_ONLY"] - 0.2  # chance is 0.067


def test_few_clouds_and_few_points_are_no_special_case() -> None:
    for difficulty in DIFFICULTIES:
        for n in (1, 2, 16):
            clouds = procedural(difficulty, clouds=n, points=1)
            assert clouds.points.shape == (n, 1, 3)
            assert clouds.points.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"difficulty": "HARD"}, "'HARD'.*there are OBJ_ONLY, OBJ_BG, PB_T50_RS"),
        ({"clouds": 0}, r"procedural\(clouds=0\)"),
        ({"points": 0}, r"procedural\(points=0\)"),
        ({"seed": -1}, r"procedural\(seed=-1\)"),
    ],
)
def test_what_cannot_be_made_is_told(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        procedural(**arguments)  # type: ignore[arg-type]
