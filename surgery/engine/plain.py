"""A merged model is plain: hooks, replaced forwards and `surgery` are taken out, and put back.

What was written down when they were put there tells where they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from .._shards import is_distributed
from .._text import first_few
from ..errors import OperationError
from ..structure.memory import own_form
from ..structure.module_tree import ADDITIONS
from .journal import Hook, Journal, Key, Numbers, Value, owner_of
from .obstacles import tensor_of

HOOKS = (
    ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)


class Taken(NamedTuple):
    """Keys taken out of a dict that a module keeps, "" for its attributes, and their order."""

    module: nn.Module
    table: str
    gone: dict[Any, Any]
    order: tuple[Any, ...]

    @property
    def entries(self) -> dict[Any, Any]:
        entries: dict[Any, Any] = vars(self.module)[self.table] if self.table else vars(self.module)
        return entries

    def undo(self) -> None:
        """Put them back where they were; what others put there since comes after them."""
        for key, value in self.gone.items():
            self.entries[key] = value
        known = [key for key in self.order if key in self.entries]
        wanted = [*known, *(key for key in self.entries if key not in self.order)]
        for key in wanted if wanted != list(self.entries) else ():
            self.entries[key] = self.entries.pop(key)

    def obstacle(self) -> Any:
        return None

    def changed(self) -> str:
        """What others have put in their place."""
        others = [k for k, v in self.gone.items() if self.entries.get(k, v) is not v]
        what = f"{self.table} {others[0]}".strip() if others else ""
        return f"{what} of {type(self.module).__name__} is another's since" if others else ""


class Overwritten(NamedTuple):
    """Other weights were loaded into a merged model: what was kept is of another base."""

    names: list[str]

    def undo(self) -> None:
        """Nothing."""

    def obstacle(self) -> Any:
        return None

    def changed(self) -> str:
        return f"{first_few(self.names)} have other values, loaded since"


class Kept(NamedTuple):
    """A tensor of a module that parts were merged into: where it was."""

    module: nn.Module
    name: str
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Kept:
        """As it is now."""
        tensor: Any = tensor_of(module, name)
        return cls(module, name, tensor.device, tensor.dtype)


class Followed(NamedTuple):
    """Where a weight was and in which mode the model, while parts were out of it."""

    additions: nn.Module
    model: nn.Module
    weights: tuple[Kept, ...]
    training: bool

    def undo(self) -> None:
        """Let the parts follow where the model has been moved, cast or set to since."""
        for module, name, device, dtype in self.weights:
            weight = tensor_of(module, name)
            if weight is None:
                continue
            if weight.device != device:
                self.additions.to(weight.device)
            if weight.dtype != dtype:
                self.additions.to(weight.dtype)
        if self.model.training is not self.training:
            self.additions.train(self.model.training)

    def obstacle(self) -> Any:
        return None

    def changed(self) -> str:
        """Which of the merged modules, or weights, is another now."""
        here = {id(module) for module in self.model.modules()}
        for module, name, _, _ in self.weights:
            weight, kind = tensor_of(module, name), type(module).__name__
            if id(module) not in here:
                return f"a {kind} was replaced by another module since"
            if weight is None or (own_form(weight) and not is_distributed(weight)):
                now = "gone" if weight is None else f"a {own_form(weight)}"
                return f"{name} of a {kind} is {now} since"
        return ""


def check_kept(journals: Iterable[Journal], call: str) -> None:
    """Raise OperationError where what a merge kept is not of the model as it is now."""
    entries = [entry for journal in journals for entry in journal.entries]
    for entry in entries:
        fact = entry.changed() if isinstance(entry, (Taken, Overwritten, Followed)) else ""
        if fact:
            raise OperationError(
                call,
                f"the model is not as it was merged: {fact}.",
                "Put back what was there; or keep what is there now, and let go of the rest for "
                "good: surgery.merge(model, keep=False).",
            )


def make_plain(model: nn.Module, additions: nn.Module, done: list[Journal], to: Journal) -> None:
    """Take off what some journals tell of; `to` writes down how it comes back."""
    entries = [entry for journal in done for entry in journal.entries]
    _take_hooks([entry for entry in entries if isinstance(entry, Hook)], to)
    for key in (entry for entry in entries if isinstance(entry, Key) and entry.key == "forward"):
        if vars(key.module).get("forward") == key.new:
            _take(key.module, "", ["forward"], to)
    loaded = "_load_state_dict_post_hooks"  # has nothing to look after then
    hooks = vars(model)[loaded]
    _take(model, loaded, [key for key, hook in hooks.items() if owner_of(hook) is additions], to)
    if ADDITIONS not in vars(model):
        to.set(model, ADDITIONS, additions)
    for module in [*model.modules()]:
        if module._modules.get(ADDITIONS) is additions:
            _take(module, "_modules", [ADDITIONS], to)


def _take_hooks(entries: list[Hook], to: Journal) -> None:
    ours = {id(hook.owner) for hook in entries}
    for module in {id(hook.module): hook.module for hook in entries}.values():
        for tables in HOOKS:
            hooks = vars(module)[tables[0]]
            keys = [key for key, hook in hooks.items() if id(owner_of(hook) or hook) in ours]
            for table in tables:
                _take(module, table, keys, to)


def _take(module: nn.Module, table: str, keys: list[Any], to: Journal) -> None:
    entries = vars(module)[table] if table else vars(module)
    gone = {key: entries[key] for key in keys if key in entries}
    if gone:
        to.entries.append(Taken(module, table, gone, tuple(entries)))
        for key in gone:
            del entries[key]


def let_go(journal: Journal) -> None:
    """Undo all but values and modes: what was trained and merged stays.

    So do forwards: those of parts are gone, and one from before them would not be merged.
    """
    for entry in reversed(journal.entries):
        values = isinstance(entry, (Value, Numbers, Overwritten, Followed))
        forward = isinstance(entry, Taken) and not entry.table
        kept = isinstance(entry, Key) and entry.key in ("training", "forward")
        if not (values or forward or kept):
            entry.undo()
    journal.entries.clear()
