"""One application of rules to a model: what was added, what was changed, what ran.

All that is added is `model.surgery`, one child an operation. What else it changes goes
through its journal; undoing it, after a fault or on request, is one and the same walk back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import GraftError, OperationError
from ..parts.room import is_used_alike, room_of
from ..structure.layers import named_modules
from ..structure.module_tree import ADDITIONS, Site
from ..structure.stretches import Stretch
from ..structure.weights import ParameterSite
from .frozen import Frozen
from .hooked_weights import HookedWeight
from .hooks import HookedSite
from .journal import Journal
from .passes import Key
from .registration import register, register_between
from .routed import routes
from .start import MissingStart
from .states import StateGuard
from .summary import Record
from .switch import Balance, Switch
from .tokens import Action
from .tracing import while_traced
from .watch import Watch, counted, rules_of

Why: TypeAlias = Callable[[list[HookedSite]], tuple[str, str]]


class Additions(StateGuard):
    """What was added to a model, one child an operation. Calling it changes nothing."""

    _is_surgery_additions = True

    def forward(self, x: Any) -> Any:
        return x

    @property
    def operations(self) -> list[Operation]:
        """Its operations, oldest first."""
        return [child for child in self.children() if isinstance(child, Operation)]


class KnownModule(NamedTuple):
    """A module of the base when rules were applied: its path, and the names of its tensors."""

    path: str
    module: nn.Module
    names: frozenset[str]


class Own(NamedTuple):
    """What is trained of the base in mixed batches, a parameter for each operation; and as it was
    when that was last told."""

    parameter: nn.Parameter
    seen: Tensor

    @classmethod
    def of(cls, value: Tensor) -> Own:
        """A new one of this value."""
        return cls(nn.Parameter(value.detach().clone()), value.detach().clone())


class Operation(Switch):
    """One application of rules to a model: its parts, its hooked sites, and the way back.

    journal        what the model was before each change, and what its use may change until undone
    merge_journal  the same of a merge of all operations up to this one
    read_besides   the sites whose weight the model reads besides calling what they stand at
    known          the modules of the base, as they were then
    adopted        what is trained without a rule, and in the journal all the same
    frozen         what is not trained, to be seen to stay what it is
    claims         the parameters of the base that its rules train: a module, and a name there
    trains         the names of those of its parts that are trained
    own            what it has made of tensors of the base, where others are active since
    own_parameters  what it trains of the base in mixed batches, each a parameter of its own
    norms          the norms with running statistics that its rules train
    rows_proven    of kinds of forwards, where rows were seen to stay rows; of all operations
    """

    def __init__(self, name: str, balance: Balance, record: Record) -> None:
        super().__init__(name, balance)
        self.record = record
        self.hooked_sites: list[HookedSite] = []
        self.journal, self.merge_journal = Journal(), Journal()
        self.model: list[nn.Module] = []  # in a list, so that it is no child of ours
        self.read_besides: set[str] = set()
        self.watcher, self.traced_anew = Watch(self), False
        self.known: list[KnownModule] = []
        self.adopted: list[tuple[nn.Module, str]] = []
        self.frozen = Frozen()
        self.claims: list[tuple[nn.Module, str]] = []
        self.trains: frozenset[str] = frozenset()
        self.own: dict[tuple[nn.Module, str], Tensor] = {}
        self.told: Any = None  # what is called before a state is taken
        self.norms: list[nn.Module] = []
        self.own_parameters: dict[tuple[nn.Module, str], Own] = {}
        self.is_trained = True  # unless train_only names others
        self.rows_proven: dict[Any, dict[nn.Module, bool]] = {}
        self.start = MissingStart(self, self.journal)

    def open(self, model: nn.Module) -> None:
        """Take a place at the root, and remember the modes and buffers of all modules.

        The place is written down first, so that it is given up last: an operation that is not
        wholly undone can still be found.
        """
        for earlier in operations(model):
            self.streams, self.rows_proven = earlier.streams, earlier.rows_proven
        self.model.append(model)
        additions = additions_of(model)
        theirs = {*additions.modules()} if additions else set()  # which are not ours to bring back
        modules = [module for module in model.modules() if module not in theirs]
        if additions is None:
            additions, host = Additions(), _host(model)
            if host is not model:
                self.journal.set(model, ADDITIONS, additions)
            self.journal.set(host, ADDITIONS, additions, table="_modules")
            additions.join(model, host, self.journal)
        self.journal.set(additions, self.name, self, table="_modules")
        for module in modules:
            self.journal.keep(module, "training")
            for name, tensor in module._buffers.items():
                if tensor is not None:
                    self.journal.keep_value(module, name)
        for path, module in named_modules(model):
            tensors = (*module._parameters.items(), *module._buffers.items())
            self.known.append(KnownModule(path, module, frozenset(name for name, _ in tensors)))

    def add_parts(self, parts: dict[str, nn.Module]) -> None:
        """Give each part its place in the operation, under the first of its keys."""
        added: set[int] = set()
        for key, part in parts.items():
            if id(part) not in added:
                self.add_module(key, part)
                added.add(id(part))
        self.trains = frozenset(name for name, p in self.named_parameters() if p.requires_grad)
        self.start = MissingStart(self, self.journal)

    def train_only(self, modules: list[nn.Module], chosen: set[int], own: set[int]) -> None:
        """Let just these parameters (by id) of the base be trained, each with a copy kept.

        own  those of them that its rules name
        """
        for module in modules:
            self.claims += [
                (module, name) for name, p in module._parameters.items() if id(p) in own
            ]
            for name, tensor in module._parameters.items():
                if tensor is None:
                    continue
                wanted = id(tensor) in chosen
                if wanted:
                    self.journal.keep_gradient(module, name, tensor)
                    self.journal.keep_value(module, name)
                if tensor.requires_grad != wanted:
                    self.journal.train(module, name, tensor, wanted)

    def join(self, site: Site, actions: list[Action], stretch: Stretch | None = None) -> None:
        """Hook `actions` to `site`; `stretch`: what it is in a forward, where nobody calls it."""
        if isinstance(site, ParameterSite):
            hooked = HookedWeight(self, site, actions)
            self.hooked_sites.append(hooked)
            hooked.join(self.journal)
            return
        self.hooked_sites.append(HookedSite(self, site, actions, stretch))
        register(self.hooked_sites[-1], self.journal)

    def watch(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        """Let the hooked sites be seen to run in a forward, and be given what they can take.

        nn.TransformerEncoder hands nested tensors to its layers where it is given a padding mask
        in eval mode without gradients. (Its fused layers look for hooks, and leave them be.)
        """
        ends = {id(end) for hooked in self.hooked_sites for end in (hooked.entry, hooked.exit)}
        for encoder in modules:
            nests = isinstance(encoder, nn.TransformerEncoder) and encoder.use_nested_tensor
            if nests and any(id(module) in ends for module in encoder.modules()):
                self.journal.set(encoder, "use_nested_tensor", False)
        for _, module in named_modules(model):
            self.frozen.remember(module._parameters.values())
        if self.start.is_watched:
            self.journal.hook(model, self.start.enter, before=True)
        for hooked in self.hooked_sites:
            register_between(hooked, self.journal)
        self.journal.hook(model, self.watcher.enter, before=True, prepend=True, with_kwargs=True)
        self.journal.hook(model, self.watcher.leave)
        self.journal.hook(model, self.watcher.end, always_call=True)

    def prove(self, why: Why, but: Collection[HookedSite] = ()) -> None:
        """Raise GraftError unless all hooked sites ran; `why` adds to the fact and has a remedy.

        but  those that need not
        """
        if idle := [each for each in self.hooked_sites if not each.ran and each not in but]:
            fact, remedy = why(idle)
            text = f"{counted(idle, len(self.hooked_sites))} never ran in a whole forward{fact}."
            raise GraftError(rules_of(self.record, idle), text, remedy)

    @while_traced
    def _surgery_begin(self) -> bool:
        """torch.compile begins to trace a forward."""
        self.traced_anew = True
        for hooked in self.hooked_sites:
            hooked.compiled.now = hooked.compiled_begin.now = False
        return True

    @while_traced
    def _surgery_check(self) -> bool:
        """Say what torch.compile did not trace: other compiled code may hide it."""
        self.watcher.untraced(self.traced_anew)
        self.traced_anew = False
        return True

    def gates(self) -> dict[Key, Tensor]:
        """Those of the last forward in this thread of execution, by site and action."""
        return self.passes.gates(self.compiled_gates())

    def compiled_gates(self) -> dict[Key, Tensor]:
        """Those that compiled code has left."""
        sites = self.hooked_sites
        return {(s.path, i): gates for s in sites for i, gates in s.left.gates().items()}

    def _load_from_state_dict(self, state: Any, prefix: str, told: Any, *rest: Any) -> None:
        assigned = bool(told.get("assign_to_params_buffers"))
        self.start.loaded(state, prefix, assigned)
        errors: list[str] = rest[-1]
        for path, part in self.named_modules():
            scale = state.get(f"{prefix}{path}.scale") if room_of(part) is not None else None
            if scale is not None and not is_used_alike(part, scale):
                errors.append(
                    f"{prefix}{path} is of other ranks there, or of another scale, than its rules "
                    f'say: surgery.swap(model, "{self.name}", file) a file of such rules first.'
                )
        super()._load_from_state_dict(state, prefix, told, *rest)

    @property
    def nbytes(self) -> int:
        """Of all that is kept for it: its parts; of the base what was there, and what it made."""
        before = (value.value for value in self.journal.values)
        kept = (*self.parameters(), *self.buffers(), *self.own.values(), *before)
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in kept}
        return sum(storage.nbytes() for storage in storages.values())

    @property
    def routers(self) -> list[HookedSite]:
        """The hooked sites with a part that routes."""
        ran = {path for path, _ in self.gates()}
        return [g for g in self.hooked_sites if g.path in ran or any(map(routes, g.actions))]

    def __prepare_scriptable__(self) -> Operation:
        """torch.jit.script asks for what it can compile in place of this."""
        if self.merged:
            return self
        raise OperationError(
            "torch.jit.script(model)",
            "parts run by hooks that are Python, and TorchScript cannot compile them.",
            "Use torch.jit.trace or torch.export; or, where the parts merge, surgery.merge first.",
        )

    def undo(self) -> None:
        """Take everything off and bring everything back, however far the work had come.

        What others still hold of it (a wrapper around a forward, a copy of a hook) does nothing
        from then on.
        """
        self.undone = True
        self.merge_journal.undo()
        self.journal.undo()


def additions_of(model: nn.Module) -> Additions | None:
    """What was added to a model; None where nothing was."""
    additions = model._modules.get(ADDITIONS) or model.__dict__.get(ADDITIONS)
    return additions if isinstance(additions, Additions) else None


def operations(model: nn.Module) -> list[Operation]:
    """All operations on a model, oldest first."""
    additions = additions_of(model)
    return additions.operations if additions else []


@contextmanager
def without_parts(model: nn.Module) -> Iterator[None]:
    """While it lasts no part of the model runs: rules are matched against the base."""
    journal = Journal()
    try:
        for operation in operations(model):
            journal.set(operation, "enabled", False)
        yield
    finally:
        journal.undo()


def _host(model: nn.Module) -> nn.Module:
    """The module whose child `surgery` is: the root, unless it calls or lists its children."""
    for module in model.modules():
        if not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict, Additions)):
            return module
    raise OperationError(
        type(model).__name__, "it holds no module that does anything.", "Give a model."
    )


# where DDP and DataParallel, torch.compile and FullyShardedDataParallel keep a model
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module"}


def check_operable(model: nn.Module) -> None:
    """Raise OperationError unless `model` is a module that is in nobody's wrapper."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise OperationError(f"a {kind}", "this is no model.", "Give a torch.nn.Module.")
    if isinstance(model, torch.jit.ScriptModule):
        raise OperationError(kind, "this is TorchScript.", "Operate on the model it was made from.")
    inner = WRAPPERS & set(model._modules)
    if inner and len(model._modules) == 1 and _stands_for_another(model):
        raise OperationError(
            kind,
            "this is a wrapper, and what is done to it would not reach the model inside.",
            f"Operate on .{inner.pop()} first; wrap or compile what comes back.",
        )


