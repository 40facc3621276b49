"""Rules meet a model: the sites that each matches, or an error that names the nearest there are."""

from __future__ import annotations

from collections.abc import Iterator

from .._text import first_few
from ..errors import MatchError, RuleError
from ..methods import rules_named
from ..rules.expression import shown
from ..rules.rule import Rule, Rules
from ..rules.selector import Address, Chosen, where
from ..rules.walk import selectors_in
from ..structure.module_tree import Site, Tree
from ..structure.path import alternatives, without_slices
from .nothing_found import nothing_named, why_nothing


def flatten_rules(rules: Rules) -> list[Rule]:
    """Rules as one list, names looked up. Raises RuleError on what is no rule."""
    if isinstance(rules, Rule):
        return [rules]
    if isinstance(rules, str):
        return rules_named(rules)
    if not isinstance(rules, (list, tuple)) or not rules:
        raise RuleError(
            f"rules={shown(rules)}",
            "this is no rule, no name of a rule set, and no list of either.",
            'Write rules="adapterx_ffn", or rules=[at(ffn, parallel(adapter(rank=8)))].',
        )
    return [rule for some in rules for rule in flatten_rules(some)]


def match_rule(rule: Rule, tree: Tree) -> dict[Site, dict[str, str]]:
    """The sites that a rule selects, with what each captured. Raises MatchError."""
    sites = rule.where.find(tree)
    kind = type(tree.model).__name__
    if not sites and not rule.optional:
        raise why_nothing(rule, tree)
    if sites and rule.times is not None and len(sites) != rule.times:
        paths = [site.path for site in sites]
        raise MatchError(
            rule.short,
            f"matched {len(sites)} sites of {kind}, not times={rule.times}: {first_few(paths)}.",
            f"Write times={len(sites)}, or a narrower or wider place.",
        )
    return sites


def check_written(rule: Rule, tree: Tree) -> None:
    """Raise MatchError where a name or a position that a rule writes out is of no module.

    A whole address without a match is the business of the rule; a role, a class, a predicate may
    come to nothing beside others, and so may a slice, as Python's do.
    """
    for pattern in () if rule.optional else selectors_in(rule):
        if isinstance(pattern, Address):
            for text in _unmatched(pattern, tree, whole=pattern is rule.where):
                raise nothing_named(rule, text, tree)
        elif isinstance(pattern, Chosen) and pattern.is_beyond(tree):
            there = len(pattern.pattern.find(tree))
            raise MatchError(
                rule.short,
                f"says {pattern!r}, and {pattern.pattern!r} selects {there} sites of "
                f"{type(tree.model).__name__}, counted from 0.",
                f"Write [{there - 1}] or [-1] for the last, leave it out, or add optional=True.",
            )


def _unmatched(pattern: Address, tree: Tree, whole: bool) -> Iterator[str]:
    """The addresses, one for each name in braces, that are of no module."""
    if pattern.find(tree):
        yield from (arm for _, arm in alternatives(pattern.what) if not where(arm).find(tree))
    elif not whole and not where(without_slices(pattern.what)).find(tree):
        yield pattern.what
