"""Laws of places that are parameters. m is the model, S the operated one."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._preserve import fingerprint
from ..engine.hooked_weights import HookedWeight, Read
from .case import SEEDS, Case, operation
from .laws import Draw, applies, holds
from .snapshot import equal, ties, unchanged


def weights_are_theirs_outside(case: Case, draw: Draw) -> None:
    """Outside of what computes with it W is W to the bit; inside it is what parts make of it.

    One that modules share stays one; and made twice it is the same.
    """
    model = case.operated(stirred=draw(SEEDS, "seed"))
    hooked = [h for h in operation(model).hooked_sites if isinstance(h, HookedWeight)]
    applies(hooked, "no part stands at a parameter")
    shared, before = ties(model), fingerprint(model)
    inside: dict[tuple[int, str], Tensor] = {}
    readers = {id(read.reader): read.reader for each in hooked for read in each.reads}
    for reader in readers.values():
        reads = [r for each in hooked for r in each.reads if r.reader is reader]
        reader.register_forward_pre_hook(partial(_note, reads, inside))
    case.outputs(model)
    for each, read in [(h, read) for h in hooked for read in h.reads]:
        own = read.holder._parameters[read.name]
        holds(getattr(read.holder, read.name) is own, f"{each.path} is not itself afterwards")
        now = inside[id(read.holder), read.name]
        holds(not torch.equal(now, each.parameter), f"{each.path} is read without its parts")
        made = [each.made(each._now(each.reads[0]))[each.reads[0].name] for _ in range(2)]
        equal([made[0]], [made[1]], f"{each.path}, made twice")
        alone = sum(h.parameter is each.parameter for h in hooked) == 1
        holds(not alone or torch.equal(made[0], now), f"{each.path} is read otherwise than made")
    holds(ties(model) == shared, "parameters that are one are not one any more")
    unchanged(before, fingerprint(model), "a forward", but=("random", "hooks"))


def _note(reads: list[Read], inside: dict[tuple[int, str], Tensor], *given: Any) -> None:
    """Keep what a reader reads."""
    for read in reads:
        inside[id(read.holder), read.name] = getattr(read.holder, read.name).detach().clone()


LAWS = (weights_are_theirs_outside,)
