"""Rules meet a model: the sites that each matches, or an error that names the nearest there are."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from .._text import first_few
from ..errors import MatchError, RuleError
from ..methods import rules_named
from ..rules.edits import Insert, Trained
from ..rules.expression import shown
from ..rules.roles import ROLES, attn, block, embed, ffn, head, norm, qkv
from ..rules.rule import Rule, Rules
from ..rules.selector import Address
from ..structure.anatomy import instead_of_ffns, roles_of
from ..structure.dataflow import dataflow_of
from ..structure.layers import keeps_statistics
from ..structure.module_tree import Site, Tree
from ..structure.path import closest, generalise
from .placement import Placement
from .tokens import Tokens, tokens_at

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
    return [rule for each in rules for rule in flatten_rules(each)]


def match_rule(rule: Rule, tree: Tree) -> dict[Site, dict[str, str]]:
    found = rule.where.find(tree)
    kind = type(tree.model).__name__
    if not found and not rule.optional:
        fact = f"matched no module of {kind}"
        if not (isinstance(rule.where, Address) or roles_of(tree)["ffn"]):
            fact += f", which has no feed-forward network: {instead_of_ffns(tree)}"
        raise MatchError(rule.short, f"{fact}.", _advice(rule, tree))
    if found and rule.times is not None and len(found) != rule.times:
        paths = [site.path for site in found]
        raise MatchError(
            rule.short,
            f"matched {len(found)} sites of {kind}, not times={rule.times}: {first_few(paths)}.",
            f"Write times={len(found)}, or a narrower or wider place.",
        )
    return found


def _advice(rule: Rule, tree: Tree) -> str:
    roles = roles_of(tree)
    if not isinstance(rule.where, Address):
        known = ", ".join(f"{role} ({len(roles[role.name])})" for role in ROLES if roles[role.name])
        more = "" if roles["ffn"] or dataflow_of(tree) else SHOW
        return (
            f"Roles found in it: {known or 'none'}. print(surgery.anatomy(model)) shows more.{more}"
        )
    asked_for = (ffn, attn, block, qkv, norm, head, embed)  # most often first
    role_of = {generalise(s.path): role for role in asked_for[::-1] for s in roles[role.name]}
    preferred = [generalise(s.path) for role in asked_for for s in roles[role.name][:1]]
    near = closest(rule.where.what, (site.path for site in tree.sites), preferred)
    if not near:
        return 'It has no modules below it. Write at("", ...) for the model itself.'
    listed = ", ".join(f"{path} ({n})" for path, n in near)
    best = near[0][0]
    general = f" or, for any architecture, at({role_of[best]}, ...)" if best in role_of else ""
    return f'Nearest addresses: {listed}.\nWrite at("{best}", ...){general}.'


def training(rule: Rule) -> list[Trained]:
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
    for each in edit.only if sites else ():
        alone = Trained(edit.trained, (each,))
        if parameters_meant(alone, sites):
            continue
        held = [name for name, _ in parameters_meant(Trained(edit.trained), sites)]
        near = closest(str(each), held, most=3)
        listed = ", ".join(f"{path} ({n})" for path, n in near) or "none"
        raise MatchError(
            rule.short,
            f"has no parameter for {alone!r}.",
            f"Nearest parameters there: {listed}. A name begins at the site.",
        )


def statistics(tree: Tree, trained: Collection[int]) -> list[tuple[Site, bool]]:
    """The norms with running statistics, and whether each is frozen: none of its parameters is
    among the trained, told by id; or, where it has none, not all of those around it are."""
    return [
        (site, not _is_trained(site, trained))
        for site in tree.sites
        if keeps_statistics(site.module)
    ]


def _is_trained(norm: Site, trained: Collection[int]) -> bool:
    if own := list(norm.module.parameters()):
        return any(id(p) in trained for p in own)
    around = (list(site.module.parameters()) for site in norm.above())
    nearest = next((found for found in around if found), [])
    return bool(nearest) and all(id(p) in trained for p in nearest)


def tokens_of(placed: list[Placement], tree: Tree) -> dict[Placement, Tokens]:
    """How each place is given tokens that an edit inserts there."""
    edits = [(p, p.edit) for p in placed if isinstance(p.edit, Insert)]
    return {p: tokens_at(p.place, tree, edit.after, p.rule.short) for p, edit in edits}


def heard_from(placed: list[Placement], tree: Tree) -> dict[Placement, Placement]:
    """For each place that hears a part, the last before it that is joined where it listens."""
    edits = [(p, p.edit.hears) for p in placed if isinstance(p.edit, Insert) and p.edit.hears]
    found: dict[Placement, Placement] = {}
    for p, heard in edits:
        sites, first = heard.find(tree), p.place.entry.order
        tell = [o for o in placed if o.edit.tells and o.place in sites]
        tell = [o for o in tell if o.place.exit.end <= first]
        tower = p.place.entry.parent if p.place.entry.is_element else None
        earlier = [o for o in tell if tower is None or tower in set(o.place.entry.above())]
        if not earlier:
            raise RuleError(
                p.rule.short,
                f"before {p.site.path} no rule joins a part at {heard!r} that it could hear.",
                "Join one there, or leave the first places out: block[1:].",
            )
        found[p] = max(reversed(earlier), key=lambda other: other.place.exit.order)
    return found
