"""Which weights a forward reads, and whether by a call of the module that holds them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from .._text import first_few
from ..errors import GraftError
from .fitting import run
from .hooked_weights import HookedWeight
from .hooks import HookedSite
from .tokens import Insertions
from .tracing import CALL

CHECKPOINT = CheckpointFunction.__name__  # of reentrant checkpoints
OURS = {
    run.__code__,
    Insertions.insert.__code__,
    HookedWeight.made.__code__,
}  # run parts, which may read weights


class Reading(TorchFunctionMode):
    """Writes down whose weights are read outside of any call of the modules that they stand at.

    Only functions that give tensors read; one that asks for a shape, or a dtype, does not.

    besides  by the path of a site: ids of its parameters that were read so
    of       the frame of the call that this is to end with, also where that is interrupted
    cut_off  sites inside functions with a backward of their own (reentrant checkpoints, reversible
             layers) none of whose inputs asks for a gradient, and the names of these
    """

    def __init__(self, sites: Iterable[HookedSite], of: FrameType | None = None) -> None:
        super().__init__()
        self.of, self.interrupted = of, False
        self.besides: dict[str, set[int]] = {}
        self.cut_off: dict[str, str] = {}
        self.sites: dict[int, list[HookedSite]] = {}
        for hooked in sites:
            for id_ in {id(p) for p in _weights(hooked)}:
                self.sites.setdefault(id_, []).append(hooked)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copies = func is Tensor.__deepcopy__  # whose memo holds all that was copied so far
        if torch.compiler.is_compiling() or copies or self.is_over():
            return func(*args, **(kwargs or {}))
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(value, Tensor) and value.is_meta for value in leaves):
            _check_memory(leaves, sys._getframe(1))
        result = func(*args, **(kwargs or {}))
        given = self.sites.keys() & set(map(id, leaves))
        if given and any(isinstance(value, Tensor) for value in pytree.tree_leaves(result)):
            self._note(given, sys._getframe(1))
        return result

    def _note(self, given: Iterable[int], frame: FrameType | None) -> None:
        called: set[int] = set()
        cut_off = ""
        while frame is not None:
            if frame.f_code in OURS:
                return
            if frame.f_code is CALL:
                called.add(id(frame.f_locals["self"]))
            elif not torch.is_grad_enabled():
                cut_off = _function_without_gradient(frame) or cut_off
            frame = frame.f_back
        for id_ in given:
            for hooked in self.sites[id_]:
                if cut_off:
                    self.cut_off[hooked.path] = cut_off
                if not called & hooked.callers():
                    self.besides.setdefault(hooked.path, set()).add(id_)

    def besides_its_own(self, hooked: HookedSite) -> bool:
        """Whether a tensor of the module itself, not of its children, was read besides its call."""
        return bool(set(map(id, hooked.own_weights())) & self.besides.get(hooked.path, set()))

    def instead_of(self, hooked: HookedSite, model: nn.Module) -> bool:
        """Whether the model reads what nobody but an idle site holds: it goes round the site."""
        read = self.besides.get(hooked.path, set())
        return bool(read) and bool(read - _held_without(model, hooked))

    @property
    def is_of_checkpoints(self) -> bool:
        """Whether all that is cut off is inside of reentrant checkpoints."""
        return set(self.cut_off.values()) == {CHECKPOINT}

    def why_cut_off(self) -> tuple[str, str]:
        """Of sites to whose parts no gradient can come: the fact, and the remedy."""
        paths = first_few(sorted(self.cut_off))
        if self.is_of_checkpoints:
            return (
                f"{paths} ran inside of reentrant checkpoints (torch.utils.checkpoint), none of "
                "whose inputs asks for a gradient: the layers before are frozen."
            ), (
                "Use checkpointing with use_reentrant=False, or let the inputs ask for a gradient "
                "(Hugging Face: model.enable_input_require_grads())."
            )
        names = first_few(sorted(set(self.cut_off.values())))
        return (
            f"{paths} ran inside of {names}, and nothing that comes into it requires grad, so its "
            "backward never runs: the layers before are frozen."
        ), "Unfreeze the embedding, at(embed, unfreeze), or let its output require grad."

    def is_over(self) -> bool:
        """Whether the call was interrupted that this is to end with: no hook ran behind it."""
        frame: FrameType | None = sys._getframe(1) if self.of is not None else None
        while frame is not None and frame is not self.of:
            frame = frame.f_back
        if self.of is not None and frame is None:
            self.of, self.interrupted = None, True
            self.sites.clear()
        return self.interrupted

    def __exit__(self, *error: object) -> None:
        self.end()  # torch would leave the last mode, which an interrupted call may have left here

    def end(self) -> None:
        """Leave the mode, wherever in torch's stack of them it is."""
        above: list[Any] = []
        while self in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            mode = torch._C._pop_torch_function_stack()
            if mode is self:
                break
            above.append(mode)
        for mode in reversed(above):
            torch._C._push_on_torch_function_stack(mode)
        self.of = None  # the last: an interrupt before it leaves what ends with its frame


