"""How near two clouds are, and how right the classes and parts that a model names.

Accuracies and IoUs are fractions, 0..1. `answers` are classes named, or logits with one more
axis, the last, of which the largest is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Generator, Tensor, nn

from .augment import scale_translate
from .checks import check_points, not_empty
from .operations import padding
from .sample import gather, random_points

if TYPE_CHECKING:
    from torch_geometric.data import Data

TILE = {"cpu": 2**18, "else": 2**24}  # distances that live at once: 1 MB stays in a CPU's cache


def chamfer(
    a: Tensor | Data,
    b: Tensor | Data,
    norm: int = 2,
    *,
    lengths_a: Tensor | None = None,
    lengths_b: Tensor | None = None,
    reduce: bool = True,
) -> Tensor:
    """Chamfer distance: how far points are from the nearest of the other cloud, in the mean.

    a, b       (b, n, 3) and (b, m, 3); or two torch-geometric Batches of as many clouds
    norm       2: mean_a min_b |a - b|^2 + mean_b min_a |a - b|^2, in squared units of the points;
               1: (mean_a min_b |a - b| + mean_b min_a |a - b|) / 2, in units of the points
    lengths_a  (b,) whole numbers: of cloud i only the first lengths_a[i] points count, 1 to n
    lengths_b  the same of b
    reduce     True: a scalar, the mean over clouds; False: (b,)

    Distances are of differences, not of matrix products, so that clouds far from the origin keep
    their digits, and in float32 or finer. The nearest is sought in tiles: beside the n + m
    distances kept for backward, memory does not grow with n * m. Of points equally near one has
    the gradient; at a distance of 0 it is 0 for both norms. Raises ValueError on shapes, dtypes,
    lengths or a norm that do not fit. Source: Fan et al. 2017, equation 1; the means and the half
    are ChamferDistanceL2 and L1 of Point-MAE (Pang et al. 2022), which prints 1000 times these.

    >>> a, b = torch.tensor([[[0.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 3.0, 4.0]]])
    >>> chamfer(a, b), chamfer(a, b, norm=1)
    (tensor(50.), tensor(5.))
    """
    rule = f"chamfer(norm={norm})"
    if norm not in (1, 2):
        raise ValueError(f"{rule}: the norm is 1 or 2. Give 2 for squared distances, 1 for plain.")
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        from . import geometric

        geometric.check_no_lengths("chamfer", lengths_a if lengths_b is None else lengths_b)
        a, lengths_a, _ = geometric.dense(a)
        b, lengths_b, _ = geometric.dense(b)
    _check_pair(rule, a, b)
    fine = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(fine), b.to(fine)
    a, real_a = _without_padding(f"{rule}: lengths_a", a, lengths_a)
    b, real_b = _without_padding(f"{rule}: lengths_b", b, lengths_b)
    there, back = _to_nearest(a, b, norm), _to_nearest(b, a, norm)
    both = (_mean(there, real_a) + _mean(back, real_b)) / (2 if norm == 1 else 1)
    return both.mean() if reduce else both


def overall_accuracy(answers: Tensor, labels: Tensor) -> float:
    """Fraction of `labels` named rightly.

    answers  classes, of the shape of labels, or logits (..., classes)
    labels   (n,), or any shape, such as (n, p) of parts

    Raises ValueError on shapes that do not fit, where there is nothing to count, and where the
    largest logit of an answer is not finite: what diverged would score like a constant answer.

    >>> overall_accuracy(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 2]))
    0.75
    """
    chosen = _chosen("overall_accuracy", answers, labels)
    return float((chosen == labels).double().mean())


def mean_class_accuracy(answers: Tensor, labels: Tensor, classes: int | None = None) -> float:
    """Mean over classes of the fraction of each class named rightly: all classes weigh the same.

    answers, labels  as in `overall_accuracy`
    classes          how many there are, to check the labels by; None: not checked

    Classes that no label has do not count. Raises ValueError as `overall_accuracy` does, and on
    labels that are not 0 to classes - 1.

    >>> mean_class_accuracy(torch.tensor([0, 0, 0, 2]), torch.tensor([0, 0, 0, 1]), classes=5)
    0.5
    """
    rule = f"mean_class_accuracy(classes={classes})"
    chosen = _chosen(rule, answers, labels)
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or (classes is not None and high >= classes):
        remedy = f"Give classes >= {high + 1}, and leave out what is below 0"
        raise ValueError(f"{rule}: labels go from {low} to {high}. {remedy}.")
    many = labels.flatten().bincount()
    right = labels[chosen == labels].bincount(minlength=len(many))
    return float((right[many > 0].double() / many[many > 0]).mean())


def shape_iou(
    answers: Tensor,
    parts: Tensor,
    categories: Sequence[Sequence[int]],
    *,
    ignore: int | None = -1,
) -> Tensor:
    """Intersection over union of each shape (n,), the mean over the parts of its category.

    answers     (n, p) parts, or logits (n, p, parts), chosen among the parts of the category
    parts       (n, p) the true ones
    categories  n lists: the parts that a shape of its category may have, there or not
    ignore      points of this true part do not count, such as background; None: all do

    A part that a shape neither has nor is said to have counts as 1. Raises ValueError on shapes
    that do not fit and on a true part outside its category. Source: Yi et al. 2016 (ShapeNetPart)
    as evaluated by Qi et al. 2017 (PointNet++), section 4 and published code.

    >>> shape_iou(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 1]]), [[0, 1, 2]])
    tensor([0.7222], dtype=torch.float64)
    """
    if len(categories) != len(parts):
        fact = f"{len(categories)} categories for {len(parts)} shapes"
        raise ValueError(f"shape_iou: {fact}. Give a list of parts for every shape.")
    logits = answers.dim() == parts.dim() + 1
    _chosen("shape_iou", answers, parts)
    rows = zip(answers, parts, categories, strict=True)
    return torch.stack([_one_iou(i, *row, logits, ignore) for i, row in enumerate(rows)])


def mean_iou(
    answers: Tensor,
    parts: Tensor,
    categories: Sequence[Sequence[int]],
    *,
    ignore: int | None = -1,
) -> float:
    """Instance-average mIoU of part segmentation: the mean over shapes of `shape_iou`.

    >>> mean_iou(torch.tensor([[0, 0], [2, 3]]), torch.tensor([[0, 0], [2, 2]]), [[0, 1], [2, 3]])
    0.625
    """
    return float(shape_iou(answers, parts, categories, ignore=ignore).mean())


def vote(
    model: Callable[[Tensor], Tensor],
    points: Tensor,
    passes: int = 10,
    *,
    samples: int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """Mean over passes of a model's logits (b, classes), every pass on clouds changed at random.

    model    called with (b, samples, 3); put in eval mode for this, without gradient, and back
    points   (b, n, 3); Point-MAE gives the 1200 farthest of them for 1024 samples
    passes   how many; each draws `samples` points of a cloud, then scales and moves it
    samples  points a pass sees, at most n; None: all n of them, in another order

    Report plain accuracy first, and this as voting. Never vote again and again and keep the best
    of the runs, as published test commands do: that is a maximum over the test set. Raises
    ValueError on no passes or too many samples. Source: Point-MAE's published code (Pang et al.
    2022), with `scale_translate` in its defaults.

    >>> vote(lambda x: x.mean(1), torch.randn(4, 1200, 3), samples=1024).shape
    torch.Size([4, 3])
    """
    rule = f"vote(passes={passes}, samples={samples})"
    check_points("vote", points)
    if passes < 1:
        raise ValueError(f"{rule}: there is nothing to take the mean of. Give 1 pass or more.")
    n = points.shape[1]
    m = n if samples is None else samples
    if not 1 <= m <= n:
        raise ValueError(f"{rule}: a cloud has {n} points. Give 1 <= samples <= {n}.")
    with torch.no_grad(), _evaluating(model):
        drawn = (random_points(points, m, generator=generator) for _ in range(passes))
        logits = [model(scale_translate(x, generator=generator)) for x in drawn]
    return torch.stack(logits).mean(0)


@contextmanager
def _evaluating(model: object) -> Iterator[None]:
    """In eval mode inside; afterwards every module is in the mode that it was in."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _to_nearest(a: Tensor, b: Tensor, norm: int) -> Tensor:
    """(b, n): distance (norm 1) or its square (2) of each point of a to the nearest of b."""
    difference = a - gather(b, _nearest(a, b))
    return (
        difference.square().sum(-1) if norm == 2 else torch.linalg.vector_norm(difference, dim=-1)
    )


