"""Claim: what Adapter-X trains brings a Point-MAE to harder clouds as full fine-tuning does.

    python examples/point_mae.py                          small, procedural clouds, on the CPU
    python examples/point_mae.py --pretrain masked        the backbone by masking, without labels
    python examples/point_mae.py --data scanobjectnn:PATH --checkpoint pretrain.pth --device cuda

With --data models are of full size and the recipe is the published one (Pang et al. 2022): 300
epochs of AdamW, 5e-4, weight decay 0.05, 32 clouds a step; for ScanObjectNN clouds are turned about
the vertical axis (Li et al. 2024), else scaled and moved. The last epoch counts, and no vote.
Runs that are done are read back from results.jsonl; one that was stopped goes on from its last
epoch. How it is done is read in surgery/demo/points.py and surgery/demo/fit.py.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from pointcloud.augment import rotate, scale_translate
from pointcloud.clouds import Clouds
from pointcloud.data import load, shapenet55
from surgery.demo.fit import Source
from surgery.demo.points import HARD, METHODS, Recipe, Split, drawn, run, small

FULL = {"group_size": 32, "embed_dim": 384, "depth": 12, "num_heads": 6, "drop_path": 0.1}


def full(given: argparse.Namespace) -> Recipe:
    """Point-MAE as published, a patch for every 16 points; every method with its default sizes."""
    sizes = {**FULL, "num_groups": given.points // 16}
    turned = given.data.startswith("scanobjectnn")
    return Recipe(
        sizes, lambda method: method, lambda method: 5e-4, given.epochs or 300, 32, given.points,
        augment=rotate if turned else scale_translate, device=given.device,
    )  # fmt: skip


def published(spec: str, seed: int) -> tuple[Clouds, Clouds]:
    """Clouds to train on and to test on; the seed is the training's alone."""
    return load(spec), load(spec, train=False)


def source(spec: str, points: int) -> Source:
    """What the backbone is made of: "shapenet:PATH", or what load() reads."""
    name, _, path = spec.partition(":")
    return shapenet55(path, points=points) if name == "shapenet" else load(spec)


def main() -> None:
    given = arguments()
    recipe = full(given) if given.data else small(given.epochs)._replace(device=given.device)
    targets: dict[str, Split] = {name: partial(drawn, name) for name in HARD}
    if given.data:
        targets = {given.data.partition(":")[0].replace("/", "-"): partial(published, given.data)}
    run(
        recipe=recipe,
        targets=targets,
        methods=given.methods,
        seeds=given.seeds,
        backbone=given.checkpoint,
        source=source(given.source, recipe.points) if given.source else None,
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
    add("--points", type=int, default=2048, help="points of a cloud, with --data (default 2048)")
    add("--methods", nargs="+", metavar="RULES", help=f"default: {' '.join(METHODS)}")
    add("--seeds", type=int, default=5, help="runs of each method (default 5)")
    add("--epochs", type=int, default=None, help="default 300 with --data, else 30")
    add("--device", default="cpu", help="cpu, cuda")
    add("--out", type=Path, default=Path("out/point_mae"), help="folder of all that is written")
    return parser.parse_args()


if __name__ == "__main__":
    main()
