"""Point clouds as (b, n, 3) tensors, or torch-geometric's Data and Batch: choose, group, augment,
measure, draw, read and make them.

    from pointcloud import group_points, procedural

    clouds = procedural("PB_T50_RS", clouds=32)
    centers, patches, _ = group_points(clouds.points, groups=64, size=32)
"""

from .augment import drop, flip, jitter, normalize, rotate, scale_translate
from .clouds import Clouds, batches, take
from .data import (
    load,
    modelnet40,
    modelnet40_h5,
    modelnet_fewshot,
    scanobjectnn,
    shapenet55,
)
from .draw import draw_clouds, draw_groups
from .group import Groups, Nearest, group_points, nearest_points
from .metrics import chamfer, mean_class_accuracy, mean_iou, overall_accuracy, vote
from .sample import farthest_points, gather, random_points
from .shapes import procedural

__all__ = [
    "Clouds", "Groups", "Nearest", "batches", "chamfer", "draw_clouds", "draw_groups", "drop",
    "farthest_points", "flip", "gather", "group_points", "jitter", "load", "mean_class_accuracy",
    "mean_iou", "modelnet40", "modelnet40_h5", "modelnet_fewshot", "nearest_points", "normalize",
    "overall_accuracy", "procedural", "random_points", "rotate", "scale_translate", "scanobjectnn",
    "shapenet55", "take", "vote",
]  # fmt: skip
