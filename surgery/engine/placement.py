"""A placement: one edit at one site, what its part will be called, and how it is built."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import nn

from ..errors import ConflictError, RuleError
from ..rules.edits import Joined, Side
from ..rules.expression import shown
from ..rules.part import Maker, Shared, call_of
from ..rules.roles import Role, attn
from ..rules.rule import Rule
from ..rules.selector import Selector
from ..rules.walk import selectors_in
from ..structure.anatomy import holder_of_loose
from ..structure.layers import forward_of, is_norm
from ..structure.module_tree import CONTAINERS, Site, Tree
from ..structure.path import generalise
from ..structure.weights import ParameterSite
from .hooks import is_replaced
from .stack import Stack
from .tokens import WRAPPING

Spot: TypeAlias = tuple[int, int, str]
FEATURES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Placement:
    """A part that one rule joins to a place; `site` is the place with the widths the part meets."""

    rule: Rule
    edit: Joined
    place: Site
    site: Site
    number: int = 0  # in the order of the rules: at one place the first rule's part runs first
    key: str = ""  # of the part in the operation; the same for all sites that share it
    text: str = ""  # its edit, as it prints
    foreign: Collection[int] = ()  # ids of modules that are no part's own: of the base, borrowed

    def __post_init__(self) -> None:
        self.settle()

    def settle(self) -> None:
        """Where the part will be, and in which dtype: as the base is now."""
        self.device, self.dtype = _surroundings(self.site)

    @property
    def spot(self) -> Spot:
        """The same for two edits at one site, whichever rule they come from."""
        name = self.site.path if isinstance(self.site, ParameterSite) else ""
        return id(self.site.entry.module), id(self.site.exit.module), name

    def make(self, seed: int) -> nn.Module:
        """The part, seeded by (seed, edit, key), with its site's device, dtype and mode."""
        return self.build_with(self._build, f"{seed}|{self.text}|{self.key}")

    def build_with(self, build: Callable[[], nn.Module], seed: str) -> nn.Module:
        """What `build` gives for this place, seeded by a text."""
        if self.device.type == "meta":
            sketch = _move(self.sketch_with(build), self.device, self.dtype)
            return sketch if self.site.module.training else sketch.eval()
        digest = hashlib.sha256(seed.encode()).digest()
        torch.default_generator.manual_seed(int.from_bytes(digest[:7], "little"))
        if torch.empty(0).device.type == "cpu":  # the default: no context, which costs each call
            part = build()
        else:
            with torch.device("cpu"):
                part = build()
        if any(t.dtype != self.dtype or t.device != self.device for t in _tensors(part)):
            _move(part, self.device, self.dtype)
        return part if self.site.module.training else part.eval()

    def sketch(self) -> nn.Module:
        """The part on the meta device: shapes without memory or random numbers."""
        return self.sketch_with(self._build)

    def sketch_with(self, build: Callable[[], nn.Module]) -> nn.Module:
        """What `build` gives, on the meta device."""
        with torch.device("meta"):
            return build()

    def _build(self) -> nn.Module:
        part = self.edit.part
        if isinstance(part, Shared):  # one for all experts, too
            return self.checked_part(part.part, self.site)
        if isinstance(self.site, ParameterSite) and self.site.is_stack:
            experts = range(len(self.site.parameter))
            return Stack([self.checked_part(part, self.site) for _ in experts])
        return self.checked_part(part, self.site)

    def checked_part(self, maker: Maker, site: Site) -> nn.Module:
        """The part of a maker, which must be a module."""
        part = self._made(maker, site)
        if not isinstance(part, nn.Module):
            raise RuleError(
                self.rule.short,
                f"{shown(maker)} gave {type(part).__name__}, no module, at {self.site!r}.",
                "A part is an nn.Module; return one.",
            )
        _disown(part, self.foreign, self)
        return part

    def _made(self, maker: Maker, site: Site) -> nn.Module:
        """What a maker gives; a class that cannot be made of a site says so."""
        try:
            return maker(site)
        except (TypeError, ValueError, AttributeError) as error:
            made_by = maker.func if isinstance(maker, partial) else maker
            if not isinstance(made_by, type):
                raise
            raise RuleError(
                self.rule.short,
                f"{shown(made_by)} was given a site, as every part is, and raised "
                f"{type(error).__name__}: {error}.",
                f"Write {self.edit.word}(lambda site: {call_of(made_by)}).",
            ) from error


