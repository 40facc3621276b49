"""Lightning: what its checkpoints hold, and going on, with the Trainer and with Fabric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import at, lora, unfreeze
from surgery.integrations.lightning import OperatedModule

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")  # what lightning says of its older ways

RULES = [at("0", lora(rank=2)), at("2", unfreeze)]
X = torch.linspace(-1, 1, 48).view(6, 8)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


class Plain(lightning.LightningModule):
    """Two models, one of them operated, and a parameter of its own."""

    def __init__(self, operate: bool = True) -> None:
        super().__init__()
        self.net, self.other = build(), nn.Sequential(nn.Linear(4, 4))
        if operate:
            surgery.apply(self.net, RULES)
        self.scale = nn.Parameter(torch.ones(4))

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return (self.other(self.net(x)) * self.scale).square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Module(OperatedModule, Plain):
    """As users write it."""


def fit(module: Any, epochs: int, folder: Path, last: Path | None = None) -> Path:
    """Train it to some epoch; a checkpoint of that."""
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(X, batch_size=2), ckpt_path=last)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return folder / f"{epochs}.ckpt"


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return [*one] == [*other] and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", [Module, Plain])
def test_it_goes_on_to_the_bit(kind: Any, tmp_path: Path) -> None:
    """Without the mixin, too: its checkpoints are whole then."""
    whole, half, again = kind(), kind(), kind()
    fit(whole, 4, tmp_path)
    last = fit(half, 2, tmp_path)
    assert not same(whole, half)
    fit(again, 4, tmp_path, last)
    assert same(again, whole)


def test_what_checkpoints_hold(tmp_path: Path) -> None:
    module = Module()
    kept = torch.load(fit(module, 1, tmp_path), weights_only=True)
    assert {*kept["state_dict"]} == {"scale", "other.0.weight", "other.0.bias"}
    assert {*kept["surgery"]["models"]} == {"net"}
    for operate in (True, False):
        again = Module.load_from_checkpoint(
            tmp_path / "1.ckpt", operate=operate, map_location="cpu", weights_only=True
        )
        assert same(again, module)
    assert same(again.net, surgery.load(build(), _file_of(kept, tmp_path)))


def _file_of(kept: Any, folder: Path) -> Path:
    """The file of an operation, as it lies in a checkpoint."""
    path = folder / "surgery.default.safetensors"
    path.write_bytes(kept["surgery"]["models"]["net"][path.name].numpy().tobytes())
    return path


def test_reading_a_checkpoint_draws_nothing(tmp_path: Path) -> None:
    last = fit(Module(), 1, tmp_path)
    torch.manual_seed(3)
    Module.load_from_checkpoint(last, weights_only=True)  # it seeds by itself
    drawn = torch.rand(3)
    torch.manual_seed(3)
    Module()
    assert torch.equal(torch.rand(3), drawn)


def test_checkpoints_that_are_whole_are_read(tmp_path: Path) -> None:
    whole = Plain()
    again = Module.load_from_checkpoint(fit(whole, 1, tmp_path), weights_only=True)
    assert same(again, whole)


@pytest.mark.parametrize("alone", [True, False])
def test_fabric_needs_nothing_of_ours(alone: bool, tmp_path: Path) -> None:
    """Its own filter leaves the base out."""

    def made() -> tuple[Any, Any, Any]:
        model = surgery.apply(build(), RULES)
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        return fabric, *fabric.setup(model, torch.optim.AdamW(surgery.groups(model, lr=0.1)))

    def step(fabric: Any, model: Any, optimizer: Any) -> None:
        fabric.backward(model(X).square().sum())
        optimizer.step()
        optimizer.zero_grad()

    fabric, model, optimizer = run = made()
    step(*run)
    trained = {key for key, p in model.module.named_parameters() if p.requires_grad}
    path, state = tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer}
    chosen = {"model": lambda key, value: key in trained} if alone else None
    fabric.save(path, state, filter=chosen)
    step(*run)
    assert {*torch.load(path)["model"]} == (trained if alone else {*model.module.state_dict()})
    again = made()
    again[0].load(path, {"model": again[1], "optimizer": again[2]}, strict=not alone)
    assert not same(again[1], model)
    step(*again)
    assert same(again[1], model)
