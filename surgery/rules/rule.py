"""A rule: where, and what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ..errors import RuleError, is_integer
from .edits import Edit, usual
from .expression import Expression, shown
from .part import Part, Shared, call_of, is_torch_layer
from .selector import Selector, Where, plain, where

Rules: TypeAlias = "str | Rule | Sequence[str | Rule]"


@dataclass(frozen=True, repr=False)
class Rule(Expression):
    """What `at` makes: a pattern, the edits to do where it matches, and how often it must."""

    where: Selector
    rest: tuple[Edit, ...]
    times: int | None = field(default=None, kw_only=True)
    optional: bool = field(default=False, kw_only=True)

    @property
    def word(self) -> str:
        return "at"

    def arguments(self) -> tuple[tuple[object, ...], dict[str, object]]:
        given, named = super().arguments()
        return (plain(self.where), *given[1:]), named

    @property
    def short(self) -> str:
        """The rule as errors name it: the place alone."""
        return f"at({shown(plain(self.where))}, ...)"


def at(
    where_: Where, *edits: Edit | Part | Shared, times: int | None = None, optional: bool = False
) -> Rule:
    """Do `edits` at every site that `where_` selects.

    where_    an address ("blocks.*.mlp"), a role (ffn), a class, a predicate, or any mix of these
    edits     parallel, append, prepend, replace, insert, freeze, unfreeze; at one site in rule
              order; or a part that is mostly joined in one way: lora(), prompt(), scale_shift()
    times     how many sites must match; None: at least one
    optional  no match is no error

    Raises RuleError where it makes no sense in itself.

    >>> from torch import nn
    >>> from surgery.rules.edits import unfreeze
    >>> at("blocks.*.norm2", unfreeze, times=12)
    at("blocks.*.norm2", unfreeze, times=12)
    """
    joined = tuple(map(usual, edits))
    rule = Rule(where(where_), joined, times=times, optional=optional)  # type: ignore[arg-type]
    for edit in joined:
        if not isinstance(edit, Edit):
            raise RuleError(rule.short, f"{shown(edit)} is no edit.", _remedy(edit))
    if not edits:
        raise RuleError(rule.short, "it says where, but not what.", "Add unfreeze, for example.")
    if times is not None and not is_integer(times):
        raise RuleError(
            rule.short, f"times={times!r} is no number of matches.", "Give an integer from 1 up."
        )
    return rule


def _remedy(edit: object) -> str:
    if isinstance(edit, (Part, Shared, type)):
        part = f"lambda site: {call_of(edit)}" if is_torch_layer(edit) else shown(edit)
        return f"A part needs an edit that says how it meets the site: parallel({part})."
    return "Give parallel(part), append, prepend, replace or insert, or freeze or unfreeze."