def _move(part: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A part on a device, its real numbers in a dtype; integers and complex ones keep theirs."""
    move: Any = part._apply  # torch has no types for it
    move(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype))
    return part


def _disown(part: nn.Module, foreign: Collection[int], p: Placement) -> None:
    """What a part borrows, or reads of the base, it uses as an attribute: no child of its own."""
    if not foreign or id(part) in foreign:  # it was built, and looked at, before
        return
    for module in [own for own in part.modules() if id(own) not in foreign]:
        for name, child in list(module._modules.items()):
            if id(child) not in foreign:
                continue
            if isinstance(module, CONTAINERS):
                raise RuleError(
                    p.rule.short,
                    f"{shown(p.edit.part)} keeps what it shares or reads in a "
                    f"{type(module).__name__}, which would own it.",
                    "Keep it as an attribute of a module: self.name = part(site).",
                )
            del module._modules[name]
            module.__dict__[name] = child


class PartNames:
    """Keys of parts: the path for one of its own, `shared/...` for a shared one."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._stems = Counter[str]()
        self._shared: dict[tuple[Any, ...], str] = {}
        self._texts: dict[int, tuple[str, Shared]] = {}

    def for_site(self, p: Placement) -> str:
        """The key of a part of one site."""
        return self._numbered(f"{p.site.path.replace('.', '/') or 'model'}/{p.edit.word}")

    def shared(self, shared: Shared, site: Site, p: Placement) -> str:
        """The key of a shared part, as `p` asks for it: the same for all that share it."""
        if id(shared) not in self._texts:
            self._texts[id(shared)] = repr(shared), shared
        text, _ = self._texts[id(shared)]
        by = self._by(shared, p)
        code = (
            id(shared.part) if not hasattr(shared.part, "word") else 0
        )  # a lambda is itself alone
        group = text, code, tuple(site.shape[:2]), by, p.device, p.dtype
        if group not in self._shared:
            self._shared[group] = self._numbered(_stem(shared, site, by))
        return self._shared[group]

    def _numbered(self, stem: str) -> str:
        """The stem, with a number from the second time on."""
        self._stems[stem] += 1
        n = self._stems[stem]
        return stem if n == 1 else f"{stem}/{n}"

    def _by(self, shared: Shared, p: Placement) -> str | None:
        """What a shared part goes by, at one place: a captured name, or the path of a holder."""
        if isinstance(shared.by, Selector):
            around = [site for site in shared.by.find(self.tree) if _lies_in(p.place, site)]
            if around:
                return max(around, key=lambda site: (site.entry.order, -site.exit.end)).path
            if shared.by == attn and (holder := holder_of_loose(self.tree, p.place)):
                return holder.path
            raise RuleError(
                p.rule.short,
                f"{p.site.path} lies in no {shared.by!r}, which {shown(shared)} goes by.",
                "Go by what holds every site of the rule: shared(..., by=block).",
            )
        if shared.by is not None and shared.by not in p.site.captures:
            raise _no_capture(p, str(shared.by))
        return None if shared.by is None else p.site.captures[str(shared.by)]


def _no_capture(p: Placement, by: str) -> RuleError:
    """The error of parts that go by a name which no step of the rule's place captures."""
    steps = p.site.path.split(".")
    elements = [site for site in (p.site.entry, *p.site.entry.above()) if site.is_element]
    where = len(elements[-1].steps) - 1 if elements else len(steps)  # the outermost
    captured, way = "layers.{" + by + "}.blocks.*.mlp", "leave by= out"
    if where < len(p.site.steps):
        holder = ".".join((*steps[:where], "*"))
        captured = generalise(".".join((*steps[:where], "{" + by + "}", *steps[where + 1 :])))
        way = f'go by what holds the sites, shared(..., by=where("{holder}"))'
    role = any(isinstance(pattern, Role) for pattern in selectors_in(p.rule.where))
    return RuleError(
        p.rule.short,
        f'shared(..., by="{by}") has no {{{by}}} to go by'
        + (": a role captures none." * role or "."),
        f'Capture it in the address, at("{captured}", ...), or {way}.',
    )


def name_all(placements: list[Placement], names: PartNames) -> None:
    """Give each place the key of its part."""
    edits = {id(p.edit): p.edit for p in placements}
    texts = {key: repr(edit) for key, edit in edits.items()}
    for p in placements:
        p.text, part = texts[id(p.edit)], p.edit.part
        p.key = names.shared(part, p.site, p) if isinstance(part, Shared) else names.for_site(p)


def _lies_in(place: Site, site: Site) -> bool:
    """Whether a place is a site, or lies inside it (a span too)."""
    return site.entry.order <= place.entry.order and place.exit.end <= site.exit.end


def _stem(shared: Shared, site: Site, by: str | None) -> str:
    word = shared.name or getattr(shared.part, "word", None) or "part"
    kind = shared.by if isinstance(shared.by, str) else "by"
    suffix = "" if by is None else f"/{kind}={by}"
    return f"shared/{word}/{site.shape.width}{suffix}".replace(".", "_")


def _tensors(part: nn.Module) -> Iterator[torch.Tensor]:
    """Its parameters and buffers, in one walk."""
    for module in part.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor


def _surroundings(site: Site) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the first weight in a site, or else around it.

    Quantised weights (integers, 8-bit floats) do not tell of which dtype features are.
    """
    above = (site.entry, *site.entry.above())
    for around in above:
        for module in around.module.modules():
            weights = [p for p in module._parameters.values() if p is not None]
            if any(weight.dtype not in FEATURES for weight in weights):
                return weights[0].device, _beside(module, above)
            if weights:
                return weights[0].device, weights[0].dtype
    buffers = [b for around in above for b in around.module.buffers()]
    return buffers[0].device if buffers else torch.device("cpu"), torch.get_default_dtype()


def _beside(quantised: nn.Module, above: tuple[Site, ...]) -> torch.dtype:
    """The dtype of the features that meet a quantised module: of its bias, or the nearest norm."""
    norms = (m for site in above for m in site.module.modules() if is_norm(m))
    for weight in chain([quantised._parameters.get("bias")], *(m.parameters() for m in norms)):
        if weight is not None and weight.dtype in FEATURES:
            return weight.dtype
    return torch.get_default_dtype()


def check_parts(placements: Iterable[Placement], parts: Mapping[str, nn.Module]) -> None:
    """Raise RuleError where a part cannot be called with what it will be given."""
    for p in placements:
        if p.edit.place != "instead" and (fact := _uncallable(parts[p.key], p.edit)):
            raise RuleError(
                p.rule.short,
                f"{shown(p.edit.part)} at {p.site.path or 'the model'} is a "
                f"{type(parts[p.key]).__name__}, {fact}.",
                "Join a part that takes features, forward(self, x)"
                + ("; what it hears comes by hears=ffn, for example." if "heard" in fact else "."),
            )


def _uncallable(part: nn.Module, edit: Joined) -> str:
    """Why a part cannot be called; "" where it can, or nothing tells."""
    forward = part.forward
    if forward_of(part) is nn.Module.forward:
        return "which has no forward: it is for other parts to hold"
    given = (None, None) if edit.hears or isinstance(edit, Side) else (None,)
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*given)
    except TypeError as error:
        return f"whose forward{signature} is given {len(given)}: {error}"
    return ""


def check_conflicts(placements: list[Placement]) -> None:
    """Raise ConflictError where a module would be replaced twice, or what is no one module once."""
    replacing: dict[int, Placement] = {}
    for p in placements:
        if p.edit.place in WRAPPING and p.site.is_span:
            raise ConflictError(
                p.rule.short,
                f"{p.site.path} runs from one module to another, and {p.edit.word} acts on one.",
                "Put the rule on the module that holds both.",
            )
        if p.edit.place != "instead":
            continue
        if is_replaced(p.site.module):
            raise ConflictError(
                repr(p.rule),
                f"{p.site.path} is already replaced by an earlier operation.",
                "Call surgery.revert(model) first.",
            )
        if other := replacing.get(id(p.site.module)):
            raise ConflictError(
                repr(p.rule),
                f"{p.site.path} is already replaced by {other.rule!r}.",
                "Keep one of the two, or narrow one of them with & ~where(...).",
            )
        replacing[id(p.site.module)] = p
