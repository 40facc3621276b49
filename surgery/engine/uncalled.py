"""Places that nobody calls: where a forward tells what they take and give, parts run there too."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from ..errors import RuleError
from ..rules.edits import Insert
from ..rules.roles import block as BLOCK
from ..structure.dataflow import Dataflow, dataflow_of
from ..structure.layers import forward_of
from ..structure.module_tree import Site, Tree
from ..structure.stretches import Stretch, is_called, is_met, stretch_of
from ..structure.weights import ParameterSite, reads_its_projection
from .placement import Placement, Spot
from .tokens import WRAPPING

EXAMPLE = "Give example=inputs: a forward may tell what it takes and what it gives. Or put"
Stretches: TypeAlias = dict[Spot, Stretch]  # by the spot of their placements


def stretches_of(placements: list[Placement], tree: Tree) -> Stretches:
    """What the places of parts are in a forward, where hooks on their own modules do not do.

    Raises RuleError where a forward does not tell either.
    """
    dataflow = dataflow_of(tree)
    placements = [p for p in placements if not isinstance(p.place, ParameterSite)]
    for p in placements if dataflow is None else ():
        _check_told(p, tree)
    places = {p.spot: p for p in placements if dataflow and p.edit.place not in WRAPPING}
    found = {spot: _stretch(p, dataflow) for spot, p in places.items() if dataflow}
    return {spot: stretch for spot, stretch in found.items() if stretch}


def _stretch(p: Placement, dataflow: Dataflow) -> Stretch | None:
    """What it is, where nobody calls it; None where hooks on its modules do."""
    called = is_called(p.place)
    if called and not _adds_up_outside(p, dataflow):
        return None
    try:
        return stretch_of(dataflow.trace, p.place)
    except LookupError as error:
        if called:
            return None
        raise _uncalled(p, p.place.entry, error.args[0], "") from None


def _adds_up_outside(p: Placement, dataflow: Dataflow) -> bool:
    """Whether tokens would miss a residual sum, which is that of whoever calls its modules.

    (Attentions and feed-forward networks in turn.)
    """
    inserts = p.edit.place in ("into", "among")
    return inserts and p.place.is_span and dataflow.asked and not is_met(dataflow.trace, p.place)


def _check_told(p: Placement, tree: Tree) -> None:
    """Raise RuleError where tokens pass sums that whoever calls blocks of several elements makes.

    (Attentions and feed-forward networks in turn.) Within one block alone nothing hears them behind
    the sum that they miss.
    """
    blocks = list(BLOCK.find(tree)) if p.place.is_span and isinstance(p.edit, Insert) else []
    lists = [block.entry.parent for block in blocks if block.is_span and block.entry.is_element]
    if p.place.entry.parent in lists and (p.place not in blocks or p.edit.place == "into"):
        raise RuleError(
            p.rule.short,
            f"a block is several elements of a list there, {blocks[0].path}, and only a forward "
            "tells who adds up what they give: tokens may miss those sums.",
            "Give example=inputs.",
        )


def check_called(placements: list[Placement], stretches: Stretches) -> None:
    """Raise RuleError where a part could never run: the model never calls the module it is at."""
    for p in placements:
        for end in (p.site.entry, p.site.exit) if not isinstance(p.site, ParameterSite) else ():
            parent = end.parent.module if end.parent and not end.aliases else None
            if (
                parent is not None
                and reads_its_projection(parent)
                and end.steps[-1].name == "out_proj"
            ):
                raise _unread(p, end)
            if p.spot not in stretches and forward_of(end.module) is nn.Module.forward:
                raise _uncalled(p, end, "", "" if p.edit.place in WRAPPING else EXAMPLE)


def _uncalled(p: Placement, end: Site, why: str, example: str) -> RuleError:
    """The error of a part that nothing would run; why, where a forward shows no other way."""
    inner = f"{end.path}.*".lstrip(".")
    fact = "so a part there would never run"
    if why:
        fact = f"and a forward on the example does not tell where a part there would act: {why}"
    return RuleError(
        p.rule.short,
        f"{end.path or 'the model'} is a {type(end.module).__name__}, which holds modules and is "
        f"never called, {fact}.",
        f'{example or "Put"} the rule on what it holds: at("{inner}", ...).',
    )


def _unread(p: Placement, projection: Site) -> RuleError:
    holder = projection.path.rpartition(".")[0]
    return RuleError(
        p.rule.short,
        f"nn.MultiheadAttention reads the weight of {projection.path} without calling it, so a "
        "part there would never run.",
        f'Put the rule on the attention itself, at("{holder}", ...), or leave its projection out '
        "with & ~inside(nn.MultiheadAttention). unfreeze works there.",
    )