def _stands_for_another(wrapper: nn.Module) -> bool:
    """Whether it is a wrapper of torch, or one that asks its child for what it has not itself."""
    asks = type(wrapper).__getattr__ is not nn.Module.__getattr__  # as DeepSpeed's engine does
    return asks or type(wrapper).__module__.startswith("torch.")


def check_model(model: nn.Module, name: str) -> None:
    check_operable(model)
    kind = type(model).__name__
    additions = additions_of(model)
    if additions is None and hasattr(model, ADDITIONS):
        raise OperationError(
            kind, f"it has an attribute {ADDITIONS} of its own.", "Rename that attribute first."
        )
    if not name or "." in name or hasattr(nn.Module, name):
        raise OperationError(f'name="{name}"', "it cannot name an operation.", "Use a plain word.")
    if any(operation.merged for operation in operations(model)):
        raise OperationError(
            kind, "its parts are merged.", "Call surgery.unmerge(model) or surgery.revert(model)."
        )
    earlier = additions._modules.get(name) if additions else None
    if isinstance(earlier, Operation):
        rules = ", ".join(row["rule"] for row in earlier.record["rows"])
        raise OperationError(
            f'name="{name}"',
            f"this {kind} has been operated under that name already, by {rules}.",
            "Call surgery.revert(model) first; or give another name to operate on top of it.",
        )
