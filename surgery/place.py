"""One edit at one site: what it will be called, where it will live, how it is made."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from .edit import Joined
from .errors import RuleError
from .leaf import forward_of, is_norm
from .part import Shared
from .rule import Rule
from .term import show
from .tree import Site

FEATURES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Placed:
    """A part that one rule joins to a place; `site` is the place with the widths the part meets."""

    rule: Rule
    edit: Joined
    place: Site
    site: Site
    key: str = ""  # its name in the room; the same for all sites that share it
    said: str = ""  # its edit in words

    def __post_init__(self) -> None:
        self.device, self.dtype = _surroundings(self.site)

    @property
    def spot(self) -> tuple[int, int]:
        """The same for two edits at one site, whichever rule they come from."""
        return id(self.site.entry.module), id(self.site.exit.module)

    def make(self, seed: int) -> nn.Module:
        """The part, seeded by (seed, edit, key), with its site's device, dtype and mode."""
        if self.device.type == "meta":
            sketch = self.sketch().to(dtype=self.dtype)
            return sketch if self.site.module.training else sketch.eval()
        digest = hashlib.sha256(f"{seed}|{self.said}|{self.key}".encode()).digest()
        torch.default_generator.manual_seed(int.from_bytes(digest[:7], "little"))
        if torch.empty(0).device.type == "cpu":  # the default: no context, which costs each call
            part = self._build()
        else:
            with torch.device("cpu"):
                part = self._build()
        if any(t.dtype != self.dtype or t.device != self.device for t in _tensors(part)):
            part.to(self.device, self.dtype)
        return part if self.site.module.training else part.eval()

    def sketch(self) -> nn.Module:
        """The part on the meta device: shapes without memory or random numbers."""
        with torch.device("meta"):
            return self._build()

    def _build(self) -> nn.Module:
        part = self.edit.part(self.site)
        if not isinstance(part, nn.Module):
            raise RuleError(
                self.rule.short,
                f"{show(self.edit.part)} gave {type(part).__name__}, no module, at {self.site!r}.",
                "A part is an nn.Module; return one.",
            )
        return part


def name_all(placed: list[Placed]) -> None:
    """Give each part its key: the path for one of its own, `shared/...` for a shared one."""
    edits = {id(p.edit): p.edit for p in placed}
    said = {key: (repr(edit), repr(edit.part)) for key, edit in edits.items()}
    stems = Counter[str]()
    groups: dict[str, dict[tuple[Any, ...], str]] = {}
    for p in placed:
        p.said, part = said[id(p.edit)]
        if isinstance(p.edit.part, Shared):
            p.key = _stem(p, p.edit.part)
            groups.setdefault(p.key, {})[_group(p, p.edit.part, part)] = ""
    for stem, alike in groups.items():
        for group in alike:
            key = f"{stem}/{_digest(group[0])}" if len(alike) > 1 else stem
            alike[group] = _numbered(key, stems)
    for p in placed:
        if isinstance(p.edit.part, Shared):
            p.key = groups[p.key][_group(p, p.edit.part, said[id(p.edit)][1])]
        else:
            stem = f"{p.site.path.replace('.', '/') or 'model'}/{p.edit.word}"
            p.key = _numbered(stem, stems)


def _numbered(stem: str, seen: Counter[str]) -> str:
    """The stem, with a number from the second time on."""
    seen[stem] += 1
    return stem if seen[stem] == 1 else f"{stem}/{seen[stem]}"


def _stem(p: Placed, shared: Shared) -> str:
    word = shared.name or getattr(shared.part, "word", None) or "part"
    captured = _captured(p, shared)
    by = f"/{shared.by}={captured}" if captured is not None else ""
    return f"shared/{word}/{p.site.shape.width}{by}".replace(".", "_")


def _group(p: Placed, shared: Shared, said: str) -> tuple[Any, ...]:
    """What parts must agree in to be one; `said` is the shared part in words.

    The first of it alone makes the key, which a file must find again on another machine.
    """
    own = id(shared.part) if not hasattr(shared.part, "word") else 0
    words = f"{said} {tuple(p.site.shape[:2])} {_captured(p, shared)}"
    return words, own, p.device, p.dtype


def _captured(p: Placed, shared: Shared) -> str | None:
    if shared.by is None:
        return None
    if shared.by not in p.site.captures:
        raise RuleError(
            p.rule.short,
            f'shared(..., by="{shared.by}") has no {{{shared.by}}} to go by.',
            f'Capture it in the address: "layers.{{{shared.by}}}.blocks.*.mlp".',
        )
    return p.site.captures[shared.by]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


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


def check_called(placed: list[Placed]) -> None:
    """Raise RuleError where a part could never run: the model never calls the module it is at."""
    for p in placed:
        for end in (p.site.entry, p.site.exit):
            parent = end.parent.module if end.parent and not end.aliases else None
            if _reads_its_projection(parent) and end.steps[-1].name == "out_proj":
                raise _unread(p, end)
            if forward_of(end.module) is nn.Module.forward:
                inner = f"{end.path}.*".lstrip(".")
                raise RuleError(
                    p.rule.short,
                    f"{end.path or 'the model'} is a {type(end.module).__name__}, which holds "
                    "modules and is never called, so a part there would never run.",
                    f'Put the rule on what it holds: at("{inner}", ...).',
                )


def _unread(p: Placed, projection: Site) -> RuleError:
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
