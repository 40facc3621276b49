"""The demo on point clouds: what it trains on, its loop, resuming, its table, the short form."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pointcloud import procedural, rotate, take
from surgery.cli import main
from surgery.demo import points as demo
from surgery.demo.fit import answers, drawn, fit, steps
from surgery.demo.pictures import table
from surgery.demo.recipe import SMALL, Recipe, pretrain, small, tune

RECIPE = small(2)._replace(
    sizes={**SMALL, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_groups": 8},
    batch=10, points=64,
)  # fmt: skip
FEW = procedural("OBJ_ONLY", 30, 96)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TRAIN", 30), ("TEST", 30), ("POINTS", 64), ("PRETRAIN", 1)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "small", lambda epochs: RECIPE._replace(epochs=epochs or 1))


def backbone(folder: Path) -> Path:
    return pretrain(RECIPE, FEW, folder / "backbone.pth")


def test_train_and_test_share_no_cloud_and_seeds_change_the_first_alone() -> None:
    (train, test), (other, same) = demo.drawn("PB_T50_RS", 0), demo.drawn("PB_T50_RS", 1)
    assert (len(train.labels), len(test.labels)) == (demo.TRAIN, demo.TEST)
    assert len(test.labels) >= 1000
    assert torch.equal(test.points, same.points)
    validation = procedural("PB_T50_RS", 600, demo.POINTS, seed=7)  # of `choose_rates`
    parts = (train, other, test, validation)
    clouds = [{c.numpy().tobytes() for c in part.points} for part in parts]
    assert sum(map(len, clouds)) == len(set.union(*clouds))


def test_points_are_drawn_of_the_farthest() -> None:
    x = torch.randn(2, 1300, 3)
    some = drawn(x, 1024, torch.Generator().manual_seed(0))
    assert some.shape == (2, 1024, 3)
    pool = {tuple(p) for p in x[0].tolist()}
    chosen = {tuple(p) for p in some[0].tolist()}
    assert len(chosen) == 1024
    assert chosen < pool


class Odd(nn.Module):
    """A model with every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.bias = nn.Parameter(torch.ones(2))
        self.token = nn.Parameter(torch.ones(1, 1, 2))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_only_matrices_decay() -> None:
    model = Odd()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return 0 * (model.weight.sum() + model.bias.sum() + model.token.sum())

    fit(model, loss, FEW, points=96, epochs=3, batch=10, rate=0.1, decay=0.5)
    assert (model.weight < 1).all()
    for kept in (model.bias, model.token, model.frozen):
        assert (kept == 1).all()


def test_the_rate_warms_up_and_falls_to_its_end() -> None:
    model, moves = Odd(), []

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return model.weight.sum()  # AdamW moves by the rate

    was = 1.0

    def step() -> None:
        nonlocal was
        moves.append(was - model.weight[0, 0].item())
        was = model.weight[0, 0].item()

    fit(model, loss, FEW, points=96, epochs=40, batch=10, rate=1e-2, decay=0.0, step=step)
    assert len(moves) == 40 * steps(FEW, 10)
    assert moves[0] == pytest.approx(1e-6, rel=0.1)
    assert max(moves) == pytest.approx(1e-2, rel=0.05)
    assert moves.index(max(moves)) in (3, 4, 5)
    assert moves[-1] < 1e-4


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "time.monotonic", iter(range(0, 10**6, 100)).__next__
    )  # always time to save
    base, keep = backbone(tmp_path), tmp_path / "run.resume"
    recipe = RECIPE._replace(epochs=4)

    def tuned(step: Any, keep: Path | None) -> dict[str, Tensor]:
        model = tune("daptx", recipe, FEW, base, seed=3, step=step, keep=keep)
        return model.state_dict()

    whole = tuned(lambda: None, None)
    count = iter(range(7))
    with pytest.raises(StopIteration):
        tuned(lambda: next(count), keep)
    assert keep.is_file()
    steps_taken: list[int] = []
    again = tuned(lambda: steps_taken.append(1), keep)
    assert len(steps_taken) == 12, "what was done before counts as done"
    assert not keep.exists()
    assert all(torch.equal(again[key], value) for key, value in whole.items())


