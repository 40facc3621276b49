"""Chamfer against brute force in float64; accuracies, IoU and votes against counting by hand."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.timing import peak
from pointcloud import metrics
from pointcloud.augment import scale_translate
from pointcloud.metrics import (
    chamfer,
    mean_class_accuracy,
    mean_iou,
    overall_accuracy,
    shape_iou,
    vote,
)
from pointcloud.shapes import procedural

EPS = 2**-23  # of float32
norms = pytest.mark.parametrize("norm", [1, 2])


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def pair(b: int, n: int, m: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = seeded(b + n + m)
    sizes = ((b, n, 3), (b, m, 3))
    a, c = (torch.randn(size, generator=draw, dtype=dtype) for size in sizes)
    return a, c


def brute(a: Tensor, b: Tensor, norm: int) -> Tensor:
    """The definition, in one broadcast, in float64: (b,)."""
    a, b = a.double(), b.double()
    square = (a[:, :, None] - b[:, None]).square().sum(-1)
    there, back = square.amin(2), square.amin(1)
    if norm == 2:
        return there.mean(1) + back.mean(1)
    return (there.sqrt().mean(1) + back.sqrt().mean(1)) / 2


def gradients(loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> list[Tensor]:
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    return list(torch.autograd.grad(loss(a, b).sum(), (a, b)))


# --- chamfer


@norms
@pytest.mark.parametrize("sizes", [(3, 40, 70), (304, 32, 32), (1, 1, 1), (2, 1, 9), (2, 9, 1)])
def test_values_and_gradients_are_those_of_brute_force(
    norm: int, sizes: tuple[int, int, int]
) -> None:
    a, b = pair(*sizes)
    exact = brute(a, b, norm)
    # every term is a sum of three squares, each rounded thrice; a mean adds few roundings more
    torch.testing.assert_close(
        chamfer(a, b, norm, reduce=False).double(), exact, rtol=8 * EPS, atol=0
    )
    torch.testing.assert_close(chamfer(a, b, norm).double(), exact.mean(), rtol=8 * EPS, atol=0)
    ours = gradients(lambda x, y: chamfer(x, y, norm, reduce=False), a, b)
    theirs = gradients(lambda x, y: brute(x, y, norm), a, b)
    for our, their in zip(ours, theirs, strict=True):
        # a point is the nearest of several: its gradient is a sum of numbers of up to this size
        slack = 8 * EPS * float(their.abs().max())
        torch.testing.assert_close(our, their, rtol=8 * EPS, atol=slack)


@norms
@pytest.mark.parametrize("tile", [1, 7, 100, 1000])
def test_tiles_change_nothing(norm: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(5, 13, 11)
    whole = chamfer(a, b, norm, reduce=False)
    monkeypatch.setitem(metrics.TILE, "cpu", tile)
    assert torch.equal(chamfer(a, b, norm, reduce=False), whole)


@norms
def test_derivatives_of_first_and_second_order(norm: int) -> None:
    a, b = (x.requires_grad_() for x in pair(2, 5, 4, torch.float64))
    assert torch.autograd.gradcheck(lambda x, y: chamfer(x, y, norm), (a, b))
    assert torch.autograd.gradgradcheck(lambda x, y: chamfer(x, y, norm), (a, b))


@norms
def test_far_from_the_origin_it_is_as_exact_as_near(norm: int) -> None:
    a, b = (1000 + x for x in pair(4, 64, 64))  # the offset rounds the points, before chamfer
    exact = brute(a, b, norm)
    torch.testing.assert_close(
        chamfer(a, b, norm, reduce=False).double(), exact, rtol=8 * EPS, atol=0
    )


@norms
def test_at_distance_zero_value_and_gradient_are_zero(norm: int) -> None:
    a, _ = pair(3, 20, 1)
    same = a[:, torch.randperm(20, generator=seeded())]
    assert chamfer(a, same, norm).item() == 0
    for gradient in gradients(lambda x, y: chamfer(x, y, norm), a, same):
        assert torch.equal(gradient, torch.zeros_like(a))


def test_one_known_value() -> None:
    a = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    b = torch.tensor([[[0.0, 2.0, 0.0]]])
    # squares there 4 and 5, back 4; roots 2 and 5^.5, back 2
    assert chamfer(a, b).item() == 8.5
    assert chamfer(a, b, norm=1).item() == pytest.approx((1 + 5**0.5 / 2 + 2) / 2, rel=EPS)


@norms
def test_lengths_leave_padding_out(norm: int) -> None:
    a, b = pair(4, 12, 9)
    n, m = torch.tensor([12, 1, 5, 7]), torch.tensor([3, 9, 1, 8])
    a[2, 5:], b[0, 3:] = math.nan, math.inf  # whatever padding holds
    got = chamfer(a, b, norm, lengths_a=n, lengths_b=m, reduce=False)
    cut = [(x[None, :i], y[None, :j]) for x, y, i, j in zip(a, b, n, m, strict=True)]
    alone = torch.cat([brute(x, y, norm) for x, y in cut])
    torch.testing.assert_close(got.double(), alone, rtol=8 * EPS, atol=0)
    grads = gradients(lambda x, y: chamfer(x, y, norm, lengths_a=n, lengths_b=m), a, b)
    for gradient, lengths in zip(grads, (n, m), strict=True):
        assert gradient.isfinite().all()
        for one, length in zip(gradient, lengths.tolist(), strict=True):
            assert not one[length:].any()
    x, y = gradients(lambda x, y: brute(x, y, norm) / 4, *cut[3])
    torch.testing.assert_close(grads[0][3, :7], x[0], rtol=8 * EPS, atol=8 * EPS)
    torch.testing.assert_close(grads[1][3, :8], y[0], rtol=8 * EPS, atol=8 * EPS)


@norms
def test_full_lengths_are_none(norm: int) -> None:
    a, b = pair(4, 12, 9)
    full = torch.full((4,), 12), torch.full((4,), 9)
    got = chamfer(a, b, norm, lengths_a=full[0], lengths_b=full[1])
    torch.testing.assert_close(got, chamfer(a, b, norm), rtol=4 * EPS, atol=0)


@norms
def test_big_clouds_take_memory_of_tiles_only(norm: int) -> None:
    a, b = (x.requires_grad_() for x in pair(2, 8192, 8192))
    whole = 2 * 8192 * 8192 * 4

    def step() -> None:
        torch.autograd.backward(chamfer(a, b, norm))

    assert peak(step) < whole / 64  # 8 MiB of 512: three tiles of 1 MiB and tensors of (b, n, 3)


class Alive(TorchDispatchMode):
    """The most tensors that operations had made and that lived at once."""

    now = most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        outputs = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self.now += 1
                weakref.finalize(tensor, self.freed)
        self.most = max(self.most, self.now)
        return outputs

    def freed(self) -> None:
        self.now -= 1


def test_nothing_is_kept_between_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small tensor kept for each tile splits the heap, and 20,000 points took 1.5 GB on a CPU."""
    a, b = pair(1, 64, 64)
    most = []
    for tiles in (4, 64):
        monkeypatch.setattr(metrics, "TILE", {"cpu": 64 * 64 // tiles, "else": 1})
        with Alive() as alive:
            chamfer(a, b)
        most.append(alive.most)
    assert most[0] == most[1]


@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)])
def test_vmap_and_compile_see_through_the_tiles(
    dims: tuple[int | None, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "TILE", {"cpu": 20, "else": 20})
    clouds = [torch.randn(3, 2, n, 3, generator=seeded(n)) for n in (9, 7)]
    a, b = (x if dim == 0 else x[0] for x, dim in zip(clouds, dims, strict=True))
    pairs = zip(a.expand(3, 2, 9, 3), b.expand(3, 2, 7, 3), strict=True)
    want = torch.stack([brute(*pair, 2).mean() for pair in pairs]).float()
    torch.testing.assert_close(torch.vmap(chamfer, in_dims=dims)(a, b), want)
    torch._dynamo.reset()
    run = torch.compile(chamfer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(clouds[0][0], clouds[1][0]), want[0])


def test_half_precision_is_measured_in_single() -> None:
    a, b = (x.half() for x in pair(4, 32, 32))
    got = chamfer(a, b, reduce=False)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), brute(a, b, 2), rtol=8 * EPS, atol=0)
    assert chamfer(a, b.double()).dtype == torch.float64


