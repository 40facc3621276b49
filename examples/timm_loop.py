"""Claim: timm's way to train takes an operated model as any other, and goes on where it was killed.

Its optimiser, schedule, gradient scaler, mean of weights and checkpoints; rates that fall by layers
are of `surgery.groups`. Run it, kill it (-9) whenever you like, run it again: the weights at
the end are those of a run that nobody killed, to the bit. Tiny, seconds, no download.

    python examples/timm_loop.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from timm.models import VisionTransformer, load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import surgery
from surgery import attn, unfreeze

EPOCHS = 4
RULES = [*surgery.methods.adapterx_ffn(), surgery.at(attn, unfreeze)]


def build() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, drop_rate=0.1
    )
    return surgery.apply(model, RULES)


def data(rows: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(rows, 3, 16, 16, generator=draw), torch.randint(0, 5, (rows,), generator=draw)
    )


def train(folder: Path) -> nn.Module:
    """The mean of a model's weights in training; a run that was killed is gone on from."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build()
    mean = ModelEmaV3(model, decay=0.9)
    rates = surgery.groups(model, lr=1e-2, weight_decay=0.05, layer_decay=0.75)
    optimizer = create_optimizer_v2(rates, opt="adamw", lr=1e-2)
    schedule, scaler = CosineLRScheduler(optimizer, EPOCHS), NativeScaler("cpu")
    batches = DataLoader(data(16), batch_size=2, shuffle=True)
    saver = CheckpointSaver(
        model, optimizer, model_ema=mean, amp_scaler=scaler, checkpoint_dir=str(folder),
        max_history=2,
    )  # fmt: skip
    done, last = 0, folder / "last.pth.tar"
    if last.exists():
        done = resume_checkpoint(model, str(last), optimizer, scaler) or 0
        load_checkpoint(mean.module, str(last), use_ema=True)
    for epoch in range(done, EPOCHS):
        torch.manual_seed(epoch)  # of which the order and what is dropped come
        schedule.step(epoch)
        for x, y in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(model(x), y) + surgery.penalty(model, balance=0.02)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=surgery.parameters(model))
            mean.update(model)
        saver.save_checkpoint(epoch)
    return mean.module


if __name__ == "__main__":
    model = train(Path(sys.argv[1]))
    print(surgery.save(model, Path(sys.argv[1]) / "tuned.safetensors"))
