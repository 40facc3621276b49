"""Why a rule matched nothing, and what to write instead."""

from __future__ import annotations

from ..errors import MatchError
from ..rules.edits import Trained
from ..rules.roles import ROLES, attn, block, embed, ffn, head, norm, qkv
from ..rules.rule import Rule
from ..rules.selector import Address
from ..rules.weights import Weight
from ..structure.anatomy import instead_of_ffns, roles_of
from ..structure.dataflow import dataflow_of
from ..structure.module_tree import Tree
from ..structure.path import Step, closest, generalise, match, split_span
from .summary import places

SHOW = " With example=inputs a forward is looked at too, for what modules do not show."


def why_nothing(rule: Rule, tree: Tree) -> MatchError:
    """The error of a rule that selects no site."""
    kind = type(tree.model).__name__
    fact = f"matched no module of {kind}"
    if isinstance(rule.where, Address):
        return _nothing_at(rule, rule.where.what, fact, tree)
    if isinstance(rule.where, Weight):
        return _no_parameter(rule, rule.where.address, tree)
    if not roles_of(tree)["ffn"]:
        fact += f", which has no feed-forward network: {instead_of_ffns(tree)}"
    return MatchError(rule.short, f"{fact}.", _roles_there(tree))


def nothing_named(rule: Rule, address: str, tree: Tree) -> MatchError:
    """The error of a rule that writes an address, among others, which is of no module."""
    fact = f'says "{address}", which matches no module of {type(tree.model).__name__}'
    told = _nothing_at(rule, address, fact, tree)
    if _named_so(address, tree):
        return told
    near = told.remedy.partition("\n")[0]
    remedy = f"{near}\nWrite one of these, leave the name out, or add optional=True."
    return MatchError(rule.short, f"{fact}.", remedy)


def _nothing_at(rule: Rule, address: str, fact: str, tree: Tree) -> MatchError:
    if named := _named_so(address, tree):
        return _a_parameter(rule, address, fact, named)
    return MatchError(rule.short, f"{fact}.", _nearest_addresses(address, tree))


def _roles_there(tree: Tree) -> str:
    roles = roles_of(tree)
    known = ", ".join(f"{role} ({len(roles[role.name])})" for role in ROLES if roles[role.name])
    more = "" if roles["ffn"] or dataflow_of(tree) else SHOW
    return f"Roles found in it: {known or 'none'}. print(surgery.anatomy(model)) shows more.{more}"


def _nearest_addresses(address: str, tree: Tree) -> str:
    roles = roles_of(tree)
    asked_for = (ffn, attn, block, qkv, norm, head, embed)  # most often first
    role_of = {generalise(s.path): role for role in asked_for[::-1] for s in roles[role.name]}
    preferred = [generalise(s.path) for role in asked_for for s in roles[role.name][:1]]
    spans = [s for role in asked_for for s in roles[role.name] if s.is_span]
    sites = [*tree.sites, *spans] if split_span(address) else tree.sites
    near = closest(address, (site.path for site in sites), preferred)
    if not near:
        return 'It has no modules below it. Write at("", ...) for the model itself.'
    listed = ", ".join(f"{path} ({n})" for path, n in near)
    best = near[0][0]
    general = f" or, for any architecture, at({role_of[best]}, ...)" if best in role_of else ""
    return f'Nearest addresses: {listed}.\nWrite at("{best}", ...){general}.'


def _named_so(address: str, tree: Tree) -> list[str]:
    """The parameters that have an address, which should have been that of a module."""
    named = (
        (*site.steps, Step(name, 0, 1))
        for site in tree.sites
        for name, tensor in site.module._parameters.items()
        if tensor is not None
    )
    return [".".join(s.name for s in steps) for steps in named if match(address, steps) is not None]


def _a_parameter(rule: Rule, address: str, fact: str, named: list[str]) -> MatchError:
    holder, _, name = address.rpartition(".")
    word = next((edit.word for edit in rule.rest if isinstance(edit, Trained)), "unfreeze")
    those = f"{named[0]} is a parameter" if len(named) == 1 else f"{places(named)} are parameters"
    return MatchError(
        rule.short,
        f"{fact}: {those}.",
        f'Write at("{holder}", {word}("{name}")), or, for a part, at(weight("{address}"), ...).',
    )


def _no_parameter(rule: Rule, address: str, tree: Tree) -> MatchError:
    """The error of an address of parameters that is of none."""
    names = [f"{s.path}.{n}".lstrip(".") for s in tree.sites for n in s.module._parameters]
    near = closest(address, names, [])
    listed = ", ".join(f"{path} ({n})" for path, n in near)
    remedy = f'Nearest addresses: {listed}.\nWrite at(weight("{near[0][0]}"), ...).' if near else ""
    return MatchError(
        rule.short,
        f"matched no parameter of {type(tree.model).__name__}.",
        remedy or "It has none.",
    )
