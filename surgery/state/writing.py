"""What a file is written from: tensors that are whole, on the process that writes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .._files import check_folder, write_whole
from .._shards import is_distributed, together, told_by_all, whole
from ..errors import FileError

Header = Callable[[Mapping[str, Tensor]], dict[str, str]]  # of the tensors, made whole


def write(
    tensors: Mapping[str, Tensor], header: Header, path: Path, call: str, mesh: Any = None
) -> None:
    """Write tensors to a file; of those in pieces one after the other is gathered, by all.

    Of the processes that give one path the first alone writes, and the others keep nothing. Where
    one fails, all do. Raises FileError, OSError.

    mesh  the processes; None: this one alone
    """
    if mesh is None:
        _write(tensors, header, path, call)
        return
    target = os.path.realpath(path)
    ours = [rank for rank, theirs in told_by_all(mesh, (_rank(), target)) if theirs == target]
    writes, own = ours[0] == _rank(), dict[str, Tensor]()
    for key, tensor in tensors.items():
        full = whole(tensor)
        if writes:
            own[key] = full.cpu() if is_distributed(tensor) else full
    together(mesh, lambda: _write(own, header, path, call) if writes else None, call)


def _rank() -> int:
    from torch import distributed

    return distributed.get_rank()


def _write(tensors: Mapping[str, Tensor], header: Header, path: Path, call: str) -> None:
    check_folder(path, call)
    plain = {key: tensor.contiguous() for key, tensor in tensors.items()}
    metadata: Any = header(plain)
    try:
        write_whole(path, lambda half: save_file(_unshared(plain), half, metadata=metadata))
    except SafetensorError as error:
        fact = f"it could not be written ({error})."
        raise FileError(call, fact, "Look at the disk's room.") from error


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors takes no two tensors in one storage: those that share one are copied."""
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    return {
        key: tensor.clone() if storages.count(tensor.untyped_storage().data_ptr()) > 1 else tensor
        for key, tensor in tensors.items()
    }
