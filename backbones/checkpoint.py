"""Published checkpoints: their tensors, whatever they are wrapped in, and what does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from os import PathLike
from typing import NamedTuple

from torch import Tensor, nn

from .opened import opened

PREFIXES = ("module.", "base_model.", "MAE_encoder.", "ACT_encoder.", "transformer_k.")
HEAD = "cls_head_finetune."


class Loaded(NamedTuple):
    """What a file did not fill (names of the model), and had beside (names of the file)."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    skipped_head: str = ""

    def __repr__(self) -> str:
        lists = {"missing": self.missing, "unexpected": self.unexpected}
        lines = [f"{len(names)} {which}: {_first_few(names)}" for which, names in lists.items()]
        return "\n".join([*lines, self.skipped_head]).rstrip()


def load_checkpoint(model: nn.Module, path: str | PathLike[str]) -> Loaded:
    """Fill `model` from a published checkpoint, and say what was missing and what was left over.

    The tensors are taken from the file's 'base_model', 'model' or 'state_dict', or are the file
    itself; 'module.', 'MAE_encoder.' (and its like in ACT and Point-BERT) are taken off a name
    until the model has it. The file is one of torch.save, or a .safetensors. A classifier filled
    from a pre-training file misses exactly cls_token, cls_pos and cls_head_finetune.*. A head of
    other shapes is left as it is, whole, and warned of.

    Numbers and arrays of NumPy beside the tensors are read, too. Raises ValueError if the file
    holds more than tensors and plain values (the message says what) or is damaged, if nothing in it
    fits, if two tensors of it that differ have one name in the model, or if shapes other than
    the head's differ; the model is then untouched.

    >>> import pathlib, tempfile, torch
    >>> from backbones.point_mae import PointMAE
    >>> model = PointMAE(15, num_groups=8, group_size=4, embed_dim=24, depth=1, num_heads=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "ckpt.pth")
    ...     torch.save({"base_model": {"module.MAE_encoder.norm.bias": torch.ones(24)}}, file)
    ...     loaded = load_checkpoint(model, file)
    >>> len(loaded.missing), loaded.unexpected, model.norm.bias[0].item()
    (52, (), 1.0)
    """
    rule, targets = f"load_checkpoint({str(path)!r})", model.state_dict()
    state = _tensors(rule, path)
    names = {key: _name_in(targets, key) for key in state}
    tensors = _renamed(rule, state, names, targets)
    if not tensors:
        contents = _first_few(list(state)) or "no named tensors"
        fact = f"The file has {contents}; the model {_first_few(list(targets))}"
        kind = type(model).__name__
        raise ValueError(f"{rule}: nothing in it fits {kind}. {fact}. Give a file of this model.")
    tensors, note = _without_other_head(rule, tensors, targets)
    if note:
        warnings.warn(note, stacklevel=2)
    model.load_state_dict(tensors, strict=False)
    unexpected = [key.removeprefix("module.") for key in state if names[key] not in targets]
    missing = [key for key in targets if key not in tensors]
    return Loaded(tuple(missing), tuple(unexpected), note)


def _renamed(
    rule: str, state: dict[str, Tensor], names: dict[str, str], targets: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a file that the model has, by its names; two of one name must not differ."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if names[key] in targets and not _same(tensors.setdefault(names[key], value), value):
            both = " and ".join(other for other in state if names[other] == names[key])
            fact = f"{both} differ, and both are {names[key]!r} of the model"
            raise ValueError(f"{rule}: {fact}. Leave out the one that is not meant.")
    return tensors


def _without_other_head(
    rule: str, tensors: dict[str, Tensor], targets: dict[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """The tensors, without the head where its shapes differ; and what to say then."""
    differ = [key for key, value in tensors.items() if value.shape != targets[key].shape]
    shapes = "; ".join(
        f"{key} {tuple(tensors[key].shape)} for {tuple(targets[key].shape)}" for key in differ
    )
    if not all(key.startswith(HEAD) for key in differ):
        remedy = "Build the model with the file's embed_dim, depth and group_size."
        raise ValueError(f"{rule}: shapes differ, file for model: {shapes}. {remedy}")
    if not differ:
        return tensors, ""
    remedy = "Train it, or build the model with the file's num_classes, head_dim and reads."
    note = f"{rule}: the head is not loaded, file for model: {shapes}. {remedy}"
    return {key: value for key, value in tensors.items() if not key.startswith(HEAD)}, note


def _tensors(rule: str, path: str | PathLike[str]) -> dict[str, Tensor]:
    """The named tensors of a file, wherever in it the published layouts keep them."""
    contents = opened(rule, path)
    for key in ("base_model", "model", "state_dict"):
        contents = contents.get(key, contents) if isinstance(contents, dict) else {}
    return {key: x for key, x in contents.items() if isinstance(key, str) and isinstance(x, Tensor)}


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and bool((a == b).all()))


def _name_in(targets: dict[str, Tensor], key: str) -> str:
    """The name in the model of a tensor of the file."""
    short = key
    for prefix in PREFIXES:
        if short in targets:
            break
        short = short.removeprefix(prefix)
    return short


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
