"""Accelerate: `save_state` and `load_state` with what was added and trained, and no base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..engine.operation import operations
from ..state.folders import bring_back, is_here, write


def adapters_alone(accelerator: Any) -> None:
    """From now on `accelerator.save_state` keeps of operated models what `surgery.save` does.

    `load_state` fills them, or operates those that are not yet; folders that are whole it reads as
    before. `surgery.load(model, folder)` reads them, too. Without this all works, and each folder
    holds the base once more.

    >>> import accelerate, tempfile
    >>> from surgery import apply, at, lora
    >>> helper = accelerate.Accelerator(cpu=True)
    >>> model = helper.prepare(apply(nn.Sequential(nn.Linear(8, 8)), at("0", lora(rank=2))))
    >>> adapters_alone(helper)
    >>> folder = Path(helper.save_state(tempfile.mkdtemp()))
    >>> sorted(file.name for file in folder.iterdir() if "surgery" in file.name)
    ['surgery.default.safetensors', 'surgery.json']
    """

    def save(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
        for i, model in reversed([*enumerate(models)] if weights else []):
            plain = accelerator.unwrap_model(model)
            if operations(plain):
                if accelerator.is_main_process:
                    write(plain, _of(folder, i))
                del weights[i]

    def load(models: list[nn.Module], folder: str) -> None:
        for i, model in reversed([*enumerate(models)]):
            if is_here(_of(folder, i)):
                bring_back(accelerator.unwrap_model(model), _of(folder, i))
                del models[i]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _of(folder: str, i: int) -> Path:
    """Where the i-th model is kept: the first in the folder itself."""
    return Path(folder) / f"surgery_{i}" if i else Path(folder)
