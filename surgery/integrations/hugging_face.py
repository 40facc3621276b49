"""Hugging Face's Trainer: checkpoints that hold the adapter alone, and the loss that parts add."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.losses import penalty
from ..state.folders import bring_back, is_here, write
from ..state.hugging_face import save_pretrained


class OperatedTrainer:
    """A mixin of transformers' Trainer, and of those made of it, for models that were operated.

    Checkpoints hold what was added and trained, and what `surgery.load` and, with `base`,
    `surgery.from_pretrained` read: going on and `load_best_model_at_end` take it from there. What
    parts add to the loss (`surgery.penalty`) is added in training, as a mean over the batches that
    are accumulated. `train(resume_from_checkpoint=True)` takes the last checkpoint that is whole (a
    run may be killed while it writes one), and begins where there is none.

    base     whether checkpoints hold the base, too, as it was before: as large as the model is
    balance  of the balance loss, where parts route (as `penalty` takes it)

    >>> import tempfile, transformers
    >>> from surgery import apply, at, lora, qkv
    >>> class Trainer(OperatedTrainer, transformers.Trainer):
    ...     balance = 0.02
    >>> config = transformers.BertConfig(vocab_size=8, hidden_size=12, num_hidden_layers=1)
    >>> model = apply(transformers.BertForSequenceClassification(config), at(qkv, lora(rank=2)))
    >>> settings = transformers.TrainingArguments(tempfile.mkdtemp(), report_to=[], use_cpu=True)
    >>> Trainer(model, settings).save_model()
    >>> sorted(file.name for file in Path(settings.output_dir).iterdir())
    ['surgery.default.safetensors', 'surgery.json', 'training_args.bin']
    """

    base: bool = False
    balance: float = 0.01
    args: Any
    model: Any
    state: Any

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss, and in training what parts add to it."""
        above: Any = super()
        loss, outputs = above.compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = loss + penalty(self.model, balance=self.balance) / self._parts_of_a_step(
                num_items_in_batch
            )
        return (loss, outputs) if return_outputs else loss

    def _parts_of_a_step(self, items: Any) -> int:
        """What the loss is to be divided by here: the Trainer does it, but where it is a sum over
        the items of all batches that are accumulated."""
        own: Any = self
        summed = getattr(own, "loss_is_scaled_for_ga", None)
        if summed is None:
            summed = own.model_accepts_loss_kwargs and items is not None
            summed = summed or own.compute_loss_func is not None
        return int(own.current_gradient_accumulation_steps) if summed else 1

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *rest: Any, **more: Any
    ) -> Any:
        """As the Trainer's own; True: from the last checkpoint that is whole, if there is one."""
        above: Any = super()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole(Path(self.args.output_dir))
        return above.train(resume_from_checkpoint, *rest, **more)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder, own = (
            Path(output_dir or self.args.output_dir),
            getattr(self, "processing_class", None),
        )
        if not self.args.should_save:
            return
        if self.base:
            save_pretrained(self.model, folder)
        else:
            write(self.model, folder)
        if own is not None:
            own.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        above: Any = super()
        if is_here(Path(resume_from_checkpoint)):
            bring_back(self.model if model is None else model, Path(resume_from_checkpoint))
        else:
            above._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        above: Any = super()
        if is_here(Path(self.state.best_model_checkpoint)):
            bring_back(self.model, Path(self.state.best_model_checkpoint))
        else:
            above._load_best_model()


def last_whole(folder: Path) -> str | None:
    """The last checkpoint of a Trainer's folder that was written to its end; None: there is none.

    (The Trainer's state is what it writes last.)
    """
    found = {
        int(path.parent.name.rpartition("-")[2]): path.parent
        for path in folder.glob("checkpoint-[0-9]*/trainer_state.json")
        if _is_json(path)
    }
    return str(found[max(found)]) if found else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True
