"""The watch: what one forward has shown is not believed for ever.

After each whole forward it is seen which hooked sites did not run. Forwards of a new kind are
looked into: there it is seen too whether a site was skipped, or the model read its weight without
calling it, by a fused kernel, say.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._text import first_few
from ..errors import GraftError, OperationError
from ..structure.path import generalise
from .hooks import HookedSite
from .journal import Hook, Journal, owner_of
from .passes import Key, Pass, Passes
from .reading import USE_OTHER_CHECKPOINTS, Reading, why_idle
from .streams import Streams, is_recomputing
from .summary import Record

KINDS = 1000  # of forwards that are looked into at most: a bound, where every input has other sizes
PATIENCE = 30  # training forwards in which a layer may be dropped at random before its first run


class Watched(Protocol):
    """What the watch must know of an operation."""

    enabled: bool
    merged: bool
    record: Record
    hooked_sites: list[HookedSite]
    journal: Journal
    passes: Passes
    streams: Streams
    seen: set[str]
    read_besides: set[str]
    model: list[nn.Module]

    watcher: Any

    def _surgery_check(self) -> bool: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def compiled_gates(self) -> dict[Key, Tensor]: ...

    def prove(self, why: Callable[[list[HookedSite]], tuple[str, str]]) -> None: ...


class Watch:
    """Hooks on the root, and what they saw.

    resting   whether it looks away: the proof by example looks for itself
    looked    the kinds of forwards that were looked into
    skipped   places that the model is known to skip, by the mode: layers that are dropped at random
    suspects  sites that did not run in a forward that was not looked into
    bypassed  sites that the model went round when it was last looked, and how
    tables    where the parameters of parts are kept
    """

    def __init__(self, operation: Watched) -> None:
        self.operation, self.resting, self.forwards = operation, False, 0  # in vain for some site
        self.looked: set[Hashable] = set()
        self.skipped: set[tuple[str, bool]] = set()
        self.suspects: set[str] = set()
        self.warned: set[str] = set()
        self.bypassed: dict[str, str] = {}
        self.tables: list[dict[str, nn.Parameter | None]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "looked": set(), "tables": []}  # copies are looked into again

    @property
    def model(self) -> nn.Module:
        return self.operation.model[0]

    @property
    def _on(self) -> bool:
        return self.operation.enabled and not self.operation.merged

    # hooks ---------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """A whole forward begins: what is left of an earlier one is forgotten."""
        if not self.operation.enabled:
            return
        if torch.compiler.is_compiling():
            if any(hooked.inserts for hooked in self.operation.hooked_sites):
                self.operation.streams.begin()
            return
        self.operation.passes.begin(self.operation.compiled_gates())
        self.operation.streams.begin()
        self._tell_anew()
        if self.operation.merged or torch._C._get_tracing_state() is not None:
            return
        kept = self.operation.passes.mine()
        if kept.reading is not None:  # of a forward that was interrupted
            kept.reading.end()
        kept.kind, kept.reading = (self._has_memory(), _kind(module, args, kwargs)), None
        known = kept.kind in self.looked or len(self.looked) >= KINDS
        if self.resting:
            return
        if (self.suspects or not known) and self._can_look():
            kept.reading = Reading(self.operation.hooked_sites)
            kept.reading.__enter__()

    def _tell_anew(self) -> None:
        """Forget what compiled code has told."""
        for hooked in self.operation.hooked_sites:
            if hooked.tokens.traced:
                hooked.tokens.traced.clear()

    def _has_memory(self) -> bool:
        """Whether all parts have values here; libraries that offload keep some elsewhere."""
        if not self.tables:
            self.tables = [m._parameters for m in self.operation.modules() if m._parameters]
        return not any(p is not None and p.is_meta for table in self.tables for p in table.values())

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """It is over: did all run?"""
        if not self._on:
            return None
        kept, stream = self.operation.passes.mine(), self.operation.streams.mine()
        for hooked in self.operation.hooked_sites if stream.opened() else ():
            if error := hooked.tokens.left_in(stream):
                raise error
        if torch.compiler.is_compiling():
            self._tell_anew()
            stream.begin()
        if torch.compiler.is_dynamo_compiling():
            self.operation._surgery_check()
            return None
        if torch.compiler.is_compiling():
            return None
        if not (self.resting or is_recomputing()):
            self._judge(kept)
        return self.operation.streams.cleared(output) if stream.inserted else None

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """In any case, also after an error."""
        if torch.compiler.is_compiling():
            return
        kept = self.operation.passes.mine()
        reading, kept.reading = kept.reading, None
        if reading is not None:
            reading.end()
        if kept.whole:
            kept.whole, kept.inputs = False, {}
            stream = self.operation.streams.mine()
            stream.aside, stream.running = None, False

    # what is made of it --------------------------------------------------------------------------

    def _judge(self, kept: Pass) -> None:
        sites, reading = self.operation.hooked_sites, kept.reading
        idle = [hooked for hooked in sites if not hooked.marks <= kept.ran]
        if self.bypassed:
            at_rest = {hooked.path for hooked in idle}
            self.bypassed = {path: how for path, how in self.bypassed.items() if path in at_rest}
        if reading is None and not idle:
            return
        if idle and self._may_be_compiled():
            self.unseen(idle)
        elif reading is not None:
            self._look(idle, reading)
            self.looked.add(kept.kind)
            self.suspects.clear()
        else:
            self._suspect(idle)

    def _look(self, idle: list[HookedSite], reading: Reading) -> None:
        """Tell apart, among idle sites, what is skipped from what is gone round."""
        self.note(reading)
        self._check_there(idle)
        if reading.cut_off and self.model.training and torch.is_grad_enabled():
            cut = [each for each in self.operation.hooked_sites if each.path in reading.cut_off]
            fact = f"can get no gradient: {reading.why_cut_off()}"
            raise self.error(cut, fact, USE_OTHER_CHECKPOINTS)
        read = [hooked for hooked in idle if reading.instead_of(hooked, self.model)]
        fact, remedy = why_idle(read, "In this forward")
        self.bypassed |= {hooked.path: fact for hooked in read}
        self.forwards += any(not hooked.ran for hooked in idle)
        if not all(hooked.ran or self._may_come(hooked, idle) for hooked in idle):
            self.operation.prove(lambda _: (fact, remedy))
        if read:
            raise self.error(read, f"did not run in this forward, as before{fact}.", remedy)
        self.skipped |= {(generalise(hooked.path), self.model.training) for hooked in idle}

    def note(self, reading: Reading) -> None:
        """Keep which weights were read besides calling what they stand at."""
        sites = self.operation.hooked_sites
        self.operation.read_besides |= {s.path for s in sites if reading.besides_its_own(s)}

    def _may_come(self, hooked: HookedSite, idle: list[HookedSite]) -> bool:
        """Whether a site that never ran may be dropped at random: others like it ran."""
        like = generalise(hooked.path)
        others = [each for each in self.operation.hooked_sites if generalise(each.path) == like]
        training, waiting = self.model.training, self.forwards <= PATIENCE
        return training and waiting and any(each not in idle for each in others)

    def _suspect(self, idle: list[HookedSite]) -> None:
        """Sites did not run in a forward that was not looked into."""
        mode = self.model.training
        self.suspects |= {each.path for each in idle if not each.ran}
        idle = [each for each in idle if (generalise(each.path), mode) not in self.skipped]
        if not idle:
            return
        self._check_there(idle)
        self.suspects |= {hooked.path for hooked in idle}
        running = {
            generalise(each.path) for each in self.operation.hooked_sites if each not in idle
        }
        # where some of many like layers did not run, the next forward tells whether one is dropped
        gone = [each for each in idle if generalise(each.path) not in running]
        if new := [each for each in gone if each.path not in self.warned]:
            self.warned |= {hooked.path for hooked in new}
            warnings.warn(
                f"{self._counted(new)} did not run in this forward, though they ran before: what "
                "was added there counts for nothing in it. The next forward is looked into.",
                stacklevel=2,
            )

    def _check_there(self, idle: list[HookedSite]) -> None:
        if lost := self.lost(idle):
            raise self.error(
                lost,
                "stand at modules that are no longer in the model: they were replaced by others "
                "since it was operated.",
                "Put the modules back, or revert, convert the model, and apply the rules then.",
            )

    def unseen(self, idle: list[HookedSite]) -> None:
        """Compiled code may hide that they ran."""
        if new := [each for each in idle if not each.ran and each.path not in self.warned]:
            self.warned |= {hooked.path for hooked in new}
            warnings.warn(
                f"{self._counted(new)} were not seen to run, though compiled code may hide it: "
                "surgery.apply(model, rules, example=x) proves that they do.",
                stacklevel=2,
            )

    # what others ask -----------------------------------------------------------------------------

    def lost(self, sites: list[HookedSite]) -> list[HookedSite]:
        """Those whose modules are no longer in the model."""
        here = {id(module) for module in self.model.modules()}
        return [each for each in sites if not {id(each.entry), id(each.exit)} <= here]

    def error(self, sites: list[HookedSite], fact: str, remedy: str) -> GraftError:
        """That something is wrong with sites, under their rules."""
        rules = rules_of(self.operation.record, sites)
        return GraftError(rules, f"{self._counted(sites)} {fact}", remedy)

    def _counted(self, sites: list[HookedSite]) -> str:
        return counted(sites, len(self.operation.hooked_sites))

    def _can_look(self) -> bool:
        """Compiled code would be compiled anew for it, and a checkpoint stops half way."""
        return not (is_recomputing() or self._may_be_compiled())

    def _may_be_compiled(self) -> bool:
        return is_compiled(self.operation)


def counted(sites: list[HookedSite], of: int) -> str:
    """Some of the sites, in words."""
    return f"{len(sites)} of {of} sites ({first_few(each.path for each in sites)})"


def rules_of(record: Record, sites: list[HookedSite]) -> str:
    """The rules by which parts stand at sites."""
    paths = {hooked.path for hooked in sites}
    rows = [row for row in record["rows"] if row["keys"]]
    return ", ".join(row["rule"] for row in rows if paths.intersection(row["paths"]))


def is_compiled(operation: Watched) -> bool:
    """Whether sites, or modules of the model, may run in compiled code."""
    return any(hooked.compiled.ran for hooked in operation.hooked_sites) or any(
        module._compiled_call_impl is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        or "_orig_mod" in module._modules
        for module in operation.model[0].modules()
    )


def _kind(module: nn.Module, args: Any, kwargs: Any) -> Hashable:
    """What may decide on the way that a forward takes: modes, and sizes by powers of two."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    plain = [tensor for tensor in tensors if not tensor.is_nested]  # which alone have sizes
    sizes = tuple(tuple((int(n) - 1).bit_length() for n in tensor.shape) for tensor in plain)
    device = tensors[0].device.type if tensors else "cpu"
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    names = tuple(sorted(kwargs or ()))
    return module.training, torch.is_grad_enabled(), autocast, names, sizes


