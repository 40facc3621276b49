"""Places that nobody calls: where a forward tells what they take and give, parts run there too."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from ..errors import RuleError
from ..structure.dataflow import Dataflow, dataflow_of
from ..structure.layers import forward_of
from ..structure.module_tree import Site, Tree
from ..structure.stretches import Stretch, is_called, is_met, stretch_of
from .placement import Placement

EXAMPLE = "Give example=inputs: a forward may tell what it takes and what it gives. Or put"
Stretches: TypeAlias = dict[tuple[int, int], Stretch]  # by the spot of their placements


def stretches_of(placements: list[Placement], tree: Tree) -> Stretches:
    """What the places of parts are in a forward, where hooks on their own modules do not do.

    Raises RuleError where a forward does not tell either.
    """
    dataflow = dataflow_of(tree)
    places = {p.spot: p for p in placements if dataflow and p.edit.place != "instead"}
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
        raise _uncalled(p, p.place.entry, f": {error.args[0]}", "") from None


def _adds_up_outside(p: Placement, dataflow: Dataflow) -> bool:
    """Whether tokens would miss a residual sum, which is that of whoever calls its modules.

    (Attentions and feed-forward networks in turn.)
    """
    inserts = p.edit.place in ("into", "among")
    return inserts and p.place.is_span and dataflow.asked and not is_met(dataflow.trace, p.place)


def check_called(placements: list[Placement], stretches: Stretches) -> None:
    """Raise RuleError where a part could never run: the model never calls the module it is at."""
    for p in placements:
        for end in (p.site.entry, p.site.exit):
            parent = end.parent.module if end.parent and not end.aliases else None
            if _reads_its_projection(parent) and end.steps[-1].name == "out_proj":
                raise _unread(p, end)
            if p.spot not in stretches and forward_of(end.module) is nn.Module.forward:
                raise _uncalled(p, end, "", "" if p.edit.place == "instead" else EXAMPLE)


def _uncalled(p: Placement, end: Site, why: str, example: str) -> RuleError:
    inner = f"{end.path}.*".lstrip(".")
    return RuleError(
        p.rule.short,
        f"{end.path or 'the model'} is a {type(end.module).__name__}, which holds modules and is "
        f"never called, so a part there would never run{why}.",
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


def _reads_its_projection(module: nn.Module | None) -> bool:
    return module is not None and forward_of(module) is nn.MultiheadAttention.forward
