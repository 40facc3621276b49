"""One hooked weight: while what computes with it runs, it reads what the parts make of it.

A part at a parameter is linear, and is folded into it as `merge` would: for as long as the reader
runs the attribute of that name is the result, and outside of it the parameter alone. So the base
keeps its keys, classes, ties and aliases, whatever reads the attribute reads the same, and merging
writes the very numbers that a forward saw. Layers that do no more than read it (a linear one, a
table) are given what two small matrices add to their output: the sum would be as large as a table.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._shards import laid, met, summed
from ..errors import GraftError
from ..rules.affine import Affine, affine, factors, joined
from ..structure.layers import forward_of
from ..structure.weights import ParameterSite
from .hooks import HookedSite, mixed
from .journal import Journal, owners_of
from .stack import Stack
from .switch import Switch
from .tokens import Action
from .tracing import is_in_call


class Read(NamedTuple):
    """A parameter where it is read: by a module, of a module (itself or one that it holds)."""

    reader: nn.Module
    holder: nn.Module
    name: str
    bias: str


class HookedWeight(HookedSite):
    """The parts at one parameter, or at rows of it.

    reads    where it is read; several, where modules share it
    alone    whether it may be read as it is elsewhere: a rule says so
    below    weights of earlier operations that are joined to the same parameter
    """

    def __init__(self, switch: Switch, site: ParameterSite, actions: list[Action]) -> None:
        super().__init__(switch, site, actions)
        self.rows, self.is_stack, self.alone = site.rows, site.is_stack, not site.tied
        self.reads = [Read(s.reader.module, s.module, s.name, s.bias) for s in (site, *site.others)]
        self.entry = self.exit = site.reader.module
        self.enters = self.leaves = True
        self.below: list[HookedWeight] = []
        self.is_small = self.rows is None and all(map(_is_small, actions))
        self.turn = Turn(self.entry)

    def join(self, journal: Journal) -> None:
        """Hook into all that read it."""
        for module in dict.fromkeys(read.reader for read in self.reads):
            earlier = owners_of(module._forward_pre_hooks, HookedWeight).values()
            self.below += [each for each in earlier if each.parameter is self.parameter]
            if not all(each.is_small for each in (self, *self.below)):
                for each in (self, *self.below):  # one makes its own of what others made
                    journal.set(each, "is_small", False)
            journal.hook(module, self.enter, before=True, with_kwargs=True)
            journal.hook(module, self.leave, with_kwargs=True, always_call=True)

    @property
    def parameter(self) -> Tensor:
        """The parameter, as it is kept."""
        return self.kept(self.reads[0].name)

    def kept(self, name: str) -> Tensor:
        """A tensor of the module that holds it, as it is kept."""
        return _kept(self.reads[0].holder, name)

    def own_weights(self) -> list[nn.Parameter]:
        """The parameter."""
        parameter: Any = self.parameter
        return [parameter]

    def callers(self) -> set[int]:
        """Ids of all that reads it."""
        return {id(read.reader) for read in self.reads}

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        """Forward pre-hook of a reader: the attribute is what the parts make of the parameter."""
        if not self.active():
            return
        if not torch.compiler.is_compiling():
            self.turn.take()
        for read in self._read_by(module) or [self._no_replica(module)]:
            if self.is_small and only_reads(read):
                continue
            for name, value in self.made(self._now(read)).items():
                read.holder.__dict__[name] = value

    def leave(self, module: nn.Module, args: Any, *given: Any) -> Any:
        """Forward hook of a reader, after an error too: the attribute is the parameter again."""
        self.switch.mark(self.path, self.compiled)
        for read in self._read_by(module):
            for name in (read.name, read.bias):
                read.holder.__dict__.pop(name, None)
        if not torch.compiler.is_compiling():
            self.turn.give()
        small = [read for read in self._read_by(module) if self.is_small and only_reads(read)]
        if small and isinstance(given[-1], Tensor) and self.active():
            kwargs = given[0] if len(given) > 1 else {}
            if self.group is not None and (acts := self.group.acts(self)) is not None:
                return self.group.left(args, kwargs, given[-1]) if acts else None
            return self._with_products(module, args[0] if args else kwargs["input"], given[-1])
        return None

    def _left(self, args: Any, kwargs: Any, output: Any) -> Any:
        """As `leave` of the one layer that reads it, on rows."""
        x = args[0] if args else kwargs["input"]
        return self._with_products(self.entry, x, output)

    def _with_products(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What a linear layer or a table gives, with what the two matrices of each part add."""
        x, y = met(x), summed(y)
        for action in self.actions:
            down, up = factors(action.part)  # type: ignore[misc]
            if isinstance(module, nn.Embedding):
                out = F.embedding(x, up) @ down
                if (padding := module.padding_idx) is not None:  # which nothing learns of
                    out = torch.where((x == padding)[..., None], out.detach(), out)
            else:
                out = F.linear(F.linear(x, down), up)
            y = mixed(y, laid(out.to(y.dtype), y), action.scale, self.switch.strength)
        return y

    def _read_by(self, module: nn.Module) -> list[Read]:
        return [read for read in self.reads if read.reader is module]

    def _no_replica(self, module: nn.Module) -> NoReturn:
        """Raise GraftError for a module that has hooks of ours, and is none that they were for."""
        raise GraftError(
            f"the graft at {self.path}",
            f"a replica of a {type(module).__name__} computes with it (nn.DataParallel), and parts "
            "at a weight do not follow into those.",
            "Use DistributedDataParallel, or merge(model) first.",
        )

    def _now(self, read: Read) -> dict[str, Tensor]:
        """Weight and bias by name, as earlier operations make them, where these are on."""
        under = any(each.switch.is_on() for each in self.below)
        names = [name for name in (read.name, read.bias) if name]
        known = read.holder.__dict__ if under else {}
        return {name: known.get(name, _kept(read.holder, name)) for name in names}

    def made(self, now: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the parts make of a weight, and of a bias where they have one; by name."""
        (name, weight), *rest = now.items()
        bias = rest[0][1] if rest else None
        with torch.autocast(weight.device.type, enabled=False):
            map = Affine(self._some(weight), None if bias is None else self._some(bias))
            new = self._joined(map)
            made = {name: self._put(weight, new.weight)}
            if bias is not None and new.bias is not None:
                made[rest[0][0]] = self._put(bias, new.bias)
        return made

    def _joined(self, map: Affine) -> Affine:
        """The map with all parts, a matrix or one for each expert; a vector stays one."""
        if map.weight.dim() > 1 and not self.is_stack:
            map = map._replace(weight=map.weight.flatten(1))
        for action in self.actions:
            map = joined(
                map, self._affine(action), action.place, action.scale, self.switch.strength
            )
        return map

    def _affine(self, action: Action) -> Affine:
        part = affine(action.part) or Affine(torch.zeros(0), None)  # a plan refuses others
        alike = self.is_stack and not isinstance(action.part, Stack)  # one for all experts
        if not alike:
            return part
        return Affine(part.weight[None], None if part.bias is None else part.bias[None])

    def _some(self, tensor: Tensor) -> Tensor:
        return tensor if self.rows is None else tensor[self.rows]

    def _put(self, whole: Tensor, new: Tensor) -> Tensor:
        """The whole tensor with other rows."""
        new = new.reshape(self._some(whole).shape).to(whole.dtype)
        if self.rows is None:
            return new
        start, stop, _ = self.rows.indices(len(whole))
        return torch.cat([whole[:start], new, whole[stop:]])


def _is_small(action: Action) -> bool:
    """Whether a part adds the product of two small matrices."""
    return action.place == "beside" and hasattr(action.part, "maps")


def only_reads(read: Read) -> bool:
    """Whether a layer gives what is linear in the weight, and does nothing else with it."""
    if read.reader is not read.holder or read.name != "weight":
        return False
    if isinstance(read.reader, nn.Embedding):
        table = read.reader
        plain = table.max_norm is None and not (table.sparse or table.scale_grad_by_freq)
        return plain and forward_of(table) is nn.Embedding.forward
    return forward_of(read.reader) is nn.Linear.forward


def _kept(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer as the module keeps it, whatever its attribute is now."""
    kept: Any = module._parameters.get(name)
    return kept if kept is not None else module._buffers[name]  # type: ignore[return-value]


class Turn:
    """Lets one thread at a time into a module, as long as its attribute is another.

    One that was interrupted there, or is over, holds nobody up.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.condition = module, threading.Condition()
        self.thread: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"])  # type: ignore[misc]

    def take(self) -> None:
        """Wait until no other thread is in it."""
        mine = threading.current_thread()
        with self.condition:
            while self.thread not in (None, mine) and self._is_inside():
                self.condition.wait(timeout=0.05)
            self.thread = mine

    def give(self) -> None:
        """Let the next one in."""
        with self.condition:
            self.thread = None
            self.condition.notify()

    def _is_inside(self) -> bool:
        """Whether the thread that has the turn is in a call of the module still."""
        return is_in_call(self.module, (self.thread and self.thread.ident) or 0)
