"""Claim: Lightning's Trainer trains an operated model, and goes on where it was killed.

Checkpoints hold the adapter alone. Run it, kill it (-9) whenever you like, run it again: at the end
the weights are those of a run that nobody killed, to the bit. Tiny, seconds, no download.

    python examples/lightning_trainer.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import surgery
from surgery.integrations.lightning import OperatedModule


def build() -> nn.Module:
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, drop_rate=0.1
    )
    return surgery.apply(model, "adapterx_ffn")


class Module(OperatedModule, lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = build()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss: Tensor = cross_entropy(self.net(x), y) + surgery.penalty(self.net, balance=0.02)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(surgery.groups(self.net, lr=1e-2, weight_decay=0.05))
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def data(rows: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(rows, 3, 16, 16, generator=draw), torch.randint(0, 5, (rows,), generator=draw)
    )


def train(folder: Path) -> nn.Module:
    """A model, trained; what is in the folder of a run that was killed is gone on from."""
    lightning.seed_everything(0, verbose=False)
    module, batches = Module(), DataLoader(data(16), batch_size=2, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=4, accumulate_grad_batches=2, gradient_clip_val=1.0, accelerator="cpu",
        callbacks=[ModelCheckpoint(folder, save_last=True, enable_version_counter=False)],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    last = folder / "last.ckpt"
    trainer.fit(module, batches, ckpt_path=str(last) if last.exists() else None)
    return module.net


if __name__ == "__main__":
    model = train(Path(sys.argv[1]))
    print(surgery.save(model, Path(sys.argv[1]) / "tuned.safetensors"))
