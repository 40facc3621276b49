"""Packed files: of quantised weights just the bits, beside their means and deviations.

In the order of the modules, for every quantised weight: its codes, lowest bits first, 8 / bits of
them a byte; its mean and its standard deviation. Then what was unfrozen, the head: weight, bias.
All numbers are float32, little-endian. The file of Jie et al. 2023 (Bi-AdaptFormer), Table 1.
"""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .._files import check_folder, write_whole
from ..engine.conditions import UNCUT, check_state
from ..engine.operation import Operation, operations
from ..errors import FileError, OperationError
from ..parts.binary import QuantisedLinear
from .checkpoint import buffers, state_dict
from .reading import BASE, PARTS

Model = TypeVar("Model", bound=nn.Module)


class _Contents(NamedTuple):
    """What a model has to say in a packed file."""

    quantised: list[QuantisedLinear]
    base: list[Tensor]

    def size(self) -> int:
        """Bytes."""
        codes = sum(_size(layer) + 8 for layer in self.quantised)
        return codes + 4 * sum(tensor.numel() for tensor in self.base)


def save(model: nn.Module, path: str | os.PathLike[str], *, name: str = "default") -> Path:
    """Write the bits of an operated model's quantised weights, and its head, to one small file.

    Weights as they are trained are not in it (`surgery.save` keeps these), and rules neither. The
    file appears whole or not at all. Raises OperationError where anything else was added or
    trained than quantised weights and parameters of the base; FileError, OSError.

    >>> from surgery import apply, at, parallel
    >>> from surgery.parts.binary import binary_adapter
    >>> import tempfile
    >>> model = apply(nn.Sequential(nn.Linear(8, 8)), at("0", parallel(binary_adapter(rank=4))))
    >>> save(model, tempfile.mkdtemp() + "/tuned.bin").stat().st_size  # 2 * (32 / 8 + 8)
    24
    """
    target, contents = Path(path), _contents(model, name, f'packed.save(model, "{path}")')
    codes = [_packed(layer) for layer in contents.quantised]
    for layer, data in zip(contents.quantised, codes, strict=True):
        _restored(layer, data, f'packed.save(model, "{path}")')
    written = [*codes, *map(_floats, contents.base)]
    check_folder(target, f'packed.save("{path}")')
    write_whole(target, lambda half: half.write_bytes(b"".join(written)))
    return target


@torch.no_grad()
def load(model: Model, path: str | os.PathLike[str], *, name: str = "default") -> Model:
    """Fill a model, operated by the rules that the file was made with, from a packed file.

    Every weight becomes one of 2^bits values, which quantise to the file's own: their codes are
    the same, and mean and deviation equal the file's but for rounding (in float32 of both). So a
    quantised weight is off by some units of its last place in float32, and it can be trained on.

    All or nothing: the model is untouched where the file does not fit. Raises FileError,
    OperationError. Returns the model.

    >>> from surgery import apply, at, parallel
    >>> from surgery.parts.binary import binary_adapter
    >>> import tempfile
    >>> def build(seed):
    ...     torch.manual_seed(0)
    ...     rule = at("0", parallel(binary_adapter(rank=4)))
    ...     return apply(nn.Sequential(nn.Linear(8, 8)), rule, seed=seed).eval()
    >>> tuned, x = build(1), torch.ones(1, 8)
    >>> again = load(build(2), save(tuned, tempfile.mkdtemp() + "/tuned.bin"))
    >>> torch.allclose(again(x), tuned(x))
    True
    """
    rule = f'packed.load(model, "{path}")'
    contents = _contents(model, name, rule)
    data = _read(Path(path), contents, rule)
    values: list[tuple[Tensor, Tensor]] = []
    start = 0
    for layer in contents.quantised:
        end = start + _size(layer) + 8
        values.append((layer.weight, _restored(layer, data[start:end], rule)))
        start = end
    for tensor in contents.base:
        end = start + 4 * tensor.numel()
        values.append((tensor, _tensor(data[start:end]).view_as(tensor)))
        start = end
    for tensor, value in values:
        tensor.copy_(value)
    return model


def _contents(model: nn.Module, name: str, rule: str) -> _Contents:
    """The quantised weights and the tensors of the base, in their order. Raises OperationError."""
    check_state(model, rule, UNCUT)
    tensors = state_dict(model, name=name)
    keys = _quantised(next(op for op in operations(model) if op.name == name))
    trained = {key for key in tensors if key.startswith(BASE)} - set(buffers(model))
    others = [key for key in tensors if key not in keys and key not in trained]
    if others or not keys:
        said = f"it holds {others[0]}" if others else "it holds no quantised weight"
        raise OperationError(
            rule,
            f"{said}, and a packed file is for quantised weights and parameters of the base alone.",
            "surgery.save(model, path) keeps everything.",
        )
    base = [tensor for key, tensor in tensors.items() if key in trained]
    return _Contents(list(keys.values()), base)


def _quantised(operation: Operation) -> dict[str, QuantisedLinear]:
    """Its quantised layers, by the keys of their weights."""
    return {
        f"{PARTS}{path}.weight": module
        for path, module in operation.named_modules()
        if isinstance(module, QuantisedLinear)
    }


def _size(layer: QuantisedLinear) -> int:
    """Bytes of its codes."""
    return -(-layer.weight.numel() * layer.bits // 8)


def _packed(layer: QuantisedLinear) -> bytes:
    """Codes, mean, deviation."""
    cells = layer.cells().cpu().flatten().numpy()
    bits = (cells[:, None] >> np.arange(layer.bits, dtype=np.uint8)) & 1
    codes = np.packbits(bits.flatten(), bitorder="little").tobytes()
    return codes + b"".join(map(_floats, layer.statistics()))


def _restored(layer: QuantisedLinear, data: bytes, rule: str) -> Tensor:
    """The weight of a layer. Raises FileError where none has such codes."""
    cells = _cells(layer, data[:-8])
    mean, std = _tensor(data[-8:])
    trial = copy.deepcopy(layer)
    trial.weight = nn.Parameter(layer.restored(cells, mean, std))
    constant = std > 0 and cells.min() == cells.max()
    strange = not (math.isfinite(mean) and math.isfinite(std))
    if constant or strange or not torch.equal(trial.cells().cpu(), cells):
        raise FileError(
            rule,
            f"no weight of {2**layer.bits} values has these codes of {layer!r} with the mean "
            f"{mean:.4g} and the deviation {std:.4g}.",
            "Keep the weights themselves, by surgery.save(model, path); a file that does not load "
            "is damaged, or of another model.",
        )
    return trial.weight.detach()


def _cells(layer: QuantisedLinear, data: bytes) -> Tensor:
    """The codes of a layer: (out, width), uint8."""
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
    digits = bits[: layer.weight.numel() * layer.bits].reshape(-1, layer.bits)
    cells = (digits << np.arange(layer.bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    return torch.from_numpy(cells).view_as(layer.weight)


def _read(path: Path, contents: _Contents, rule: str) -> bytes:
    if not path.is_file():
        raise FileError(rule, "there is no such file.", "Check the path.")
    data, size = path.read_bytes(), contents.size()
    if len(data) != size:
        raise FileError(
            rule,
            f"it has {len(data):,} bytes, and this model's has {size:,}.",
            "Load it into the model it was made for: the same rules, architecture and head.",
        )
    return data


def _floats(tensor: Tensor) -> bytes:
    return tensor.detach().float().cpu().numpy().astype("<f4").tobytes()


def _tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype="<f4").astype(np.float32))
