"""Rows of a site's output that parts may choose: q and v of a linear that makes q, k and v."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import RuleError
from ..rules.affine import Affine, affine
from ..structure.module_tree import Site
from .arguments import declare_as


def chosen_rows(rows: str | None, out: int, rule: str) -> list[slice]:
    """The rows that are chosen of `out`, one slice for each name without a leading underscore.

    rows    as many names as there are equal chunks, "q _k v"; None: one slice over all rows
    rule    the word that is given them, for errors

    Raises RuleError where `out` does not divide by the names, or all names are left alone.

    >>> chosen_rows("q _k v", 12, "lora")
    [slice(0, 4, None), slice(8, 12, None)]
    """
    if rows is None:
        return [slice(0, out)]
    names = rows.split() if isinstance(rows, str) else []
    if all(name.startswith("_") for name in names):
        raise RuleError(
            f"{rule}(rows={rows!r})",
            "it names no rows that are changed.",
            'Name the chunks of the output, with a "_" before what is left alone: "q _k v".',
        )
    size, over = divmod(out, len(names))
    if over:
        raise RuleError(
            f"{rule}(rows={rows!r})",
            f"the site gives {out} features, which are not {len(names)} equal chunks.",
            "Put it on a linear that makes q, k and v at once, or leave out rows.",
        )
    return [slice(i * size, i * size + size) for i, n in enumerate(names) if n[0] != "_"]


def row_size(slices: list[slice]) -> int:
    """How many rows each slice has: all have the same number.

    >>> row_size([slice(0, 4), slice(8, 12)])
    4
    """
    return int(slices[0].stop - slices[0].start)


def placed(pieces: list[Tensor], slices: list[slice], out: int) -> Tensor:
    """Pieces (..., size) at their slices of (..., out), zeros elsewhere.

    >>> placed([torch.ones(2, 1), torch.ones(2, 1)], [slice(0, 1), slice(2, 3)], 3)[0]
    tensor([1., 0., 1.])
    """
    if len(pieces) == 1 and slices[0] == slice(0, out):
        return pieces[0]
    columns: list[Tensor] = []
    end = 0
    for piece, place in zip(pieces, slices, strict=True):
        if place.start > end:
            columns.append(piece.new_zeros(*piece.shape[:-1], place.start - end))
        columns.append(piece)
        end = place.stop
    if end < out:
        columns.append(columns[-1].new_zeros(*columns[-1].shape[:-1], out - end))
    return torch.cat(columns, -1)


class OnRows(nn.Module):
    """One part for each chosen slice of the output, all given the same: (..., width) to (..., out).

    >>> OnRows([nn.Linear(4, 2)], [slice(2, 4)], 4)(torch.ones(1, 4))[0, :2]
    tensor([0., 0.], grad_fn=<SliceBackward0>)
    """

    def __init__(self, parts: list[nn.Module], slices: list[slice], out: int) -> None:
        super().__init__()
        self.parts, self.slices, self.out = nn.ModuleList(parts), slices, out
        declare_as(self, parts)

    def forward(self, x: Tensor) -> Tensor:
        return placed([part(x) for part in self.parts], self.slices, self.out)

    def affine(self) -> Affine:
        maps = [affine(part) for part in self.parts]
        weights = [map.weight.t() for map in maps if map is not None]
        return Affine(placed(weights, self.slices, self.out).t(), None)


def on_rows(rows: str | None, site: Site, rule: str, make: Callable[[int], nn.Module]) -> nn.Module:
    """`make(out)` for every chosen slice of the site's output; alone where it is all of it."""
    slices = chosen_rows(rows, site.out, rule)
    parts = [make(row_size(slices)) for _ in slices]
    return parts[0] if rows is None else OnRows(parts, slices, site.out)
