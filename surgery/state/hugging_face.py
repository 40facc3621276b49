"""Folders and repositories of Hugging Face's: the base as they write it, and what was done."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from ..engine.apply import operated
from ..engine.conditions import DISABLED, READING, UNCUT, check_state
from ..engine.operation import Operation
from ..engine.owned import base_values
from ..errors import FileError
from ..structure.module_tree import ADDITIONS
from .folders import bring_back, is_here, write
from .hub import LIST, address, folder_of, library, listed, pull_card, push
from .model_card import write_card
from .reading import UNREADABLE

BUILD = "Build the model, and surgery.load(model, folder, name=...) each operation."


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: bool = True,
    private: bool | None = None,
) -> Path:
    """Write each operation to a file of a folder, with a model card, and beside them the base.

    The base is written by the model's own `save_pretrained`, where it has one, as it was before:
    others may use the folder without what was added. "hf:user/name" (or "hf:user/name@branch") is
    a repository of the Hugging Face Hub, which is made where there is none. A card that is there
    keeps all that is not ours.

    base     False: the operations alone, for a base that others have, too
    private  of a repository that is new; None: as its owner's are

    Returns what `from_pretrained` and `load` take. Raises what `save` raises, and FileError where
    `huggingface_hub` is not installed, or the Hub does not take it.

    >>> from surgery import apply, at, load, lora
    >>> import tempfile
    >>> def build():
    ...     return nn.Sequential(nn.Linear(8, 8))
    >>> folder = save_pretrained(apply(build(), at("0", lora(rank=2))), tempfile.mkdtemp() + "/a")
    >>> sorted(file.name for file in folder.iterdir())
    ['README.md', 'surgery.default.safetensors', 'surgery.json']
    >>> load(build(), folder).surgery.default.get_submodule("0/parallel").A.shape
    torch.Size([1, 2, 8])
    """
    call = f'save_pretrained(model, "{folder}")'
    done, where = operated(model, call), address(folder, call)
    check_state(model, call, UNCUT, READING, DISABLED)
    library(call)
    if where is None:
        _write(model, done, Path(folder), "", base, call)
        return Path(folder)
    if where.file:
        raise FileError(call, "this is a file of a repository.", "Give the repository alone.")
    with TemporaryDirectory() as made:
        pull_card(where, Path(made), call)
        _write(model, done, Path(made), str(folder), base, call)
        push(Path(made), where, private, call)
    return Path(folder)


def _write(
    model: nn.Module, done: list[Operation], folder: Path, source: str, base: bool, call: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    own = getattr(model, "save_pretrained", None) if base else None
    if own is not None:
        with _as_base(model, done):
            own(folder)
    write(model, folder, has_base=own is not None, verify=True)
    write_card(model, done, folder, source, call, whole=own is not None and _is_whole(folder))


@contextmanager
def _as_base(model: nn.Module, done: list[Operation]) -> Iterator[None]:
    """While it lasts, the state of a model is that of its base, whoever asks for it."""
    before = base_values(done)
    values: dict[str, Tensor] = {
        key: before.get(id(tensor), tensor).detach()
        for key, tensor in model.state_dict(keep_vars=True).items()
        if f"{ADDITIONS}." not in key
    }

    def show(module: nn.Module, state: dict[str, Tensor], prefix: str, told: Any) -> None:
        if not prefix:
            state.clear()
            state.update(values)

    root: Any = model  # torch does not type it
    handle = root.register_state_dict_post_hook(show)
    try:
        yield
    finally:
        handle.remove()


def from_pretrained(
    folder: str | os.PathLike[str], *, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """A model of what `save_pretrained` here wrote: base, operations, which are active.

    folder   or "hf:user/name", a repository of the Hugging Face Hub; @revision may follow
    options  to the `from_pretrained` of the class that the folder's config names (transformers):
             dtype, device_map

    No code of the folder runs, and no pickle is read. Raises FileError where the folder is none of
    these, and what `load` raises.

    >>> from_pretrained("nowhere")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    surgery.errors.FileError: from_pretrained("nowhere"): there is no surgery.json...
    """
    call = f'from_pretrained("{folder}")'
    source = folder_of(folder, call)
    if not is_here(source):
        fact = "there is no surgery.json in it, so nothing of surgery's."
        raise FileError(call, fact, "Write it by surgery.save_pretrained(model, folder).")
    listed(source / LIST, call)  # which is told before a model is built
    if not os.path.isfile(source / "config.json"):
        raise FileError(call, "it has no config.json, to name a class of transformers.", BUILD)
    build = _class_of(source, call)
    given = {"trust_remote_code": False, "use_safetensors": True, **(options or {})}
    try:
        model: nn.Module = build.from_pretrained(source, **given)
    except UNREADABLE as error:
        fact = f"{build.__name__} is not built of it ({error!s:.300})."
        raise FileError(call, fact, "Save it again.") from error
    bring_back(model, source, call)
    return model


def _is_whole(folder: Path) -> bool:
    """Whether `from_pretrained` brings back what is in a folder."""
    try:
        return _class_of(folder, "") is not None
    except FileError:
        return False


def _class_of(folder: Path, call: str) -> Any:
    """The class of transformers that a config names: of a model, and nothing else of there."""
    try:
        kind = json.loads((folder / "config.json").read_text())["architectures"][0]
        library = importlib.import_module("transformers")
        build = getattr(library, kind)
        if issubclass(build, library.PreTrainedModel):
            return build
        told = f"{kind:.100} is none"
    except UNREADABLE as error:
        told = f"{error!s:.200}"
    raise FileError(call, f"its config names no class of transformers ({told}).", BUILD)
