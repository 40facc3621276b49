"""The parts of a plan, made: a shared one once, whether it stands at a site or inside another part.

A part that is built out of others (ARC's projections, VeRA's frozen matrices) asks for them with
the site it is built for. What it is lent stays in the room under a key of its own: it is used by
all that borrow it, and stored once.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from .errors import RuleError
from .part import Shared
from .place import Names, Placed
from .term import show
from .tree import CONTAINERS, Site


class Stock:
    """What is made for `placed`, by key; `seed` None: sketches on the meta device.

    borrowed  by the key of a part, the keys of the shared parts inside it
    """

    def __init__(self, placed: list[Placed], names: Names, seed: int | None) -> None:
        self.names, self.seed = names, seed
        self.parts: dict[str, nn.Module] = {}
        self.borrowed: dict[str, list[str]] = {}
        base = {id(module) for p in placed[:1] for module in names.tree.model.modules()}
        for p in placed:
            p.site.lender = partial(self._lend, p)
            if p.key not in self.parts:
                self.parts[p.key] = p.sketch() if seed is None else p.make(seed)
        foreign = base | set(map(id, self.parts.values()))
        for p in {p.key: p for p in placed}.values():
            _disown(self.parts[p.key], foreign - {id(self.parts[p.key])}, p)
        for p in placed:
            for key in self.borrowed.get(p.key, ()):
                _disown(self.parts[key], foreign - {id(self.parts[key])}, p)

    def _lend(self, p: Placed, shared: Shared, site: Site) -> nn.Module:
        """The part that is shared, made if nobody has asked for it before."""
        key = self.names.shared(shared, site, p)
        self.borrowed.setdefault(p.key, []).append(key)
        if key not in self.parts:
            build = partial(p.built, shared.part, site)
            if self.seed is None:
                self.parts[key] = p.sketched(build)
            else:
                state = torch.get_rng_state()
                self.parts[key] = p.made(build, f"{self.seed}|{show(shared)}|{key}")
                torch.set_rng_state(state)
        return self.parts[key]


def _disown(part: nn.Module, foreign: set[int], p: Placed) -> None:
    """What a part was lent it uses as an attribute: no child of its own."""
    for module in list(part.modules()):
        for name, child in list(module._modules.items()):
            if id(child) not in foreign:
                continue
            if isinstance(module, CONTAINERS):
                raise RuleError(
                    p.rule.short,
                    f"{show(p.edit.part)} keeps what it shares or reads in a "
                    f"{type(module).__name__}, which would own it.",
                    "Keep it as an attribute of a module: self.name = part(site).",
                )
            del module._modules[name]
            module.__dict__[name] = child
