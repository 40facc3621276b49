"""Which tensors of the base rules leave trained, and which of them take no gradient."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import MatchError, RuleError
from ..rules.edits import Token, Trained
from ..rules.expression import shown
from ..rules.rule import Rule
from ..structure.layers import named_modules
from ..structure.module_tree import Site
from ..structure.path import alternatives, closest, generalise
from ..structure.quantised import is_packed, is_quantised
from ..structure.weights import ParameterSite
from .summary import places


class Meant(NamedTuple):
    """What a rule unfreezes: a parameter, or a module whose weights are none."""

    rule: Rule
    path: str
    what: Tensor | nn.Module

    @property
    def takes_no_gradient(self) -> bool:
        return isinstance(self.what, nn.Module) or is_quantised(self.what)


def unfrozen_by(
    matches: Iterable[tuple[Rule, Collection[Site]]], check_braces: bool = True
) -> tuple[set[int], list[str]]:
    """Ids of the base parameters that rules leave trained, where the last word counts; notes.

    check_braces  each name of several in braces must be there, too

    Raises MatchError where a rule names a parameter that is not there, and RuleError where it
    unfreezes what takes no gradient; of an optional rule that is a note.
    """
    chosen = _chosen(matches, check_braces)
    quantised = [m for m in chosen if m.takes_no_gradient]
    for m in quantised:
        if not m.rule.optional:
            raise _no_gradient(m.rule, [other for other in quantised if other.rule is m.rule])
    left = [m.path for m in quantised]
    notes = [f"quantised, so it stays frozen: {places(left)}"] if left else []
    skip = {id(m.what) for m in quantised}
    floating = (m.what for m in chosen if isinstance(m.what, Tensor) and m.what.is_floating_point())
    return {id(p) for p in floating} - skip, notes


def _chosen(
    matches: Iterable[tuple[Rule, Collection[Site]]], check_braces: bool
) -> Collection[Meant]:
    """What rules leave unfrozen, of all kinds, each by the last rule that says so."""
    chosen: dict[int, Meant] = {}
    edits = ((rule, edit, sites) for rule, sites in matches for edit in rule.rest)
    for rule, edit, sites in edits:
        if not isinstance(edit, Trained):
            continue
        meant = {id(what): Meant(rule, path, what) for path, what in _meant(edit, sites)}
        if not rule.optional:
            check_named(rule, edit, sites, check_braces)
        if edit.trained:
            chosen |= meant
        else:
            chosen = {key: m for key, m in chosen.items() if key not in meant}
    return chosen.values()


def _no_gradient(rule: Rule, quantised: list[Meant]) -> RuleError:
    path, what = quantised[0].path, quantised[0].what
    more = f" (and {len(quantised) - 1} more)" if quantised[1:] else ""
    modules = sorted({generalise(m.path) for m in quantised if isinstance(m.what, nn.Module)})
    tensors = sorted({generalise(m.path) for m in quantised if isinstance(m.what, Tensor)})
    freezing = [f'at("{address}", freeze)' for address in modules]
    if tensors:
        freezing.append(f'at("", freeze({", ".join(map(shown, tensors))}))')
    kind = what.dtype if type(what) is nn.Parameter else type(what).__name__
    return RuleError(
        rule.short,
        f"{path}{more} is quantised ({kind}), and no gradient comes to it.",
        f"Leave it out, by optional=True or after this rule by {', '.join(freezing)}; or "
        "dequantise it first.",
    )


def unfreezing_edits(rule: Rule) -> list[Trained]:
    """The edits of a rule that unfreeze."""
    return [edit for edit in rule.rest if isinstance(edit, Trained) and edit.trained]


def parameters_meant(edit: Trained, sites: Iterable[Site]) -> list[tuple[str, nn.Parameter]]:
    """The parameters at some sites, by path, that an edit speaks of."""
    return [
        (f"{path}.{name}".strip("."), p)
        for end in _ends(sites)
        for path, name, p in _parameters(edit, end)
    ]


def _parameters(edit: Trained, end: Site) -> list[tuple[str, str, nn.Parameter]]:
    """Those at one site, with the path of what holds them: of a weight itself and its bias."""
    named = edit.parameters(end.module)
    if not isinstance(end, ParameterSite):
        return [(end.path, name, p) for name, p in named]
    if end.rows is not None and edit.trained:
        raise RuleError(
            f"at({end.path}, {edit!r})",
            "some rows of a parameter cannot be trained alone, and the others be frozen.",
            "Train all of it, at(qkv, unfreeze), or put a part at the rows.",
        )
    holder = end.parent.path if end.parent else ""
    return [(holder, name, p) for name, p in named if name in (end.name, end.bias)]


def _meant(edit: Trained, sites: Collection[Site]) -> Iterator[tuple[str, Tensor | nn.Module]]:
    """The parameters that an edit speaks of, and the modules whose weights are no parameters."""
    yield from parameters_meant(edit, sites)
    for end in [] if edit.only else _ends(sites):
        for path, module in () if isinstance(end, ParameterSite) else named_modules(end.module):
            if is_packed(module):
                yield f"{end.path}.{path}".strip("."), module


def _ends(sites: Iterable[Site]) -> Sequence[Site]:
    ends = [end for site in sites for end in (site.entry, site.exit)]
    return list({(id(end.module), getattr(end, "name", "")): end for end in ends}.values())


def check_named(rule: Rule, edit: Trained, sites: Collection[Site], check_braces: bool) -> None:
    """Raise MatchError where an edit speaks of parameters that no site of the rule has."""
    for asked in edit.only if sites else ():
        names = [] if isinstance(asked, Token) else [name for _, name in alternatives(asked)]
        for name in (asked, *(names if check_braces else ())):
            alone = Trained(edit.trained, (name,))
            if not parameters_meant(alone, sites):
                raise _no_parameter(rule, alone, sites)


def _no_parameter(rule: Rule, edit: Trained, sites: Collection[Site]) -> MatchError:
    names = [name for name, _ in parameters_meant(Trained(edit.trained), sites)]
    near = closest(str(edit.only[0]), names, most=3)
    listed = ", ".join(f"{path} ({n})" for path, n in near) or "none"
    return MatchError(
        rule.short,
        f"has no parameter for {edit!r}.",
        f"Nearest parameters there: {listed}. A name begins at the site.",
    )