def test_a_point_that_is_no_number_is_not_hidden() -> None:
    a, b = pair(2, 8, 8)
    a[1, 3, 0] = math.nan
    assert chamfer(a, b, reduce=False).isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ((2, 0, 3), (2, 4, 3), r"chamfer\(\): clouds \(2, 0, 3\) have no points"),
        ((2, 4, 3), (2, 0, 3), r"clouds \(2, 0, 3\) have no points"),
        ((4, 3), (2, 4, 3), r"points are \(b, n, 3\), these are \(4, 3\)"),
        ((2, 4, 3), (3, 4, 3), "2 clouds and 3 to compare"),
        ((0, 4, 3), (0, 4, 3), "0 clouds and 0 to compare"),
    ],
)
def test_clouds_that_do_not_fit_are_refused(
    a: tuple[int, ...], b: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        chamfer(torch.zeros(a), torch.zeros(b))


def test_what_else_is_refused() -> None:
    a, b = pair(2, 4, 5)
    with pytest.raises(ValueError, match=r"norm=3.*Give 2"):
        chamfer(a, b, 3)
    with pytest.raises(ValueError, match=r"points are torch\.int64"):
        chamfer(a.long(), b)
    with pytest.raises(ValueError, match="cpu and on meta"):
        chamfer(a, b.to("meta"))
    for lengths, said in (
        (torch.tensor([0, 4]), "lengths_a go from 0 to 4 where clouds have 4 points"),
        (torch.tensor([1, 5]), "lengths_a go from 1 to 5"),
        (torch.tensor([1, 2, 3]), r"lengths_a have the shape \(3,\)"),
        (torch.tensor([1.0, 2.0]), r"lengths_a have .* torch.float32 for 2 clouds"),
    ):
        with pytest.raises(ValueError, match=said):
            chamfer(a, b, lengths_a=lengths)


# --- accuracies and IoU


def test_overall_accuracy_of_classes_and_logits() -> None:
    labels = torch.tensor([0, 1, 2, 2])
    assert overall_accuracy(torch.tensor([0, 1, 0, 2]), labels) == 0.75
    assert overall_accuracy(torch.eye(3)[[0, 1, 0, 2]], labels) == 0.75
    assert overall_accuracy(torch.tensor([[0, 1], [0, 2]]), labels.view(2, 2)) == 0.75


def test_mean_class_accuracy_weighs_classes_alike_and_leaves_absent_ones_out() -> None:
    labels = torch.tensor([0] * 8 + [3] * 2)
    answers = torch.tensor([0] * 8 + [3, 1])
    assert overall_accuracy(answers, labels) == 0.9
    assert mean_class_accuracy(answers, labels) == 0.75
    assert mean_class_accuracy(answers, labels, classes=40) == 0.75
    assert mean_class_accuracy(torch.eye(9)[answers], labels, classes=9) == 0.75


def test_mean_class_accuracy_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import balanced_accuracy_score

    labels = torch.randint(0, 15, (300,), generator=seeded())
    answers = torch.where(torch.rand(300, generator=seeded(1)) < 0.6, labels, labels.roll(1))
    theirs = balanced_accuracy_score(labels.numpy(), answers.numpy())
    assert mean_class_accuracy(answers, labels) == pytest.approx(theirs, rel=1e-12)


def test_wrong_labels_are_refused() -> None:
    labels = torch.tensor([0, 1, 2])
    for call in (overall_accuracy, mean_class_accuracy):
        with pytest.raises(ValueError, match=r"answers \(2,\) torch.int64 for labels \(3,\)"):
            call(labels[:2], labels)
        with pytest.raises(ValueError, match=r"torch\.float32 for labels"):
            call(labels.float(), labels)
        with pytest.raises(ValueError, match="no labels to count"):
            call(labels[:0], labels[:0])
    with pytest.raises(ValueError, match=r"classes=2\): labels go from 0 to 2"):
        mean_class_accuracy(labels, labels, classes=2)
    with pytest.raises(ValueError, match="labels go from -1 to 1"):
        mean_class_accuracy(labels, labels - 1)


def test_iou_by_hand() -> None:
    parts = torch.tensor([[0, 0, 0, 1], [2, 2, 2, 2]])
    said = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 0]])
    # shape 0: 2/3 and 1/2, and part 4 in neither counts as 1; shape 1: 3/4 (0 is none of its own)
    expected = torch.tensor([(2 / 3 + 1 / 2 + 1) / 3, 3 / 4], dtype=torch.float64)
    got = shape_iou(said, parts, [[0, 1, 4], [2]])
    torch.testing.assert_close(got, expected, rtol=1e-15, atol=0)
    assert mean_iou(said, parts, [[0, 1, 4], [2]]) == pytest.approx(expected.mean().item())
    assert mean_iou(parts, parts, [[0, 1, 4], [2, 3]]) == 1.0
    # said but not there: an IoU of 0
    assert shape_iou(said[1:], parts[1:], [[2, 0]]).item() == 3 / 8


