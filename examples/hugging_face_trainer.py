"""Claim: transformers' Trainer trains an operated model, and goes on where it was killed.

Checkpoints hold the adapter alone. Run it, kill it (-9) whenever you like, run it again: at the end
the weights are those of a run that nobody killed, to the bit. Tiny, seconds, no download.

    python examples/hugging_face_trainer.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import surgery
from surgery import at, ffn, head, lora, moa, parallel, qkv, shared, unfreeze
from surgery.integrations.hugging_face import OperatedTrainer

RULES = [
    at(qkv, lora(rank=2, dropout=0.1)),
    at(ffn, parallel(shared(moa(heads=2, rank=4)))),
    at(head, unfreeze),
]


class Trainer(OperatedTrainer, transformers.Trainer):
    balance = 0.02


def build() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        vocab_size=32, max_position_embeddings=16,
    )  # fmt: skip
    return surgery.apply(transformers.LlamaForCausalLM(config), RULES)


def data(rows: int) -> list[dict[str, torch.Tensor]]:
    words = torch.randint(0, 8, (rows, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in words]


def train(folder: Path, **more: Any) -> nn.Module:
    """A model, trained; what is in the folder of a run that was killed is gone on from."""
    settings: dict[str, Any] = {
        "max_steps": 8, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps",
        "load_best_model_at_end": True, "save_total_limit": 2, "learning_rate": 1e-2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": True, "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **more})
    trainer = Trainer(build(), arguments, train_dataset=data(24), eval_dataset=data(8))
    trainer.train(resume_from_checkpoint=True)
    return trainer.model


if __name__ == "__main__":
    print(surgery.save(train(Path(sys.argv[1])), Path(sys.argv[1]) / "tuned.safetensors"))
