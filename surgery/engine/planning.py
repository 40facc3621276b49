"""A plan: rules met with one model. It knows what would be done, and can do it."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .._preserve import preserved
from .._text import first_few
from ..errors import FileError, RuleError
from ..rules.edits import Insert, Joined
from ..rules.expression import encode
from ..rules.rule import Rule, Rules
from ..structure.dataflow import attach_dataflow
from ..structure.layers import named_modules, own_parameters
from ..structure.module_tree import Site, Tree
from .build import BuiltParts
from .conditions import APPLYING, DISABLED, MAKING, check_example, check_state
from .decided import Decided, modules_of, roles_told
from .hearing import guessed, sources_of, unheard_asides
from .maps import PatchMap
from .matching import check_written, flatten_rules, match_rule
from .mixing import attach, check_mixing
from .norm_statistics import guard, statistics
from .notes import beside, frozen_head, frozen_norms, how_found, without_tokens
from .operation import Operation, check_model, operations, without_parts
from .placement import PartNames, Placement, Spot, check_conflicts, check_parts, name_all
from .probe import prove_tokens
from .ranks import check_room, give_room
from .streams import Tokens
from .summary import Record, RuleRecord, count_parameters, summary
from .switch import Balance
from .tokens import ASIDE, Action, tokens_at
from .trained import adopt
from .unattended import check_attended
from .uncalled import Stretches, check_called, stretches_of
from .unfreezing import parameters_meant, unfreezing_edits, unfrozen_by
from .verify import TrainTarget, verify
from .vocabulary import vocabulary
from .weight_checks import check_weights


def _tracking() -> AbstractContextManager[object]:
    """Out of inference mode, in which nothing can be made that is trained later."""
    on = torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if on else nullcontext()


@contextmanager
def no_collection() -> Iterator[None]:
    """Hold the garbage collector off while much is made and nothing is thrown away.

    It would walk the whole growing model again and again: at 10,000 modules most of the time.
    """
    with ExitStack() as stack:  # a stack: no fault at any line here leaves the collector off
        if gc.isenabled():
            stack.callback(gc.enable)
            gc.disable()
        yield


class Plan:
    """What rules would do to a model. Prints as a table; `apply()` does it."""

    @no_collection()
    def __init__(
        self,
        model: nn.Module,
        rules: Rules,
        *,
        seed: int,
        name: str,
        balance: Balance,
        example: Any = None,
        decided: Decided | None = None,
        room: int | None = None,
    ) -> None:
        check_model(model, name)
        if balance is not None and not isinstance(balance, (int, float)) and not callable(balance):
            raise RuleError(
                f"balance={balance!r}", "it is no coefficient.", "Give a number such as 0.01."
            )
        self.model, self.seed, self.name, self.balance = model, seed, name, balance
        self.room = room
        self.rules = flatten_rules(rules)
        check_example(model, example, f"a plan for {type(model).__name__}")
        self.tree = Tree(model)
        self.dataflow = attach_dataflow(self.tree, example, lambda: without_parts(model))
        self.decided = decided if example is None else None
        for rule in self.rules if decided is None else ():  # a file's were checked when it was made
            check_written(rule, self.tree)
        if self.decided:
            self.decided.tell(self.tree)
            self.decided.check_edits(self.rules, self.tree)
        self.matches = [(rule, self._match(i, rule)) for i, rule in enumerate(self.rules)]
        self.placements = [
            Placement(rule, edit, site, site.seen(shape=edit.port(site), captures=captures))
            for rule, sites in self.matches
            for edit in rule.rest
            if isinstance(edit, Joined)
            for site, captures in sites.items()
        ]
        for number, p in enumerate(self.placements):
            p.number = number
        self._leave_out(sources_of(self.placements, self.tree, self.decided))
        check_conflicts(self.placements)
        check_attended(self.placements, self.tree)
        self.stretches = stretches_of(self.placements, self.tree)
        check_called(self.placements, self.stretches)
        self.tokens = tokens_of(self.placements, self.tree, self.stretches)
        self.names = PartNames(self.tree)
        name_all(self.placements, self.names)
        self.unfrozen, self._left = unfrozen_by(self.matches, decided is None)
        self._check_trains()
        self._roles = roles_told(self.tree, self.rules)
        self._sketches: BuiltParts | None = None

    def _check_trains(self) -> None:
        if not (self.placements or self.unfrozen):
            raise RuleError(
                self.rules[0].short,
                "nothing would be left to train: what no rule unfreezes is frozen anyway.",
                'Put at("", unfreeze) before rules that freeze.',
            )

    def _match(self, number: int, rule: Rule) -> dict[Site, dict[str, str]]:
        """The sites of a rule: as a forward decided for its file, or as they are found here."""
        known = self.decided.find(number, rule, self.tree) if self.decided else None
        return match_rule(rule, self.tree) if known is None else known

    def _leave_out(self, sources: Mapping[Placement, list[Placement]]) -> None:
        """Keep what each place hears, and join nothing where there is nothing to hear."""
        self.heard_from = {p: those[0] for p, those in sources.items() if those}
        self.unheard = [p for p, those in sources.items() if not those]
        self.guessed = guessed(sources, self.tree)
        if not self.unheard:
            return
        self.placements = [p for p in self.placements if p not in self.unheard]
        left = {(p.rule, p.place) for p in self.placements}
        deaf = {(p.rule, p.place) for p in self.unheard if not unfreezing_edits(p.rule)} - left
        for number, (rule, sites) in enumerate(self.matches):
            some = {site: found for site, found in sites.items() if (rule, site) not in deaf}
            self.matches[number] = rule, some

    @property
    def sites(self) -> list[Site]:
        """The sites that parts are joined to, in the order of the walk."""
        unique = {p.spot: p.site for p in self.placements}
        return sorted(unique.values(), key=lambda site: site.order)

    @property
    def is_without_memory(self) -> bool:
        """Whether a part, or a parameter that is unfrozen, would be on the meta device."""
        unfrozen = (p for p in self._base() if id(p) in self.unfrozen)
        parts = (p.device.type == "meta" for p in self.placements)
        return any(parts) or any(p.is_meta for p in unfrozen)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Every part that would be added, sketched on the meta device."""
        return self._sketched.parts

    @property
    def _sketched(self) -> BuiltParts:
        if self._sketches is None:
            with preserved():
                sketches = BuiltParts(self.placements, self.names, None)
            check_parts(self.placements, sketches.parts)
            check_weights(self.placements, sketches.parts)
            check_mixing(self.placements, sketches.parts, self.tree)
            check_room(self.room, sketches)
            self._sketches = sketches
        return self._sketches

    @property
    def added(self) -> int:
        """Parameters that would be added; a shared part counts once."""
        return count_parameters(self.parts.values())

    @property
    def trainable(self) -> int:
        """Parameters that would be trained: those of the parts, and what is unfrozen."""
        return count_parameters(self.parts.values(), trainable=True) + self._numel(self._base())

    @property
    def record(self) -> Record:
        """What the operation writes down of itself: plain data, with no hold on the model."""
        return self._record(self._sketched)

    @property
    def _decided_on(self) -> str:
        """The modules on which a forward decided what feeds what, here or for a file."""
        if self.dataflow.asked:
            return modules_of(self.tree)
        return self.decided.modules if self.decided else ""

    def _record(self, built: BuiltParts | None) -> Record:
        trained = {*self.unfrozen, *self._trained_before()}
        notes = [*how_found(self.matches, self.tree, self.dataflow.asked, self.decided)]
        if any(isinstance(p.edit, Insert) and not p.edit.keep for p in self.heard_from):
            notes.append("no token is made of what is heard last: tokens are taken out before it")
        if self.unheard:
            first = first_few(p.place.entry.path for p in self.unheard)
            notes.append(f"nothing is heard before {first}: no token is put in there")
        notes += without_tokens(self.matches, self.tree, [p.place for p in self.unheard])
        notes += unheard_asides(self.placements, self.heard_from)
        if self.guessed:
            told = [f"{self.heard_from[p].place.path} ({p.site.path})" for p in self.guessed]
            notes.append(f"heard is the last in each block, {told[0]}: example=inputs shows which")
        notes += frozen_norms(s.path for s, frozen in statistics(self.tree, trained) if frozen)
        notes += beside(operations(self.model), self.name)
        notes += self._left
        notes += frozen_head(self.matches, self.tree, trained) if self.placements else ()
        borrowed = built.borrowed if built else {}
        return Record(
            rows=self._rows(borrowed),
            seed=self.seed,
            data=_data(self.rules),
            notes=notes,
            modules=self._decided_on,
            roles=self._roles,
        )

    def __str__(self) -> str:
        title = f"Plan for {type(self.model).__name__}"
        return str(summary(self.record, self.parts, count_parameters([self.model]), title))

    def __repr__(self) -> str:
        return f"<plan of {len(self.rules)} rules at {len(self.sites)} sites>"

    def apply(self, example: Any = None) -> nn.Module:
        """Carry the plan out, all or nothing; returns the model itself.

        With `example` (a tensor, tuple or dict of inputs) forwards in eval mode prove that every
        part runs, without gradients too; that a gradient comes to every part, and to every
        module that a rule unfreezes (to some tensor of it: models hold tensors that they do not
        use; an optional rule leaves a note in the report instead); and, where all parts say
        `starts_at_zero`, that the output is that of the base.

        Raises OperationError where the model was operated since the plan was made, and GraftError
        where something is not so.
        """
        check_model(self.model, self.name)
        tables = (APPLYING, DISABLED, *((MAKING,) if self.is_without_memory else ()))
        check_state(self.model, "apply(model, ...)", *tables)
        check_example(self.model, example, "apply(model, example=...)")
        operation = Operation(self.name, self.balance, self._record(None))
        try:
            with preserved(), _tracking():
                maps = self._execute(operation)
                if example is not None:
                    verify(self.model, operation, example, self._train_targets(operation))
                    prove_tokens(self.model, operation, example, maps)
        except BaseException:
            operation.undo()
            raise
        return self.model

    @no_collection()
    def _execute(self, operation: Operation) -> list[PatchMap]:
        modules = [module for _, module in named_modules(self.model)]
        adopt(self.model)  # what was trained by hand until now is of the operation before
        trained = self.unfrozen | self._trained_before()
        operation.open(self.model)
        operation.train_only(modules, trained, self.unfrozen)
        built = BuiltParts(self.placements, self.names, self.seed)
        parts = built.parts
        check_parts(self.placements, parts)
        check_weights(self.placements, parts)
        check_mixing(self.placements, parts, self.tree)
        give_room(self.room, built)
        guard(operation, self.tree, trained, self.unfrozen)
        if built.borrowed:
            operation.record = self._record(built)
        operation.add_parts(parts)
        operation.start.plan = self if operation.start.names else None
        maps = attach(self.model, operation, operation.journal, self.placements, parts, self.tree)
        spots: dict[Spot, list[Placement]] = {}
        for p in self.placements:
            spots.setdefault(p.spot, []).append(p)
        for there in spots.values():
            actions = [self._action(p, parts[p.key]) for p in there]
            operation.join(there[0].place, actions, self.stretches.get(there[0].spot))
        hooked_sites = dict(zip(spots, operation.hooked_sites, strict=True))
        for p, source in self.heard_from.items():
            mine, theirs = spots[p.spot], spots[source.spot]
            hooked_sites[p.spot].listen(
                mine.index(p), hooked_sites[source.spot], theirs.index(source)
            )
        operation.watch(self.model, modules)
        return maps

    def _action(self, p: Placement, part: nn.Module) -> Action:
        tokens = self.tokens.get(p, Tokens(0))
        hears = p.edit.hears is not None or p.edit.place in ASIDE
        return Action(p.edit.place, part, p.edit.scale, tokens, p.rule.optional, hears)

    def _train_targets(self, operation: Operation) -> Iterator[TrainTarget]:
        """What is to be trained: each part, and each module that a rule unfreezes."""
        rows = zip(operation.record["rows"], self.rules, strict=True)
        rules = {key: rule for row, rule in rows for key in row["keys"]}
        inserting = {p.key for p in self.placements if isinstance(p.edit, Insert)}
        for key, part in operation.named_children():
            tensors: list[tuple[str, Tensor]] = [
                (f"{key}.{name}", tensor) for name, tensor in part.named_parameters()
            ]
            rule = rules[key]
            inserted = key in inserting
            yield TrainTarget(rule.short, tensors, inserted=inserted, spared=rule.optional)
        for rule, sites in self.matches:
            for edit, site in product(unfreezing_edits(rule), sites):
                tensors = [
                    (name, tensor)
                    for name, tensor in parameters_meant(edit, [site])
                    if id(tensor) in self.unfrozen
                ]
                yield TrainTarget(rule.short, tensors, rule.optional)

    def _base(self) -> list[nn.Parameter]:
        return [p for _, module in named_modules(self.model) for p in own_parameters(module)]

    def _trained_before(self) -> set[int]:
        """Ids of the base parameters that earlier operations left trained."""
        done = operations(self.model)
        return {id(p) for p in self._base() if p.requires_grad} if done else set()

    def _numel(self, parameters: Iterable[nn.Parameter], but: Iterable[int] = ()) -> int:
        skip = set(but)
        numbers = {id(p): p.numel() for p in parameters}  # a tied one once
        return sum(n for i, n in numbers.items() if i in self.unfrozen and i not in skip)

    def _rows(self, borrowed: Mapping[str, list[str]]) -> list[RuleRecord]:
        rows: list[RuleRecord] = []
        counted: set[int] = set()
        for rule, sites in self.matches:
            joined = dict.fromkeys(p.key for p in self.placements if p.rule is rule)
            keys = dict.fromkeys(k for key in joined for k in (key, *borrowed.get(key, ())))
            trained = [
                p for edit in unfreezing_edits(rule) for _, p in parameters_meant(edit, sites)
            ]
            rows.append(
                RuleRecord(
                    rule=repr(rule),
                    paths=[site.path for site in sites],
                    edits=[repr(edit) for edit in rule.rest],
                    keys=list(keys),
                    unfrozen=self._numel(trained, but=counted),
                )
            )
            counted.update(map(id, trained))
        return rows