def check_watched(operation: Watched, call: str) -> None:
    """Raise OperationError where parts can be seen not to count any more; warn where none ran.

    Before a call that relies on them: a module was replaced, or our hooks are gone from it, or the
    last forwards went round it.
    """
    watch: Watch = operation.watcher
    if lost := watch.lost(operation.hooked_sites):
        fact = "stand at modules that are no longer in the model (replaced since it was operated)"
    elif lost := _unhooked(operation):
        fact = "have lost their hooks"
    elif lost := [each for each in operation.hooked_sites if each.path in watch.bypassed]:
        fact = f"did not run in the last forward{watch.bypassed[lost[0].path]}"
    else:
        _warn_untrained(operation, call)
        return
    raise OperationError(
        call,
        f"{counted(lost, len(operation.hooked_sites))} {fact}: what was added there counts for "
        "nothing.",
        "Convert or change the model first, and apply the rules then.",
    )


def _unhooked(operation: Watched) -> list[HookedSite]:
    """Sites from whose modules our hooks were taken."""
    hooks = [entry for entry in operation.journal.entries if isinstance(entry, Hook)]
    gone = {
        id(entry.owner)
        for entry in hooks
        if not any(
            owner_of(hook) is entry.owner
            for table in (entry.module._forward_pre_hooks, entry.module._forward_hooks)
            for hook in table.values()
        )
    }
    return [hooked for hooked in operation.hooked_sites if id(hooked) in gone]


def _warn_untrained(operation: Watched, call: str) -> None:
    """Gradients came to something, and parts never ran: another method than forward was called."""
    if is_compiled(operation):
        return
    never = [hooked for hooked in operation.hooked_sites if not hooked.ran]
    parts = [action.part for hooked in never for action in hooked.actions]
    trained = [p for p in operation.model[0].parameters() if p.grad is not None]
    if trained and never and all(p.grad is None for part in parts for p in part.parameters()):
        warnings.warn(
            f"{call}: {counted(never, len(operation.hooked_sites))} never ran, though something "
            "else was trained: the model was run by another method than forward, which reads their "
            "weights without calling them, or does not come to them.",
            stacklevel=4,
        )