def test_iou_of_logits_chooses_among_the_parts_of_the_category() -> None:
    logits = torch.tensor([[[9.0, 1.0, 2.0, 0.0], [9.0, 0.0, 1.0, 2.0]]])
    parts = torch.tensor([[2, 3]])
    assert mean_iou(logits, parts, [[2, 3]]) == 1.0
    assert mean_iou(logits, parts, [[0, 2, 3]]) == 0.0


@pytest.mark.parametrize("call", [overall_accuracy, mean_class_accuracy])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_of_a_run_that_diverged_are_refused(
    call: Callable[[Tensor, Tensor], float], value: float
) -> None:
    labels = torch.tensor([0, 0, 1])
    logits = torch.eye(2)[labels]
    logits[:, 1] = logits[:, 1].masked_fill(labels == 1, -math.inf)  # a class that is barred
    assert call(logits, labels) < 1
    logits[2] = value
    with pytest.raises(ValueError, match="largest logits of 1 answers are not finite"):
        call(logits, labels)
    with pytest.raises(ValueError, match="of 3 answers are not finite"):
        call(torch.full((3, 2), -math.inf), labels)


def test_points_of_the_background_do_not_count() -> None:
    parts = torch.tensor([[0, 0, 1, 1, -1, -1], [-1] * 6])
    said = torch.tensor([[0, 0, 1, 0, 0, 1], [0] * 6])
    whole = shape_iou(said[:1, :4], parts[:1, :4], [[0, 1]])
    got = shape_iou(said, parts, [[0, 1]] * 2)
    assert got.tolist() == [whole.item(), 1.0]  # with nothing left there is nothing wrong
    assert mean_iou(said, parts, [[0, 1]] * 2) == got.mean()
    logits = torch.nn.functional.one_hot(said, 2).float()
    assert torch.equal(shape_iou(logits, parts, [[0, 1]] * 2), got)
    assert mean_iou(said, said, [[0, 1]] * 2, ignore=0) == 1.0
    with pytest.raises(ValueError, match="parts outside its category"):
        mean_iou(said, parts, [[0, 1]] * 2, ignore=None)
    clouds = procedural("OBJ_BG", 15, 64)
    categories = [sorted(set(p.tolist()) - {-1}) for p in clouds.parts]
    assert mean_iou(clouds.parts, clouds.parts, categories) == 1.0


