"""One hooked site: what happens to features that pass it.

Sites get hooks that are methods of plain objects, so that deep copies and pickles of the model
carry on with their own parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._shards import laid, met, summed
from ..errors import GraftError
from ..rules import routing
from ..structure.module_tree import Site, elements_of
from ..structure.path import generalise
from ..structure.stretches import Stretch
from .attending import Attending, no_attention
from .caches import check_caches, given_beside
from .ends import EndHook
from .features import declared, first_tensor, input_of
from .fitting import check_one_shape, feature_axis, fitting, run
from .heard import Heard
from .journal import owner_of
from .passes import Key, Pass
from .routed import Left, routed
from .rows import Group
from .streams import Inserted
from .switch import Switch
from .tokens import ASIDE, ENTERING, ON_OUTPUT, WRAPPING, Action, Fits, Insertions
from .tracing import Traced, apart


class HookedSite:
    """The actions joined to one site, in rule order, and what they saw last.

    enters, leaves  whether anything acts on the input, on the output
    remembers       whether the input is kept for parts that run beside the site
    heard           what its actions hear from others
    listeners       (j, heard, i): action i of another site hears what action j gives
    like            its path, but for what tells those apart that a container lists
    optional        its rules say that it need not be of use
    group           those that act here beside it on rows of one batch, each on its own
    extent          where the entry begins and the exit ends, in the order of the walk
    entry, exit     the modules with the hooks: its own, or where the values of a stretch are met
    """

    def __init__(
        self, switch: Switch, site: Site, actions: list[Action], stretch: Stretch | None = None
    ) -> None:
        self.switch, self.path, self.actions = switch, site.path, actions
        self.like = _like(site)
        self.optional = all(action.optional for action in actions)
        self.entry, self.exit = _hooked(site, stretch)
        in_two = stretch is not None or site.is_span
        self.axis_in, self.axis_out = site.shape.axis, site.exit.shape.axis
        self.width, self.out = site.shape.width, site.shape.out
        places = [action.place for action in actions]
        first = _first_entering(places)
        besides = [i for i, place in enumerate(places) if place == "beside"]
        self.remembers = bool(besides) and (in_two or first < besides[-1])
        self.enters = first < len(actions)
        self.leaves = not {*ON_OUTPUT, "among"}.isdisjoint(places)
        replaces = "instead" in places
        self.wraps = not {*WRAPPING}.isdisjoint(places)
        self.replacement = actions[places.index("instead")].part if replaces else None
        self.was_forward = self.entry.__dict__.get("forward")
        self.names = declared(getattr(type(self.entry), "forward", None))
        self.heard = Heard(self.path)
        self.group: Group | None = None
        self.listeners: list[tuple[int, Heard, int]] = []
        self.inserts = not {"into", "among"}.isdisjoint(places)
        self.tokens = Insertions(self.path, switch.name)
        self.stretches = "among" in places and stretch is None
        self.stretch = _blocks(site) if self.stretches else []
        self.extent = site.entry.order, site.exit.end
        self.begin_mark = f"{self.path}, its beginning" if in_two and self.enters else ""
        self.marks = frozenset({self.path, self.begin_mark} if self.begin_mark else {self.path})

        self.compiled, self.compiled_begin = Traced(), Traced()
        # what compiled code keeps, and leaves, by the number of an action alone
        self.traced, self.left = Pass(), Left()
        self.ends, self.fits = self._ends(stretch), self._fits(stretch)

    def _ends(self, stretch: Stretch | None) -> list[EndHook]:
        """Where the values are met that a stretch takes and gives."""
        if stretch is None:
            return []
        begin = EndHook(self, stretch.entry, entering=True)
        end = EndHook(self, stretch.exit, entering=False)
        return [begin, end] if self.enters or self.remembers else [end]

    def _fits(self, stretch: Stretch | None) -> list[Fits]:
        """What looks at all that a stretch is given, where tokens are put in."""
        called = stretch.modules if stretch and self.inserts else []
        return [Fits(self.path, module, self.opened) for module in called]

    def own_weights(self) -> list[nn.Parameter]:
        """The weights of the module that it stands at, not of its children."""
        return [p for p in self.entry._parameters.values() if p is not None]

    def callers(self) -> set[int]:
        """Ids of the modules in whose calls its weights are read as they should be."""
        return {id(self.entry), id(self.exit)}

    @property
    def ran(self) -> bool:
        """Whether all of it ever ran, the beginning and the end."""
        unseen = {self.path: self.compiled.ran, self.begin_mark: self.compiled_begin.ran}
        return all(mark in self.switch.seen or unseen[mark] for mark in self.marks)

    def unsee(self) -> None:
        """As if it had never run."""
        self.switch.seen -= self.marks
        self.compiled.ran = self.compiled_begin.ran = False

    @property
    def traced_now(self) -> bool:
        """Whether all of it was met since a forward was last begun to be traced."""
        return self.compiled.now and (self.compiled_begin.now or not self.begin_mark)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "traced": Pass(), "left": Left()}

    def _is_apart(self, *places: str) -> bool:
        """Whether this is compiled code, and goes on with what was left outside of it."""
        if not (torch.compiler.is_compiling() and self.switch.is_on()):
            return False
        leaving = "after" in places
        counts = self.stretches if leaving else self.inserts and "before" in places
        if counts and not self.tokens.is_here(self.switch.streams, leaving):
            return True
        acting = [i for i, action in enumerate(self.actions) if action.place in places]
        return not self.heard.is_here(acting)

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> Any:
        """Forward pre-hook: what happens to the input, the last rule outermost.

        Tools that copy modules register it anew in torch's plain form, without keyword arguments.
        """
        if self._is_apart(*ENTERING):
            return apart(self.enter, module, args, kwargs)
        if self.begin_mark:
            self.switch.mark(self.begin_mark, self.compiled_begin)
        if not ((self.enters or self.remembers) and self.active()):
            return None
        acts = None if (group := self.group) is None else group.acts(self)
        if acts is False:
            return None
        act = group.entered if acts and group is not None else self._entered
        given = act(args, {} if kwargs is None else kwargs)
        return given[0] if kwargs is None else given

    def _entered(self, args: Any, kwargs: Any) -> Any:
        """The arguments with what the actions make of the input."""
        first, put = input_of(args, kwargs, self)
        if self.inserts and (beside := given_beside((*args, *kwargs.values()))):
            self.switch.passes.mine().caches[self.path] = beside
        x = first
        for i, action in reversed(list(enumerate(self.actions))):
            if action.place == "before":
                x = self._act(i, action, x, x, first)
            elif action.place in ENTERING:
                leaves = pytree.tree_leaves((args, kwargs))
                others = [t for t in leaves if isinstance(t, Tensor) and t is not first]
                x = self._put_in(i, action, x, first, others)
            elif action.place == "beside" and self.remembers:
                self._inputs()[self._key(i)] = x
        return put(x)

    def leave(self, module: nn.Module, args: Any, *given: Any) -> Any:
        """Forward hook: what happens to the output, the first rule innermost.

        given  keyword arguments and output; the output alone in torch's plain form
        """
        if self._is_apart(*ON_OUTPUT):
            return apart(self.leave, module, args, *given)
        kwargs, output = given if len(given) == 2 else ({}, *given)
        self.switch.mark(self.path, self.compiled)
        if self.inserts and not torch.compiler.is_compiling():
            beside = self.switch.passes.mine().caches.pop(self.path, None)
            if beside is not None:
                check_caches(beside, output, self.path)
        if not (self.leaves and self.active()):
            return None
        acts = None if (group := self.group) is None else group.acts(self)
        if acts is None or group is None:
            return self._left(args, kwargs, output)
        return group.left(args, kwargs, output) if acts else None

    def _left(self, args: Any, kwargs: Any, output: Any) -> Any:
        """The output with what the actions make of it."""
        y, put = first_tensor(output, self.path)
        came = input_of(args, kwargs, self)[0] if self.heard.sources else y
        for i, action in enumerate(self.actions):
            if action.place == "after" or action.place in ASIDE:
                y = self._act(i, action, y, y, came)
            elif action.place == "among":
                y = self.tokens.take_out(self.switch.streams, i, action.tokens, y)
            elif action.place == "beside":
                x = self._remembered(i) if self.remembers else input_of(args, kwargs, self)[0]
                y = self._act(i, action, x, y, came)
        return put(y)

    def opened(self) -> list[Inserted]:
        """The tokens that are among those of the model now."""
        return [*self.switch.streams.mine().opened().values()]

    def begin(self, x: Tensor) -> Tensor:
        """What the actions make of the value that a stretch takes."""
        given = self.enter(self.entry, (x,))
        return x if given is None else given[0]

    def end(self, y: Tensor) -> Tensor:
        """What the actions make of the value that a stretch gives."""
        given = self.leave(self.exit, (y,), y)
        return y if given is None else given

    def _put_in(
        self, i: int, action: Action, x: Tensor, given: Tensor, others: list[Tensor]
    ) -> Tensor:
        passes, streams = self.switch.passes, self.switch.streams
        heard = [self.heard.by_samples(i, h, action.tokens, x) for h in self._hear(i, given)]
        whole = self.tokens.insert(passes, streams, i, action, x, others, heard)
        if action.place == "among":
            streams.know(whole, streams.mine().opened())
        return whole

    def listen(self, i: int, source: HookedSite, j: int) -> None:
        """Let action i hear what action j of another site gives."""
        self.heard.listen(i, source.path, source.actions[j].part)
        source.listeners.append((j, self.heard, i))

    def _hear(self, i: int, given: Tensor) -> list[Tensor]:
        """What action i hears, if anything, where that came to the site."""
        if i not in self.heard.sources:
            return []
        return [self.heard.hear(self.switch.passes, self.switch.streams, i, given)]

    def _remembered(self, i: int) -> Tensor:
        inputs, key = self._inputs(), self._key(i)
        if key not in inputs:
            raise GraftError(
                f"the graft at {self.path}",
                "its end ran without its beginning, so there is no input to run beside.",
                "Revert, and give apply(..., example=inputs): a forward tells what feeds what. "
                "Or put the rule on one module that is called whole.",
            )
        return inputs.pop(key)

    def _inputs(self) -> dict[Key, Tensor]:
        kept = self.traced if torch.compiler.is_compiling() else self.switch.passes.mine()
        return kept.inputs

    def _key(self, i: int) -> Key:
        return ("", i) if torch.compiler.is_compiling() else (self.path, i)

    def instead(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of a module that is replaced, or attends to more than it makes."""
        if self._is_apart(*WRAPPING):
            return apart(self.instead, *args, **kwargs)
        if self.replacement is not None:
            self.switch.mark(self.path, self.compiled)
        if not self.active():
            return self._base(*args, **kwargs)
        prefixes = [
            self._prefix(i, action, args, kwargs)
            for i, action in enumerate(self.actions)
            if action.place == "attended"
        ]
        if not prefixes:
            return self._replaced(*args, **kwargs)
        attending = Attending(prefixes, self.path)
        with attending:
            answer = self._replaced(*args, **kwargs)
        if not attending.ran:
            raise no_attention(self.path)
        return answer

    def _prefix(self, i: int, action: Action, args: Any, kwargs: Any) -> Any:
        """Keys and values that a part gives."""
        x, _ = input_of(args, kwargs, self)
        check_one_shape(x, x, self.path)
        axis = feature_axis(x, self.axis_in, self.width)
        given = x if axis == -1 else x.movedim(axis, -1)
        return run(action.part, given, [*self._hear(i, x)], self.width, self.path)

    def _replaced(self, *args: Any, **kwargs: Any) -> Any:
        if self.replacement is None:
            return self._base(*args, **kwargs)
        i = [action.place for action in self.actions].index("instead")
        heard = self._hear(i, input_of(args, kwargs, self)[0]) if self.heard.sources else []
        return self.replacement(*args[:1], *heard, *args[1:], **kwargs)

    def _base(self, *args: Any, **kwargs: Any) -> Any:
        if self.was_forward is not None:
            return self.was_forward(*args, **kwargs)
        return type(self.entry).forward(self.entry, *args, **kwargs)

    def active(self) -> bool:
        """Whether the parts run. While disabled no gradient may be asked for: it would be wrong."""
        if self.switch.merged or self.switch.undone or not self.switch.strength:
            return False
        self.switch.streams.refuse_checkpoints(self.path)
        if not self.switch.enabled and torch.is_grad_enabled():
            raise GraftError(
                "disabled(model)",
                f"a gradient was asked for through {self.path or 'the model'}, by enable_grad or "
                "the backward of a checkpoint: it would not be that of the model being trained.",
                "Run forward and backward both outside of disabled(model).",
            )
        return self.switch.enabled

    def _act(self, i: int, action: Action, x: Tensor, base: Tensor, came: Tensor) -> Tensor:
        """`base` with the part's answer to `x`; parts see features on the last axis.

        came  what the site was given, by which it is known again when a checkpoint runs again
        """
        check_one_shape(x, base, self.path)
        x, base = met(x), summed(base)  # tensor parallel: parts are whole, and see all features
        on_output = action.place == "after" or action.place in ASIDE
        taken = (self.axis_out, self.out) if on_output else (self.axis_in, self.width)
        given = (
            (self.axis_in, self.width) if action.place == "before" else (self.axis_out, self.out)
        )
        axis, axis_out = feature_axis(x, *taken), feature_axis(base, *given)
        out = self._answer(i, action, x if axis == -1 else x.movedim(axis, -1), came, taken[1])
        if action.place in ASIDE:
            return base
        if isinstance(out, Tensor) and axis_out != -1:
            out = out.movedim(-1, axis_out)
        out = fitting(action.part, out, base, (self.entry, self.exit), self.path)
        return mixed(base, laid(out, base), action.scale, self.switch.strength)

    def _answer(self, i: int, action: Action, x: Tensor, came: Tensor, width: int) -> Any:
        """What a part gives, told to those that hear it."""
        heard: list[Any] = self._hear(i, came)
        if action.place in ASIDE:
            x, heard = x.detach() if action.place == "aside" else x, heard or [None]
        out = run(action.part, x, heard, width, self.path)
        if isinstance(out, routing.Routed):
            out = routed(self.switch, self.left, (self.path, i), out, x)
        for j, listener, k in self.listeners:
            if i == j and isinstance(out, Tensor):
                listener.tell(self.switch.passes, k, out)
        return out


