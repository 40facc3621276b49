"""Readers, each of small files written in the published layout; what is missing or hostile."""

from __future__ import annotations

import builtins
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.timing import peak
from pointcloud import data
from pointcloud.augment import normalize
from pointcloud.clouds import Clouds, batches, take
from pointcloud.shapes import procedural

RANDOM = np.random.default_rng(0)


def write_scanobjectnn(root: Path, variant: str, clouds: Clouds, train: bool) -> Path:
    """Any clouds as ScanObjectNN publishes its own."""
    folder, suffix = data.VARIANTS[variant]
    path = (
        root / "h5_files" / folder / f"{'training' if train else 'test'}_objectdataset{suffix}.h5"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["data"] = clouds.points.numpy()
        file["label"] = clouds.labels.numpy().astype(np.int32)
        if clouds.parts is not None:
            file["mask"] = clouds.parts.numpy().astype(np.int32)
    return path


@pytest.mark.parametrize("variant", list(data.VARIANTS))
@pytest.mark.parametrize("inner", [False, True])
def test_scanobjectnn_reads_what_was_written(tmp_path: Path, variant: str, inner: bool) -> None:
    for train in (True, False):
        written = procedural("OBJ_BG", clouds=30, points=64, train=train)
        write_scanobjectnn(tmp_path, variant, written, train)
    root = tmp_path / "h5_files" if inner else tmp_path
    for train in (True, False):
        written = procedural("OBJ_BG", clouds=30, points=64, train=train)
        read = data.scanobjectnn(root, variant, train=train)
        assert torch.equal(read.points, written.points)
        assert torch.equal(read.labels, written.labels)
        assert read.names == written.names
        assert written.parts is not None
        assert read.parts is not None
        assert torch.equal(read.parts, written.parts)
        assert (read.points.dtype, read.labels.dtype, read.parts.dtype) == (
            torch.float32,
            torch.int64,
            torch.int64,
        )
    round_ = data.scanobjectnn(root, variant, train=False, normalize=True)
    torch.testing.assert_close(round_.points, normalize(written.points))


def test_the_variants_of_scanobjectnn_are_different_files(tmp_path: Path) -> None:
    written = procedural("OBJ_BG", clouds=15, points=8)
    files = {
        write_scanobjectnn(tmp_path, variant, written, train)
        for variant in data.VARIANTS
        for train in (True, False)
    }
    assert len(files) == 12
    assert tmp_path / "h5_files/main_split/training_objectdataset_augmentedrot_scale75.h5" in files
    assert tmp_path / "h5_files/main_split_nobg/test_objectdataset.h5" in files


def test_scanobjectnn_without_a_mask_has_no_parts(tmp_path: Path) -> None:
    written = procedural("OBJ_ONLY", clouds=15, points=8)._replace(parts=None)
    write_scanobjectnn(tmp_path, "OBJ_ONLY", written, True)
    assert data.scanobjectnn(tmp_path, "OBJ_ONLY").parts is None


def test_an_h5_file_that_lacks_a_key_is_told(tmp_path: Path) -> None:
    written = procedural("OBJ_ONLY", clouds=15, points=8)
    with h5py.File(write_scanobjectnn(tmp_path, "OBJ_ONLY", written, True), "a") as file:
        del file["label"]
    with pytest.raises(ValueError, match=r"training_objectdataset\.h5.*it lacks label"):
        data.scanobjectnn(tmp_path, "OBJ_ONLY")


def test_a_missing_h5py_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = procedural("OBJ_ONLY", clouds=15, points=8)
    write_scanobjectnn(tmp_path, "OBJ_ONLY", written, True)
    normal = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "h5py":
            raise ImportError(name)
        return normal(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install h5py"):
        data.scanobjectnn(tmp_path, "OBJ_ONLY")


IDS = ["night_stand_0001", "airplane_0002", "night_stand_0003", "chair_0001"]
CLASSES = ["airplane", "chair", "night_stand"]


def write_modelnet40(root: Path, points: int = 40) -> dict[str, np.ndarray]:
    """The text files; a class name may hold an underscore itself."""
    (root / "modelnet40_shape_names.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "modelnet40_train.txt").write_text("\n".join(IDS) + "\n")
    (root / "modelnet40_test.txt").write_text(IDS[1] + "\n")
    clouds = {}
    for name in IDS:
        clouds[name] = RANDOM.normal(size=(points, 6)).round(6).astype(np.float32)
        folder = root / name.rpartition("_")[0]
        folder.mkdir(exist_ok=True)
        np.savetxt(folder / f"{name}.txt", clouds[name], fmt="%.6f", delimiter=",")
    return clouds


def test_modelnet40_from_text_keeps_a_cache_of_its_own(tmp_path: Path) -> None:
    clouds = write_modelnet40(tmp_path)
    read = data.modelnet40(tmp_path, points=16, normalize=False)
    assert read.names == tuple(CLASSES)
    assert read.labels.tolist() == [2, 0, 2, 1]
    assert read.points.shape == (4, 16, 3)
    for x, name in zip(read.points, IDS, strict=True):
        whole = torch.from_numpy(clouds[name][:, :3])
        assert torch.equal(x[0], whole[0])  # farthest points start at the first
        assert (x[:, None] == whole).all(-1).any(1).all()
        assert len(x.unique(dim=0)) == 16
    for name in IDS:
        (tmp_path / name.rpartition("_")[0] / f"{name}.txt").unlink()
    again = data.modelnet40(tmp_path, points=16)
    torch.testing.assert_close(again.points, normalize(read.points))
    assert data.modelnet40(tmp_path, points=16, normalize=False).points.equal(read.points)
    assert sorted(p.name for p in tmp_path.glob("*fps*")) == ["modelnet40_train_16pts_fps.npz"]
    with pytest.raises(FileNotFoundError, match=r"airplane_0002\.txt"):
        data.modelnet40(tmp_path, train=False, points=16)


def test_modelnet40_caches_elsewhere_where_told(tmp_path: Path) -> None:
    root, other = tmp_path / "data", tmp_path / "cache"
    root.mkdir(), other.mkdir()
    write_modelnet40(root)
    data.modelnet40(root, points=8, cache=other)
    assert [p.name for p in other.iterdir()] == ["modelnet40_train_8pts_fps.npz"]
    assert not list(root.glob("*fps*"))


@pytest.mark.parametrize("protocol", range(6))
def test_modelnet40_reads_the_published_cache(tmp_path: Path, protocol: int) -> None:
    write_modelnet40(tmp_path)
    clouds = [RANDOM.normal(size=(32, 6)).astype(np.float32) for _ in range(5)]
    labels = [np.array([i % 3]).astype(np.int32) for i in range(5)]
    with (tmp_path / "modelnet40_test_32pts_fps.dat").open("wb") as file:
        pickle.dump([clouds, labels], file, protocol)
    read = data.modelnet40(tmp_path, train=False, points=32, normalize=False)
    assert torch.equal(read.points, torch.from_numpy(np.stack(clouds)[..., :3]))
    assert read.labels.tolist() == [0, 1, 2, 0, 1]
    assert (
        data.modelnet40(tmp_path, train=False, points=32)
        .points.norm(dim=-1)
        .amax(1)
        .allclose(torch.ones(5))
    )


def test_a_pickle_of_the_other_numpy_is_read(tmp_path: Path) -> None:
    """numpy 1 wrote numpy.core, numpy 2 writes numpy._core: each reads both."""
    write_modelnet40(tmp_path)
    raw = pickle.dumps([[np.ones((4, 6), np.float32)], [np.array([1], np.int32)]], 0)
    for old, new in ((b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core.")):
        (tmp_path / "modelnet40_test_4pts_fps.dat").write_bytes(raw.replace(old, new))
        assert data.modelnet40(tmp_path, train=False, points=4).labels.tolist() == [1]


class Hostile:
    """What a pickle can do: `touch` a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (f"touch {self.path}",)


class Sly(Hostile):
    """The same by a builtin, without a shell."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, (f"__import__('pathlib').Path({str(self.path)!r}).touch()",)


@pytest.mark.parametrize("kind", [Hostile, Sly])
@pytest.mark.parametrize("protocol", range(6))
def test_a_hostile_pickle_is_refused_and_not_executed(
    tmp_path: Path, kind: type[Hostile], protocol: int
) -> None:
    mark = tmp_path / "mark"
    payload = pickle.dumps([[kind(mark)], [np.zeros(1)]], protocol)
    pickle.loads(payload)
    assert mark.exists()  # it does work
    mark.unlink()
    write_modelnet40(tmp_path)
    (tmp_path / "modelnet40_train_16pts_fps.dat").write_bytes(payload)
    fold = tmp_path / "5way_10shot" / "0.pkl"
    fold.parent.mkdir()
    fold.write_bytes(payload)
    with pytest.raises(ValueError, match=r"nothing is executed; .* refused at .*(system|eval)"):
        data.modelnet40(tmp_path, points=16)
    with pytest.raises(ValueError, match="refused at"):
        data.modelnet_fewshot(tmp_path)
    assert not mark.exists()


def test_objects_within_arrays_are_refused_as_well(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    payload = pickle.dumps([[np.array([Hostile(mark)], dtype=object)], [np.zeros(1)]])
    write_modelnet40(tmp_path)
    (tmp_path / "modelnet40_train_16pts_fps.dat").write_bytes(payload)
    with pytest.raises(ValueError, match="refused at"):
        data.modelnet40(tmp_path, points=16)
    assert not mark.exists()


@pytest.mark.parametrize("raw", [b"", b"not a pickle", pickle.dumps([1])[:-3]])
def test_what_is_no_pickle_is_told(tmp_path: Path, raw: bytes) -> None:
    write_modelnet40(tmp_path)
    (tmp_path / "modelnet40_train_16pts_fps.dat").write_bytes(raw)
    with pytest.raises(ValueError, match=r"modelnet40_train_16pts_fps\.dat"):
        data.modelnet40(tmp_path, points=16)


def test_a_cache_of_clouds_of_two_sizes_is_told(tmp_path: Path) -> None:
    write_modelnet40(tmp_path)
    ragged = [[np.zeros((4, 6)), np.zeros((5, 6))], [0, 1]]
    (tmp_path / "modelnet40_train_16pts_fps.dat").write_bytes(pickle.dumps(ragged))
    with pytest.raises(ValueError, match=r"sizes \[4, 5\]"):
        data.modelnet40(tmp_path, points=16)


def test_modelnet40_of_too_few_points_is_told(tmp_path: Path) -> None:
    write_modelnet40(tmp_path, points=10)
    with pytest.raises(ValueError, match=r"points=16.*has 10, fewer\. Give points <= 10"):
        data.modelnet40(tmp_path, points=16)
    assert not list(tmp_path.glob("*fps*"))  # no half of a cache


N = {"data": RANDOM.normal(size=(6, 16, 3)).astype(np.float32), "label": np.arange(6)}
FAULTS = [
    ({"label": np.arange(4)}, r"labels are int64 \(4,\), no whole number for each of 6 clouds"),
    ({"label": np.zeros((6, 2), int)}, r"labels are int64 \(6, 2\)"),
    ({"label": np.arange(6) + 0.7}, "labels are float64"),
    ({"label": np.arange(6) + 99}, "labels go from 99 to 104, of 15 classes"),
    ({"label": np.arange(6) - 1}, "labels go from -1 to 4"),
    ({"data": np.zeros((6, 16, 6))}, r"clouds are \(6, 16, 6\), not \(n > 0, p > 0, 3\)"),
    ({"data": np.zeros((6, 3, 16))}, r"clouds are \(6, 3, 16\)"),
    ({"data": np.zeros((6, 48))}, r"clouds are \(6, 48\)"),
    ({"data": np.zeros((0, 16, 3)), "label": np.zeros(0, int)}, r"clouds are \(0, 16, 3\)"),
    ({"data": N["data"] * np.nan}, "a point is not finite"),
    ({"data": np.array([b"x"])}, "refused at ValueError"),
    ({"mask": np.zeros((6, 8), int)}, r"the mask is int64 \(6, 8\), no whole numbers \(6, 16\)"),
    ({"mask": np.zeros((6, 16))}, "the mask is float64"),
]


def write_h5(path: Path, **arrays: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return path


@pytest.mark.parametrize(("arrays", "said"), FAULTS)
def test_a_file_that_is_not_as_published_is_told(tmp_path: Path, arrays, said: str) -> None:
    path = write_h5(tmp_path / "main_split_nobg/training_objectdataset.h5", **(N | arrays))
    with pytest.raises(ValueError, match=said) as error:
        data.scanobjectnn(tmp_path, "OBJ_ONLY")
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith("anew.")


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i4", "u8", "i8", ">i4"])
@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_labels_may_be_any_integers(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    labels = np.arange(6).astype(kind).reshape(shape)
    arrays = {"data": N["data"].astype(">f8"), "label": labels, "mask": np.ones((6, 16), bool)}
    write_h5(tmp_path / "main_split_nobg/training_objectdataset.h5", **arrays)
    read = data.scanobjectnn(tmp_path, "OBJ_ONLY")
    assert read.labels.tolist() == list(range(6))
    assert read.points.equal(torch.from_numpy(N["data"]))
    assert read.parts is not None
    assert (read.parts.dtype, read.parts.sum()) == (torch.int64, 96)


def test_what_cannot_be_opened_is_told_by_its_path(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "main_split_nobg/training_objectdataset.h5", **N)
    path.write_bytes(b"no h5")
    with pytest.raises(ValueError, match=r"training_objectdataset\.h5: .*HDF5 .*OSError"):
        data.scanobjectnn(tmp_path, "OBJ_ONLY")
    write_modelnet40(tmp_path)
    data.modelnet40(tmp_path, points=8)
    npz = tmp_path / "modelnet40_train_8pts_fps.npz"
    npz.write_bytes(npz.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"8pts_fps\.npz: .*BadZipFile"):
        data.modelnet40(tmp_path, points=8)
    text = tmp_path / "chair" / "chair_0001.txt"
    text.write_text("no,number\n")
    with pytest.raises(ValueError, match=r"chair_0001\.txt: .*could not convert"):
        data.modelnet40(tmp_path, points=9)
    write_shapenet55(tmp_path)
    clouds = data.shapenet55(tmp_path, points=8)
    (tmp_path / "shapenet_pc" / clouds.files[0]).write_bytes(b"no npy")
    with pytest.raises(ValueError, match=r"a0\.npy: "):
        clouds[0]
    np.save(tmp_path / "shapenet_pc" / clouds.files[1], np.full((64, 3), np.nan))
    with pytest.raises(ValueError, match=r"a1\.npy: a point is not finite"):
        clouds[1]


CLOUD = np.ones((16, 6), np.float32)


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({"a": 1}, "not enough values"),
        ([CLOUD] * 3, "too many values"),
        ([CLOUD, CLOUD], "too many indices"),
        ([[CLOUD[:8]], [0]], r"clouds are \(1, 8, 3\), not \(n > 0, 16, 3\)"),
        ([[CLOUD[:, :2]], [0]], r"clouds are \(1, 16, 2\)"),
        ([[CLOUD], [9]], "labels go from 9 to 9, of 3 classes"),
        ([[CLOUD], [0, 1]], r"labels are int64 \(2,\)"),
    ],
)
def test_a_published_cache_of_another_layout_is_told(tmp_path: Path, contents, said: str) -> None:
    write_modelnet40(tmp_path)
    (tmp_path / "modelnet40_train_16pts_fps.dat").write_bytes(pickle.dumps(contents))
    with pytest.raises(ValueError, match=rf"modelnet40_train_16pts_fps\.dat: .*{said}"):
        data.modelnet40(tmp_path, points=16)


@pytest.mark.parametrize(
    "contents", [[1], {"train": [], "test": []}, {"train": [(CLOUD, 5, 7)], "test": []}]
)
def test_a_fold_of_another_layout_is_told(tmp_path: Path, contents) -> None:
    (tmp_path / "5way_10shot").mkdir()
    (tmp_path / "5way_10shot" / "0.pkl").write_bytes(pickle.dumps(contents))
    with pytest.raises(ValueError, match=r"0\.pkl: (the layout is a pickle of|labels go from 5)"):
        data.modelnet_fewshot(tmp_path)


def test_a_cache_of_another_list_is_told(tmp_path: Path) -> None:
    write_modelnet40(tmp_path)
    data.modelnet40(tmp_path, points=8)
    listed = tmp_path / "modelnet40_train.txt"
    listed.write_text("\n".join(reversed(IDS)))
    with pytest.raises(ValueError, match=r"its 4 ids are not the 4 of the list.*delete it"):
        data.modelnet40(tmp_path, points=8)
    listed.write_text("sofa_0001")
    with pytest.raises(ValueError, match=r"classes \['sofa'\] of modelnet40_train\.txt are not in"):
        data.modelnet40(tmp_path, points=8)


def test_h5_files_of_other_point_numbers_are_told(tmp_path: Path) -> None:
    (tmp_path / "shape_names.txt").write_text("airplane\nbathtub\n")
    for i, n in enumerate((16, 8)):
        arrays = {"data": np.zeros((2, n, 3)), "label": np.zeros((2, 1), np.uint8)}
        write_h5(tmp_path / f"ply_data_train{i}.h5", **arrays)
    with pytest.raises(ValueError, match=r"train1\.h5: clouds are \(2, 8, 3\), not \(n > 0, 16, 3"):
        data.modelnet40_h5(tmp_path)


def test_normalizing_takes_no_second_copy(tmp_path: Path) -> None:
    clouds = RANDOM.normal(size=(2048, 256, 3)).astype(np.float32)
    arrays = {"data": clouds, "label": np.zeros(2048, int)}
    write_h5(tmp_path / "main_split_nobg/training_objectdataset.h5", **arrays)
    grown = peak(lambda: data.scanobjectnn(tmp_path, "OBJ_ONLY", normalize=True))
    assert grown < 2 * clouds.nbytes  # itself, and pieces of 256 of the 2048


def test_modelnet40_h5_reads_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "shape_names.txt").write_text("airplane\nbathtub\n")
    (tmp_path / "train_files.txt").write_text("data/modelnet40_ply_hdf5_2048/ply_data_train1.h5\n")
    for i in (3, 0, 2, 1):
        with h5py.File(tmp_path / f"ply_data_train{i}.h5", "w") as file:
            file["data"] = np.full((2, 16, 3), i, np.float32)
            file["label"] = np.full((2, 1), i % 2, np.uint8)
            file["normal"] = np.zeros((2, 16, 3), np.float32)
    read = data.modelnet40_h5(tmp_path)
    assert read.points[:, 0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert read.labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert read.names == ("airplane", "bathtub")
    with pytest.raises(FileNotFoundError, match=r"ply_data_test0\.h5"):
        data.modelnet40_h5(tmp_path, train=False)


@pytest.mark.parametrize("folder", ["5way_10shot", "5way10shot"])
def test_modelnet_fewshot_reads_a_fold(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    fold = {
        split: [(RANDOM.normal(size=(32, 6)), i % 5, 7) for i in range(n)]
        for split, n in (("train", 50), ("test", 100))
    }
    (tmp_path / folder / "3.pkl").write_bytes(pickle.dumps(fold))
    train, test = data.modelnet_fewshot(tmp_path, 5, 10, 3, normalize=False)
    assert (len(train.labels), len(test.labels), len(train.names)) == (50, 100, 5)
    assert train.labels.bincount().tolist() == [10] * 5
    expected = np.stack([x for x, *_ in fold["test"]])[..., :3].astype(np.float32)
    assert torch.equal(test.points, torch.from_numpy(expected))
    torch.testing.assert_close(
        data.modelnet_fewshot(tmp_path, fold=3)[1].points, normalize(test.points)
    )


def write_shapenet55(root: Path, clouds: int = 6, points: int = 64) -> None:
    (root / "ShapeNet-55").mkdir()
    (root / "shapenet_pc").mkdir()
    names = [f"0269115{i}-a{i}.npy" for i in range(clouds)]
    (root / "ShapeNet-55" / "train.txt").write_text("\n".join(names))
    (root / "ShapeNet-55" / "test.txt").write_text(names[0])
    for i, name in enumerate(names):
        np.save(root / "shapenet_pc" / name, i + RANDOM.normal(size=(points, 3)).astype(np.float32))


def test_shapenet55_reads_one_cloud_at_a_time(tmp_path: Path) -> None:
    write_shapenet55(tmp_path)
    train = data.shapenet55(tmp_path, points=16)
    assert (len(train), len(data.shapenet55(tmp_path, train=False))) == (6, 1)
    (tmp_path / "shapenet_pc" / train.files[5]).unlink()  # not looked at before it is asked for
    assert train[0].shape == (16, 3)
    assert train[0].dtype == torch.float32
    assert abs(float(train[0].norm(dim=-1).max()) - 1) < 1e-6
    with pytest.raises(FileNotFoundError, match=r"02691155-a5\.npy"):
        train[5]
    whole = data.shapenet55(tmp_path, points=64)[1]
    raw = normalize(torch.from_numpy(np.load(tmp_path / "shapenet_pc" / train.files[1]))[None])[0]
    assert not torch.equal(whole, raw)  # in random order
    torch.testing.assert_close(whole[whole[:, 0].argsort()], raw[raw[:, 0].argsort()])


def test_shapenet55_draws_by_seed_epoch_and_index_in_any_worker(tmp_path: Path) -> None:
    write_shapenet55(tmp_path)
    one, two = (data.shapenet55(tmp_path, points=16, seed=3) for _ in range(2))
    torch.manual_seed(5)
    here = torch.stack([one[i] for i in range(6)])
    torch.manual_seed(6)
    loader = DataLoader(two, batch_size=6, num_workers=1)
    assert torch.equal(next(iter(loader)), here)
    one.set_epoch(1)
    assert not torch.equal(one[0], here[0])
    assert not torch.equal(data.shapenet55(tmp_path, points=16, seed=4)[0], here[0])


def test_shapenet55_of_too_few_points_is_told(tmp_path: Path) -> None:
    write_shapenet55(tmp_path)
    with pytest.raises(ValueError, match=r"points=65.*has 64, fewer\. Give points <= 64"):
        data.shapenet55(tmp_path, points=65)[0]


READERS = [
    (data.scanobjectnn, "h5_files|main_split"),
    (data.modelnet40, "modelnet40_shape_names.txt"),
    (data.modelnet40_h5, "shape_names.txt"),
    (data.modelnet_fewshot, "5way_10shot/0.pkl"),
    (data.shapenet55, "ShapeNet-55/train.txt"),
]


@pytest.mark.parametrize(("reader", "file"), READERS)
def test_a_missing_file_is_told_with_layout_and_where_to_ask(tmp_path: Path, reader, file) -> None:
    with pytest.raises(FileNotFoundError) as error:
        reader(tmp_path)
    text = str(error.value)
    assert text.startswith(f"{reader.__name__}('{tmp_path}'")
    assert f"there is no {tmp_path}" in text
    assert any(name in text for name in file.split("|"))
    assert "The layout under `root` is " in text
    assert "there is no downloader: " in text
    assert "http" in text


def test_a_variant_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'PB'.*there are OBJ_ONLY, OBJ_BG, PB_T25"):
        data.scanobjectnn(tmp_path, "PB")


def test_load_by_a_line_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = procedural("OBJ_BG", clouds=15, points=8)
    for variant, clouds in (("OBJ_BG", written), ("PB_T50_RS", take(written, slice(0, 4)))):
        write_scanobjectnn(tmp_path, variant, clouds, False)
    assert len(data.load(f"scanobjectnn/OBJ_BG:{tmp_path}", train=False).labels) == 15
    assert len(data.load(f"scanobjectnn:{tmp_path}", train=False).labels) == 4
    with pytest.raises(FileNotFoundError, match="training_objectdataset"):
        data.load(f"scanobjectnn:{tmp_path}")
    monkeypatch.setattr(data, "procedural", lambda *args, **kwargs: (args, kwargs))
    assert data.load("procedural") == (("PB_T50_RS", 1500, 1024), {"train": True})
    other = data.load("procedural/OBJ_BG", train=False, points=2048)
    assert other == (("OBJ_BG", 600, 2048), {"train": False})
    for reader in ("modelnet40", "modelnet40_h5"):
        monkeypatch.setattr(data, reader, lambda path, train, name=reader: (name, path, train))
        assert data.load(f"{reader}:C:/x", train=False) == (reader, "C:/x", False)


@pytest.mark.parametrize(
    "spec", ["", "scan", "scanobjectnn", "procedural:x", "modelnet40", "modelnet40/a:x", "ab:c"]
)
def test_a_line_that_cannot_be_loaded_is_told(spec: str) -> None:
    with pytest.raises(ValueError, match=r"a source is procedural.*Give one of these") as error:
        data.load(spec)
    assert repr(spec) in str(error.value)


def numbered(n: int) -> Clouds:
    x = torch.arange(n).float()[:, None, None].expand(n, 4, 3)
    return Clouds(x, torch.arange(n), tuple(map(str, range(n))), torch.zeros(n, 4).long())


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_give_each_cloud_once_with_its_label(shuffle: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    epoch = list(batches(numbered(23), 5, shuffle=shuffle, generator=generator))
    assert [len(labels) for _, labels in epoch] == [5, 5, 5, 5, 3]
    labels = torch.cat([y for _, y in epoch])
    assert sorted(labels.tolist()) == list(range(23))
    assert (labels.tolist() == list(range(23))) is not shuffle
    assert torch.equal(torch.cat([x for x, _ in epoch])[:, 2, 1], labels.float())


def test_a_last_batch_that_is_smaller_is_left_out_where_that_is_asked_for() -> None:
    for n, sizes in ((9, [4, 4]), (8, [4, 4]), (3, []), (4, [4])):
        epoch = list(batches(numbered(n), 4, drop_last=True))
        assert [len(labels) for _, labels in epoch] == sizes
        assert [len(points) for points, _ in epoch] == sizes
    generator = torch.Generator().manual_seed(0)
    seen = torch.cat([y for _, y in batches(numbered(9), 4, drop_last=True, generator=generator)])
    assert len(seen.unique()) == 8


def test_batches_follow_the_generator_epoch_after_epoch() -> None:
    def epochs(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.cat([y for _, y in batches(numbered(23), 5, generator=generator)]).tolist()
            for _ in range(2)
        ]

    assert epochs(0) == epochs(0)
    assert epochs(0) != epochs(1)
    assert epochs(0)[0] != epochs(0)[1]


def test_a_batch_of_nothing_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"batches\(size=0\)"):
        batches(numbered(3), 0)


def test_take_keeps_what_belongs_together() -> None:
    kept = take(numbered(9), torch.tensor([7, 2]))
    assert kept.points[:, 0, 0].tolist() == [7, 2]
    assert kept.labels.tolist() == [7, 2]
    assert kept.parts is not None
    assert kept.parts.shape == (2, 4)
    assert take(numbered(9)._replace(parts=None), slice(3)).parts is None
