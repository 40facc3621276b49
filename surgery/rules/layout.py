"""The contract of parts that read tokens as a map, and of parts that let tokens hear others.

A part says `mixes_tokens = True` where what it gives for one token depends on others. Where it
reads them as a map of patches it says `reads_map = True` too: it is then called as
`part(x, layout)` with what the model shows of them; alone it is called as `part(x)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn


class Layout(NamedTuple):
    """How tokens lie in the plane.

    grid  (rows, columns) of patches, which come last, row by row; None: nothing tells
    axis  of tokens: 1, or 0 where the sequence comes before the samples
    """

    grid: tuple[int, int] | None
    axis: int = 1


def mixes_tokens(part: nn.Module) -> bool:
    """Whether a part, or one inside it, lets tokens hear others."""
    return any(getattr(module, "mixes_tokens", False) for module in part.modules())


def map_readers(part: nn.Module) -> Iterator[nn.Module]:
    """The modules of a part that read tokens as a map."""
    return (module for module in part.modules() if getattr(module, "reads_map", False))
