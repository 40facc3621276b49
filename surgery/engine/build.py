"""The parts of a plan, made: a shared one once, whether it stands at a site or inside another part.

A part that is built out of others (ARC's projections, VeRA's frozen matrices) asks for them with
the site it is built for. What it is lent stays in the room under a key of its own: it is used by
all that borrow it, and stored once.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from .._preserve import preserved
from ..rules.expression import shown
from ..rules.part import Shared
from ..structure.module_tree import Site
from .placement import PartNames, Placement


class BuiltParts:
    """What is made for `placed`, by key; `seed` None: sketches on the meta device.

    borrowed  by the key of a part, the keys of the shared parts inside it
    """

    def __init__(self, placed: list[Placement], names: PartNames, seed: int | None) -> None:
        self.names, self.seed = names, seed
        self.parts: dict[str, nn.Module] = {}
        self.borrowed: dict[str, list[str]] = {}
        foreign = {id(module) for module in names.tree.model.modules()}
        self._foreign = foreign
        for p in placed:
            p.foreign, p.site.borrow = foreign, partial(self._borrow, p)
            if p.key not in self.parts:
                self._put(p.key, p.sketch() if seed is None else p.make(seed))

    def _put(self, key: str, made: nn.Module) -> None:
        self.parts[key] = made
        self._foreign.update(map(id, made.modules()))

    def _borrow(self, p: Placement, shared: Shared, site: Site) -> nn.Module:
        """The part that is shared, made if nobody has asked for it before."""
        key = self.names.shared(shared, site, p)
        self.borrowed.setdefault(p.key, []).append(key)
        if key not in self.parts:
            build = partial(p.built, shared.part, site)
            if self.seed is None:
                self._put(key, p.sketched(build))
            else:
                with preserved():
                    self._put(key, p.made(build, f"{self.seed}|{shown(shared)}|{key}"))
        return self.parts[key]
