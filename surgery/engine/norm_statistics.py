"""Norms with running statistics: they count only where an operation that is active trains them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from types import MethodType
from typing import Any

from torch import nn

from ..structure.layers import keeps_statistics
from ..structure.module_tree import Site, Tree
from .journal import Journal, owner_of
from .operation import Operation, operations
from .switch import Switch

METHODS = ("train", "reset_running_stats")  # those of a norm that are taken the place of


class Statistics:
    """Methods in place of a norm's own: where nobody trains it, it stays in eval mode, and keeps
    its statistics.

    Of a plain object, so that a copy of the model gets its own.
    """

    def __init__(self, norm: nn.Module, switch: Switch) -> None:
        self.norm, self.switch = norm, switch
        self.own = {name: vars(norm)[name] for name in METHODS if name in vars(norm)}

    def train(self, mode: bool = True) -> nn.Module:
        if self._count():
            trained: nn.Module = self._base("train")(mode)
            return trained
        for child in self.norm.children():  # an activation, a dropout (timm's BatchNormAct2d)
            child.train(mode)
        self.norm.training = False  # whoever has set it
        return self.norm

    def reset_running_stats(self) -> None:
        """Nothing: torch's update_bn would reset what it then cannot count."""
        if self._count():
            self._base("reset_running_stats")()

    def _count(self) -> bool:
        """Whether statistics are the norm's to change."""
        switch: Any = self.switch
        return switch.undone or is_live(self.norm, operations(switch.model[0]))

    def _base(self, name: str) -> Any:
        """The method that it took the place of."""
        return self.own.get(name) or MethodType(getattr(type(self.norm), name), self.norm)


def is_live(norm: nn.Module, done: Iterable[Operation]) -> bool:
    """Whether an operation that is active trains a norm."""
    return any(op.strength and op.is_trained and norm in op.norms for op in done)


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


def guard(operation: Operation, tree: Tree, trained: Collection[int], own: Collection[int]) -> None:
    """Let norms count, or not, whatever train() says, from the application of an operation.

    Frozen, their statistics would go on drifting, and what is saved would not reproduce.

    trained  the parameters of the model, by id, that are; own: those that its rules name
    """
    (model,) = operation.model
    done = operations(model)
    theirs = [norm for op in done for norm in op.norms]
    mine = [site.module for site, frozen in statistics(tree, own) if not frozen]
    norms = [(site.module, frozen) for site, frozen in statistics(tree, trained)]
    by_hand = [norm for norm, frozen in norms if not frozen and norm not in theirs]
    operation.norms = [*dict.fromkeys([*mine, *by_hand])]
    for norm, _ in norms:
        if not is_guarded(norm):
            methods = Statistics(norm, operation)
            for name in METHODS:
                operation.journal.set(norm, name, getattr(methods, name))
        training = model.training and is_live(norm, done)
        operation.journal.set(norm, "training", training)


def is_guarded(norm: nn.Module) -> bool:
    """Whether an operation says when it counts."""
    methods = owner_of(vars(norm).get("train"))
    return isinstance(methods, Statistics) and not methods.switch.undone


def follow(done: Sequence[Operation], journal: Journal) -> None:
    """Let norms count, or not, as operations are active now, and trained."""
    for norm in dict.fromkeys(norm for op in done for norm in op.norms):
        live = is_live(norm, done) and any(model.training for op in done for model in op.model)
        if norm.training is not live:
            journal.set(norm, "training", live)
