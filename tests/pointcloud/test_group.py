"""Nearest neighbours and groups: distances of a brute force, equal from all backends."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

from benchmarks.timing import peak
from pointcloud import group, sample
from pointcloud.group import group_points, nearest_points
from pointcloud.operations import padding
from pointcloud.sample import farthest_points, gather
from tests.pointcloud.test_sample import CLOUDS, FLAT, NAN

FEW = settings(max_examples=40, deadline=None)
BACKENDS = ["torch", "scipy", "auto"]


def squares(queries: Tensor, points: Tensor) -> Tensor:
    """All squared distances (b, m, n) in float64."""
    x, y, z = (queries.double()[:, :, None] - points.double()[:, None]).square().unbind(3)
    return x + y + z


def correct(queries: Tensor, points: Tensor, k: int, backend: str) -> None:
    """The k smallest distances there are, from k different points that have them, in order."""
    index, square = nearest_points(queries, points, k, backend=backend)
    assert index.dtype == torch.int64
    assert square.dtype == points.dtype
    far = squares(queries, points)
    assert torch.equal(square, far.sort(dim=2).values[..., :k].to(points.dtype))
    assert torch.equal(square, far.gather(2, index).to(points.dtype))
    assert (index.sort(dim=2).values.diff(dim=2) > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", CLOUDS)
def test_distances_are_those_of_a_brute_force_in_float64(kind: str, backend: str) -> None:
    points = CLOUDS[kind](3, 144)
    correct(points[:, ::9], points, 12, backend)
    correct(points[:, :1], points, 1, backend)
    correct(points[:, ::50] + torch.ones(3, dtype=points.dtype), points, 144, backend)


@FEW
@given(st.integers(0, 2**31), st.sampled_from(sorted(CLOUDS)), st.integers(1, 40))
def test_backends_give_equal_distances(seed: int, kind: str, k: int) -> None:
    torch.manual_seed(seed)
    points, queries = CLOUDS[kind](2, 40), CLOUDS[kind](2, 12)
    one, other = (nearest_points(queries, points, k, backend=name) for name in BACKENDS[:2])
    assert torch.equal(one.square, other.square)


@FEW
@given(st.integers(0, 2**31), st.tuples(*[st.integers(-1000, 1000)] * 3), st.sampled_from(BACKENDS))
def test_exact_translations_change_nothing(
    seed: int, by: tuple[int, int, int], backend: str
) -> None:
    torch.manual_seed(seed)
    points = torch.randint(-2048, 2049, (2, 60, 3)) / 256  # and 2^10 at most: all sums are exact
    moved = points + torch.tensor(by, dtype=torch.float32)
    near = nearest_points(points, points, 9, backend=backend).square
    assert torch.equal(nearest_points(moved, moved, 9, backend=backend).square, near)


@FEW
@given(st.integers(0, 2**31), st.sampled_from(BACKENDS))
def test_permuted_points_give_the_same_points(seed: int, backend: str) -> None:
    torch.manual_seed(seed)
    points, order = torch.randn(1, 60, 3), torch.randperm(60)
    index = nearest_points(points, points[:, order], 9, backend=backend).index
    assert torch.equal(order[index], nearest_points(points, points, 9, backend=backend).index)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hole", [float("nan"), float("inf"), 0.0])
def test_ragged_clouds_are_as_one_at_a_time(backend: str, hole: float) -> None:
    points, lengths = torch.randn(4, 60, 3), torch.tensor([12, 60, 33, 59])
    points[padding(points, lengths)] = hole
    groups = group_points(points, 10, 12, lengths=lengths, backend=backend)
    for i, n in enumerate(lengths.tolist()):
        alone = group_points(points[i : i + 1, :n], 10, 12, backend=backend)
        for one, other in zip(groups, alone, strict=True):
            assert torch.equal(one[i], other[0])


@pytest.mark.parametrize("tile", [1, 100, 250, 1999, 1 << 20])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    points, queries = torch.randn(5, 100, 3), torch.randn(5, 7, 3)
    lengths = torch.tensor([100, 9, 50, 99, 100])
    whole = nearest_points(queries, points, 9, lengths=lengths, backend="torch")
    monkeypatch.setattr(group, "CPU_TILE", tile)
    tiled = nearest_points(queries, points, 9, lengths=lengths, backend="torch")
    assert torch.equal(whole.index, tiled.index)


def test_memory_is_of_tiles() -> None:
    points = torch.randn(4, 4096, 3, dtype=torch.float64)
    queries = points[:, :512]
    all_of_them = 4 * 512 * 4096 * 8
    assert peak(lambda: group._torch(queries, points, 8, None)) < all_of_them / 8


def test_many_equal_points_make_no_deep_tree() -> None:
    points = torch.randint(0, 2, (1, 8192, 3)).float()
    correct(points[:, :16], points, 32, "scipy")


def test_squares_have_a_gradient() -> None:
    points = torch.randn(2, 20, 3, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, p: nearest_points(q, p, 5).square, (queries, points))


def test_groups_are_centers_and_what_is_around_them() -> None:
    points = torch.randn(2, 100, 3, requires_grad=True)
    centers, patches, index = group_points(points, 10, 8, start=3)
    assert torch.equal(centers, gather(points, farthest_points(points, 10, start=3)))
    assert torch.equal(index, nearest_points(centers, points, 8).index)
    assert torch.equal(patches, gather(points, index) - centers[:, :, None])
    assert torch.equal(patches[:, :, 0], torch.zeros_like(centers))  # each is its own nearest
    patches.square().sum().backward()
    assert points.grad is not None
    assert points.grad.sum().abs() < 1e-3  # moving all points moves no patch
    assert points.grad.abs().sum() > 1


def test_options_reach_the_sampling() -> None:
    points = torch.randn(2, 100, 3)
    points[:, :3] = 0.0
    groups = group_points(points, 99, 4, skip_origin=True)
    assert torch.equal(
        groups.centers, gather(points, farthest_points(points, 99, skip_origin=True))
    )
    drawn = group_points(points, 9, 4, start="random", generator=torch.Generator().manual_seed(5))
    start = torch.Generator().manual_seed(5)
    index = farthest_points(points, 9, start="random", generator=start)
    assert torch.equal(drawn.centers, gather(points, index))


@pytest.mark.parametrize("backend", ["auto", "torch", "numpy", "scipy"])
def test_groups_are_the_same_by_all_backends(backend: str) -> None:
    points = torch.randn(2, 600, 3)
    groups, other = group_points(points, 9, 7), group_points(points, 9, 7, backend=backend)
    assert all(map(torch.equal, groups, other))


def test_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.zeros(1, group.TREE, 3)
    assert group._choice(points, "auto") == "scipy"
    assert group._choice(points[:, 1:], "auto") == "torch"
    assert group._choice(points.to("meta"), "auto") == "torch"
    monkeypatch.setattr(sample, "installed", lambda name: name != "scipy")
    monkeypatch.setattr(sample, "pyg_has", lambda name: name == "knn")
    assert group._choice(points, "auto") == "pyg"
    monkeypatch.setattr(sample, "pyg_has", lambda name: False)
    assert group._choice(points, "auto") == "torch"


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        nearest_points(FLAT, FLAT, 2, backend="scipy")


WRONG = [
    (FLAT, FLAT, {"k": 9}, "nearest_points(k=9): a cloud has 8 points, fewer than the 9"),
    (FLAT, FLAT, {"k": 0}, "Give k >= 1"),
    (FLAT, FLAT[:, :0], {"k": 1}, "a cloud has 0 points"),
    (FLAT, FLAT, {"k": 4, "lengths": torch.tensor([3, 8])}, "(k=4): a cloud has 3 points"),
    (FLAT, FLAT, {"k": 4, "lengths": torch.tensor([4, 9])}, "a length is 9"),
    (FLAT[:1], FLAT, {"k": 1}, "1 clouds of queries, 2 of points"),
    (FLAT[0], FLAT, {"k": 1}, "these are (8, 3)"),
    (FLAT, FLAT, {"k": 1, "backend": "numpy"}, "no such backend. Give auto, torch, scipy, pyg"),
    (NAN, FLAT, {"k": 1}, "point 5 of cloud 0"),
    (FLAT, NAN, {"k": 1}, "point 5 of cloud 0"),
]


@pytest.mark.parametrize(("queries", "points", "given", "says"), WRONG)
def test_errors_say_what_is_wrong(
    queries: Tensor, points: Tensor, given: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        nearest_points(queries, points, **given)


def test_errors_of_groups() -> None:
    with pytest.raises(ValueError, match=re.escape("group_points(groups=9): a cloud has 8 points")):
        group_points(FLAT, 9, 2)
    with pytest.raises(ValueError, match=re.escape("group_points(size=9): a cloud has 8 points")):
        group_points(FLAT, 2, 9)
    with pytest.raises(ValueError, match=r"no such backend\. Give auto, torch, numpy, pyg, scipy"):
        group_points(FLAT, 2, 2, backend="faiss")
    with pytest.raises(TypeError, match="points are a list, neither a tensor nor"):
        nearest_points(FLAT, [1.0], 2)


class Small(nn.Module):
    """What a backbone does with groups, in two lines."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, points: Tensor, lengths: Tensor | None = None) -> Tensor:
        groups = group_points(points, 6, 5, lengths=lengths)
        return self.linear(groups.patches).amax(dim=2) + self.linear(groups.centers)


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def test_compiles_as_one_graph_and_trains_the_same() -> None:
    model, points = Small(), torch.randn(2, 30, 3)
    run = compiled(model)
    assert torch.equal(run(points), model(points))
    lengths = torch.tensor([20, 30])
    assert torch.equal(run(points, lengths), model(points, lengths))
    grads = []
    for act in (model, run):
        model.zero_grad()
        act(points).square().sum().backward()
        grads.append(model.linear.weight.grad.clone())
    torch.testing.assert_close(*grads)  # sums in another order
    with pytest.raises(ValueError, match="not finite"):
        run(points * float("nan"))


