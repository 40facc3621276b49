"""The sites of every role in a tree, found by structure, never by name.

Feed-forward networks come first. Attention is what else projects features inside a block; a block
is the repeated module that holds them; before the first one are embeddings, after the last heads.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

from torch import nn

from .dataflow import Dataflow, dataflow_of
from .ffn import find_ffns
from .ffn_merged import find_traced_ffns
from .layers import (
    CONVS,
    NARROWEST,
    is_conv,
    is_list,
    is_norm,
    is_spatial_conv,
    is_torch_attention,
    keeps_statistics,
    linear_shape,
)
from .module_tree import Projections, Site, Tree, holders
from .path import generalise


def roles_of(tree: Tree) -> dict[str, list[Site]]:
    """The sites of every role, in the order of the walk; worked out once for a tree."""
    return _anatomy(tree).roles


def operands(tree: Tree, dataflow: Dataflow) -> dict[Site, set[str]]:
    """What each projection of an attention makes, as a forward tells: query, key, value, or all."""
    roles = roles_of(tree)
    if "operands" not in tree.memo:
        tree.memo["operands"] = dataflow.operands(roles["attn"], roles["qkv"])
    words: dict[Site, set[str]] = tree.memo["operands"]
    return {site: words[site] for site in roles["qkv"] if site in words}


def instead_of_ffns(tree: Tree) -> str:
    """Why a model has no feed-forward network: what it is made of, in words."""
    anatomy = _anatomy(tree)
    spatial = [s for s in tree.sites if is_spatial_conv(s.module)]
    for sites, what in (
        (
            anatomy.ffns.fused,
            "blocks whose attention and feed-forward network share one projection",
        ),
        (anatomy.ffns.bottlenecks, "inverted bottlenecks, which mix positions as they widen"),
        (spatial, "convolutions over positions"),
        (anatomy.projections.all, "projections, none of them a pair d -> h, h -> d in a block"),
    ):
        if sites:
            return f"it has {len(sites)} {what} ({generalise(sites[0].path) or 'the model'})"
    return "it has no projection at all"


def stages(tree: Tree) -> list[int]:
    """For every block, in order, the stage it is in: a new one where width or container changes."""
    blocks = _anatomy(tree).roles["block"]
    marks = [(b.out, b.parent) for b in blocks]
    new = [i > 0 and marks[i] != marks[i - 1] for i in range(len(marks))]
    return list(accumulate(map(int, new)))


def _anatomy(tree: Tree) -> _Anatomy:
    if "anatomy" not in tree.memo:
        tree.memo["anatomy"] = _Anatomy(tree)
    anatomy: _Anatomy = tree.memo["anatomy"]
    return anatomy


class _Anatomy:
    """The roles of one tree, each worked out from those before it."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.projections = Projections(tree)
        self.ffns = find_ffns(self.projections)
        dataflow = dataflow_of(tree)
        if dataflow:
            self.ffns = find_traced_ffns(dataflow.trace, self.projections, self.ffns)
        self.rest = {s for s in self.projections.all if s not in self.ffns.projections}
        self.blocks = _unique(self._block(ffn) for ffn in self.ffns.sites)
        self.attns = self._attentions()
        self.coordinates = {s for attn in self.attns for s in self._of_coordinates(attn)}
        self._read_shapes()
        self.roles = self._roles()

    def _read_shapes(self) -> None:
        """Read the widths of blocks and attentions off their features, not off coordinates.

        Nor off networks where anything else tells: MViT's last of a stage gives more than d.
        """
        inside = {s for ffn in self.ffns.sites for s in self.projections.below(ffn)}
        for site in (*self.blocks, *self.attns):
            site.read_shape(leave_out=self.coordinates | inside)
            if not site.shape.out:
                site.read_shape(leave_out=self.coordinates)

    def _roles(self) -> dict[str, list[Site]]:
        layers = [self._layers(ffn) for ffn in self.ffns.sites]
        return {
            "ffn": self.ffns.sites,
            "block": self.blocks,
            "attn": self.attns,
            "norm": [s for s in self.tree.sites if is_norm(s.module)],
            "fc1": [s for fc1, _ in layers for s in fc1],
            "fc2": [s for _, fc2 in layers for s in fc2],
            "head": self._heads(),
            "embed": self._embeddings(),
            **self._projection_roles(),
        }

    def _projection_roles(self) -> dict[str, list[Site]]:
        """What attentions are made of: what reads features, what gives them, what makes all."""
        outputs = {attn: self._output(attn) for attn in self.attns}
        last = set(outputs.values())
        inputs = {attn: [s for s in self._inside(attn) if s not in last] for attn in self.attns}
        fused = [a for a, qkv in inputs.items() if _makes_thirds(qkv, outputs[a])]
        return {
            "qkv": [s for qkv in inputs.values() for s in qkv],
            "proj": [s for s in outputs.values() if not is_torch_attention(s.module)],
            "fused": [inputs[attn][0] for attn in fused],
        }

    def _inside(self, attn: Site) -> list[Site]:
        """The projections of features inside an attention."""
        return [s for s in self.projections.below(attn) if s not in self.coordinates]

    def _layers(self, ffn: Site) -> tuple[list[Site], list[Site]]:
        """The linear layers of a feed-forward network: what widens (and gates), what narrows."""
        layers = [s for s in self.projections.below(ffn) if linear_shape(s.module)]
        fc2 = [s for i, s in enumerate(layers) if i and s.out == ffn.out]
        hidden = {s.width for s in fc2}
        reading = [s for s in layers if s not in fc2 and s.width == ffn.width]
        return [s for s in reading if s.out in hidden or s.out // 2 in hidden], fc2

    def _block(self, ffn: Site) -> Site:
        """The nearest container element around an FFN that also projects; else the nearest.

        (T5 lists attention and FFN as elements of a block. Convolutions do not count, or
        FastViT's and MobileNetV4's stages would be blocks.)
        """
        elements = [s for s in holders(ffn) if s.is_element]
        for site in elements:
            if any(s in self.rest and not is_conv(s.module) for s in self.projections.below(site)):
                return site
        called = [s for s in holders(ffn) if not is_list(s.module)]
        return [*elements, *called, ffn][0]

    def _attentions(self) -> list[Site]:
        ffns, sites = self.ffns.sites, self.tree.sites
        shared = {s for ffn in ffns for s in (*sites[ffn.order : ffn.end], *ffn.entry.above())}
        return _unique(attn for block in self.blocks for attn in self._beside_ffns(block, shared))

    def _beside_ffns(self, block: Site, shared: set[Site]) -> list[Site]:
        """The smallest modules that hold what else projects in a block, branch by branch.

        shared  the sites that have something in common with an FFN
        """
        attns: list[Site] = []

        def visit(site: Site) -> None:
            projections = [s for s in self.projections.below(site) if s in self.rest]
            if not projections:
                return
            if site in shared or site is block or is_list(site.module):
                for child in site.children:
                    visit(child)
            elif len(projections) > 1 or is_torch_attention(projections[0].module):
                attns.append(_smallest(site, projections))

        visit(block)
        return attns

    def _output(self, attn: Site) -> Site:
        """The output projection: the last that gives as many features as the FFN beside it takes.

        (Phi-3 registers it first.)
        """
        ffns, projections = self.ffns.sites, self._inside(attn)
        near = ffns[min(bisect_left(ffns, attn.order, key=lambda f: f.order), len(ffns) - 1)]
        ends = [s for s in projections if s.out == near.width]
        return (ends or projections or self.projections.below(attn))[-1]

    def _of_coordinates(self, attn: Site) -> list[Site]:
        """The projections of an attention that take coordinates, no features (Swin V2, ConViT)."""
        projections = self.projections.below(attn)
        narrow = {
            s for s in projections if (shape := linear_shape(s.module)) and shape.width < NARROWEST
        }
        small = {s.parent for s in narrow} - {attn}
        return [s for s in projections if s in narrow or s.parent in small]

    def _heads(self) -> list[Site]:
        """The outermost modules after the last block that project to another width than its own.

        The last of all where none does (BERT's pooler). And what stands among them and keeps
        running statistics, which nothing else would train (MobileViT, MobileNetV4).
        """
        if not self.blocks:
            return []
        end, width = max(block.end for block in self.blocks), self.blocks[-1].out
        late = [s for s in self.projections.all if s.order >= end and linear_shape(s.module)]
        tops = self._outermost(late)
        heads = [s for s in tops if self.projections.below(s)[-1].out != width] or tops[-1:]
        if not heads:
            return []
        statistics = [s for s in self.tree.sites if keeps_statistics(s.module)]
        among = [s for s in statistics if heads[0].order < s.order]
        return _unique([*heads, *self._outermost(among)])

    def _embeddings(self) -> list[Site]:
        """The outermost modules before the first block that take the input in."""
        if not self.blocks:
            return []
        kinds = (*CONVS, nn.Linear, nn.Embedding)
        early = [s for s in self.tree.sites if s.order < self.blocks[0].order]
        return self._outermost(s for s in early if isinstance(s.module, kinds))

    def _outermost(self, sites: Iterable[Site]) -> list[Site]:
        """The outermost module around each site that holds no block, and is not the model."""
        return _unique(_outermost(site, self.blocks) for site in sites)


def _makes_thirds(qkv: list[Site], output: Site) -> bool:
    """Whether one projection makes query, key and value, each as wide as what the output takes."""
    return len(qkv) == 1 and qkv[0].out == 3 * output.width


def _smallest(site: Site, projections: list[Site]) -> Site:
    """The smallest module in a site that holds all of these."""
    for child in site.children:
        if child.order <= projections[0].order and projections[-1].order < child.end:
            return _smallest(child, projections)
    return site


def _outermost(site: Site, blocks: list[Site]) -> Site:
    top = site
    for above in site.above():
        if above.parent is None or any(above.order <= b.order < above.end for b in blocks):
            break
        top = above
    return top


def _unique(sites: Iterable[Site]) -> list[Site]:
    """Sites in the order of the walk, each once."""
    return sorted(dict.fromkeys(sites), key=lambda s: s.order)
