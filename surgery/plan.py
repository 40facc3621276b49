"""A plan: rules met with one model. It knows what would be done, and can do it."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from . import chance
from .account import Record, Row, count, places, summary
from .edit import Insert, Joined, Trained
from .errors import ConflictError, FileError, OperationError, RuleError
from .flow import follow
from .graft import Balance, is_replaced
from .insertion import Step
from .meeting import (
    check_named,
    flatten,
    matched,
    meant,
    statistics,
    tellers,
    tokens_of,
    training,
)
from .place import Names, Placed, check_called, name_all
from .proof import Trainee, prove
from .room import Operation, operations, room_of
from .rule import Rule, Rules
from .stock import Stock
from .term import encode
from .tokens import Tokens
from .tree import ROOM, Site, Tree
from .words import words

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
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


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
        self.rules = flatten(rules)
        self.tree = Tree(model)
        self.fed = follow(self.tree, example)
        self.matches = [(rule, matched(rule, self.tree)) for rule in self.rules]
        self.placed = [
            Placed(rule, edit, site, site.seen(shape=edit.port(site), captures=captures))
            for rule, sites in self.matches
            for edit in rule.rest
            if isinstance(edit, Joined)
            for site, captures in sites.items()
        ]
        _check_conflicts(self.placed)
        check_called(self.placed)
        self.tokens = tokens_of(self.placed, self.tree)
        self.tellers = tellers(self.placed, self.tree)
        self.names = Names(self.tree)
        name_all(self.placed, self.names)
        self.unfrozen = self._unfrozen()
        if not (self.placed or self.unfrozen):
            raise RuleError(
                self.rules[0].short,
                "nothing would be left to train: what no rule unfreezes is frozen anyway.",
                'Put at("", unfreeze) before rules that freeze.',
            )
        self._sketches: Stock | None = None

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
    def _sketched(self) -> Stock:
        if self._sketches is None:
            restore = chance.remember()
            try:
                self._sketches = Stock(self.placed, self.names, None)
            finally:
                restore()
        return self._sketches

    @property
    def added(self) -> int:
        """Parameters that would be added; a shared part counts once."""
        return count(self.parts.values())

    @property
    def trainable(self) -> int:
        """Parameters that would be trained: those of the parts, and what is unfrozen."""
        return count(self.parts.values(), trainable=True) + self._numel(self._base())

    @property
    def record(self) -> Record:
        """What the operation writes down of itself: plain data, with no hold on the model."""
        return self._record(self._sketched)

    def _record(self, stock: Stock | None) -> Record:
        notes = ["what feeds what was read off a forward on the example"] if self.fed.asked else []
        if any(isinstance(p.edit, Insert) and not p.edit.keep for p in self.tellers):
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
        return str(summary(self.record, self.parts, count([self.model]), title))

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
        restore = chance.remember()
        try:
            with _tracking():
                self._carry_out(operation)
                if example is not None:
                    prove(self.model, operation, example, self._trainees(operation))
            restore()
        except BaseException:
            operation.undo()
            restore()
            raise
        return self.model

    @no_collection()
    def _carry_out(self, operation: Operation) -> None:
        modules = [site.module for site in self.tree.sites]
        trained = self.unfrozen | self._trained_before()
        operation.open(self.model)
        operation.train_only(modules, trained)
        stock = Stock(self.placed, self.names, self.seed)
        parts = stock.parts
        operation.still((s.module, frozen) for s, frozen in statistics(self.tree, trained))
        if stock.borrowed:
            operation.record = self._record(stock)
        operation.own(parts)
        spots: dict[tuple[int, int], list[Placed]] = {}
        for p in self.placed:
            spots.setdefault(p.spot, []).append(p)
        for there in spots.values():
            steps = [
                Step(p.edit.place, parts[p.key], p.edit.scale, self.tokens.get(p, Tokens(0)))
                for p in there
            ]
            operation.join(there[0].place, steps)
        grafts = dict(zip(spots, operation.grafts, strict=True))
        for p, teller in self.tellers.items():
            mine, theirs = spots[p.spot], spots[teller.spot]
            grafts[p.spot].listen(mine.index(p), grafts[teller.spot], theirs.index(teller))
        operation.watch(self.model)

    def _trainees(self, operation: Operation) -> Iterator[Trainee]:
        """What is to be trained: each part, and each module that a rule unfreezes."""
        rows = zip(operation.record["rows"], self.rules, strict=True)
        rules = {key: rule for row, rule in rows for key in row["keys"]}
        for key, part in operation.named_children():
            parts = [(f"{key}.{n}", t) for n, t in part.named_parameters()]
            yield Trainee(rules[key].short, [*parts])
        for rule, sites in self.matches:
            for edit in training(rule):
                for site in sites:
                    held = meant(edit, [site])
                    chosen = [it for it in held if id(it[1]) in self.unfrozen]
                    yield Trainee(rule.short, [*chosen], rule.optional)

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
                    named = meant(edit, sites)
                    if not rule.optional:
                        check_named(rule, edit, sites)
                    ids = {id(p) for _, p in named if p.is_floating_point()}
                    chosen = chosen | ids if edit.trained else chosen - ids
        return chosen

    def _numel(self, parameters: Iterable[nn.Parameter], but: Iterable[int] = ()) -> int:
        skip = set(but)
        held = {id(p): p.numel() for p in parameters}
        return sum(n for i, n in held.items() if i in self.unfrozen and i not in skip)

    def _rows(self, borrowed: Mapping[str, list[str]]) -> list[Row]:
        rows: list[Row] = []
        told: set[int] = set()
        for rule, sites in self.matches:
            own = dict.fromkeys(p.key for p in self.placed if p.rule is rule)
            keys = dict.fromkeys(k for key in own for k in (key, *borrowed.get(key, ())))
            trained = [p for edit in training(rule) for _, p in meant(edit, sites)]
            rows.append(
                Row(
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
    room = room_of(model)
    if room is None and hasattr(model, ROOM):
        raise OperationError(
            kind, f"it has an attribute {ROOM} of its own.", "Rename that attribute first."
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


def _check_conflicts(placed: list[Placed]) -> None:
    replacing: dict[int, Placed] = {}
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
        return json.dumps(encode(rules, words()))
    except FileError:
        return ""
