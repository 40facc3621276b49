"""How Point-MAE is made, pre-trained and tuned in the demo: its recipe, small and at any size."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from backbones.checkpoint import Loaded, load_checkpoint
from backbones.point_mae import PointMAE, PointMAEPretrain
from pointcloud.augment import scale_translate
from pointcloud.clouds import Clouds
from pointcloud.metrics import overall_accuracy
from pointcloud.shapes import procedural

from .._files import write_whole
from ..engine.apply import apply
from ..engine.losses import balance_loss
from ..methods.adapter_x import adapterx_ffn, daptx
from ..methods.point_clouds import dapt
from ..rules.rule import Rule, Rules
from .fit import Augment, Source, answers, fit, steps

ALL = ("cls", "prompt", "patch")
PROMPTED = {"dapt", "daptx", "idpt"}  # whose head reads the prompts
BALANCE = 0.01  # weight of the load-balance loss, as usual (Li et al. 2024, Eq. 7)
Step = Callable[[], None]

# The small recipe: 0.5 M parameters, 60 clouds of a class; ranks a quarter of those at width 384,
# as the width is; learning rates the best of RATES on validation clouds, see `choose_rates`.
SMALL: dict[str, Any] = {
    "num_groups": 32, "group_size": 16, "embed_dim": 96, "depth": 4, "num_heads": 4,
    "drop_path": 0.0, "head_dim": 32, "drop_rate": 0.1,
}  # fmt: skip
POINTS, EPOCHS, PRETRAIN = 512, 8, 10
RANKED: dict[str, Callable[..., list[Rule]]] = {
    "dapt": dapt, "daptx": daptx, "adapterx_ffn": adapterx_ffn
}  # fmt: skip
RANK = {"dapt": 16, "daptx": 8, "adapterx_ffn": 16}
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
RATE = {"linear_probe": 1e-2, "full": 1e-3, "dapt": 1e-2, "daptx": 1e-2, "adapterx_ffn": 1e-2}


def narrow(method: str) -> Rules:
    """The rules of a method at width 96."""
    return RANKED[method](rank=RANK[method]) if method in RANKED else method


def prompted(method: str) -> dict[str, Any]:
    """The head reads prompts, where a method makes them."""
    return {"reads": ALL} if method in PROMPTED else {}


class Recipe(NamedTuple):
    """How models are made and trained.

    sizes    of Point-MAE, and `asks`: what a method asks of it beside them
    rules    of a method; rate of AdamW for it
    points   of a cloud
    """

    sizes: dict[str, Any]
    rules: Callable[[str], Rules]
    rate: Callable[[str], float]
    epochs: int
    batch: int
    points: int
    asks: Callable[[str], dict[str, Any]] = prompted
    augment: Augment = scale_translate
    decay: float = 0.05
    clip: float | None = 10.0
    device: str = "cpu"

    def model(self, classes: int, method: str = "full") -> PointMAE:
        """A Point-MAE as a method asks for it."""
        return PointMAE(classes, **{**self.sizes, **self.asks(method)}).to(self.device)

    def fit(self, model: nn.Module, source: Source, rate: float, **rest: Any) -> nn.Module:
        """Train it, on labels or, masked, on itself."""
        masked = isinstance(model, PointMAEPretrain)
        return fit(
            model, (lambda x, y: model(x)) if masked else _supervised(model), source, rate=rate,
            points=self.points, epochs=self.epochs, batch=self.batch, decay=self.decay,
            clip=self.clip, augment=self.augment, **rest,
        )  # fmt: skip

    def mark(self, method: str, *of: str) -> str:
        """What this recipe comes to for a method, and what else it is of, in twelve letters."""
        augment = getattr(self.augment, "__name__", repr(self.augment))
        facts = (
            self.sizes, self.asks(method), str(self.rules(method)), self.rate(method), self.epochs,
            self.batch, self.points, augment, self.decay, self.clip, of,
        )  # fmt: skip
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def small(epochs: int | None = None) -> Recipe:
    """The recipe of `surgery demo --points`."""
    return Recipe(SMALL, narrow, lambda m: RATE.get(m, 3e-3), epochs or EPOCHS, 30, POINTS)


def digest(source: Source | Path) -> str:
    """Letters that change with a file, with clouds, or with the description of a data set."""
    if isinstance(source, Clouds):
        tensors = (source.points, source.labels)
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
    content = source.read_bytes() if isinstance(source, Path) else repr(vars(source)).encode()
    return hashlib.sha256(content).hexdigest()


def pretrained_backbone(
    recipe: Recipe, out: Path, source: Source | None = None, *, masked: bool = False,
    anew: bool = False,
) -> Path:  # fmt: skip
    """The file of a backbone trained on clean objects; the one there is, if it is of the same."""
    source = procedural("OBJ_ONLY", 1500, recipe.points) if source is None else source
    file = out / f"backbone-{recipe.mark('full', digest(source), str(masked))}.pth"
    if anew or not file.is_file():
        with Progress() as progress:
            bar = progress.add_task("backbone", total=recipe.epochs * steps(source, recipe.batch))
            pretrain(recipe, source, file, masked=masked, step=partial(progress.advance, bar))
    return file


def pretrain(
    recipe: Recipe, source: Source, file: Path, *, masked: bool = False, step: Step = lambda: None
) -> Path:
    """Train a whole model on clouds, by their labels or by masking, and keep its backbone."""
    torch.manual_seed(0)
    if masked:
        sizes = {k: v for k, v in recipe.sizes.items() if k not in ("head_dim", "drop_rate")}
        depth, heads = max(1, sizes["depth"] // 3), sizes["num_heads"]
        model: nn.Module = PointMAEPretrain(**sizes, decoder_depth=depth, decoder_heads=heads)
        model = model.to(recipe.device)
    elif isinstance(source, Clouds):
        model = recipe.model(len(source.names))
    else:
        raise ValueError(f"{type(source).__name__} has no labels. Give --pretrain masked.")
    recipe.fit(model, source, 1e-3, step=step, keep=file.with_suffix(".resume"))
    state = {k: v.cpu() for k, v in model.state_dict().items() if "cls_head" not in k}
    content = {"base_model": state, "epoch": recipe.epochs}
    write_whole(file, lambda half: torch.save(content, half))
    return file


def load_backbone(model: nn.Module, backbone: Path) -> Loaded:
    """Load a backbone. Raises ValueError where it lacks more than what is new: token and head."""
    loaded = load_checkpoint(model, backbone)
    fresh = ("cls_token", "cls_pos", "cls_head_finetune.")
    if lacking := [key for key in loaded.missing if not key.startswith(fresh)]:
        raise ValueError(
            f"{backbone} lacks {len(lacking)} tensors of the backbone, such as {lacking[0]}. "
            "Give a file of a model of the same depth and sizes."
        )
    return loaded


def tune(
    method: str, recipe: Recipe, train: Clouds, backbone: Path, *, seed: int,
    step: Step = lambda: None, rate: float | None = None, keep: Path | None = None,
) -> nn.Module:  # fmt: skip
    """The backbone with a new head, operated by `method` and trained on `train`."""
    torch.manual_seed(seed)
    model = recipe.model(len(train.names), method)
    load_backbone(model, backbone)
    apply(model, recipe.rules(method), seed=seed)
    return recipe.fit(model, train, rate or recipe.rate(method), seed=seed, step=step, keep=keep)


def _supervised(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        entropy = F.cross_entropy(model(x), y)
        operated = hasattr(model, "surgery")
        return entropy + BALANCE * balance_loss(model) if operated else entropy

    return loss


def score(model: nn.Module, test: Clouds, recipe: Recipe) -> float:
    """Fraction of the test clouds named rightly."""
    logits = answers(model, test, points=recipe.points, batch=recipe.batch)
    return overall_accuracy(logits, test.labels)
