"""Claim: a loop of Accelerate's trains an operated model, and goes on where it was killed.

Checkpoints hold the adapter alone, also of several processes. Run it, kill it (-9) whenever you
like, run it again: the weights at the end are those of a run that nobody killed, to the bit. Tiny,
seconds, no download.

    python examples/accelerate_loop.py FOLDER
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from timm.models import VisionTransformer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import surgery
from surgery.integrations.accelerate import adapters_alone

EPOCHS = 4


def build() -> nn.Module:
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, drop_rate=0.1
    )
    return surgery.apply(model, "adapterx_ffn")


def data(rows: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(rows, 3, 16, 16, generator=draw), torch.randint(0, 5, (rows,), generator=draw)
    )


def train(folder: Path) -> nn.Module:
    """A model, trained; what is in the folder of a run that was killed is gone on from."""
    # without a sampler of a seed, the order that several processes share is kept nowhere
    order = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=order)
    adapters_alone(accelerator)
    set_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(surgery.groups(model, lr=1e-2, weight_decay=0.05))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    model, optimizer, schedule, batches = accelerator.prepare(
        model, optimizer, schedule, DataLoader(data(16), batch_size=2, shuffle=True)
    )
    done = max((int(path.name.split("-")[1]) for path in folder.glob("epoch-*")), default=0)
    if done:
        accelerator.load_state(str(folder / f"epoch-{done}"))
    for epoch in range(done, EPOCHS):
        batches.set_epoch(epoch)
        for x, y in batches:
            with accelerator.accumulate(model):
                plain = accelerator.unwrap_model(model)
                loss = cross_entropy(model(x), y) + surgery.penalty(plain, balance=0.02)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        accelerator.save_state(str(folder / "half"))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            os.replace(folder / "half", folder / f"epoch-{epoch + 1}")  # it is there whole, or not
        accelerator.wait_for_everyone()
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    model = train(Path(sys.argv[1]))
    print(surgery.save(model, Path(sys.argv[1]) / "tuned.safetensors"))
