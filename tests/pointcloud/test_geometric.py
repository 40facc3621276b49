"""torch-geometric's Data, Batch, transforms and loader; pyg-lib by a stub that keeps its word.

pyg-lib cannot be installed here: the stub does what the documentation of torch_geometric.nn.fps
and knn (2.8) says, with the traps (a ratio in float32, a random start unless told otherwise, no
order of neighbours).
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from pointcloud import augment, geometric, sample
from pointcloud.geometric import Augment, Data
from pointcloud.group import group_points, nearest_points
from pointcloud.metrics import chamfer
from pointcloud.sample import farthest_points, random_points
from tests.pointcloud.test_group import correct
from tests.pointcloud.test_sample import CLOUDS, brute

batched = geometric.torch_geometric.data.Batch.from_data_list
SIZES = [[40, 40, 40], [40, 17, 25], [33]]


def clouds(sizes: list[int]) -> list[Data]:
    return [Data(pos=torch.randn(n, 3), y=torch.tensor([i])) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("sizes", SIZES)
def test_a_batch_is_as_one_cloud_at_a_time(sizes: list[int]) -> None:
    separate = clouds(sizes)
    batch = batched(separate)
    index = farthest_points(batch, 8, start=2)
    groups = group_points(batch, 8, 5)
    for i, data in enumerate(separate):
        first = int(batch.ptr[i])
        assert torch.equal(index[i] - first, farthest_points(data, 8, start=2)[0])
        alone = group_points(data, 8, 5)
        assert torch.equal(groups.index[i] - first, alone.index[0])
        assert torch.equal(groups.centers[i], alone.centers[0])
        assert torch.equal(groups.patches[i], alone.patches[0])
    assert torch.equal(batch.pos[groups.index] - groups.centers[:, :, None], groups.patches)


def test_one_data_is_one_cloud() -> None:
    data = Data(pos=torch.randn(50, 3))
    assert torch.equal(farthest_points(data, 9), farthest_points(data.pos[None], 9))


def test_a_batch_vector_alone_will_do() -> None:
    pos, vector = torch.randn(12, 3), torch.tensor([0] * 5 + [1] * 7)
    index = farthest_points(Data(pos=pos, batch=vector), 4)
    assert index.tolist() == [brute(pos[:5], 4), [5 + i for i in brute(pos[5:], 4)]]


@pytest.mark.parametrize("sizes", SIZES)
def test_dense_and_back(sizes: list[int]) -> None:
    batch = batched(clouds(sizes))
    padded = geometric.dense(batch)
    assert padded.points.shape == (len(sizes), max(sizes), 3)
    assert (padded.lengths is None) == (len(set(sizes)) == 1)
    assert torch.equal(padded.back(padded.points), batch.pos)
    alike = torch.cat([x.flatten(0, 1) for x in padded.alike()])
    assert torch.equal(alike, batch.pos)
    assert (len(padded.alike()) == 1) == (len(set(sizes)) == 1)


@pytest.mark.parametrize("sizes", SIZES)
def test_neighbours_are_rows_of_pos(sizes: list[int]) -> None:
    queries, points = batched(clouds(sizes[::-1])), batched(clouds(sizes))
    for asked in (queries, points):
        near = nearest_points(asked, points, 5)
        assert near.index.shape == near.square.shape == (len(asked.pos), 5)
        square = (points.pos[near.index] - asked.pos[:, None]).square().sum(-1)
        torch.testing.assert_close(near.square, square)
        assert torch.equal(points.batch[near.index], asked.batch[:, None].expand(-1, 5))
        for i in range(len(sizes)):
            alone = nearest_points(asked[i].pos[None], points[i].pos[None], 5)
            rows = near.index[asked.batch == i] - points.ptr[i]
            assert torch.equal(rows, alone.index[0])


@pytest.mark.parametrize("sizes", SIZES)
def test_random_points_are_of_each_cloud(sizes: list[int]) -> None:
    batch = batched(clouds(sizes))
    drawn = random_points(batch, 9)
    assert drawn.shape == (len(sizes), 9, 3)
    for i, rows in enumerate(drawn):
        same = (rows[:, None] == batch[i].pos).all(-1)
        assert same.any(1).all()
        assert same.sum(0).max() == 1


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("sizes", SIZES)
def test_chamfer_is_of_each_pair_of_clouds(sizes: list[int], norm: int) -> None:
    a, b = batched(clouds(sizes)), batched(clouds(sizes[::-1]))
    pairs = [(a[i].pos[None], b[i].pos[None]) for i in range(len(sizes))]
    want = torch.cat([chamfer(*pair, norm, reduce=False) for pair in pairs])
    torch.testing.assert_close(chamfer(a, b, norm, reduce=False), want)
    assert torch.equal(chamfer(a, a, norm), torch.tensor(0.0))


CHANGES = [
    augment.scale_translate, augment.rotate, augment.jitter, augment.flip, augment.drop,
    augment.normalize,
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("change", CHANGES)
def test_augmentations_give_a_copy_with_new_pos(change, sizes: list[int]) -> None:
    batch = batched(clouds(sizes))
    before = batch.pos.clone()
    torch.manual_seed(0)
    changed = change(batch)
    assert type(changed) is type(batch)
    assert changed is not batch
    assert torch.equal(batch.pos, before)
    assert (changed.y is batch.y, changed.batch is batch.batch) == (True, True)
    torch.manual_seed(0)
    if len(set(sizes)) == 1:
        want = change(before.view(len(sizes), -1, 3)).flatten(0, 1)
    else:
        want = torch.cat([change(data.pos[None])[0] for data in batch.to_data_list()])
    assert torch.equal(changed.pos, want)


def test_augmentations_take_their_arguments_and_compile() -> None:
    data = Data(pos=torch.randn(20, 3))
    seeds = [torch.Generator().manual_seed(0) for _ in "ab"]
    want = augment.rotate(data.pos[None], "z", degrees=20.0, generator=seeds[0])[0]
    turned = augment.rotate(data, "z", degrees=20.0, generator=seeds[1])
    assert torch.equal(turned.pos, want)
    assert torch.equal(augment.flip(points=data, probability=0.0).pos, data.pos)
    torch._dynamo.reset()
    run = torch.compile(augment.normalize, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(data.pos[None]), augment.normalize(data.pos[None]))


def test_errors() -> None:
    with pytest.raises(TypeError, match="a dict, neither a tensor nor torch-geometric's Data"):
        farthest_points({"pos": 1}, 2)
    with pytest.raises(ValueError, match="Give a Data with such a pos"):
        group_points(Data(x=torch.zeros(5, 3)), 2, 2)
    with pytest.raises(ValueError, match="batch is not sorted"):
        farthest_points(Data(pos=torch.zeros(3, 3), batch=torch.tensor([0, 1, 0])), 1)
    with pytest.raises(ValueError, match="a Data has lengths of its own"):
        farthest_points(Data(pos=torch.zeros(3, 3)), 1, lengths=torch.tensor([3]))
    with pytest.raises(ValueError, match="a cloud has 17 points"):
        farthest_points(batched(clouds([40, 17])), 18)
    data = Data(pos=torch.zeros(3, 3))
    for call in (nearest_points, chamfer):
        for pair in ((data, data.pos[None]), (data.pos[None], data)):
            with pytest.raises(TypeError, match="a tensor beside a Data or Batch"):
                call(*pair, 1)
        with pytest.raises(TypeError, match="neither a tensor nor"):
            call(np.zeros((1, 3, 3)), np.zeros((1, 3, 3)), 1)
    with pytest.raises(ValueError, match=r"nearest_points\(lengths=\): a Data has lengths"):
        nearest_points(data, data, 1, lengths=torch.tensor([3]))
    for lengths in ({"lengths_a": torch.tensor([3])}, {"lengths_b": torch.tensor([3])}):
        with pytest.raises(ValueError, match=r"chamfer\(lengths=\): a Data has lengths"):
            chamfer(data, data, **lengths)
    with pytest.raises(ValueError, match="2 clouds and 1 to compare"):
        chamfer(batched(clouds([5, 6])), batched(clouds([5])))
    with pytest.raises(TypeError, match="neither a tensor nor"):
        augment.rotate([1.0])
    empty = batched([Data(pos=torch.zeros(0, 3)), Data(pos=torch.zeros(4, 3))])
    with pytest.raises(ValueError, match="a cloud has 0 points"):
        farthest_points(empty, 1)


def test_it_is_imported_late_and_its_warnings_are_its_own() -> None:
    code = (
        "import sys, torch; from pointcloud.group import group_points; "
        "group_points(torch.randn(2, 1024, 3), 8, 4); "
        "print({'torch_geometric', 'matplotlib', 'h5py'} & set(sys.modules)); "
        "import pointcloud.geometric"
    )
    run = [sys.executable, "-W", "error", "-W", "ignore::ResourceWarning", "-c", code]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")


# a transform


def scaled(points: Tensor, by: float = 2.0, generator: torch.Generator | None = None) -> Tensor:
    """One random factor for each cloud."""
    factor = torch.rand(len(points), 1, 1, generator=generator) + by
    return points * factor


def test_augment_changes_pos_alone_of_a_copy() -> None:
    data = Data(pos=torch.randn(20, 3), y=torch.tensor([3]))
    before = data.pos.clone()
    changed = Augment(scaled, torch.Generator().manual_seed(0))(data)
    want = scaled(before[None], generator=torch.Generator().manual_seed(0))[0]
    assert torch.equal(changed.pos, want)
    assert torch.equal(data.pos, before)
    assert changed.y is data.y


def test_augment_is_of_each_cloud_of_a_batch() -> None:
    for sizes in SIZES:
        batch = batched(clouds(sizes))
        ratio = Augment(scaled)(batch).pos / batch.pos
        by_cloud = [ratio[batch.batch == i] for i in range(len(sizes))]
        for factors in by_cloud:
            torch.testing.assert_close(factors, factors[:1, :1].expand_as(factors))
        assert len({round(float(factors[0, 0]), 4) for factors in by_cloud}) == len(sizes)


def test_augment_shows_what_it_does() -> None:
    assert repr(Augment(scaled)) == "Augment(scaled)"
    assert repr(Augment(partial(scaled, by=3.0))) == "Augment(scaled, by=3.0)"
    with pytest.raises(ValueError, match=r"Augment\(<lambda>\): gave \(1, 2, 3\) for \(1, 5, 3\)"):
        Augment(lambda points: points[:, :2])(Data(pos=torch.zeros(5, 3)))


def test_augment_composes_and_loads() -> None:
    from torch_geometric.loader import DataLoader
    from torch_geometric.transforms import Compose

    transform = Compose([Augment(partial(scaled, by=1.0)), Augment(torch.abs)])
    loader = DataLoader([transform(data) for data in clouds([9, 12, 9, 10])], batch_size=2)
    batches = list(loader)
    assert [len(batch.pos) for batch in batches] == [21, 19]
    assert all((batch.pos >= 0).all() for batch in batches)
    assert group_points(batches[0], 3, 4).patches.shape == (2, 3, 4, 3)


# pyg-lib


class Stub:
    """torch_geometric.nn.fps and knn as documented; counts its calls."""

    calls = 0

    def fps(
        self,
        x: Tensor,
        batch: Tensor,
        ratio: float = 0.5,
        random_start: bool = True,
        batch_size: int | None = None,
    ) -> Tensor:
        self.calls += 1
        picked, first = [], 0
        for n in batch.bincount(minlength=batch_size or 0).tolist():
            m = int(np.ceil(np.float32(n) * np.float32(ratio)))
            start = int(torch.randint(n, ())) if random_start else 0
            picked += [first + i for i in brute(x[first : first + n], m, start)]
            first += n
        return torch.tensor(picked)

    def knn(
        self,
        x: Tensor,
        y: Tensor,
        k: int,
        batch_x: Tensor,
        batch_y: Tensor,
        cosine: bool = False,
        num_workers: int = 1,
        batch_size: int | None = None,
    ) -> Tensor:
        self.calls += 1
        far = (y[:, None] - x).square().sum(2)
        far[batch_y[:, None] != batch_x] = torch.inf
        near = far.topk(k, largest=False).indices
        near = near[:, torch.randperm(k)]  # in no order
        return torch.stack([torch.arange(len(y)).repeat_interleave(k), near.flatten()])


@pytest.fixture
def pyg(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()
    monkeypatch.setattr(geometric.pool, "fps", stub.fps)
    monkeypatch.setattr(geometric.pool, "knn", stub.knn)
    monkeypatch.setattr(geometric.torch_geometric.typing, "WITH_FPS", True, raising=False)
    monkeypatch.setattr(geometric.torch_geometric.typing, "WITH_KNN", True, raising=False)
    monkeypatch.setattr(sample, "installed", lambda name: True)
    return stub


@pytest.mark.parametrize("kind", CLOUDS)
def test_pyg_gives_the_same(pyg: Stub, kind: str) -> None:
    points = CLOUDS[kind](3, 96)
    index = farthest_points(points, 20, backend="pyg")
    assert index.tolist() == [brute(cloud, 20) for cloud in points]
    correct(points[:, ::9], points, 12, "pyg")
    assert pyg.calls == 2


def test_pyg_gives_as_many_as_asked_for(pyg: Stub) -> None:
    """ceil(n * ratio) in float32 is m + 1 with ratio = m / n for some of these."""
    n, points = 1000, torch.randn(1, 1000, 3)
    counts = [m for m in range(1, n) if np.ceil(np.float32(n) * np.float32(m / n)) != m]
    assert counts
    for m in counts[:2]:
        assert farthest_points(points, m, backend="pyg").shape == (1, m)
    ours = [np.ceil(np.float32(n) * np.float32((m - 0.5) / n)) for m in range(1, n + 1)]
    assert ours == list(range(1, n + 1))


def test_what_pyg_cannot_do_is_done_without_it(pyg: Stub) -> None:
    points, lengths = torch.randn(2, 30, 3), torch.tensor([20, 30])
    for options in ({"start": 3}, {"skip_origin": True}, {"lengths": lengths}):
        index = farthest_points(points, 9, backend="pyg", **options)
        assert torch.equal(index, farthest_points(points, 9, backend="torch", **options))
    assert pyg.calls == 0


def test_pyg_finds_neighbours_in_ragged_clouds(pyg: Stub) -> None:
    points, lengths = torch.randn(3, 30, 3), torch.tensor([20, 30, 9])
    ours = nearest_points(points, points, 9, lengths=lengths, backend="torch")
    pygs = nearest_points(points, points, 9, lengths=lengths, backend="pyg")
    assert torch.equal(ours.index, pygs.index)
    assert pyg.calls == 1


def test_auto_takes_pyg_where_it_is_faster(pyg: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(1, 600, 3)
    group_points(points, 4, 4)
    assert pyg.calls == 0  # NumPy and SciPy are
    monkeypatch.setattr(sample, "installed", lambda name: name != "scipy")
    group_points(points, 4, 4)
    assert pyg.calls == 1  # the neighbours alone
    on_gpu = torch.empty(0, device="meta")
    assert not sample._by_pyg("auto", on_gpu)


def test_without_pyg() -> None:
    points = torch.randn(1, 30, 3)
    for act in (farthest_points, partial(nearest_points, points)):
        with pytest.raises(ImportError, match=r"pyg-lib >= 0\.6"):
            act(points, 4, backend="pyg")
    assert not sample.pyg_has("fps")
