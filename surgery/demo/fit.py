"""One training loop for clouds: Point-MAE's published recipe, at any size; it can be resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pointcloud.augment import scale_translate
from pointcloud.clouds import Clouds, batches
from pointcloud.sample import farthest_points, gather, random_points

from .._files import write_whole

Source = Clouds | Dataset[Tensor]  # in memory, or read as it is needed, without labels
Loss = Callable[[Tensor, Tensor], Tensor]
Augment = Callable[..., Tensor]


def fit(
    model: nn.Module,
    loss: Loss,
    clouds: Source,
    *,
    points: int,
    epochs: int,
    batch: int,
    rate: float,
    decay: float,
    clip: float | None = 10.0,
    augment: Augment = scale_translate,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
    keep: Path | None = None,
) -> nn.Module:
    """Train what of `model` needs a gradient, and return it in eval mode.

    loss     of points (b, points, 3) and labels (b,), on the model's device
    rate     of AdamW, after a warm-up over a thirtieth of the steps and along a cosine to 1e-6;
             weights of two dimensions or more decay, but for tokens; gradients are cut at `clip`
    augment  (points, generator=) -> points
    keep     a file for what a run that is stopped goes on from, written at most once a minute
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(_groups(model, decay), lr=rate)
    per_epoch = steps(clouds, batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: _cosine(t / (epochs * per_epoch), 1e-6 / rate)
    )
    states = {"model": model, "optimizer": optimizer, "schedule": schedule}
    first, saved = _resume(states, keep), time.monotonic()
    for _ in range(first * per_epoch):
        step()
    device = trained[0].device
    for epoch in range(first, epochs):
        torch.manual_seed(100_003 * seed + epoch)  # an epoch is the same, resumed or not
        generator = torch.Generator().manual_seed(100_003 * seed + epoch)
        for x, y in _epoch(clouds, batch, epoch, generator):
            x = augment(drawn(x.to(device), points, generator), generator=generator)
            model.train()
            optimizer.zero_grad()
            torch.autograd.backward(loss(x, y.to(device)))
            if clip is not None:
                nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            schedule.step()
            step()
        if keep and time.monotonic() - saved > 60:
            saved = time.monotonic()
            _save(states, epoch + 1, keep)
    if keep:
        keep.unlink(missing_ok=True)
    return model.eval()


def steps(clouds: Source, batch: int) -> int:
    """How many batches an epoch has: the last is left out where it is not whole."""
    total = len(clouds.labels) if isinstance(clouds, Clouds) else len(clouds)  # type: ignore[arg-type]
    return max(1, total // batch)


def _epoch(
    clouds: Source, batch: int, epoch: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(clouds, Clouds):
        yield from islice(batches(clouds, batch, generator=generator), steps(clouds, batch))
        return
    if hasattr(clouds, "set_epoch"):
        clouds.set_epoch(epoch)
    loader = DataLoader(clouds, batch, shuffle=True, generator=generator, num_workers=2)
    for x in islice(loader, steps(clouds, batch)):
        yield x, torch.zeros(len(x), dtype=torch.int64)


def drawn(x: Tensor, points: int, generator: torch.Generator) -> Tensor:
    """So many points of each cloud (b, n, 3), as in training: at random, of the farthest 1.17x."""
    most = min(points if points == 8192 else points * 75 // 64, x.shape[1])  # 1200 for 1024
    pool = x if most == x.shape[1] else gather(x, farthest_points(x, most))
    return random_points(pool, points, generator=generator)


def answers(model: nn.Module, clouds: Clouds, *, points: int, batch: int = 32) -> Tensor:
    """Logits (n, classes) for the farthest points of each cloud, as in testing: nothing drawn."""
    device = next(model.parameters()).device

    def logits() -> Iterator[Tensor]:
        for x, _ in batches(clouds, batch, shuffle=False):
            x = x.to(device)
            yield model(x if points == x.shape[1] else gather(x, farthest_points(x, points)))

    with torch.inference_mode():
        return torch.cat([*logits()]).cpu()


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """The trained parameters in two groups: biases, norms and tokens do not decay, weights do."""
    free, decaying = list[nn.Parameter](), list[nn.Parameter]()
    for name, p in model.named_parameters():
        if p.requires_grad:
            is_free = p.dim() < 2 or name.endswith("bias") or "token" in name
            (free if is_free else decaying).append(p)
    return [{"params": free, "weight_decay": 0.0}, {"params": decaying, "weight_decay": decay}]


def _cosine(done: float, least: float, warm: float = 1 / 30) -> float:
    """The factor of the learning rate when a fraction of all steps is done."""
    if done < warm:
        return least + (1 - least) * done / warm
    return least + (1 - least) * (1 + math.cos(math.pi * done)) / 2


def _save(states: dict[str, Any], epoch: int, file: Path) -> None:
    content = {**{name: state.state_dict() for name, state in states.items()}, "epoch": epoch}
    write_whole(file, lambda half: torch.save(content, half))


def _resume(states: dict[str, Any], file: Path | None) -> int:
    """Fill the states from a file, where it is there; the epochs that are done."""
    if file is None or not file.is_file():
        return 0
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever half a file is
        print(f"{file} cannot be read ({error}): this run starts anew")
        return 0
    for name, state in states.items():
        state.load_state_dict(content[name])
    return int(content["epoch"])
