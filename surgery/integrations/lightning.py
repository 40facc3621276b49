"""Lightning: checkpoints with what was added and trained, and no base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .. import _rng
from ..engine.operation import operations
from ..state.folders import bring_back, write

KEY = "surgery"


class OperatedModule:
    """A mixin of a LightningModule in which models were operated, or that itself was.

    Checkpoints of the Trainer hold of these what `surgery.save` writes, in place of all their
    weights, and, of one process, the random numbers, so that dropout goes on, too. Going on
    (`fit(ckpt_path=...)`) and `load_from_checkpoint` fill what is operated, or operate it. Whole
    checkpoints are read as before.

    >>> from surgery import apply, at, lora
    >>> class Plain(nn.Module):
    ...     def on_save_checkpoint(self, checkpoint): ...
    >>> class Module(OperatedModule, Plain):  # lightning.LightningModule in its place
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = apply(nn.Sequential(nn.Linear(8, 8)), at("0", lora(rank=2)))
    ...         self.scale = nn.Parameter(torch.ones(()))
    >>> checkpoint = {"state_dict": Module().state_dict()}
    >>> Module().on_save_checkpoint(checkpoint)
    >>> [*checkpoint["state_dict"]], [*checkpoint["surgery"]["models"]]
    (['scale'], ['net'])
    """

    _random: Any = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put what was added and trained in the place of operated models."""
        own: Any = self
        above: Any = super()
        above.on_save_checkpoint(checkpoint)
        models = dict(_operated(own))
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            key: state[key] for key in state if not any(_is_below(key, path) for path in models)
        }
        checkpoint[KEY] = {
            "models": {path: _packed(model) for path, model in models.items()},
            "random": _rng.state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fill operated models, and tell the rest of the loading that all is there."""
        own: Any = self
        above: Any = super()
        above.on_load_checkpoint(checkpoint)
        if kept := checkpoint.get(KEY):
            for path, files in kept["models"].items():
                _unpack(own.get_submodule(path), files)
            now = own.state_dict()
            models = [*kept["models"]]
            here = {key: now[key] for key in now if any(_is_below(key, path) for path in models)}
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **here}
            self._random = kept["random"]

    def on_fit_start(self) -> None:
        """Have the random numbers of the run that goes on, before batches are drawn."""
        own: Any = self
        above: Any = super()
        above.on_fit_start()
        if self._random is not None and own.trainer.world_size == 1:
            _rng.restore(self._random)
        self._random = None


def _operated(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The operated models in a module, by their paths; a list of layers keeps in one of these what
    was done to it, and is itself the model."""
    for path, model in module.named_modules():
        if any(operation.model[0] is model for operation in operations(model)):
            yield path, model


def _is_below(key: str, path: str) -> bool:
    return not path or key.startswith(f"{path}.")


def _packed(model: nn.Module) -> dict[str, Tensor]:
    """The files of a folder, as tensors of bytes, which every checkpoint takes."""
    with TemporaryDirectory() as folder:
        write(model, Path(folder))
        return {
            file.name: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
            for file in Path(folder).iterdir()
        }


def _unpack(model: nn.Module, files: dict[str, Tensor]) -> None:
    with TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / Path(name).name).write_bytes(data.cpu().numpy().tobytes())
        bring_back(model, Path(folder))