def test_a_backbone_is_kept_as_it_is_published(tmp_path: Path) -> None:
    published = torch.load(backbone(tmp_path), weights_only=True)["base_model"]
    state = RECIPE.model(15).state_dict()
    assert set(published) == {key for key in state if "cls_head" not in key}
    masked = pretrain(RECIPE, FEW, tmp_path / "masked.pth", masked=True)
    names = set(torch.load(masked, weights_only=True)["base_model"])
    assert {"mask_token", "MAE_encoder.norm.weight", "increase_dim.0.weight"} <= names
    tune("daptx", RECIPE, FEW, masked, seed=0, step=lambda: None)


def test_the_small_model_learns_what_is_easy(tmp_path: Path) -> None:
    clouds = procedural("OBJ_ONLY", 90, 64)
    easy = take(clouds, clouds.labels < 3)._replace(names=clouds.names[:3])
    recipe = RECIPE._replace(epochs=40, batch=9, augment=lambda x, generator: x)
    base = pretrain(recipe, easy, tmp_path / "base.pth")
    model = tune("full", recipe, easy, base, seed=0, step=lambda: None, rate=3e-3)
    right = answers(model, easy, points=64).argmax(1) == easy.labels
    assert right.float().mean() > 0.8


def targets(difficulty: str = "PB_T50_RS") -> dict[str, demo.Split]:
    return {"hard": lambda seed: demo.drawn(difficulty, seed)}


def test_done_runs_are_read_back_while_nothing_they_depend_on_changes(
    tmp_path: Path, tiny: None
) -> None:
    first, file = backbone(tmp_path), tmp_path / "results.jsonl"

    def lines() -> int:
        written = file.read_text().splitlines() if file.is_file() else []
        return sum(line.endswith("]") for line in written)

    def runs(
        recipe: Recipe = RECIPE, seeds: int = 1, base: Path = first, difficulty: str = "PB_T50_RS"
    ) -> int:
        """How many were done."""
        before, methods = lines(), ["linear_probe", "daptx"]
        results = demo.compare(
            recipe, targets(difficulty), base, methods=methods, seeds=seeds, out=tmp_path
        )
        assert [r.method for r in results] == ["linear_probe"] * seeds + ["daptx"] * seeds
        return lines() - before

    assert runs() == 2
    assert runs() == 0
    assert runs(seeds=2) == 2
    assert runs(recipe=RECIPE._replace(epochs=1)) == 2
    assert runs(recipe=RECIPE._replace(rate=lambda method: 1e-4)) == 2
    assert runs(recipe=RECIPE._replace(augment=rotate)) == 2
    assert runs(recipe=RECIPE._replace(rules=lambda method: method)) == 1, "daptx of another rank"
    assert runs(difficulty="OBJ_BG") == 2
    other = pretrain(RECIPE._replace(epochs=1), FEW, tmp_path / "backbone.pth")
    assert runs(base=other) == 2
    assert runs(base=other) == 0
    file.write_text(file.read_text()[:-20])  # a run that was stopped while it wrote
    assert runs(base=other) == 1


def test_half_a_file_to_go_on_from_is_not_gone_on_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, keep = backbone(tmp_path), tmp_path / "run.resume"
    keep.write_bytes(b"PK half")
    model = tune("linear_probe", RECIPE, FEW, base, seed=0, keep=keep)
    assert "this run starts anew" in capsys.readouterr().out
    again = tune("linear_probe", RECIPE, FEW, base, seed=0)
    assert torch.equal(model(FEW.points[:, :64]), again(FEW.points[:, :64]))


def test_the_last_batch_is_left_out_where_it_is_not_whole(tmp_path: Path) -> None:
    one_more = take(procedural("OBJ_ONLY", 45, 96), slice(0, 31))
    assert (steps(one_more, 10), steps(one_more, 31), steps(one_more, 50)) == (3, 1, 1)
    taken: list[int] = []
    tune("full", RECIPE, one_more, backbone(tmp_path), seed=0, step=lambda: taken.append(1))
    assert len(taken) == 2 * 3