def plan(
    model: nn.Module,
    rules: Rules,
    *,
    seed: int = 0,
    name: str = "default",
    balance: Balance = None,
    example: Any = None,
    room: int | None = None,
) -> Plan:
    """Meet rules with a model and touch nothing; works on the meta device too.

    Takes what `apply` takes. Raises what `apply` raises before its first change: RuleError,
    MatchError, ConflictError, OperationError.

    >>> from surgery import adapter, at, parallel
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    >>> adapters = plan(model, at(nn.Linear, parallel(adapter(rank=2))))
    >>> len(adapters.sites), adapters.added
    (2, 124)
    """
    planned = Plan(model, rules, seed=seed, name=name, balance=balance, example=example, room=room)
    _ = planned.parts  # what does not suit a site is an error now
    return planned


def _data(rules: list[Rule]) -> str:
    try:
        return json.dumps(encode(rules, vocabulary()))
    except FileError:
        return ""


def tokens_of(
    placements: list[Placement], tree: Tree, stretches: Stretches
) -> dict[Placement, Tokens]:
    """How each place is given tokens that an edit inserts there."""
    edits = [(p, p.edit) for p in placements if isinstance(p.edit, Insert)]
    return {
        p: tokens_at(p.place, tree, edit.after, p.rule.short, stretches.get(p.spot))
        for p, edit in edits
    }
