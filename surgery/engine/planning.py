"""A plan: rules met with one model. It knows what would be done, and can do it."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from .._preserve import preserved
from ..errors import ConflictError, FileError, OperationError, RuleError
from ..rules.edits import Insert, Joined, Trained
from ..rules.expression import encode
from ..rules.rule import Rule, Rules
from ..structure.dataflow import attach_dataflow
from ..structure.module_tree import ADDITIONS, Site, Tree
from .build import BuiltParts
from .hooks import Balance, is_replaced
from .matching import (
    check_named,
    flatten_rules,
    heard_from,
    match_rule,
    parameters_meant,
    statistics,
    tokens_of,
    training,
)
from .operation import Operation, additions_of, operations
from .placement import PartNames, Placement, check_called, name_all
from .summary import Record, RuleRecord, count_parameters, places, summary
from .tokens import Action, Tokens
from .verify import TrainTarget, verify
from .vocabulary import vocabulary

WRAPPERS = {"module", "_orig_mod"}  # where DDP, DataParallel, FSDP and torch.compile keep a model


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
        _check_model(model, name)
        if balance is not None and not isinstance(balance, (int, float)) and not callable(balance):
            raise RuleError(
                f"balance={balance!r}", "it is no coefficient.", "Give a number such as 0.01."
            )
        self.model, self.seed, self.name, self.balance = model, seed, name, balance
        self.rules = flatten_rules(rules)
        self.tree = Tree(model)
        self.fed = attach_dataflow(self.tree, example)
        self.matches = [(rule, match_rule(rule, self.tree)) for rule in self.rules]
        self.placed = [
            Placement(rule, edit, site, site.seen(shape=edit.port(site), captures=captures))
            for rule, sites in self.matches
            for edit in rule.rest
            if isinstance(edit, Joined)
            for site, captures in sites.items()
        ]
        _check_conflicts(self.placed)
        check_called(self.placed)
        self.tokens = tokens_of(self.placed, self.tree)
        self.heard_from = heard_from(self.placed, self.tree)
        self.names = PartNames(self.tree)
        name_all(self.placed, self.names)
        self.unfrozen = self._unfrozen()
        if not (self.placed or self.unfrozen):
            raise RuleError(
                self.rules[0].short,
                "nothing would be left to train: what no rule unfreezes is frozen anyway.",
                'Put at("", unfreeze) before rules that freeze.',
            )
        self._sketches: BuiltParts | None = None

    @property
    def sites(self) -> list[Site]:
        """The sites that parts are joined to, in the order of the walk."""
        unique = {p.spot: p.site for p in self.placed}
        return sorted(unique.values(), key=lambda site: site.order)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Every part that would be added, sketched on the meta device."""
        return self._sketched.parts

    @property
    def _sketched(self) -> BuiltParts:
        if self._sketches is None:
            with preserved():
                self._sketches = BuiltParts(self.placed, self.names, None)
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

    def _record(self, stock: BuiltParts | None) -> Record:
        notes = ["what feeds what was read off a forward on the example"] if self.fed.asked else []
        if any(isinstance(p.edit, Insert) and not p.edit.keep for p in self.heard_from):
            notes.append("no token is made of what is heard last: tokens are taken out before it")
        trained = {*self.unfrozen, *self._trained_before()}
        if kept := [s.path for s, frozen in statistics(self.tree, trained) if frozen]:
            notes.append(
                "frozen norms keep their running statistics, in eval mode in training too: "
                + places(kept)
            )
        borrowed = stock.borrowed if stock else {}
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
        graft runs, without gradients too; that a gradient comes to every part, and to every
        module that a rule unfreezes (to some tensor of it: models hold tensors that they do not
        use; an optional rule leaves a note in the report instead); and, where all parts say
        `starts_at_zero`, that the output is that of the base.

        Raises OperationError where the model was operated since the plan was made, and GraftError
        where something is not so.
        """
        _check_model(self.model, self.name)
        operation = Operation(self.name, self.balance, self._record(None))
        try:
            with preserved(), _tracking():
                self._carry_out(operation)
                if example is not None:
                    verify(self.model, operation, example, self._train_targets(operation))
        except BaseException:
            operation.undo()
            raise
        return self.model

    @no_collection()
    def _carry_out(self, operation: Operation) -> None:
        modules = [site.module for site in self.tree.sites]
        trained = self.unfrozen | self._trained_before()
        operation.open(self.model)
        operation.train_only(modules, trained)
        stock = BuiltParts(self.placed, self.names, self.seed)
        parts = stock.parts
        operation.still((s.module, frozen) for s, frozen in statistics(self.tree, trained))
        if stock.borrowed:
            operation.record = self._record(stock)
        operation.own(parts)
        spots: dict[tuple[int, int], list[Placement]] = {}
        for p in self.placed:
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
        operation.watch(self.model)

    def _train_targets(self, operation: Operation) -> Iterator[TrainTarget]:
        """What is to be trained: each part, and each module that a rule unfreezes."""
        rows = zip(operation.record["rows"], self.rules, strict=True)
        rules = {key: rule for row, rule in rows for key in row["keys"]}
        for key, part in operation.named_children():
            parts = [(f"{key}.{n}", t) for n, t in part.named_parameters()]
            yield TrainTarget(rules[key].short, [*parts])
        for rule, sites in self.matches:
            for edit in training(rule):
                for site in sites:
                    held = parameters_meant(edit, [site])
                    chosen = [it for it in held if id(it[1]) in self.unfrozen]
                    yield TrainTarget(rule.short, [*chosen], rule.optional)

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
        held = {id(p): p.numel() for p in parameters}
        return sum(n for i, n in held.items() if i in self.unfrozen and i not in skip)

    def _rows(self, borrowed: Mapping[str, list[str]]) -> list[RuleRecord]:
        rows: list[RuleRecord] = []
        told: set[int] = set()
        for rule, sites in self.matches:
            own = dict.fromkeys(p.key for p in self.placed if p.rule is rule)
            keys = dict.fromkeys(k for key in own for k in (key, *borrowed.get(key, ())))
            trained = [p for edit in training(rule) for _, p in parameters_meant(edit, sites)]
            rows.append(
                RuleRecord(
                    rule=repr(rule),
                    paths=[site.path for site in sites],
                    edits=[repr(edit) for edit in rule.rest],
                    keys=list(keys),
                    unfrozen=self._numel(trained, but=told),
                )
            )
            told.update(map(id, trained))
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
    >>> made = plan(model, at(nn.Linear, parallel(adapter(rank=2))))
    >>> len(made.sites), made.added
    (2, 124)
    """
    made = Plan(model, rules, seed=seed, name=name, balance=balance, example=example)
    _ = made.parts
    return made


