"""Readers of the published layouts of ScanObjectNN, ModelNet40 and ShapeNet-55.

Nothing is downloaded: the data are behind forms, or their links are dead. A reader that misses a
file says where it looked, what the layout is and where to ask.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import normalize as unit_sphere
from .clouds import Clouds as Clouds
from .clouds import batches as batches
from .clouds import take as take
from .files import checked, h5, lines, missing, normalized, parsing, read_arrays, stacked
from .objects import NAMES
from .sample import farthest_points, gather
from .shapes import DIFFICULTIES, procedural

# Of ScanObjectNN: variant -> folder, and what the file's name ends in.
VARIANTS = {
    "OBJ_ONLY": ("main_split_nobg", ""),
    "OBJ_BG": ("main_split", ""),
    "PB_T25": ("main_split", "_augmented25_norot"),
    "PB_T25_R": ("main_split", "_augmented25rot"),
    "PB_T50_R": ("main_split", "_augmentedrot"),
    "PB_T50_RS": ("main_split", "_augmentedrot_scale75"),
}
_SCANOBJECTNN_LAYOUT = "h5_files/{main_split,main_split_nobg}/{training,test}_objectdataset*.h5"
_TEXT_LAYOUT = "modelnet40_shape_names.txt, modelnet40_{train,test}.txt and {class}/{id}.txt"
_H5_LAYOUT = "shape_names.txt and ply_data_{train0..4,test0..1}.h5"
_FEWSHOT_LAYOUT = "{5,10}way_{10,20}shot/{0..9}.pkl"
_DAT_LAYOUT = "a pickle of [clouds (p, 6), labels]"
_PKL_LAYOUT = "a pickle of {'train': [(cloud (p, 6), label, class), ...], 'test': [...]}"
_NPZ_LAYOUT = "the points and ids that were written here, the ids those of the list"
_SHAPENET_LAYOUT = "ShapeNet-55/{train,test}.txt and shapenet_pc/{taxonomy}-{model}.npy"
_SCANOBJECTNN = "https://hkust-vgd.github.io/scanobjectnn has the form to ask for it"
_MODELNET = "ask at https://modelnet.cs.princeton.edu, or for a copy in the field's repositories"
_FEWSHOT = "DATASET.md of https://github.com/Pang-Yatian/Point-MAE links them"
_SHAPENET = "register at https://shapenet.org; DATASET.md of Point-BERT and Point-MAE link the npy"


def scanobjectnn(
    root: str | Path,
    variant: str = "PB_T50_RS",
    *,
    train: bool = True,
    normalize: bool = False,
) -> Clouds:
    """ScanObjectNN, its published main split: clouds (n, 2048, 3), in the order of the file.

    root       the folder `h5_files`, or the one that holds it
    variant    OBJ_ONLY (without background), OBJ_BG, or perturbed: PB_T25, PB_T25_R, PB_T50_R,
               PB_T50_RS (the hardest); T is the shift in per cent, R rotation, S scale
    normalize  centre and scale into the unit sphere; Point-MAE and its followers do not

    `parts` is the file's mask where it has one, -1 for background. Raises FileNotFoundError, and
    ValueError on another variant or a file that is not as published. Source: Uy et al. 2019;
    files as in its h5_files.zip.

    >>> VARIANTS["PB_T50_RS"]
    ('main_split', '_augmentedrot_scale75')
    """
    rule = f"scanobjectnn({str(root)!r}, {variant!r})"
    if variant not in VARIANTS:
        raise ValueError(f"{rule}: there are {', '.join(VARIANTS)}. Give one of these.")
    folder, suffix = VARIANTS[variant]
    name = f"{folder}/{'training' if train else 'test'}_objectdataset{suffix}.h5"
    inner = Path(root) / "h5_files" / name
    path = inner if inner.is_file() else Path(root) / name
    if not path.is_file():
        missing(rule, path, _SCANOBJECTNN_LAYOUT, _SCANOBJECTNN)
    arrays = h5(path)
    clouds = checked(path, arrays["data"], arrays["label"], NAMES, arrays.get("mask"))
    return _spheres(clouds) if normalize else clouds


def modelnet40(
    root: str | Path,
    *,
    train: bool = True,
    points: int = 8192,
    normalize: bool = True,
    cache: str | Path | None = None,
) -> Clouds:
    """ModelNet40 as resampled with normals (x, y, z alone): clouds (n, points, 3).

    root       the folder `modelnet40_normal_resampled`
    points     farthest points of the 10,000 of each cloud
    normalize  into the unit sphere, as the published loader does
    cache      the folder of the caches, by default `root`

    Reads the published cache modelnet40_{split}_{points}pts_fps.dat if there, by an unpickler
    that refuses all but arrays; or its own .npz of that name; or makes that from the text files,
    which takes an hour or so for 8192 points, once. (The published cache starts at a random point
    of each cloud, ours at the first.) Raises FileNotFoundError; ValueError on a cloud that is
    smaller than `points`, and on a cache that is refused or of another list. Source: Wu et al.
    2015; Qi et al. 2017 (PointNet++); the cache as in Point-BERT and Point-MAE.

    >>> modelnet40("nowhere")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    FileNotFoundError: modelnet40('nowhere'): there is no nowhere/modelnet40_shape_names.txt. ...
    """
    rule, folder = f"modelnet40({str(root)!r})", Path(root)
    names = tuple(lines(rule, folder / "modelnet40_shape_names.txt", _TEXT_LAYOUT, _MODELNET))
    split = "train" if train else "test"
    path = Path(cache or root) / f"modelnet40_{split}_{points}pts_fps.dat"
    if path.is_file():
        arrays = read_arrays(path)
        with parsing(path, _DAT_LAYOUT):
            x, labels = arrays
            x = stacked(x)
    else:
        path = path.with_suffix(".npz")
        ids = lines(rule, folder / f"modelnet40_{split}.txt", _TEXT_LAYOUT, _MODELNET)
        kinds = [name.rpartition("_")[0] for name in ids]
        if unknown := set(kinds) - set(names):
            fact = f"classes {sorted(unknown)} of modelnet40_{split}.txt are not"
            raise ValueError(f"{rule}: {fact} in modelnet40_shape_names.txt. Mend either list.")
        labels = [names.index(kind) for kind in kinds]
        if not path.is_file():
            _write_modelnet40(rule, folder, ids, points, path)
        with parsing(path, _NPZ_LAYOUT), path.open("rb") as file, np.load(file) as arrays:
            x = arrays["points"]
            if arrays["ids"].tolist() != ids:
                raise ValueError(f"its {len(arrays['ids'])} ids are not the {len(ids)} of the list")
    clouds = checked(path, x, labels, names, points=points)
    return _spheres(clouds) if normalize else clouds


def modelnet40_h5(root: str | Path, *, train: bool = True, normalize: bool = False) -> Clouds:
    """ModelNet40 as in `modelnet40_ply_hdf5_2048` (the root): clouds (n, 2048, 3).

    They lie in the unit sphere already. The files are read in the order of their names, the same
    everywhere. Raises FileNotFoundError; ValueError on a file that is not as published. Source:
    Qi et al. 2017 (PointNet).

    >>> modelnet40_h5("nowhere")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    FileNotFoundError: modelnet40_h5('nowhere'): there is no nowhere/shape_names.txt. ...
    """
    rule, folder, split = f"modelnet40_h5({str(root)!r})", Path(root), "train" if train else "test"
    names = tuple(lines(rule, folder / "shape_names.txt", _H5_LAYOUT, _MODELNET))
    files: list[Clouds] = []
    for path in sorted(folder.glob(f"ply_data_{split}*.h5")):
        points = files[0].points.shape[1] if files else None  # as many in all
        arrays = h5(path)
        files.append(checked(path, arrays["data"], arrays["label"], names, points=points))
    if not files:
        missing(rule, folder / f"ply_data_{split}0.h5", _H5_LAYOUT, _MODELNET)
    x, labels = torch.cat([f.points for f in files]), torch.cat([f.labels for f in files])
    clouds = Clouds(x, labels, names)
    return _spheres(clouds) if normalize else clouds


def modelnet_fewshot(
    root: str | Path, way: int = 5, shot: int = 10, fold: int = 0, *, normalize: bool = True
) -> tuple[Clouds, Clouds]:
    """The train and test clouds of one fold of few-shot ModelNet40: (way * shot, 8192, 3), tests.

    root       the folder `ModelNetFewshot`, of {way}way_{shot}shot/{fold}.pkl
    way, shot  classes, 5 or 10, and train clouds of each, 10 or 20
    fold       0 to 9: what is published is the mean and deviation over all ten

    Raises FileNotFoundError; ValueError where the pickle holds more than arrays, or is not as
    published. Source: Sharma & Kaul 2020; the files as in Point-BERT and Point-MAE.

    >>> modelnet_fewshot("nowhere", fold=3)  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    FileNotFoundError: modelnet_fewshot('nowhere', ..., fold=3): there is no nowhere/5way_...
    """
    folder, name = Path(root), f"{way}way_{shot}shot/{fold}.pkl"
    tried = (folder / name, folder / name.replace("_", ""))
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        rule = f"modelnet_fewshot({str(root)!r}, way={way}, shot={shot}, fold={fold})"
        missing(rule, tried[0], _FEWSHOT_LAYOUT, _FEWSHOT)
    folds, names = read_arrays(path), tuple(f"class {i}" for i in range(way))

    def clouds(split: str) -> Clouds:
        with parsing(path, _PKL_LAYOUT):
            x, labels, *_ = zip(*folds[split], strict=True)
            x = stacked(x)
        read = checked(path, x, labels, names)
        return _spheres(read) if normalize else read

    return clouds("train"), clouds("test")


class ShapeNet55(Dataset[Tensor]):
    """Clouds (points, 3) to pre-train on, each read when it is asked for: see `shapenet55`."""

    def __init__(self, folder: Path, files: list[str], points: int, seed: int) -> None:
        self.folder, self.files, self.points, self.seed = folder, files, points, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        path = self.folder / self.files[index]
        if not path.is_file():
            missing("shapenet55", path, _SHAPENET_LAYOUT, _SHAPENET)
        with parsing(path, "an array (p, 3)"):
            cloud = np.load(path)[None, :, :3]
        x = checked(path, cloud, [0], ("cloud",)).points[0]
        if len(x) < self.points:
            raise ValueError(
                f"shapenet55(points={self.points}): {path} has {len(x)}, fewer. Give points <= "
                f"{len(x)}."
            )
        drawn = random.Random(f"{self.seed} {self.epoch} {index}").getrandbits(63)
        rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(drawn))
        return unit_sphere(x[None, rows[: self.points], :3])[0]

    def set_epoch(self, epoch: int) -> None:
        """Other points of each cloud from here on; before the DataLoader starts its workers."""
        self.epoch = epoch


def shapenet55(
    root: str | Path, *, train: bool = True, points: int = 1024, seed: int = 0
) -> ShapeNet55:
    """ShapeNet-55 to pre-train on: a Dataset of clouds (points, 3) in the unit sphere.

    root    the folder `ShapeNet55-34`, of ShapeNet-55/{train,test}.txt and shapenet_pc/*.npy
    points  drawn from the 8192 of each cloud, then normalised
    seed    with the epoch (`set_epoch`) and the index it decides which: the same in any worker

    Raises FileNotFoundError; when a cloud is read, also ValueError on one that has fewer points
    or is no array.
    Source: Yu et al. 2022 (Point-BERT), as read by Point-MAE.

    >>> shapenet55("nowhere")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    FileNotFoundError: shapenet55('nowhere'): there is no nowhere/ShapeNet-55/train.txt. ...
    """
    rule, folder = f"shapenet55({str(root)!r})", Path(root)
    listed = folder / "ShapeNet-55" / f"{'train' if train else 'test'}.txt"
    files = lines(rule, listed, _SHAPENET_LAYOUT, _SHAPENET)
    return ShapeNet55(folder / "shapenet_pc", files, points, seed)


def load(spec: str, *, train: bool = True, points: int | None = None) -> Clouds:
    """Clouds by a line of text, such as an example's --data: "source/variant:path".

    spec    procedural[/OBJ_ONLY | /OBJ_BG | /PB_T50_RS]   1500 clouds, 600 to test
            scanobjectnn[/variant]:path                    see `scanobjectnn`
            modelnet40:path, modelnet40_h5:path
    points  of a procedural cloud, by default 1024; files have as many as they have

    Raises ValueError on another line, and what the reader raises.

    >>> load("procedural/OBJ_ONLY", train=False).points.shape
    torch.Size([600, 1024, 3])
    """
    source, _, path = spec.partition(":")
    name, _, variant = source.partition("/")
    plain: dict[str, Callable[..., Clouds]] = {
        "modelnet40": modelnet40,
        "modelnet40_h5": modelnet40_h5,
    }
    if name == "procedural" and not path:
        clouds, points = 1500 if train else 600, 1024 if points is None else points
        return procedural(variant or "PB_T50_RS", clouds, points, train=train)
    if name == "scanobjectnn" and path:
        return scanobjectnn(path, variant or "PB_T50_RS", train=train)
    if name in plain and path and not variant:
        return plain[name](path, train=train)
    raise ValueError(
        f"load({spec!r}): a source is procedural, procedural/{DIFFICULTIES[0]}, scanobjectnn:PATH, "
        "scanobjectnn/OBJ_BG:PATH, modelnet40:PATH or modelnet40_h5:PATH. Give one of these, with "
        "the folder of the data for PATH."
    )


def _spheres(clouds: Clouds) -> Clouds:
    return clouds._replace(points=normalized(clouds.points))


def _write_modelnet40(rule: str, folder: Path, ids: list[str], points: int, npz: Path) -> None:
    x = np.empty((len(ids), points, 3), np.float32)
    for i, name in enumerate(ids):
        path = folder / name.rpartition("_")[0] / f"{name}.txt"
        if not path.is_file():
            missing(rule, path, _TEXT_LAYOUT, _MODELNET)
        with parsing(path, "lines of x, y, z and a normal, with commas"):
            rows = np.loadtxt(path, np.float32, delimiter=",", ndmin=2)[None, :, :3]
        cloud = checked(path, rows, [0], ("cloud",)).points
        if cloud.shape[1] < points:
            raise ValueError(
                f"modelnet40(points={points}): {path} has {cloud.shape[1]}, fewer. Give points <= "
                f"{cloud.shape[1]}."
            )
        x[i] = gather(cloud, farthest_points(cloud, points))[0].numpy()
    part = npz.with_suffix(".part.npz")  # a run that is stopped leaves no half of a cache
    np.savez(part, points=x, ids=np.array(ids))
    part.replace(npz)
