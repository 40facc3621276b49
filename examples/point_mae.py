"""Claim: what Adapter-X trains brings a Point-MAE to harder clouds as full fine-tuning does.

    python examples/point_mae.py                          small, procedural clouds, on the CPU
    python examples/point_mae.py --pretrain masked        the backbone by masking, without labels
    python examples/point_mae.py --data scanobjectnn:PATH --checkpoint pretrain.pth --device cuda

With --data models are of full size and the recipe is the published one (Pang et al. 2022): 300
epochs of AdamW, 5e-4, weight decay 0.05, 32 clouds a step; for ScanObjectNN clouds are turned about
the vertical axis (Li et al. 2024), else scaled and moved. DAPT has its published sizes, and its
positions added once. The last epoch counts, and no vote. Runs that are done are read back from
results.jsonl, where nothing they depend on has changed; one that was stopped goes on from its last
epoch. How it is done is read in surgery/demo/: points.py, recipe.py, fit.py.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from pointcloud.augment import rotate, scale_translate
from pointcloud.clouds import Clouds
from pointcloud.data import load, shapenet55
from surgery import SurgeryError
from surgery.cli import number
from surgery.demo.fit import Source
from surgery.demo.points import HARD, METHODS, Split, drawn, run
from surgery.demo.recipe import ALL, Recipe, prompted, small
from surgery.methods import dapt
from surgery.rules.rule import Rules

FULL = {"group_size": 32, "embed_dim": 384, "depth": 12, "num_heads": 6}
DAPT = {  # rank, dropout, drop path, what the head reads (Zhou et al. 2024)
    "scanobjectnn": (64, 0.2, 0.3, ALL),
    "scanobjectnn/OBJ_BG": (64, 0.5, 0.3, ALL),
    "scanobjectnn/OBJ_ONLY": (64, 0.0, 0.1, ("cls", "prompt")),
    "modelnet40": (72, 0.0, 0.1, ("cls", "patch")),
}


def full(given: argparse.Namespace) -> Recipe:
    """Point-MAE as published, a patch for every 16 points."""
    name = given.data.partition(":")[0]
    rank, dropout, drop_path, reads = DAPT.get(name, DAPT["scanobjectnn"])

    def rules(method: str) -> Rules:
        return dapt(rank=rank, dropout=dropout) if method == "dapt" else method

    def asks(method: str) -> dict[str, Any]:
        once = {"reads": reads, "every_block": False, "drop_path": drop_path}
        return once if method == "dapt" else prompted(method)

    sizes = {**FULL, "num_groups": given.points // 16, "skip_origin": given.checkpoint is not None}
    return Recipe(
        sizes, rules, lambda method: 5e-4, given.epochs or 300, 32, given.points, asks,
        rotate if name.startswith("scanobjectnn") else scale_translate, device=given.device,
    )  # fmt: skip


def masked(recipe: Recipe) -> Recipe:
    """The published recipe of pre-training: batches of 128 clouds of 1024 points, nothing cut."""
    sizes = {**recipe.sizes, "num_groups": 64}
    return recipe._replace(sizes=sizes, batch=128, points=1024, clip=None, augment=scale_translate)


@cache
def published(spec: str, points: int) -> tuple[Clouds, Clouds]:
    """Clouds to train on and to test on; the seed is the training's alone."""
    return load(spec, points=points), load(spec, train=False, points=points)


def source(spec: str, points: int) -> Source:
    """What the backbone is made of: "shapenet:PATH", or what load() reads."""
    name, _, path = spec.partition(":")
    return shapenet55(path, points=points) if name == "shapenet" else load(spec, points=points)


def main() -> None:
    given = arguments()
    recipe = full(given) if given.data else small(given.epochs or 24)._replace(device=given.device)
    first = masked(recipe) if given.data and given.pretrain == "masked" else None
    targets: dict[str, Split] = {name: partial(drawn, name) for name in HARD}
    if given.data:
        name = given.data.partition(":")[0].replace("/", "-")
        targets = {name: lambda seed: published(given.data, given.points)}
    run(
        recipe=recipe,
        first=first,
        targets=targets,
        methods=given.methods,
        seeds=given.seeds,
        backbone=given.checkpoint,
        source=source(given.source, (first or recipe).points) if given.source else None,
        masked=given.pretrain == "masked",
        out=given.out,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="", help="scanobjectnn:PATH, scanobjectnn/OBJ_BG:PATH, modelnet40:PATH")
    add("--checkpoint", type=Path, help="a published pre-training file; else one is made")
    add("--pretrain", choices=("labels", "masked"), default="labels", help="how it is made")
    add("--source", default="", help="of what: shapenet:PATH, or as --data (default procedural)")
    add("--points", type=number, help="points of a cloud (ScanObjectNN 2048, else 1024)")
    add("--methods", nargs="+", metavar="RULES", help=f"default: {' '.join(METHODS)}")
    add("--seeds", type=number, default=5, help="runs of each method (default 5)")
    add("--epochs", type=number, help="default 300 with --data, else 24")
    add("--device", default="cpu", help="cpu, cuda")
    add("--out", type=Path, default=Path("out/point_mae"), help="folder of all that is written")
    given = parser.parse_args()
    given.points = given.points or (2048 if given.data.startswith("scanobjectnn") else 1024)
    if given.checkpoint and not given.checkpoint.is_file():
        parser.error(f"--checkpoint: there is no file {given.checkpoint}")
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {given.device}: this machine has none")
    return given


if __name__ == "__main__":
    try:
        main()
    except (SurgeryError, ValueError, OSError) as error:
        sys.exit(f"point_mae: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