def mixed(base: Tensor, out: Tensor, scale: float | None, strength: float) -> Tensor:
    """`base` with what a part gives: `scale` of it added, or it in place (None); so much of that.

    >>> mixed(torch.ones(1), torch.zeros(1), None, 0.25)
    tensor([0.7500])
    """
    if scale is not None:
        return torch.add(base, out, alpha=scale * strength)
    return out if strength == 1 else torch.lerp(base, out, strength)


def _first_entering(places: list[str]) -> int:
    """The number of the first action on the input; that of all where there is none."""
    return next((i for i, place in enumerate(places) if place in ENTERING), len(places))


def _hooked(site: Site, stretch: Stretch | None) -> tuple[nn.Module, nn.Module]:
    """The modules that have the hooks of a site."""
    if stretch is None:
        return site.entry.module, site.exit.module
    return stretch.entry.module, stretch.exit.module


def _like(site: Site) -> str:
    """Layers, experts, heads of tasks have this in common: one may run without another."""
    named = {
        each.path: f"{each.parent.path}.*"
        for each in (site.entry, *site.entry.above())
        if each.parent is not None and isinstance(each.parent.module, nn.ModuleDict)
    }
    path = site.path
    for own, general in sorted(named.items(), reverse=True):  # the innermost first
        path = general.lstrip(".") + path[len(own) :] if path.startswith(own) else path
    return generalise(path)


def _blocks(site: Site) -> list[Site]:
    """The blocks of a list from the first that a site begins with to the last that it ends with."""
    return elements_of(site) if site.is_span and site.entry.is_element else []


def is_replaced(module: nn.Module) -> bool:
    """Whether a part of some operation runs instead of the module."""
    hooked = owner_of(module.__dict__.get("forward"))
    return isinstance(hooked, HookedSite) and not hooked.switch.undone
