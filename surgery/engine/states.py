"""What torch's own state_dict and load_state_dict do with an operated model, merged or not."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._preserve import same
from .._shards import mesh_of
from .._text import first_few
from ..errors import OperationError
from ..structure.layers import named_modules
from ..structure.memory import own_form
from ..structure.module_tree import ADDITIONS
from .folding import folded
from .journal import Journal, owner_of
from .obstacles import dotted, tensor_of
from .plain import Overwritten
from .switch import Switch

MERGED = "surgery.merged"  # in the metadata of a state: it was taken from a merged model
TABLES = (
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class StateHooks(NamedTuple):
    """The hooks of a guard on the root, around its state_dict and load_state_dict."""

    model: nn.Module
    guard: StateGuard

    def undo(self) -> None:
        for table in TABLES:
            hooks = vars(self.model)[table]
            for key, hook in [*hooks.items()]:
                if owner_of(getattr(hook, "hook", hook)) is self.guard:
                    del hooks[key]

    def obstacle(self) -> Any:
        return None


class StateGuard(nn.Module):
    """The container of all operations, which sees what states are taken from a model and put in.

    A state with parts and one without tell nothing of whether parts are merged: it is refused
    where it would count an update twice, or lose it.

    lacking  the prefix of ours where a state that is being loaded has nothing of it; "" else
    loading  where a state that is being loaded has tensors, and of which shapes
    is_base  whether it is one of the base
    """

    def join(self, model: nn.Module, host: nn.Module, journal: Journal) -> None:
        """Be asked before the states of a model are taken or loaded; `host` has this as a child."""
        self.host, self.lacking = [host], ""  # in a list, so that it is no child of ours
        self.loading, self.is_base = list[tuple[nn.Module, str, torch.Size]](), False
        journal.entries.append(StateHooks(model, self))
        own: Any = self  # torch types none of these
        own.register_load_state_dict_post_hook(self._after_loading)
        root: Any = model
        root.register_state_dict_pre_hook(self._before_taking)
        root._register_state_dict_hook(self._mark)
        root.register_load_state_dict_pre_hook(self._before_loading)
        root.register_load_state_dict_post_hook(self._after_base)

    @property
    def switches(self) -> list[Any]:
        """Its operations, as they are to be known down here."""
        return [child for child in self.children() if isinstance(child, Switch)]

    @property
    def merged(self) -> bool:
        return any(switch.merged for switch in self.switches)

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles are made of."""
        self._check_enabled("a copy of the model")
        return self.__dict__

    def _check_enabled(self, call: str) -> None:
        if not all(switch.enabled for switch in self.switches):
            raise OperationError(
                call,
                "inside disabled(model) its tensors are those of the base, for a while.",
                "Do it before or after the `with` block.",
            )
        if any(switch.is_mixed for switch in self.switches):
            raise OperationError(
                call,
                "inside mixed(model, ...) its rows are those of several operations, for a while.",
                "Do it before or after the `with` block.",
            )

    def _before_taking(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        self._check_enabled("model.state_dict()")
        for tell in [each.told for each in self.switches if getattr(each, "told", None)][:1]:
            tell(model)
        if not self.merged and _is_saving_pretrained():
            warnings.warn(
                "save_pretrained writes what was added under surgery.* keys, which from_pretrained "
                "drops as unexpected. surgery.save_pretrained(model, folder) writes the base and "
                "what was done to it, and surgery.from_pretrained(folder) brings both back.",
                stacklevel=2,
            )
        lost = [s.name for s in self.switches if s.strength != 1 and getattr(s, "own", None)]
        if lost and not any(module.startswith("surgery.") for module, _ in _callers()):
            warnings.warn(
                "model.state_dict() has what tensors of the base are now, and not what "
                f"{first_few(lost)} made of them, which are not active, or in a mixture: "
                "surgery.save(model, path, name=...) keeps that of each.",
                stacklevel=2,
            )

    def _mark(self, model: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
        if self.merged:
            metadata[MERGED] = True

    def _before_loading(
        self,
        model: nn.Module,
        state: Mapping[str, Any],
        prefix: str,
        metadata: Mapping[str, Any],
        *rest: Any,
    ) -> None:
        """Raise OperationError where a state is not of such a model as this is now."""
        self._check_enabled("model.load_state_dict(...)")
        own, self.loading = f"{_path(model, self.host[0], prefix)}{ADDITIONS}.", []
        parts = [key for key in state if key.startswith(own)]
        if self.merged and parts:
            raise OperationError(
                "model.load_state_dict(...)",
                f"the state has parts ({first_few(parts)}), and those of this "
                f"{type(model).__name__} are merged into its weights.",
                "Call surgery.unmerge(model) first, and load it then.",
            )
        if self.merged:
            self._see_overwritten(_told(model, state, prefix))
        elif not parts and not _says_base(metadata):
            self._check_not_twice(model, _told(model, state, prefix), MERGED in metadata)
        self.is_base = not (self.merged or parts) and self._is_base(state, own.removesuffix("."))
        self.loading = [] if self.merged else _places(model, state, prefix)

    def _is_base(self, state: Mapping[str, Any], own: str) -> bool:
        """Whether a state without parts is one of the base.

        Rules that only unfreeze have no parts: there the marks that torch gives a state tell.
        """
        if any(True for tensors in (self.parameters(), self.buffers()) for _ in tensors):
            return True
        marks = getattr(state, "_metadata", None)
        return marks is not None and own not in marks

    def _after_base(self, model: nn.Module, keys: Any) -> None:
        """The base is what was loaded: so is what was kept of it, to be brought back."""
        loaded, self.loading = self.loading, []
        now = [(tensor_of(module, name), shape) for module, name, shape in loaded]
        ids = {id(t) for t, shape in now if t is not None and t.shape == shape and not t.is_meta}
        for switch in self.switches if ids else ():
            switch.frozen.again(ids)
            if self.is_base:
                switch.journal.keep_again(ids)

    def _check_not_twice(
        self, model: nn.Module, told: dict[tuple[int, str], str], marked: bool
    ) -> None:
        """Of a state without parts, marked as a merged model's or without any mark at all.

        (torch's own states say of what version each module is; that of a base says no more.)
        """
        moved = _moved(model, self.switches, told)
        if moved and marked:
            raise OperationError(
                "model.load_state_dict(...)",
                "the state was taken while parts were merged into its weights, and the parts of "
                f"this {type(model).__name__} would add to them once more ({first_few(moved)}).",
                "Load it into a model without parts (and operate that), or the state of the "
                "unmerged model into this one.",
            )
        if moved:
            warnings.warn(
                "model.load_state_dict(...): the state has no parts, and is taken for one of the "
                f"base; the parts that are here stay ({first_few(moved)}). If it is of a merged "
                "model, they count twice: load it into a model without parts.",
                stacklevel=2,
            )

    def _see_overwritten(self, told: dict[tuple[int, str], str]) -> None:
        """Write down which merged weights get other values now."""
        for switch in self.switches:
            values = switch.merge_journal.values
            places = [(id(value.module), value.name) for value in values]
            names = [told[place] for place in places if place in told]
            if names:
                switch.merge_journal.entries.append(Overwritten(names))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.lacking = prefix if not state_dict else ""
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _after_loading(self, module: nn.Module, keys: Any) -> None:
        """A state without anything of `surgery` is one of the base: what was added stays."""
        if self.lacking:
            keys.missing_keys[:] = [k for k in keys.missing_keys if not k.startswith(self.lacking)]


def _says_base(metadata: Mapping[str, Any]) -> bool:
    """Whether a state came with the marks that torch gives it, and is not a merged model's."""
    return "version" in metadata and MERGED not in metadata


def _callers() -> Iterator[tuple[str, str]]:
    """Module and function of each caller, the nearest first; without torch's and this one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module != __name__ and not module.startswith("torch."):
            yield module, frame.f_code.co_name
        frame = frame.f_back


def _is_saving_pretrained() -> bool:
    """Whether a state is taken to be saved where others read what they know of it alone.

    The `save_pretrained` of transformers, diffusers and `PyTorchModelHubMixin`, which push_to_hub
    calls; the `save_model` of transformers' Trainer and of accelerate. That of safetensors is read
    as a whole.
    """
    saving = [module for module, name in _callers() if name in ("save_pretrained", "save_model")]
    others = [module for module in saving if not module.startswith("safetensors")]
    return bool(others) and not any(module.startswith("surgery.") for module in others)


def _path(model: nn.Module, host: nn.Module, prefix: str) -> str:
    """Where a module below a model is, with a dot behind it."""
    path = next((path for path, module in model.named_modules() if module is host), "")
    return prefix + (f"{path}." if path else "")


def _places(
    model: nn.Module, state: Mapping[str, Any], prefix: str
) -> list[tuple[nn.Module, str, torch.Size]]:
    """Where a state has tensors, and of which shapes."""
    return [
        (module, name, state[key].shape)
        for path, module in named_modules(model)
        for name in (*module._parameters, *module._buffers)
        if isinstance(state.get(key := prefix + dotted(path, name)), Tensor)
    ]


def _told(model: nn.Module, state: Mapping[str, Any], prefix: str) -> dict[tuple[int, str], str]:
    """The keys of a state that have another value than the model, by module and name."""
    told: dict[tuple[int, str], str] = {}
    for path, module in model.named_modules():
        for name in module._parameters:
            key = prefix + (f"{path}.{name}" if path else name)
            new, now = state.get(key), module._parameters[name]
            if isinstance(new, Tensor) and now is not None and not _same(new, now):
                told[id(module), name] = key
    return told


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, where that can be seen."""
    seen = not any(t.is_meta or own_form(t) for t in (a, b))
    return seen and same(a, b)


@torch.no_grad()
def _moved(model: nn.Module, switches: list[Any], told: dict[tuple[int, str], str]) -> list[str]:
    """The sites with parts that would change the weights there, which a state does too."""
    if mesh_of(model.parameters()) is not None:  # one process may ask alone
        return []
    hooked = [hooked for switch in switches for hooked in switch.hooked_sites]
    try:
        folds = [fold for fold in folded(model, hooked) if fold.moves]
    except OperationError:  # these do not merge: the state is not of such parts
        return []
    return [f.path for f in folds if any((id(f.module), name) in told for name in f.tensors)]
