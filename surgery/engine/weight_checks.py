"""What may stand at a parameter: linear parts alone, without dropout on features."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..errors import RuleError
from ..rules.affine import affine
from ..rules.expression import shown
from ..structure.memory import own_form
from ..structure.weights import ParameterSite
from .placement import Placement
from .tokens import LINEAR


def check_weights(placements: Iterable[Placement], parts: Mapping[str, nn.Module]) -> None:
    """Raise RuleError where a part cannot stand at a parameter; the parts are sketches or real."""
    for p in placements:
        if isinstance(p.site, ParameterSite):
            _check(p, p.site, parts[p.key])


def _check(p: Placement, site: ParameterSite, part: nn.Module) -> None:
    _check_numbers(p, site)
    if p.edit.place not in LINEAR:
        raise _refused(p, f"{p.edit.word} acts on features, and {site.path} is a weight")
    if p.edit.hears is not None:
        raise _refused(p, f"its part hears features, and {site.path} is a weight")
    weight, map = site.parameter, affine(part)
    if map is None:
        raise _refused(p, f"{type(part).__name__} is not linear, so no weight is made by it")
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in part.modules()):
        raise _refused(p, "a dropout acts on features, which a weight does not meet (dropout=0.0)")
    if map.bias is not None and not site.bias:
        fact = f"{type(part).__name__} adds a bias, and {site.path} has none beside it"
        raise _refused(p, fact, "Leave it out, & ~where(nn.Parameter), or use lora.")
    if weight.dim() == 1 and map.weight.dim() != 1:
        raise _refused(p, f"{type(part).__name__} is a matrix, and {site.path} is a vector")


def _check_numbers(p: Placement, site: ParameterSite) -> None:
    """Raise RuleError where there are no numbers to add to, or no such rows."""
    weight = site.parameter
    kind = own_form(weight) or ("" if weight.is_floating_point() else str(weight.dtype))
    if kind:
        fact = f"{site.path} is a {kind}, which holds no numbers to add to."
        raise RuleError(p.rule.short, fact, "Operate before it is quantised or sharded.")
    if site.rows is not None and site.rows.stop > len(weight):
        fact = f"{site.path} ends beyond the {len(weight)} rows that there are."
        raise RuleError(p.rule.short, fact, f"Give rows up to {len(weight)}.")


LINEAR_PART = (
    "Use a linear part there (lora, scale_shift), or put this one on a module that is called."
)


def _refused(p: Placement, fact: str, remedy: str = LINEAR_PART) -> RuleError:
    fact = f"{fact}: {shown(p.edit)} cannot stand at {p.site.path}."
    return RuleError(p.rule.short, fact, remedy)
