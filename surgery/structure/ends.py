"""What stands before the first block and after the last: embeddings and heads.

By the order of registration; where there is an example, by what feeds what: a head is made of what
blocks give and feeds none, whatever is registered first, and what never runs is none. Whatever
makes features may be one, where it runs last: a convolution over positions, a table of weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from itertools import takewhile

from torch import nn

from .layers import CONVS, is_conv, is_list, keeps_statistics, linear_shape
from .linear_ops import is_depthwise, linear_op
from .module_tree import Projections, Site, in_order
from .trace import CONV_OPS, Op, Trace, names

TRANSPOSED = names("conv_transpose1d conv_transpose2d conv_transpose3d")
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
        self.projections, self.attending, self.known = projections, attending, bool(blocks)
        self.tree, self.blocks = projections.tree, blocks or _repeated(projections)
        self.flow = _Flow(trace, self.blocks, self.tree.sites) if trace and self.blocks else None

    def heads(self) -> list[Site]:
        """The outermost modules after the last block that project to another width than its own.

        The last of all where none does (BERT's pooler). And what stands among them and keeps
        running statistics, which nothing else would train (MobileViT, MobileNetV4). The last alone
        where no block is known.
        """
        if not self.blocks:
            return []
        width, late = self.blocks[-1].out, self._late()
        tops = self._outermost(late)
        heads = [s for s in tops if self._gives(s, late) != width] or tops[-1:]
        if not self.known:
            heads = [s for s in tops[-1:] if not _is_network(s)]
        if not heads:
            return []
        return in_order([*heads, *self._outermost(self._statistics(heads[0]))])

    def _gives(self, top: Site, late: list[Site]) -> int:
        """How many features its last layer gives; 0 where that has a matrix of its own kind."""
        last = [s for s in late if top.order <= s.order < top.end][-1]
        return int(getattr(last.module, "out_channels", last.out))

    def embeddings(self) -> list[Site]:
        """The outermost modules before the first block that take the input in."""
        if not self.known:
            return []
        if self.flow:
            early = [s for s in self.flow.before if isinstance(s.module, EMBEDS)]
        else:
            first = self.blocks[0].order
            early = [s for s in self.tree.sites if s.order < first and isinstance(s.module, EMBEDS)]
        return in_order(_around(site, self.blocks)[-1] for site in early)

    def _late(self) -> list[Site]:
        """What makes features after the last block, in the order in which it runs: projections.

        Something else where that is last (SwinIR's convolution), without those that feed it.
        """
        if self.flow:
            late = self.flow.late
            return [s for s in late if s not in self.attending and not self._in_stage(s)]
        end = max(block.end for block in self.blocks)
        projecting = [s for s in self.projections.all if s.order >= end and linear_shape(s.module)]
        spatial = [s for s in self.tree.sites[end:] if _mixes_positions(s.module)][-1:]
        return spatial if self._is_head(spatial, projecting) else projecting

    def _is_head(self, spatial: list[Site], projecting: list[Site]) -> bool:
        """Whether a convolution is the head: registered last, and in no network of its own."""
        if not spatial or (projecting and projecting[-1].order > spatial[0].order):
            return False
        return not _is_network(_around(spatial[0], self.blocks)[-1])

    def _in_stage(self, site: Site) -> bool:
        """Whether it lies in an element of a container that holds blocks too (MobileViT's).

        Or in one of those that take turns with them (convolutions between axial attentions).
        """
        around = [s for s in (site, *site.above()) if s.is_element and s.parent and s.parent.parent]
        if any(s.order <= b.order < s.end for s in around for b in self.blocks):
            return True
        first, last = self.blocks[0].order, self.blocks[-1].order
        between = [
            s for e in around if e.parent for s in e.parent.children if first < s.order < last
        ]
        return any(s.parent is e.parent and _alike(s, e) for e in around for s in between)

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
    """What runs before blocks and feeds them, and what is made of what they give and feeds none.

    late  of what comes after, the projections, and what else makes features and runs last
    """

    def __init__(self, trace: Trace, blocks: list[Site], sites: list[Site]) -> None:
        self.by_module = {id(s.module): s for s in sites}
        inside = {id(s.module) for b in blocks for s in sites[b.order : b.exit.end]}
        in_block = {op for op in trace.ops if any(id(c.module) in inside for c in op.stack())}
        behind, ahead = _reached(trace.ops, in_block), _reaching(trace.ops, in_block)
        after = [op for op in trace.ops if op in behind and op not in ahead]
        self.before = self._sites(op for op in trace.ops if op in ahead and op not in behind)
        self.after = self._sites(after)
        self.late = self._making(after, blocks)

    def _sites(self, ops: Iterable[Op]) -> dict[Site, None]:
        found = (self.by_module.get(id(_owner(op))) for op in ops)
        return dict.fromkeys(site for site in found if site)

    def _making(self, after: list[Op], blocks: list[Site]) -> list[Site]:
        """Projections; and what else makes features last, without the projections that feed it.

        (A U-Net's last convolution over positions; a table of words, or queries, is none.)
        """
        others = self._last(after)
        feeding = _reaching(after, others)
        kept = [op for op in after if op in others or self._is_projection(op) > (op in feeding)]
        sites = (s for s in self._sites(kept) if s.parent and not self._is_table(s))
        return [s for s in sites if not any(s.order <= b.order < s.end for b in blocks)]

    def _last(self, after: list[Op]) -> set[Op]:
        """What makes features last and is no projection."""
        making = {op for op in after if _makes_features(op)}
        feeding = _reaching(after, making)
        last = (op for op in making if not any(use in feeding for use in _uses(op)))
        return {op for op in last if not self._is_projection(op)}

    def _is_table(self, site: Site) -> bool:
        """Whether it looks words up, here or before the blocks."""
        tied = site in self.before and not linear_shape(site.module)
        return tied or isinstance(site.module, nn.Embedding)

    def _is_projection(self, op: Op) -> bool:
        owner = _owner(op)
        return owner is not None and linear_shape(owner) is not None


def _alike(a: Site, b: Site) -> bool:
    """Whether they are of the same classes, and the same lie in both; a lone layer is none."""
    kinds = [[type(s.module) for s in (each, *each.below())] for each in (a, b)]
    return kinds[0] == kinds[1] and len(kinds[0]) > 1


def _repeated(projections: Projections) -> list[Site]:
    """The elements of containers that hold several of a kind, with linear layers in them.

    What stands for blocks where none is known (Mamba's layers; not ResNet's bottlenecks).
    """
    elements = [s for s in projections.tree.sites if s.is_element and s.children]
    holding = [s for s in elements if not all(is_conv(p.module) for p in projections.below(s))]
    kinds = Counter((id(s.parent), type(s.module)) for s in holding)
    return [s for s in holding if kinds[id(s.parent), type(s.module)] > 1]


def _makes_features(op: Op) -> bool:
    """Whether it multiplies features with weights, but for channel by channel."""
    if linear_op(op):
        return True
    return op.name in CONV_OPS | TRANSPOSED and bool(op.features) and not is_depthwise(op)


def _mixes_positions(module: nn.Module) -> bool:
    """Whether it is a convolution that mixes channels and positions, and does not merge these.

    Transposed too. (GLM-4V's vision tower registers a merging one behind its head.)
    """
    if not isinstance(module, nn.modules.conv._ConvNd) or linear_shape(module):
        return False
    merges = is_conv(module) and max(module.stride) > 1
    return not merges and module.groups < max(2, module.in_channels)


def _uses(op: Op) -> Iterable[Op]:
    return (use for value in op.outputs for use in value.uses)


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
        if any(use in found for use in _uses(op)):
            found.add(op)
    return found


def _outermost(site: Site, blocks: list[Site]) -> Site:
    """The outermost module around a site that holds no block, and is not the model.

    Nor a network of its own, where the site is a convolution (a vocoder behind what speaks).
    """
    around = _around(site, blocks)
    if linear_shape(site.module) or keeps_statistics(site.module):
        return around[-1]
    return [s for s in around if not _is_network(s)][-1]


def _around(site: Site, blocks: list[Site]) -> list[Site]:
    """A site and the modules around it that hold no block, without the model."""

    def is_outside(above: Site) -> bool:
        return above.parent is None or any(above.order <= b.order < above.end for b in blocks)

    return [site, *takewhile(lambda above: not is_outside(above), site.above())]


def _is_network(site: Site) -> bool:
    return any(is_list(s.module) for s in site.below())