def test_exports() -> None:
    model, points = Small(), torch.randn(2, 30, 3)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (points,), dynamic_shapes=({0: batch},)).module()
    assert torch.equal(exported(points), model(points))
    more = torch.randn(5, 30, 3)
    assert torch.equal(exported(more), model(more))


def test_traces_symbolically() -> None:
    points = torch.randn(2, 30, 3)
    traced = make_fx(lambda x: group_points(x, 6, 5).patches, tracing_mode="symbolic")(points)
    other = torch.randn(3, 40, 3)
    assert torch.equal(traced(other), group_points(other, 6, 5).patches)


def test_no_values_no_work() -> None:
    assert Small().to("meta")(torch.empty(2, 30, 3, device="meta")).shape == (2, 6, 4)
    with FakeTensorMode():
        assert Small()(torch.randn(2, 30, 3)).shape == (2, 6, 4)


def test_function_transforms() -> None:
    model, points = Small(), torch.randn(3, 2, 30, 3)
    params = dict(model.named_parameters())

    def loss(params: dict[str, Tensor], points: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (points,)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, points)
    alone = [torch.func.grad(loss)(params, cloud) for cloud in points]
    for name, grads in together.items():
        torch.testing.assert_close(grads, torch.stack([slopes[name] for slopes in alone]))
    for at in range(4):  # also where the batch is not the first dimension
        by = torch.vmap(lambda x: farthest_points(x, 5), in_dims=at)(points.movedim(0, at))
        assert torch.equal(by, torch.stack([farthest_points(cloud, 5) for cloud in points]))
    same = torch.vmap(lambda q: nearest_points(q, points[0], 5).index)(points)
    assert torch.equal(same, torch.stack([nearest_points(q, points[0], 5).index for q in points]))
    value, slope = torch.func.jvp(lambda x: loss(params, x), (points[0],), (points[0],))
    assert value > 0
    assert slope != 0


def test_copies_and_pickles() -> None:
    model, points = Small(), torch.randn(2, 30, 3)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(again(points), model(points))


def test_operations_keep_their_promises_to_torch() -> None:
    points = torch.randn(2, 30, 3)
    lengths = torch.tensor([20, 30])
    opcheck(torch.ops.pointcloud.farthest, (points, 4, lengths - 1, lengths, True, "auto"))
    opcheck(torch.ops.pointcloud.nearest, (points, points, 4, lengths, "scipy"))
