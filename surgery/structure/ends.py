"""What stands before the first block and after the last: embeddings and heads.

By the order of registration; where there is an example, by what feeds what: a head is made of what
blocks give and feeds none, whatever is registered first, and what never runs is none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import nn

from .layers import CONVS, keeps_statistics, linear_shape
from .linear_ops import linear_op
from .module_tree import Projections, Site, in_order
from .trace import Op, Trace

EMBEDS = (*CONVS, nn.Linear, nn.Embedding)


class Ends:
    """The sites before and after the blocks of a model."""

    def __init__(
        self,
        projections: Projections,
        blocks: list[Site],
        trace: Trace | None,
        attending: Collection[Site] = (),
    ) -> None:
        self.projections, self.blocks, self.attending = projections, blocks, attending
        self.tree = projections.tree
        self.flow = _Flow(trace, blocks, self.tree.sites) if trace and blocks else None

    def heads(self) -> list[Site]:
        """The outermost modules after the last block that project to another width than its own.

        The last of all where none does (BERT's pooler). And what stands among them and keeps
        running statistics, which nothing else would train (MobileViT, MobileNetV4).
        """
        if not self.blocks:
            return []
        width = self.blocks[-1].out
        tops = self._outermost(self._late())
        heads = [s for s in tops if self.projections.below(s)[-1].out != width] or tops[-1:]
        if not heads:
            return []
        return in_order([*heads, *self._outermost(self._statistics(heads[0]))])

    def embeddings(self) -> list[Site]:
        """The outermost modules before the first block that take the input in."""
        if not self.blocks:
            return []
        if self.flow:
            early = [s for s in self.flow.before if isinstance(s.module, EMBEDS)]
        else:
            first = self.blocks[0].order
            early = [s for s in self.tree.sites if s.order < first and isinstance(s.module, EMBEDS)]
        return in_order(self._outermost(early))

    def _late(self) -> list[Site]:
        """The projections after the last block, in the order in which they run."""
        if self.flow:
            late = (s for s in self.flow.after if linear_shape(s.module))
            return [s for s in late if s not in self.attending and not self._in_stage(s)]
        end = max(block.end for block in self.blocks)
        return [s for s in self.projections.all if s.order >= end and linear_shape(s.module)]

    def _in_stage(self, site: Site) -> bool:
        """Whether it lies in an element of a container that holds blocks too (MobileViT's)."""
        around = [s for s in (site, *site.above()) if s.is_element and s.parent and s.parent.parent]
        return any(s.order <= b.order < s.end for s in around for b in self.blocks)

    def _statistics(self, first: Site) -> list[Site]:
        if self.flow:
            late = (s for s in self.flow.after if keeps_statistics(s.module))
            return [s for s in late if not self._in_stage(s)]
        later = (s for s in self.tree.sites if first.order < s.order)
        return [s for s in later if keeps_statistics(s.module)]

    def _outermost(self, sites: Iterable[Site]) -> list[Site]:
        """The outermost module around each site that holds no block, and is not the model."""
        return list(dict.fromkeys(_outermost(site, self.blocks) for site in sites))


class _Flow:
    """What runs before blocks and feeds them, and what is made of what they give and feeds none."""

    def __init__(self, trace: Trace, blocks: list[Site], sites: list[Site]) -> None:
        inside = {id(s.module) for b in blocks for s in sites[b.order : b.exit.end]}
        by_module = {id(s.module): s for s in sites}
        in_block = {op for op in trace.ops if any(id(c.module) in inside for c in op.stack())}
        behind, ahead = _reached(trace.ops, in_block), _reaching(trace.ops, in_block)
        self.before: dict[Site, None] = {}
        self.after: dict[Site, None] = {}
        for op in trace.ops:
            site = by_module.get(id(_owner(op)))
            if site is None or op in in_block:
                continue
            if op in behind and op not in ahead:
                self.after[site] = None
            elif op in ahead and op not in behind:
                self.before[site] = None


def _owner(op: Op) -> nn.Module | None:
    """The module whose weights an operation uses, or else the one that runs it."""
    linear = linear_op(op)
    return linear.owner if linear else op.call.module if op.call else None


def _reached(ops: list[Op], start: set[Op]) -> set[Op]:
    """The operations that what these give goes into, by whatever way."""
    found = set(start)
    for op in ops:
        if any(value.op in found for value in op.inputs if value.op is not None):
            found.add(op)
    return found


def _reaching(ops: list[Op], end: set[Op]) -> set[Op]:
    """The operations that feed these, by whatever way."""
    found = set(end)
    for op in reversed(ops):
        if any(use in found for value in op.outputs for use in value.uses):
            found.add(op)
    return found


def _outermost(site: Site, blocks: list[Site]) -> Site:
    top = site
    for above in site.above():
        if above.parent is None or any(above.order <= b.order < above.end for b in blocks):
            break
        top = above
    return top
