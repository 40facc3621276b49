"""A plan: rules met with one model. It knows what would be done, and can do it."""

from __future__ import annotations

import gc
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .._preserve import preserved
from ..errors import FileError, RuleError
from ..rules.edits import Insert, Joined, Trained
from ..rules.expression import encode
from ..rules.rule import Rule, Rules
from ..rules.selector import Selector
from ..structure.dataflow import attach_dataflow
from ..structure.layers import keeps_statistics
from ..structure.module_tree import Site, Tree
from .build import BuiltParts
from .matching import check_named, flatten_rules, match_rule, parameters_meant, unfreezing_edits
from .operation import Operation, check_model, operations
from .placement import PartNames, Placement, check_called, check_conflicts, name_all
from .streams import Tokens
from .summary import Record, RuleRecord, count_parameters, places, summary
from .switch import Balance
from .tokens import Action, tokens_at
from .verify import TrainTarget, verify
from .vocabulary import vocabulary


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
    ) -> None:
        check_model(model, name)
        if balance is not None and not isinstance(balance, (int, float)) and not callable(balance):
            raise RuleError(
                f"balance={balance!r}", "it is no coefficient.", "Give a number such as 0.01."
            )
        self.model, self.seed, self.name, self.balance = model, seed, name, balance
        self.rules = flatten_rules(rules)
        self.tree = Tree(model)
        self.dataflow = attach_dataflow(self.tree, example)
        self.matches = [(rule, match_rule(rule, self.tree)) for rule in self.rules]
        self.placements = [
            Placement(rule, edit, site, site.seen(shape=edit.port(site), captures=captures))
            for rule, sites in self.matches
            for edit in rule.rest
            if isinstance(edit, Joined)
            for site, captures in sites.items()
        ]
        check_conflicts(self.placements)
        check_called(self.placements)
        self.tokens = tokens_of(self.placements, self.tree)
        self.heard_from = heard_from(self.placements, self.tree)
        self.names = PartNames(self.tree)
        name_all(self.placements, self.names)
        self.unfrozen = self._unfrozen()
        if not (self.placements or self.unfrozen):
            raise RuleError(
                self.rules[0].short,
                "nothing would be left to train: what no rule unfreezes is frozen anyway.",
                'Put at("", unfreeze) before rules that freeze.',
            )
        self._sketches: BuiltParts | None = None

    @property
    def sites(self) -> list[Site]:
        """The sites that parts are joined to, in the order of the walk."""
        unique = {p.spot: p.site for p in self.placements}
        return sorted(unique.values(), key=lambda site: site.order)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Every part that would be added, sketched on the meta device."""
        return self._sketched.parts

    @property
    def _sketched(self) -> BuiltParts:
        if self._sketches is None:
            with preserved():
                self._sketches = BuiltParts(self.placements, self.names, None)
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

    def _record(self, built: BuiltParts | None) -> Record:
        notes = (
            ["what feeds what was read off a forward on the example"] if self.dataflow.asked else []
        )
        if any(isinstance(p.edit, Insert) and not p.edit.keep for p in self.heard_from):
            notes.append("no token is made of what is heard last: tokens are taken out before it")
        trained = {*self.unfrozen, *self._trained_before()}
        if frozen := [s.path for s, frozen in statistics(self.tree, trained) if frozen]:
            notes.append(
                "frozen norms keep their running statistics, in eval mode in training too: "
                + places(frozen)
            )
        borrowed = built.borrowed if built else {}
        return Record(
            rows=self._rows(borrowed), seed=self.seed, data=_data(self.rules), notes=notes
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
        operation = Operation(self.name, self.balance, self._record(None))
        try:
            with preserved(), _tracking():
                self._execute(operation)
                if example is not None:
                    verify(self.model, operation, example, self._train_targets(operation))
        except BaseException:
            operation.undo()
            raise
        return self.model

    @no_collection()
    def _execute(self, operation: Operation) -> None:
        modules = [site.module for site in self.tree.sites]
        trained = self.unfrozen | self._trained_before()
        operation.open(self.model)
        operation.train_only(modules, trained)
        built = BuiltParts(self.placements, self.names, self.seed)
        parts = built.parts
        operation.freeze_norms((s.module, frozen) for s, frozen in statistics(self.tree, trained))
        if built.borrowed:
            operation.record = self._record(built)
        operation.add_parts(parts)
        spots: dict[tuple[int, int], list[Placement]] = {}
        for p in self.placements:
            spots.setdefault(p.spot, []).append(p)
        for there in spots.values():
            actions = [
                Action(p.edit.place, parts[p.key], p.edit.scale, self.tokens.get(p, Tokens(0)))
                for p in there
            ]
            operation.join(there[0].place, actions)
        hooked_sites = dict(zip(spots, operation.hooked_sites, strict=True))
        for p, source in self.heard_from.items():
            mine, theirs = spots[p.spot], spots[source.spot]
            hooked_sites[p.spot].listen(
                mine.index(p), hooked_sites[source.spot], theirs.index(source)
            )
        operation.watch(self.model, modules)

    def _train_targets(self, operation: Operation) -> Iterator[TrainTarget]:
        """What is to be trained: each part, and each module that a rule unfreezes."""
        rows = zip(operation.record["rows"], self.rules, strict=True)
        rules = {key: rule for row, rule in rows for key in row["keys"]}
        for key, part in operation.named_children():
            tensors: list[tuple[str, Tensor]] = [
                (f"{key}.{name}", tensor) for name, tensor in part.named_parameters()
            ]
            yield TrainTarget(rules[key].short, tensors)
        for rule, sites in self.matches:
            for edit, site in product(unfreezing_edits(rule), sites):
                tensors = [
                    (name, tensor)
                    for name, tensor in parameters_meant(edit, [site])
                    if id(tensor) in self.unfrozen
                ]
                yield TrainTarget(rule.short, tensors, rule.optional)

    def _base(self) -> list[nn.Parameter]:
        return [p for site in self.tree.sites for p in site.module.parameters(recurse=False)]

    def _trained_before(self) -> set[int]:
        """Ids of the base parameters that earlier operations left trained."""
        done = operations(self.model)
        return {id(p) for p in self._base() if p.requires_grad} if done else set()

    def _unfrozen(self) -> set[int]:
        """Ids of the base parameters that the rules leave trained; the last word counts."""
        chosen: set[int] = set()
        for rule, sites in self.matches:
            for edit in rule.rest:
                if isinstance(edit, Trained):
                    named = parameters_meant(edit, sites)
                    if not rule.optional:
                        check_named(rule, edit, sites)
                    ids = {id(p) for _, p in named if p.is_floating_point()}
                    chosen = chosen | ids if edit.trained else chosen - ids
        return chosen

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
    planned = Plan(model, rules, seed=seed, name=name, balance=balance, example=example)
    _ = planned.parts  # what does not suit a site is an error now
    return planned


def _data(rules: list[Rule]) -> str:
    try:
        return json.dumps(encode(rules, vocabulary()))
    except FileError:
        return ""


def statistics(tree: Tree, trained: Collection[int]) -> list[tuple[Site, bool]]:
    """The norms with running statistics, and whether each is frozen: none of its parameters is
    among the trained, by id; or, where it has none, not all of those around it are."""
    return [
        (site, not _is_trained(site, trained))
        for site in tree.sites
        if keeps_statistics(site.module)
    ]


def _is_trained(norm: Site, trained: Collection[int]) -> bool:
    if parameters := list(norm.module.parameters()):
        return any(id(p) in trained for p in parameters)
    around = (list(site.module.parameters()) for site in norm.above())
    nearest = next(filter(None, around), [])
    return bool(nearest) and all(id(p) in trained for p in nearest)


def tokens_of(placements: list[Placement], tree: Tree) -> dict[Placement, Tokens]:
    """How each place is given tokens that an edit inserts there."""
    edits = [(p, p.edit) for p in placements if isinstance(p.edit, Insert)]
    return {p: tokens_at(p.place, tree, edit.after, p.rule.short) for p, edit in edits}


def heard_from(placements: list[Placement], tree: Tree) -> dict[Placement, Placement]:
    """For each place that hears a part, the last before it that is joined where it listens."""
    listening = [(p, p.edit.hears) for p in placements if isinstance(p.edit, Insert)]
    return {p: _source(p, heard, placements, tree) for p, heard in listening if heard}


def _source(p: Placement, heard: Selector, placements: list[Placement], tree: Tree) -> Placement:
    """What it hears: the last of its own tower, where there are several. Raises RuleError."""
    sites, beginning = heard.find(tree), p.place.entry.order
    sources = [
        other
        for other in placements
        if other.edit.can_be_heard and other.place in sites and other.place.exit.end <= beginning
    ]
    if p.place.entry.is_element:
        tower = p.place.entry.parent
        sources = [other for other in sources if tower in set(other.place.entry.above())]
    if not sources:
        raise RuleError(
            p.rule.short,
            f"before {p.site.path} no rule joins a part at {heard!r} that it could hear.",
            "Join one there, or leave the first places out: block[1:].",
        )
    return max(reversed(sources), key=lambda other: other.place.exit.order)
