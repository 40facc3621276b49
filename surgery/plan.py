"""A plan: rules met with one model. It knows what would be done, and can do it."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from . import chance
from .account import Record, Row, count, summary
from .address import generalise, nearest
from .edit import Joined, Trained
from .errors import ConflictError, FileError, MatchError, OperationError, RuleError
from .flow import follow, followed
from .graft import Balance, Step, is_replaced
from .pattern import Address
from .place import Placed, check_called, name_all
from .proof import Trainee, prove
from .role import ROLES, anatomise, attn, block, embed, ffn, head, instead_of_ffns, norm, qkv
from .room import Operation, operations, room_of
from .rule import Rule, Rules
from .rulesets import named
from .term import encode, show
from .tree import ROOM, Site, Tree
from .words import words

SHOW = " With example=inputs a forward is looked at too, for what modules do not show."
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
        self.matches = [(rule, _matched(rule, self.tree)) for rule in self.rules]
        self.placed = [
            Placed(rule, edit, site, site.seen(shape=edit.port(site), captures=captures))
            for rule, sites in self.matches
            for edit in rule.rest
            if isinstance(edit, Joined)
            for site, captures in sites.items()
        ]
        _check_conflicts(self.placed)
        check_called(self.placed)
        name_all(self.placed)
        self.unfrozen = self._unfrozen()
        if not (self.placed or self.unfrozen):
            raise RuleError(
                self.rules[0].short,
                "nothing would be left to train: what no rule unfreezes is frozen anyway.",
                'Put at("", unfreeze) before rules that freeze.',
            )
        self._parts: dict[str, nn.Module] | None = None

    @property
    def sites(self) -> list[Site]:
        """The sites that parts are joined to, in the order of the walk."""
        unique = {p.spot: p.site for p in self.placed}
        return sorted(unique.values(), key=lambda site: site.order)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Every part that would be added, sketched on the meta device."""
        if self._parts is None:
            restore = chance.remember()
            try:
                self._parts = {p.key: p.sketch() for p in self._makers()}
            finally:
                restore()
        return self._parts

    @property
    def added(self) -> int:
        """Parameters that would be added; a shared part counts once."""
        return count(self.parts.values())

    @property
    def trainable(self) -> int:
        """Parameters that would be trained: those of the parts, and what is unfrozen."""
        return count(self.parts.values(), trainable=True) + self._numel(self.tree.sites)

    @property
    def record(self) -> Record:
        """What the operation writes down of itself: plain data, with no hold on the model."""
        notes = ["what feeds what was read off a forward on the example"] if self.fed.asked else []
        return Record(rows=self._rows(), seed=self.seed, data=_data(self.rules), notes=notes)

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
        operation = Operation(self.name, self.balance, self.record)
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
        earlier = [p for p in self._base() if p.requires_grad] if operations(self.model) else []
        operation.open(self.model)
        operation.train_only(modules, self.unfrozen | set(map(id, earlier)))
        parts = {p.key: p.make(self.seed) for p in self._makers()}
        operation.own(parts)
        spots: dict[tuple[int, int], list[Placed]] = {}
        for p in self.placed:
            spots.setdefault(p.spot, []).append(p)
        for there in spots.values():
            steps = [Step(p.edit.place, parts[p.key], p.edit.scale) for p in there]
            operation.join(there[0].place, steps)
        operation.watch(self.model)

    def _trainees(self, operation: Operation) -> Iterator[Trainee]:
        """What is to be trained: each part, and each module that a rule unfreezes."""
        rules = {p.key: p.rule for p in self.placed}
        for key, part in operation.named_children():
            parts = [(f"{key}.{n}", t) for n, t in part.named_parameters()]
            yield Trainee(rules[key].short, [*parts])
        for rule, sites in self.matches:
            if any(isinstance(edit, Trained) and edit.trained for edit in rule.rest):
                for site in sites:
                    ends = dict.fromkeys((site.entry, site.exit))
                    named = [(e.path, *it) for e in ends for it in e.module.named_parameters()]
                    held = [(f"{a}.{b}".strip("."), t) for a, b, t in named]
                    chosen = [it for it in held if id(it[1]) in self.unfrozen]
                    yield Trainee(rule.short, [*chosen], rule.optional)

    def _makers(self) -> Iterable[Placed]:
        """For each part, the first place that asks for it."""
        first: dict[str, Placed] = {}
        for p in self.placed:
            first.setdefault(p.key, p)
        return first.values()

    def _base(self) -> list[nn.Parameter]:
        return [p for site in self.tree.sites for p in site.module.parameters(recurse=False)]

    def _unfrozen(self) -> set[int]:
        """Ids of the base parameters that the rules leave trained; the last word counts."""
        chosen: set[int] = set()
        for rule, sites in self.matches:
            for edit in rule.rest:
                if isinstance(edit, Trained):
                    ids = {id(p) for p in _parameters(sites) if p.is_floating_point()}
                    chosen = chosen | ids if edit.trained else chosen - ids
        return chosen

    def _numel(self, sites: Iterable[Site], but: Iterable[int] = ()) -> int:
        skip = set(but)
        held = {id(p): p.numel() for p in _parameters(sites)}
        return sum(n for i, n in held.items() if i in self.unfrozen and i not in skip)

    def _rows(self) -> list[Row]:
        rows: list[Row] = []
        told: set[int] = set()
        for rule, sites in self.matches:
            keys = dict.fromkeys(p.key for p in self.placed if p.rule is rule)
            trains = any(isinstance(edit, Trained) and edit.trained for edit in rule.rest)
            rows.append(
                Row(
                    rule=repr(rule),
                    paths=[site.path for site in sites],
                    edits=[repr(edit) for edit in rule.rest],
                    keys=list(keys),
                    unfrozen=self._numel(sites, but=told) if trains else 0,
                )
            )
            told.update(map(id, _parameters(sites)) if trains else ())
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


