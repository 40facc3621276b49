"""The parts of a plan, built: a shared one once, at whatever sites and inside whatever parts.

A part that is built out of others (ARC's projections, VeRA's frozen matrices) asks for them with
the site it is built for. What it borrows has a key of its own in the operation: it is used by all
that borrow it, and stored once.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from .._preserve import preserved
from ..rules.expression import shown
from ..rules.part import Maker, Shared
from ..structure.module_tree import Site
from .placement import PartNames, Placement


class BuiltParts:
    """What is built for placements, by key; `seed` None: sketches on the meta device.

    borrowed  by the key of a part, the keys of the shared parts inside it
    makers    by the key of a part, what made it
    """

    def __init__(self, placements: list[Placement], names: PartNames, seed: int | None) -> None:
        self.names, self.seed = names, seed
        self.parts: dict[str, nn.Module] = {}
        self.makers: dict[str, Maker] = {}
        self.borrowed: dict[str, list[str]] = {}
        foreign = {id(module) for module in names.tree.model.modules()}
        self._foreign = foreign
        for p in placements:
            p.foreign, p.site.borrow = foreign, partial(self._borrow, p)
            if p.key not in self.parts:
                self._put(p.key, p.sketch() if seed is None else p.make(seed), p.edit.part)

    def _put(self, key: str, part: nn.Module, maker: Maker) -> None:
        self.parts[key] = part
        self.makers[key] = maker.part if isinstance(maker, Shared) else maker
        self._foreign.update(map(id, part.modules()))

    def _borrow(self, p: Placement, shared: Shared, site: Site) -> nn.Module:
        """The part that is shared, built if nobody has asked for it before."""
        key = self.names.shared(shared, site, p)
        self.borrowed.setdefault(p.key, []).append(key)
        if key not in self.parts:
            build = partial(p.checked_part, shared.part, site)
            if self.seed is None:
                self._put(key, p.sketch_with(build), shared)
            else:
                with preserved():
                    made = p.build_with(build, f"{self.seed}|{shown(shared)}|{key}")
                self._put(key, made, shared)
        return self.parts[key]
