"""A model as a tree of sites: the places where something can be joined to it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from torch import nn

from ..errors import RuleError
from .layers import (
    CONVS,
    Shape,
    called_children,
    is_norm,
    is_torch_attention,
    linear_shape,
    shape_of,
)
from .path import Step

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
ADDITIONS = "surgery"  # the one child under which all that was added lives


class Site:
    """A place in a model: one module, or the span from the input of one to the output of another.

    path, aliases   where it is; a module under several names is one site
    module          the module itself; for a span, the smallest module that holds it
    entry, exit     the sites where features come in and go out (the site itself, or a span's ends)
    width, out      number of features in and out, 0 where nothing fixes it (an error in a part)
    axis            where features lie: -1 last, 1 after the batch
    index           position among the children of `parent`
    captures        what `{name}` steps of the matching address stood for
    """

    def __init__(self, module: nn.Module, parent: Site | None, steps: tuple[Step, ...]) -> None:
        self.module, self.parent, self.steps = module, parent, steps
        self.path = ".".join(step.name for step in steps)
        self.aliases: list[tuple[Step, ...]] = []
        self.children: list[Site] = []
        self.order = self.end = 0  # in the walk: this site, and one past the last site below it
        self.entry = self.exit = self
        self.captures: dict[str, str] = {}
        self.borrow: Callable[[Any, Site], nn.Module] | None = None  # of shared parts, to parts
        self._shape: Shape | None = None
        self._handed = False  # to a part, which must know its width

    def __repr__(self) -> str:
        return f"<{self.path or 'the model'}: {type(self.module).__name__}>"

    @property
    def index(self) -> int:
        return self.steps[-1].position if self.steps else 0

    @property
    def is_span(self) -> bool:
        return self.entry is not self.exit

    @property
    def is_element(self) -> bool:
        """Whether it is one of those that a container lists: a block, an expert, a layer."""
        return self.parent is not None and isinstance(self.parent.module, CONTAINERS)

    @property
    def completes_projection(self) -> bool:
        """Whether it is a batch norm right after a linear layer or a convolution: one step with it.

        (LeViT, EfficientViM, StarNet.)
        """
        if not (self.parent and isinstance(self.module, nn.modules.batchnorm._NormBase)):
            return False
        siblings = self.parent.children
        place = siblings.index(self)
        return place > 0 and isinstance(siblings[place - 1].module, (nn.Linear, *CONVS))

    @property
    def width(self) -> int:
        return self._known(self.shape.width)

    @property
    def out(self) -> int:
        return self._known(self.shape.out)

    def _known(self, features: int) -> int:
        if not features and self._handed:
            raise RuleError(
                repr(self),
                "nothing in it fixes a number of features, so a part cannot be made to measure.",
                "Give the width yourself, or put the rule on a module with weights.",
            )
        return features

    @property
    def axis(self) -> int:
        return self.shape.axis

    @property
    def shape(self) -> Shape:
        """(width, out, axis), read off the first and the last layer that fix them."""
        if self._shape is None:
            self.read_shape()
        return self._shape or Shape(0, 0, -1)

    def read_shape(self, leave_out: Collection[Site] = ()) -> None:
        """Read the shape off the first and the last layer that fix it, leaving some of them out."""
        first = _first_shape(self.entry, leave_out)
        last = _first_shape(self.exit, leave_out, backwards=True)
        if first is None and last is None:
            first = last = _shape_around(self)
        self._shape = Shape(
            first.width if first else 0, last.out if last else 0, first.axis if first else -1
        )

    def seen(self, *, shape: Shape, captures: dict[str, str] | None = None) -> Site:
        """The same site as one edit sees it: with the widths that its part meets."""
        site = type(self).__new__(type(self))
        site.__dict__.update(self.__dict__, _handed=True)
        site._shape, site.captures = shape, captures if captures is not None else self.captures
        return site

    def sized(self, width: int, out: int) -> Site:
        """The same site with other widths: how a part asks for a shared one of another size."""
        return self.seen(shape=Shape(width, out, -1))

    def below(self) -> Iterator[Site]:
        """Every site strictly inside this one, in the order of the walk."""
        for child in self.children:
            yield child
            yield from child.below()

    def above(self) -> Iterator[Site]:
        """Every site this one is strictly inside of, nearest first."""
        site = self.parent
        while site is not None:
            yield site
            site = site.parent


def span(entry: Site, exit: Site) -> Site:
    """The site from the input of `entry` to the output of `exit`."""
    above = {id(s) for s in (entry, *entry.above())}
    owner = next(s for s in (exit, *exit.above()) if id(s) in above)
    site = Site(owner.module, owner.parent, owner.steps)
    a, b = entry.path[len(owner.path) :].lstrip("."), exit.path[len(owner.path) :].lstrip(".")
    site.path = f"{owner.path}.({a} to {b})" if owner.path else f"({a} to {b})"
    site.entry, site.exit = entry, exit
    site.order, site.end = entry.order, exit.end
    return site


def stretch(first: Site, last: Site) -> Site:
    """The span from the input of one site to the output of another; features lie as in the last."""
    site = span(first.entry, last.exit)
    if first.width and last.out:
        site._shape = Shape(first.width, last.out, last.axis)
    return site


def elements_of(site: Site) -> list[Site]:
    """The children of one module from that which a span begins with to that which it ends with."""
    parent = site.entry.parent
    if parent is None or site.exit.parent is not parent:
        return []
    first, last = parent.children.index(site.entry), parent.children.index(site.exit)
    return parent.children[first : last + 1]


def element(site: Site) -> Site | None:
    """The nearest element of a container that holds a site."""
    return next((s for s in holders(site) if s.is_element), None)


def holders(site: Site) -> list[Site]:
    """What a site lies in, nearest first; a span's smallest holder may be its own module."""
    if not site.is_span:
        return list(site.above())
    above = set(site.exit.above())
    return [s for s in site.entry.above() if s in above]


def in_order(sites: Iterable[Site]) -> list[Site]:
    """Sites in the order of the walk, each once."""
    return sorted(dict.fromkeys(sites), key=lambda s: s.order)


def _first_shape(site: Site, leave_out: Collection[Site], backwards: bool = False) -> Shape | None:
    """The shape of the first layer below a site that fixes one, or from the end of the last."""
    if site in leave_out:
        return None
    if shape := shape_of(site.module):
        return shape
    projections = [shape for child in site.children if (shape := linear_shape(child.module))]
    widths = {width for shape in projections for width in shape[:2]}
    for child in reversed(site.children) if backwards else site.children:
        shape = _first_shape(child, leave_out, backwards)
        # a norm of another width than the projections beside it is one per head (Qwen3, Gemma 3)
        per_head = shape and widths and is_norm(child.module) and shape.width not in widths
        if shape and not per_head:
            return shape
    return None


def _shape_around(norm: Site) -> Shape | None:
    """What a norm that fixes no number of features is given: what the next layer takes.

    Behind the last layer, what that gives. (ScaleNorm has one number, OLMo's norm none.)
    """
    if not is_norm(norm.module):
        return None
    for holder in norm.above():
        for child in holder.children:
            if child.order > norm.order and (shape := _first_shape(child, ())):
                return Shape(shape.width, shape.width, shape.axis)
        for child in reversed(holder.children):
            if child.end <= norm.order and (shape := _first_shape(child, (), backwards=True)):
                return Shape(shape.out, shape.out, shape.axis)
    return None


class Tree:
    """All sites of a model, in order of registration, without what surgery added to it.

    Nor parametrizations (weight norm), which are called on weights and never on features.
    `memo` keeps what was once worked out about this tree (roles, selections).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites: list[Site] = []
        self.memo: dict[Any, Any] = {}
        self._known: dict[int, Site] = {}  # by the id of its module
        self.root = self._grow(model, None, (), ())

    def _grow(
        self,
        module: nn.Module,
        parent: Site | None,
        steps: tuple[Step, ...],
        above: tuple[int, ...],
    ) -> Site:
        site = self._known[id(module)] = Site(module, parent, steps)
        site.order = len(self.sites)
        self.sites.append(site)
        above = (*above, id(module))
        for step, child in _children(module):
            if (known := self._known.get(id(child))) is not None:
                if id(child) not in above:  # a module inside itself is no second place
                    _alias(known, (*steps, step))
            else:
                site.children.append(self._grow(child, site, (*steps, step), above))
        site.end = len(self.sites)
        return site


def _children(module: nn.Module) -> list[tuple[Step, nn.Module]]:
    named = called_children(module)
    return [(Step(name, i, len(named)), child) for i, (name, child) in enumerate(named.items())]


def _alias(site: Site, steps: tuple[Step, ...]) -> None:
    site.aliases.append(steps)
    for child in site.children:
        _alias(child, (*steps, child.steps[-1]))


class Projections:
    """The channel-linear layers of a tree, in the order of the walk.

    elements  for each the nearest element of a container that holds it
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.all = [s for s in tree.sites if _projects(s)]
        self.orders = [s.order for s in self.all]
        self.elements = {s: element(s) for s in self.all}

    def below(self, site: Site) -> list[Site]:
        """Those of a site, itself included."""
        low, high = bisect_left(self.orders, site.order), bisect_left(self.orders, site.end)
        return self.all[low:high]


def _projects(site: Site) -> bool:
    if is_torch_attention(site.module):
        return True
    inside_attention = site.parent is not None and is_torch_attention(site.parent.module)
    return linear_shape(site.module) is not None and not inside_attention
