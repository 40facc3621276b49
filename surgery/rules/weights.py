"""Where: a parameter, called or not, whole or some of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..errors import RuleError
from ..structure.module_tree import Site, Tree
from ..structure.path import Step, match, parse
from ..structure.weights import parameter_site
from .expression import shown
from .selector import Selected, Selection


@dataclass(frozen=True, repr=False)
class Weight(Selection):
    """Parameters by their address."""

    address: str
    rows: tuple[int, int] | None = field(default=None, kw_only=True)
    tied: bool = field(default=True, kw_only=True)

    def select(self, tree: Tree) -> Selected:
        return dict(self._found(tree))

    def _found(self, tree: Tree) -> Iterator[tuple[Site, dict[str, str]]]:
        for holder in tree.sites:
            for name, parameter in holder.module._parameters.items():
                steps = (Step(name, 0, 1),)
                paths = [(*above, *steps) for above in (holder.steps, *holder.aliases)]
                found = (match(self.address, path) for path in paths)
                captures = next((it for it in found if it is not None), None)
                if parameter is not None and captures is not None:
                    rows = None if self.rows is None else slice(*self.rows)
                    yield parameter_site(tree, holder, name, rows, self.tied), captures


def weight(address: str, *, rows: tuple[int, int] | None = None, tied: bool = True) -> Weight:
    """The parameters of an address: what computes with one sees what linear parts make of it.

    Its module need not be called: nn.MultiheadAttention's "**.in_proj_weight", the experts of a
    layer in one tensor (experts, out, in), each with a part of its own, a table of embeddings, a
    convolution of any kernel. A part is given site.width features and gives site.out, as at a
    linear; of a vector, both are its length. Parts must be linear (`lora`, `scale_shift`, any
    with `affine()`), and merge.

    rows   (first, end) of those that are meant; None: all
    tied   where modules share the parameter, all see it changed; False: this one alone

    Raises RuleError where `rows` is no such pair.

    >>> weight("**.self_attn.in_proj_weight", rows=(0, 8))
    weight("**.self_attn.in_proj_weight", rows=(0, 8))
    """
    parse(address)
    if rows is not None and not _is_pair(rows):
        raise RuleError(
            f'weight("{address}", rows={shown(rows)})',
            "rows are given by the first and the end.",
            "Write rows=(0, 8) for the first eight.",
        )
    return Weight(address, rows=None if rows is None else (rows[0], rows[1]), tied=tied)


def _is_pair(rows: object) -> bool:
    numbers = isinstance(rows, (tuple, list)) and all(type(n) is int for n in rows)
    return numbers and len(rows) == 2 and 0 <= rows[0] < rows[1]  # type: ignore[arg-type, index]
