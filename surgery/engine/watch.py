"""The watch: what one forward has shown is not believed for ever.

After each whole forward it is seen which hooked sites did not run. Forwards of a new kind are
looked into: there it is seen too whether a site was skipped, or the model read its weight without
calling it, by a fused kernel, say.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._text import first_few
from ..errors import GraftError
from ..structure.module_tree import ADDITIONS
from .compiled import hidden, holds_compiled
from .hooked_weights import HookedWeight
from .hooks import HookedSite
from .journal import Journal
from .kinds import kind_of
from .passes import Key, Pass, Passes
from .raised import note_tokens
from .reading import Reading, end_interrupted, hinders, why_idle
from .streams import Streams, is_recomputing
from .summary import Record
from .switch import Switch
from .tracing import call_of

KINDS = 1000  # of forwards that are looked into at most: a bound, where every input has other sizes
PATIENCE = 30  # training forwards in which a layer may be dropped at random before its first run


class Watched(Protocol):
    """What the watch must know of an operation."""

    enabled: bool
    merged: bool
    has_rows: bool
    record: Record
    hooked_sites: list[HookedSite]
    journal: Journal
    passes: Passes
    streams: Streams
    seen: set[str]
    read_besides: set[str]
    model: list[nn.Module]

    watcher: Any

    def _surgery_begin(self) -> bool: ...

    def _surgery_check(self) -> bool: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def is_on(self) -> bool: ...

    def compiled_gates(self) -> dict[Key, Tensor]: ...

    def prove(
        self,
        why: Callable[[list[HookedSite]], tuple[str, str]],
        but: Collection[HookedSite] = (),
    ) -> None: ...


class Watch:
    """Hooks on the root, and what they saw.

    resting   whether it looks away: the proof by example looks for itself
    looked    the kinds of forwards that were looked into
    skipped   places of which the model is known to skip some, by the mode: dropped layers, experts
    gone      places of which it is known to skip all, by the kind of forward
    gone_for  for how many forwards it has skipped all of them
    rested    sites that it was seen to skip
    times     in how many forwards it has skipped some
    suspects  sites that did not run in a forward that was not looked into
    bypassed  sites that the model went round when it was last looked, and how
    tables    where the parameters of parts are kept
    """

    def __init__(self, operation: Watched) -> None:
        self.operation, self.resting, self.forwards = operation, False, 0  # in vain for some site
        self.looked: set[Hashable] = set()
        self.skipped: set[tuple[str, bool]] = set()
        self.gone: set[tuple[str, Hashable]] = set()
        self.gone_for: dict[str, int] = {}
        self.rested: set[str] = set()
        self.times = 0
        self.suspects: set[str] = set()
        self.warned: set[str] = set()
        self.bypassed: dict[str, str] = {}
        self.tables: list[dict[str, nn.Parameter | None]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Copies are looked into again."""
        return {
            **self.__dict__,
            "looked": set(),
            "gone": set(),
            "tables": [],
        }  # copies are looked into again

    @property
    def model(self) -> nn.Module:
        return self.operation.model[0]

    @property
    def _on(self) -> bool:
        return self.operation.is_on() or self.operation.has_rows

    def _is_alone(self) -> bool:
        """Whether a forward is this one's to be looked into: not another's, nor of mixed rows."""
        group = self.operation.hooked_sites[0].group
        if group is not None and group.rows.on:
            return False
        additions = self.model._modules.get(ADDITIONS) or vars(self.model)[ADDITIONS]
        switches = (each for each in additions.children() if isinstance(each, Switch))
        return all(each.passes.mine().reading is None for each in switches)

    # hooks ---------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """A whole forward begins: what is left of an earlier one is forgotten."""
        if not self.operation.enabled:
            return
        if torch.compiler.is_compiling():
            self._begin_traced(module)
            return
        self.operation.passes.begin(self.operation.compiled_gates())
        self.operation.streams.begin(module)
        self._tell_anew()
        if not self._on or torch._C._get_tracing_state() is not None:
            return
        kept = self.operation.passes.mine()
        end_interrupted()
        if kept.reading is not None:  # of a call of this model before
            kept.reading.end()
        kept.kind, kept.reading = (self._has_memory(), kind_of(module, args, kwargs)), None
        kept.blind = False
        known = kept.kind in self.looked or len(self.looked) >= KINDS
        wanted = self.operation.hooked_sites and (self.suspects or not known) and self._is_alone()
        if self.resting or not wanted or is_recomputing():  # a checkpoint stops half way
            return
        kept.blind = hinders(self.model) or holds_compiled(self.model, self.operation.hooked_sites)
        if not kept.blind:
            kept.reading = Reading(self.operation.hooked_sites, call_of(module))
            kept.reading.__enter__()

    def _begin_traced(self, module: nn.Module) -> None:
        """The same where the forward is compiled."""
        if torch.compiler.is_dynamo_compiling():
            self.operation._surgery_begin()
        if any(hooked.inserts for hooked in self.operation.hooked_sites):
            self.operation.streams.begin(module)

    def _tell_anew(self) -> None:
        """Forget what compiled code has told."""
        for hooked in self.operation.hooked_sites:
            if hooked.heard.traced:
                hooked.heard.traced.clear()

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
            stream.begin_anew()
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
            if output is None and not self.resting:
                note_tokens(stream, self.model)
            stream.aside, stream.call = None, None

    # what is made of it --------------------------------------------------------------------------

    def _judge(self, kept: Pass) -> None:
        sites, reading = self.operation.hooked_sites, kept.reading
        idle = [hooked for hooked in sites if not hooked.marks <= kept.ran]
        if self.bypassed:
            at_rest = {hooked.path for hooked in idle}
            self.bypassed = {path: how for path, how in self.bypassed.items() if path in at_rest}
        if not idle:
            self.gone_for.clear()
        if reading is not None:
            self._look(kept, idle, reading)
            self.suspects.clear()
        elif idle:
            self._suspect(kept, idle)
        if reading is not None or kept.blind:
            self.looked.add(kept.kind)

    def _look(self, kept: Pass, idle: list[HookedSite], reading: Reading) -> None:
        """Tell apart, among idle sites, what is skipped from what is gone round."""
        self.note(reading)
        self._check_there(idle)
        idle = self._without_hidden(idle)
        if reading.cut_off and self.model.training and torch.is_grad_enabled():
            cut = [each for each in self.operation.hooked_sites if each.path in reading.cut_off]
            fact, remedy = reading.why_cut_off()
            raise self.error(cut, f"can get no gradient: {fact}", remedy)
        read = [hooked for hooked in idle if reading.instead_of(hooked, self.model)]
        self.bypassed |= {hooked.path: why_idle(read, "")[0] for hooked in read}
        self._demand(idle, read)
        if read:
            fact, remedy = why_idle(read, "In this forward")
            raise self.error(read, f"did not run in this forward, as before{fact}.", remedy)
        self.rested |= {hooked.path for hooked in idle}
        self.skipped |= {(hooked.like, self.model.training) for hooked in idle}
        self.gone |= {(hooked.like, kept.kind) for hooked in self._without_like(idle)}

    def note(self, reading: Reading) -> None:
        """Keep which weights were read besides calling what they stand at."""
        read = [s for s in self.operation.hooked_sites if reading.besides_its_own(s)]
        self.operation.read_besides |= {hooked.path for hooked in read}
        if raw := [s for s in read if isinstance(s, HookedWeight) and not s.alone]:
            raise GraftError(
                rules_of(self.operation.record, raw),
                f"the model reads {first_few([s.path for s in raw])} elsewhere too, and parts "
                "would not be in it there.",
                "Put the rule on a module that is called; or, if it is meant to be another there "
                'alone, write weight("...", tied=False).',
            )

    def _demand(self, idle: list[HookedSite], read: list[HookedSite]) -> None:
        """Raise GraftError where sites never ran that should have by now."""
        never = [hooked for hooked in idle if not hooked.ran]
        self.forwards += bool(never)
        spared = [each for each in self.spared(idle, read) if self._may_come(each)]
        if needed := [each for each in never if each not in spared]:
            others = [each for each in self.operation.hooked_sites if each not in needed]
            self.operation.prove(lambda _: why_idle(read, "In this forward"), others)

    def spared(self, idle: list[HookedSite], read: list[HookedSite]) -> list[HookedSite]:
        """Idle sites that need not run in one forward: others like them ran (experts, heads)."""
        alone = self._without_like(idle)
        return [each for each in idle if each not in read and (each.optional or each not in alone)]

    def _may_come(self, hooked: HookedSite) -> bool:
        """Whether a spared site that never ran may do so later; in training not for ever.

        But where others like it run at times, as experts do, or it need not be of use.
        """
        if hooked.optional or not self.model.training or self.forwards <= PATIENCE:
            return True
        alike = [each for each in self.operation.hooked_sites if each.like == hooked.like]
        return any(each.ran and each.path in self.rested for each in alike)

    def _without_hidden(self, idle: list[HookedSite]) -> list[HookedSite]:
        """The idle sites without those that compiled code may hide, which are told of once."""
        may_hide = hidden(self.model, self.operation.hooked_sites, idle) if idle else []
        self.unseen(may_hide)
        return [each for each in idle if each not in may_hide]

    def _without_like(self, idle: list[HookedSite]) -> list[HookedSite]:
        """Those of the idle sites that no site like them ran instead of."""
        sites = self.operation.hooked_sites
        at_rest = {hooked.path for hooked in idle}
        running = {each.like for each in sites if each.path not in at_rest}
        return [each for each in idle if each.like not in running]

    def _suspect(self, kept: Pass, idle: list[HookedSite]) -> None:
        """Sites did not run in a forward that was not looked into."""
        gone = self._without_like(idle)
        known = [each for each in gone if (each.like, kept.kind) in self.gone]
        told = [each for each in gone if each not in known]
        some = [each for each in idle if each not in gone]
        new = [each for each in some if self._is_new(each)]
        again = self._again(known, some)
        if not (told or new or again):
            return
        self._check_there([*told, *new])
        self.suspects |= {hooked.path for hooked in (*told, *new, *again)}
        told = self._without_hidden(told)
        if kept.blind:
            self._demand(self._without_hidden(idle), [])
        self._warn(told, kept.blind)

    def _is_new(self, hooked: HookedSite) -> bool:
        """Whether it is not known yet that the model skips it."""
        waits = self.forwards <= PATIENCE and not hooked.ran
        return waits or (hooked.like, self.model.training) not in self.skipped

    def _again(self, known: list[HookedSite], some: list[HookedSite]) -> list[HookedSite]:
        """Sites that are skipped are looked at again, ever more seldom: they may be read now."""
        self.times += bool(some)
        likes = {hooked.like for hooked in known}
        self.gone_for = {like: self.gone_for.get(like, 0) + 1 for like in likes}
        again = [each for each in known if _is_power(self.gone_for[each.like])]
        return again + (some if _is_power(self.times) else [])

    def _warn(self, gone: list[HookedSite], blind: bool) -> None:
        """Say that sites do not run any more, unless one may be dropped and the next will tell."""
        new = [each for each in gone if each.path not in self.warned and each.ran]
        if not blind and self.model.training:  # all of few layers may be dropped
            new = [each for each in new if (each.like, True) not in self.skipped]
        if not new:
            return
        self.warned |= {hooked.path for hooked in new}
        warnings.warn(
            f"{self._counted(new)} did not run in this forward, though they ran before: what "
            "was added there counts for nothing in it."
            + ("" if blind else " The next forward is looked into."),
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

    def untraced(self, anew: bool) -> None:
        """torch.compile has traced the end of a forward; and its beginning, if anew."""
        sites = self.operation.hooked_sites
        self.unseen([hooked for hooked in sites if not hooked.ran])
        if anew and (gone := self._without_like([s for s in sites if not s.traced_now])):
            self._warn(gone, blind=True)

    def unseen(self, idle: list[HookedSite]) -> None:
        """Compiled code may hide that they ran."""
        traced = {each.like for each in self.operation.hooked_sites if each.compiled.ran}
        idle = [each for each in idle if each.like not in traced and not each.ran]
        if new := [each for each in idle if each.path not in self.warned]:
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


def counted(sites: list[HookedSite], of: int) -> str:
    """Some of the sites, in words."""
    return f"{len(sites)} of {of} sites ({first_few(each.path for each in sites)})"


def rules_of(record: Record, sites: Sequence[HookedSite]) -> str:
    """The rules by which parts stand at sites."""
    paths = {hooked.path for hooked in sites}
    rows = [row for row in record["rows"] if row["keys"]]
    return ", ".join(row["rule"] for row in rows if paths.intersection(row["paths"]))


def _is_power(n: int) -> bool:
    """Whether it is 1, 2, 4, 8 and so on."""
    return n & (n - 1) == 0 < n