def flatten(rules: Rules) -> list[Rule]:
    """Rules as one list, names looked up. Raises RuleError on what is no rule."""
    if isinstance(rules, Rule):
        return [rules]
    if isinstance(rules, str):
        return named(rules)
    if not isinstance(rules, (list, tuple)) or not rules:
        raise RuleError(
            f"rules={show(rules)}",
            "this is no rule, no name of a rule set, and no list of either.",
            'Write rules="adapterx_ffn", or rules=[at(ffn, parallel(adapter(rank=8)))].',
        )
    return [rule for each in rules for rule in flatten(each)]


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


def _matched(rule: Rule, tree: Tree) -> dict[Site, dict[str, str]]:
    found = rule.where.find(tree)
    kind = type(tree.model).__name__
    if not found and not rule.optional:
        fact = f"matched no module of {kind}"
        if not (isinstance(rule.where, Address) or anatomise(tree)["ffn"]):
            fact += f", which has no feed-forward network: {instead_of_ffns(tree)}"
        raise MatchError(rule.short, f"{fact}.", _advice(rule, tree))
    if found and rule.times is not None and len(found) != rule.times:
        paths = [site.path for site in found]
        listed = ", ".join(paths[:4]) + (" and more" if len(paths) > 4 else "")
        raise MatchError(
            rule.short,
            f"matched {len(found)} sites of {kind}, not times={rule.times}: {listed}.",
            f"Write times={len(found)}, or a narrower or wider place.",
        )
    return found


def _advice(rule: Rule, tree: Tree) -> str:
    roles = anatomise(tree)
    if not isinstance(rule.where, Address):
        known = ", ".join(f"{role} ({len(roles[role.name])})" for role in ROLES if roles[role.name])
        more = "" if roles["ffn"] or followed(tree) else SHOW
        return (
            f"Roles found in it: {known or 'none'}. print(surgery.anatomy(model)) shows more.{more}"
        )
    asked_for = (ffn, attn, block, qkv, norm, head, embed)  # most often first
    role_of = {generalise(s.path): role for role in asked_for[::-1] for s in roles[role.name]}
    preferred = [generalise(s.path) for role in asked_for for s in roles[role.name][:1]]
    near = nearest(rule.where.what, (site.path for site in tree.sites), preferred)
    if not near:
        return 'It has no modules below it. Write at("", ...) for the model itself.'
    listed = ", ".join(f"{path} ({n})" for path, n in near)
    best = near[0][0]
    general = f" or, for any architecture, at({role_of[best]}, ...)" if best in role_of else ""
    return f'Nearest addresses: {listed}.\nWrite at("{best}", ...){general}.'


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


def _parameters(sites: Iterable[Site]) -> list[nn.Parameter]:
    modules = {id(end.module): end.module for site in sites for end in (site.entry, site.exit)}
    return [p for module in modules.values() for p in module.parameters()]


def _data(rules: list[Rule]) -> str:
    try:
        return json.dumps(encode(rules, words()))
    except FileError:
        return ""
