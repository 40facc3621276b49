"""A figure of a paper beside the count that is ours, and tables of such figures."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import timm
import torch
from torch import nn

import surgery
from surgery import at, ffn, nearest, norm, token, unfreeze
from surgery._table import Table
from surgery.rules.rule import Rules

CLASS = at("", unfreeze(token))
NORMS = at(nearest(norm, before=ffn), unfreeze)


class Figure(NamedTuple):
    """A method as it was run, the integer it must come to, and what a paper prints for it.

    printed  with its unit, "0.17 M" or "24.6 K"; "" where none is known
    plus     parameters that the printed figure counts beside ours (a head)
    why      why it does not match, or what the figure counts
    several  rule sets instead of one, whose mean is counted
    models   what they are applied to, one each; a ViT-B/16 without head where there are none
    """

    method: str
    setting: str
    rules: Rules | None  # None: nothing beside the head
    integer: int
    printed: str = ""
    plus: float = 0
    why: str = ""
    several: tuple[Rules, ...] = ()
    models: tuple[nn.Module, ...] = ()

    @property
    def counted(self) -> int:
        """What is trained; of rule sets in `several` their mean."""
        sets = self.several or ([self.rules] if self.rules else [])
        models = self.models or (vit(),) * len(sets)
        counts = [surgery.plan(*pair).trainable for pair in zip(models, sets, strict=True)]
        return round(sum(counts) / max(len(sets), 1))

    @property
    def verdict(self) -> str:
        if not self.printed:
            return self.why or "none printed"
        rounds = matches(self.counted + self.plus, self.printed)
        if rounds and self.plus:
            return f"with {self.why}"
        return "match" if rounds else f"no: {self.why}"


@cache
def vit() -> nn.Module:
    """ViT-B/16 at 224 without head, on the meta device: 85,798,656 parameters."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model("vit_base_patch16_224", num_classes=0)
    return model


def matches(count: float, printed: str) -> bool:
    """Whether a count rounds to a printed figure, in its unit and to its decimals.

    >>> matches(167_424, "0.17 M"), matches(156_768, "0.15 M")
    (True, False)
    """
    number, unit = printed.split()
    decimals = len(number.partition(".")[2])
    return f"{count / {'M': 1e6, 'K': 1e3, '': 1}[unit]:.{decimals}f}" == number


def table(title: str, figures: list[Figure], base: float = 85.84) -> Table:
    """A row for each figure; `base` is what is 100 %, in millions."""
    counted = [(figure, figure.counted) for figure in figures]
    rows: list[tuple[object, ...]] = [
        (f.method, f.setting, n, f"{n / base / 10_000:.3f}", f.printed or "-", f.verdict)
        for f, n in counted
    ]
    wrong = [
        f"WRONG: {f.method}, {f.setting}: not {f.integer:,}" for f, n in counted if n != f.integer
    ]
    columns = ("method", "setting", "trained", f"% of {base} M", "printed", "match")
    return Table(title, columns, rows, wrong)