def end_interrupted() -> None:
    """Leave the modes of calls that were interrupted in this thread."""
    if torch._C._len_torch_function_stack():
        for mode in _get_current_function_mode_stack():  # type: ignore[no-untyped-call]
            if isinstance(mode, Reading) and mode.is_over():
                mode.end()


def hinders(model: nn.Module) -> bool:
    """Whether a forward that is looked into may answer otherwise than one that is not.

    torch takes no fused path through nn.MultiheadAttention (nor through nn.TransformerEncoder,
    which leaves padding out there) while a mode looks.
    """
    if not torch.backends.mha.get_fastpath_enabled():
        return False
    found = (m for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    return any(
        m.batch_first
        and m.num_heads % 2 == 0
        and not m.training
        and not (torch.is_grad_enabled() and any(p.requires_grad for p in m.parameters()))
        for m in found
    )


def why_idle(read: list[HookedSite], here: str) -> tuple[str, str]:
    """The rest of the fact, and the remedy, for sites that did not run; some whose weight was read.

    here  "With this example", "In this forward"
    """
    if not read:
        return "", (
            f"{here} the model does not come to them. Give an example that does, or a "
            "narrower place: & ~where(...). Where layers are dropped at random, "
            "apply(..., example=x) proves it without; what need not run is optional=True."
        )
    paths = [hooked.path for hooked in read]
    holders = dict.fromkeys(path.rpartition("(" if "(" in path else ".")[0] for path in paths)
    called = " or ".join(f'at("{holder.rstrip(".")}", ...)' for holder in list(holders)[:2])
    how = "without calling it" if len(paths) == 1 else "without calling them"
    return f": the model reads the weight of {first_few(paths)} {how}", (
        "Give apply(..., example=inputs): a forward shows that, and qkv and proj are the weights "
        f"then (linear parts). Or put the rule on a module that is called, such as {called}. "
        "unfreeze works there. "
        "(checkpoint(layer.forward, x) goes round a layer's hooks: give it the layer itself.)"
    )


def _check_memory(leaves: list[Any], frame: FrameType | None) -> None:
    """Raise GraftError where a part reads a tensor without memory beside one that has values.

    torch takes whatever lies there. (A library that keeps weights elsewhere, accelerate, fetches
    those of modules that are called; ARC's projection is read by many, and called by none.)
    """
    if all(value.is_meta for value in leaves if isinstance(value, Tensor) and value.dim()):
        return
    while frame is not None:
        if frame.f_code in OURS:
            own = frame.f_locals
            part = own["part"] if frame.f_code is run.__code__ else own["action"].part
            path = own["path"] if frame.f_code is run.__code__ else own["self"].path
            raise GraftError(
                f"{type(part).__name__} at {path or 'the model'}",
                "it reads a tensor on the meta device, without values, and its input has values.",
                "Give the model memory first; where it is offloaded, run it without, or use parts "
                "that read no tensors but their own (lora, adapter).",
            )
        frame = frame.f_back


def _function_without_gradient(frame: FrameType) -> str:
    """The name of the autograd.Function of a frame, if none of its inputs asks for a gradient."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if not isinstance(first, BackwardCFunction) or any(first.needs_input_grad):
        return ""
    return type(first).__name__.removesuffix("Backward")


def _weights(hooked: HookedSite) -> list[nn.Parameter]:
    whole = [] if isinstance(hooked, HookedWeight) else [hooked.entry, hooked.exit]
    return [*hooked.own_weights(), *(p for module in whole for p in module.parameters())]


def _held_without(model: nn.Module, hooked: HookedSite) -> set[int]:
    """Ids of the parameters that the model holds elsewhere than in a site too: tied ones."""
    ends, todo, seen = {id(hooked.entry), id(hooked.exit)}, [model], set[int]()
    held: set[int] = set()
    while todo:
        module = todo.pop()
        if id(module) in ends or id(module) in seen:
            continue
        seen.add(id(module))
        held |= {id(p) for p in module._parameters.values() if p is not None}
        todo += [child for child in module._modules.values() if child is not None]
    return held