@torch.no_grad()
def _nearest(a: Tensor, b: Tensor) -> Tensor:
    """Index (b, n) of the point of b that is nearest to each of a, sought tile by tile."""
    n, m = a.shape[1], b.shape[1]
    tile = TILE["cpu" if a.device.type == "cpu" else "else"]
    clouds, rows = max(1, tile // (n * m)), max(1, tile // m)
    x, y = (rearrange(p, "b n c -> c b n").contiguous() for p in (a, b))
    # Made first, for what is kept between tiles splits the heap; of both, for vmap of either.
    index = torch.empty_like(x[0] + y[0, :, :1], dtype=torch.int64)
    for i in range(0, len(a), clouds):
        for j in range(0, n, rows):
            some, whole = x[:, i : i + clouds, j : j + rows], y[:, i : i + clouds]
            index[i : i + clouds, j : j + rows] = _squares(some, whole).min(-1).indices
    return index


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (b, n, m) of planes (3, b, n) and (3, b, m)."""
    x, y = rearrange(x, "c b n -> c b n 1"), rearrange(y, "c b m -> c b 1 m")
    square = (x[0] - y[0]).pow_(2)
    for i in (1, 2):
        square += (x[i] - y[i]).pow_(2)
    return square


def _without_padding(
    rule: str, points: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Padding becomes the first point, which is never nearer than itself; and which are real."""
    if lengths is None:
        return points, None
    b, n, _ = points.shape
    if lengths.shape != (b,) or lengths.is_floating_point():
        fact = f"have the shape {tuple(lengths.shape)} and {lengths.dtype} for {b} clouds"
        raise ValueError(f"{rule} {fact}. Give a whole number for each cloud.")
    low, high = (int(end) for end in lengths.aminmax())
    if low < 1 or high > n:
        fact = f"go from {low} to {high} where clouds have {n} points"
        raise ValueError(f"{rule} {fact}. Give 1 to {n}; leave empty clouds out.")
    real = ~padding(points, lengths)
    return torch.where(rearrange(real, "b n -> b n 1"), points, points[:, :1]), real


def _mean(distance: Tensor, real: Tensor | None) -> Tensor:
    if real is None:
        return distance.mean(1)
    return (distance * real).sum(1) / real.sum(1)


def _check_pair(rule: str, a: Tensor, b: Tensor) -> None:
    for points in (a, b):
        check_points("chamfer", points)
        not_empty("chamfer", points)
    if len(a) != len(b) or not len(a):
        fact = f"{len(a)} clouds and {len(b)} to compare them with"
        raise ValueError(f"{rule}: {fact}. Give as many of both, one or more.")
    if a.device != b.device:
        fact = f"clouds on {a.device} and on {b.device}"
        raise ValueError(f"{rule}: {fact}. Move them to one device.")


def _chosen(rule: str, answers: Tensor, labels: Tensor) -> Tensor:
    """The classes named: `answers` themselves, or where their logits are largest."""
    chosen = answers.argmax(-1) if answers.dim() == labels.dim() + 1 else answers
    if chosen.shape != labels.shape or chosen.is_floating_point():
        fact = f"answers {tuple(answers.shape)} {answers.dtype} for labels {tuple(labels.shape)}"
        remedy = "Give a whole number for each label, or logits with the classes last"
        raise ValueError(f"{rule}: {fact}. {remedy}.")
    if not labels.numel():
        raise ValueError(f"{rule}: there are no labels to count. Give at least one.")
    if chosen is not answers and not (top := answers.amax(-1)).isfinite().all():
        fact = f"the largest logits of {int((~top.isfinite()).sum())} answers are not finite"
        raise ValueError(f"{rule}: {fact}, as of a run that diverged. Give finite ones.")
    return chosen


def _one_iou(
    i: int,
    answers: Tensor,
    parts: Tensor,
    category: Sequence[int],
    logits: bool,
    ignore: int | None,
) -> Tensor:
    if ignore is not None:
        answers, parts = answers[parts != ignore], parts[parts != ignore]
    known = torch.tensor(list(category), device=parts.device)
    if not torch.isin(parts, known).all():
        fact = f"shape {i} has parts outside its category {list(category)}"
        raise ValueError(f"shape_iou: {fact}. Name all the parts it may have.")
    if logits and max(category) >= answers.shape[-1]:
        fact = f"the category {list(category)} of shape {i} has logits of only {answers.shape[-1]}"
        raise ValueError(f"shape_iou: {fact} parts. Give a logit for every part there is.")
    if logits:
        answers = known[answers[:, known].argmax(-1)]
    said, true = (
        rearrange(p, "p -> 1 p") == rearrange(known, "k -> k 1") for p in (answers, parts)
    )
    union = (said | true).sum(1)
    return torch.where(union > 0, (said & true).sum(1) / union.double(), 1.0).mean()