def test_a_checkpoint_that_lacks_the_backbone_is_refused(tmp_path: Path) -> None:
    poor = tmp_path / "poor.pth"
    torch.save({"base_model": {"norm.bias": torch.ones(24)}}, poor)
    with pytest.raises(ValueError, match=r"poor.pth lacks \d+ tensors of the backbone, such as"):
        tune("full", RECIPE, FEW, poor, seed=0)


def test_wrong_data_is_told_before_the_backbone_is_made(tmp_path: Path, tiny: None) -> None:
    with pytest.raises(ValueError, match="hard has clouds of 64 points, 128 are asked for"):
        demo.run(recipe=RECIPE._replace(points=128), targets=targets(), out=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_no_labels_no_training_with_labels(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no labels. Give --pretrain masked"):
        pretrain(RECIPE, torch.utils.data.TensorDataset(FEW.points), tmp_path / "x.pth")


def test_the_table_says_how_daptx_stands_to_full() -> None:
    def result(method: str, seed: int, trained: int, accuracy: float) -> demo.Result:
        return demo.Result("hard", method, seed, trained, 1000, accuracy, 1.0, "")

    runs = [result("full", s, 1000, 0.5 + s / 100) for s in range(3)]
    runs += [result("daptx", s, 40, 0.4 + s / 100) for s in range(3)]
    text = str(table(runs, "title"))
    assert "daptx is 10.0 points behind full fine-tuning, with 4.0 % of what that trains" in text
    line = next(row.split() for row in text.splitlines() if "daptx  " in row)
    assert line == ["hard", "daptx", "40", "4.00", "41.0", "1.0", "1.0"]
    alone = str(table(runs[3:], "title"))
    assert "4.00" in alone, "of all parameters, be full fine-tuning there or not"
    assert "full" not in alone


def test_the_short_form(tmp_path: Path, tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]
    assert main(["demo", "--points", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "reverted: every tensor of the backbone equal to the last bit: True" in printed
    for method in demo.METHODS:
        assert f"PB_T50_RS  {method}" in printed
    for picture in ("clouds.png", "tradeoff.png", "loads.png"):
        assert (tmp_path / picture).stat().st_size > 5000
    rows = printed[printed.index("% of all") :]
    accuracy = next(r for r in rows.splitlines() if "daptx  " in r).split()[4]
    assert f"into a fresh model: {accuracy} %, as when it was trained: True" in printed


def test_wrong_names_are_told_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--points", "--methods", "daptxx", "--out", str(tmp_path / "o")]) == 2
    assert "Nearest: daptx" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_the_example_in_full_size_takes_published_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ScanObjectNN's layout and a pre-training file, both made here; sizes cut to be quick."""
    h5py = pytest.importorskip("h5py")
    folder = tmp_path / "h5_files" / "main_split"
    folder.mkdir(parents=True)
    for split in ("training", "test"):
        clouds = procedural("PB_T50_RS", 30, 64, train=split == "training")
        name = f"{split}_objectdataset_augmentedrot_scale75.h5"
        with h5py.File(folder / name, "w") as file:
            file["data"], file["label"] = clouds.points.numpy(), clouds.labels.numpy()
    example = importlib.import_module("examples.point_mae")
    monkeypatch.setattr(example, "FULL", {**example.FULL, "embed_dim": 24, "depth": 2,
                                          "num_heads": 2, "group_size": 8})  # fmt: skip
    recipe = RECIPE._replace(sizes={**RECIPE.sizes, "group_size": 8})
    base = pretrain(recipe, FEW, tmp_path / "published.pth", masked=True)
    command = (
        f"x --data scanobjectnn:{tmp_path / 'h5_files'} --checkpoint {base} --points 64 --seeds 1 "
        f"--epochs 1 --methods linear_probe daptx --out {tmp_path / 'out'}"
    )
    monkeypatch.setattr(sys, "argv", command.split())
    example.main()
    printed = capsys.readouterr().out
    assert "scanobjectnn  daptx" in printed
    assert "reverted: every tensor of the backbone equal to the last bit: True" in printed