def check_operable(model: nn.Module) -> None:
    """Raise OperationError unless `model` is a module that is in nobody's wrapper."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise OperationError(f"a {kind}", "this is no model.", "Give a torch.nn.Module.")
    if isinstance(model, torch.jit.ScriptModule):
        raise OperationError(kind, "this is TorchScript.", "Operate on the model it was made from.")
    inner = WRAPPERS & set(model._modules)
    if inner and len(model._modules) == 1 and type(model).__module__.startswith("torch."):
        raise OperationError(
            kind,
            "this is a wrapper, and what is done to it would not reach the model inside.",
            f"Operate on .{inner.pop()} first; wrap or compile what comes back.",
        )


def _check_model(model: nn.Module, name: str) -> None:
    check_operable(model)
    kind = type(model).__name__
    room = additions_of(model)
    if room is None and hasattr(model, ADDITIONS):
        raise OperationError(
            kind, f"it has an attribute {ADDITIONS} of its own.", "Rename that attribute first."
        )
    if not name or "." in name or hasattr(nn.Module, name):
        raise OperationError(f'name="{name}"', "it cannot name an operation.", "Use a plain word.")
    if any(operation.merged for operation in operations(model)):
        raise OperationError(
            kind, "its parts are merged.", "Call surgery.unmerge(model) or surgery.revert(model)."
        )
    earlier = room._modules.get(name) if room else None
    if isinstance(earlier, Operation):
        rules = ", ".join(row["rule"] for row in earlier.record["rows"])
        raise OperationError(
            f'name="{name}"',
            f"this {kind} has been operated under that name already, by {rules}.",
            "Call surgery.revert(model) first; or give another name to operate on top of it.",
        )


def _check_conflicts(placed: list[Placement]) -> None:
    replacing: dict[int, Placement] = {}
    for p in placed:
        if p.edit.place != "instead":
            continue
        if p.site.is_span:
            raise ConflictError(
                p.rule.short,
                f"{p.site.path} runs from one module to another, and replace acts on one.",
                "Replace the module that holds both.",
            )
        if is_replaced(p.site.module):
            raise ConflictError(
                repr(p.rule),
                f"{p.site.path} is already replaced by an earlier operation.",
                "Call surgery.revert(model) first.",
            )
        if other := replacing.get(id(p.site.module)):
            raise ConflictError(
                repr(p.rule),
                f"{p.site.path} is already replaced by {other.rule!r}.",
                "Keep one of the two, or narrow one of them with & ~where(...).",
            )
        replacing[id(p.site.module)] = p


def _data(rules: list[Rule]) -> str:
    try:
        return json.dumps(encode(rules, vocabulary()))
    except FileError:
        return ""
