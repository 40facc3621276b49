"""Rules meet a model: the sites that each matches, or an error that names the nearest there are."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from .._text import first_few
from ..errors import MatchError, RuleError
from ..methods import rules_named
from ..rules.edits import Trained
from ..rules.expression import shown
from ..rules.roles import ROLES, attn, block, embed, ffn, head, norm, qkv
from ..rules.rule import Rule, Rules
from ..rules.selector import Address
from ..structure.anatomy import instead_of_ffns, roles_of
from ..structure.dataflow import dataflow_of
from ..structure.module_tree import Site, Tree
from ..structure.path import closest, generalise

SHOW = " With example=inputs a forward is looked at too, for what modules do not show."


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
        fact = f"matched no module of {kind}"
        if not (isinstance(rule.where, Address) or roles_of(tree)["ffn"]):
            fact += f", which has no feed-forward network: {instead_of_ffns(tree)}"
        raise MatchError(rule.short, f"{fact}.", _advice(rule, tree))
    if sites and rule.times is not None and len(sites) != rule.times:
        paths = [site.path for site in sites]
        raise MatchError(
            rule.short,
            f"matched {len(sites)} sites of {kind}, not times={rule.times}: {first_few(paths)}.",
            f"Write times={len(sites)}, or a narrower or wider place.",
        )
    return sites


def _advice(rule: Rule, tree: Tree) -> str:
    """What to write instead: of roles those that there are, of addresses the nearest."""
    if isinstance(rule.where, Address):
        return _nearest_addresses(rule.where.what, tree)
    roles = roles_of(tree)
    known = ", ".join(f"{role} ({len(roles[role.name])})" for role in ROLES if roles[role.name])
    more = "" if roles["ffn"] or dataflow_of(tree) else SHOW
    return f"Roles found in it: {known or 'none'}. print(surgery.anatomy(model)) shows more.{more}"


def _nearest_addresses(address: str, tree: Tree) -> str:
    roles = roles_of(tree)
    asked_for = (ffn, attn, block, qkv, norm, head, embed)  # most often first
    role_of = {generalise(s.path): role for role in asked_for[::-1] for s in roles[role.name]}
    preferred = [generalise(s.path) for role in asked_for for s in roles[role.name][:1]]
    near = closest(address, (site.path for site in tree.sites), preferred)
    if not near:
        return 'It has no modules below it. Write at("", ...) for the model itself.'
    listed = ", ".join(f"{path} ({n})" for path, n in near)
    best = near[0][0]
    general = f" or, for any architecture, at({role_of[best]}, ...)" if best in role_of else ""
    return f'Nearest addresses: {listed}.\nWrite at("{best}", ...){general}.'


def unfreezing_edits(rule: Rule) -> list[Trained]:
    """The edits of a rule that unfreeze."""
    return [edit for edit in rule.rest if isinstance(edit, Trained) and edit.trained]


def parameters_meant(edit: Trained, sites: Iterable[Site]) -> list[tuple[str, nn.Parameter]]:
    """The parameters at some sites, by path, that an edit speaks of."""
    ends = {id(end.module): end for site in sites for end in (site.entry, site.exit)}
    return [
        (f"{end.path}.{name}".strip("."), p)
        for end in ends.values()
        for name, p in edit.parameters(end.module)
    ]


def check_named(rule: Rule, edit: Trained, sites: Collection[Site]) -> None:
    """Raise MatchError where an edit speaks of parameters that no site of the rule has."""
    for asked in edit.only if sites else ():
        alone = Trained(edit.trained, (asked,))
        if parameters_meant(alone, sites):
            continue
        names = [name for name, _ in parameters_meant(Trained(edit.trained), sites)]
        near = closest(str(asked), names, most=3)
        listed = ", ".join(f"{path} ({n})" for path, n in near) or "none"
        raise MatchError(
            rule.short,
            f"has no parameter for {alone!r}.",
            f"Nearest parameters there: {listed}. A name begins at the site.",
        )