def test_wrong_parts_are_refused() -> None:
    parts = torch.tensor([[0, 0], [2, 3]])
    with pytest.raises(ValueError, match="1 categories for 2 shapes"):
        mean_iou(parts, parts, [[0]])
    with pytest.raises(ValueError, match=r"shape 1 has parts outside its category \[2\]"):
        mean_iou(parts, parts, [[0], [2]])
    with pytest.raises(ValueError, match=r"answers \(1, 2\)"):
        mean_iou(parts[:1], parts, [[0], [2, 3]])
    with pytest.raises(
        ValueError, match=r"category \[2, 3\] of shape 1 has logits of only 3 parts"
    ):
        mean_iou(torch.zeros(2, 2, 3), parts, [[0], [2, 3]])


# --- vote


class Remembers(nn.Module):
    """Says the mean point, and keeps what it was called with and in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.5)
        self.drop.eval()  # a module that was frozen on its own
        self.seen: list[Tensor] = []
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        self.modes += [m.training for m in self.modules()]
        y: Tensor = self.drop(self.norm(x.mean(1)))
        return y


def test_vote_is_the_mean_over_changed_samples() -> None:
    model, points = Remembers(), torch.randn(4, 100, 3, generator=seeded())
    logits = vote(model, points, 7, samples=60, generator=seeded(2))
    assert [x.shape for x in model.seen] == [(4, 60, 3)] * 7
    assert len({tuple(x.flatten().tolist()) for x in model.seen}) == 7
    assert not any(model.modes)
    assert not logits.requires_grad
    model.eval()
    means = torch.stack([model(x) for x in list(model.seen)]).mean(0)
    torch.testing.assert_close(logits, means.detach(), rtol=0, atol=4 * EPS)


def test_vote_gives_points_of_the_cloud_scaled_and_moved() -> None:
    points = torch.randn(2, 50, 3, generator=seeded(), dtype=torch.float64)
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x)
        return x.mean(1)

    vote(model, points, 1, generator=seeded(1))
    # all 50 points, in another order: each axis in the order of its values is one line
    x, y = points.sort(1).values, seen[0].sort(1).values
    slope = (y[:, 1:] - y[:, :1]) / (x[:, 1:] - x[:, :1])
    torch.testing.assert_close(slope, slope[:, :1].expand_as(slope), rtol=1e-9, atol=0)
    assert 2 / 3 - 1e-6 < slope.min() < slope.max() < 1.5 + 1e-6
    assert not torch.allclose(scale_translate(points, generator=seeded(1)), seen[0])


def test_vote_is_a_seed_and_leaves_modes_and_buffers() -> None:
    model, points = Remembers(), torch.randn(4, 30, 3, generator=seeded())
    modes = [m.training for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    once, again = (vote(model, points, 3, samples=9, generator=seeded(4)) for _ in range(2))
    assert torch.equal(once, again)
    assert [m.training for m in model.modules()] == modes == [True, True, False]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_vote_restores_modes_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        vote(model, torch.zeros(2, 8, 3))
    assert all(m.training for m in model.modules())


def test_vote_refuses() -> None:
    points = torch.zeros(2, 8, 3)
    with pytest.raises(ValueError, match=r"passes=0.*1 pass or more"):
        vote(nn.Identity(), points, 0)
    with pytest.raises(ValueError, match=r"samples=9\): a cloud has 8 points"):
        vote(nn.Identity(), points, samples=9)
    with pytest.raises(ValueError, match=r"points are \(b, n, 3\)"):
        vote(nn.Identity(), points[0])
