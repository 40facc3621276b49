"""What a forward decided when a file was made: roles, and places of rules, kept for `load`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

from ..errors import FileError
from ..rules.roles import Role
from ..rules.rule import Rule
from ..rules.selector import Address
from ..rules.walk import selectors_in
from ..structure.anatomy import tell_roles, told_roles
from ..structure.dataflow import dataflow_of
from ..structure.layers import Shape
from ..structure.module_tree import Site, Tree
from ..structure.places import site_at

RolesTold: TypeAlias = dict[str, list[tuple[str, int, int, int]]]  # path, width, out, axis


class Decided(NamedTuple):
    """The rules of a file, the paths that each matched, and the roles that a forward told.

    modules  those on which a forward decided (`modules_of`); "" where none did
    """

    modules: str
    rules: Sequence[str]
    sites: Sequence[Sequence[str]]
    roles: RolesTold = {}  # noqa: RUF012  (a default that nobody writes to)

    def tell(self, tree: Tree) -> None:
        """Let roles be what the forward told, where the model has the same modules."""
        if not (self.roles and self.modules and self.modules == modules_of(tree)):
            return
        told: dict[str, list[Site]] = {}
        for name, described in self.roles.items():
            places = [site_at(tree, path) for path, *_ in described]
            for place, (_, *shape) in zip(places, described, strict=True):
                if place is None:
                    return
                place._shape = Shape(*shape)
            told[name] = [place for place in places if place]
        tell_roles(tree, told)

    def find(self, number: int, rule: Rule, tree: Tree) -> dict[Site, dict[str, str]] | None:
        """The places of one rule, where a forward decided on them; None: it is to be matched.

        They are taken where the rule depends on what feeds what, is written as it was, and meets
        the same modules: then they are what a forward on an example would tell.
        """
        same_modules = self.modules and self.modules == modules_of(tree)
        if not (same_modules and number < len(self.rules) and told_by_forward(rule, tree)):
            return None
        if not self.rules[number].startswith(rule.short.removesuffix("...)")):
            return None
        places = [site_at(tree, path) for path in self.sites[number]]
        found = {place: _captures(rule, place, tree) for place in places if place}
        return found if len(found) == len(places) else None

    def check_edits(self, rules: Iterable[Rule], tree: Tree) -> None:
        """Raise FileError where a forward decided what a part hears, or what it is shared by."""
        for rule in rules if self.modules else ():
            for selector in selectors_in(rule.rest):
                if selector.told_by_forward(tree):
                    raise FileError(
                        rule.short,
                        f"a forward on an example told what {selector!r} is when the file was "
                        "made, and the file does not.",
                        "Give load(..., example=inputs).",
                    )


def roles_told(tree: Tree, rules: Iterable[Rule]) -> RolesTold:
    """The roles, of those that rules speak of, which a forward tells otherwise than modules do."""
    asked = {p.name for rule in rules for p in selectors_in(rule) if isinstance(p, Role)}
    if not asked or (dataflow_of(tree) is None and "told" not in tree.memo):
        return {}
    told = told_roles(tree).items()
    return {name: [(s.path, *s.shape) for s in sites] for name, sites in told if name in asked}


def modules_of(tree: Tree) -> str:
    """A short text that is the same for trees with modules at the same paths."""
    paths = "\n".join(site.path for site in tree.sites)
    return hashlib.sha256(paths.encode()).hexdigest()[:16]


def told_by_forward(rule: Rule, tree: Tree) -> bool:
    """Whether a forward could choose other places for a rule than the order of modules does."""
    return any(selector.told_by_forward(tree) for selector in selectors_in(rule.where))


def _captures(rule: Rule, place: Site, tree: Tree) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern in selectors_in(rule.where):
        if isinstance(pattern, Address):
            found |= pattern.test(tree, place) or {}
    return found
