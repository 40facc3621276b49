"""The sites of every role in a tree, found by structure, never by name.

Feed-forward networks come first. Attention is what else projects features inside a block; a block
is the repeated module that holds them; before the first one are embeddings, after the last heads.
Where there is an example a forward corrects all of these.
"""

from __future__ import annotations

from itertools import accumulate

from .attention import (
    Attention,
    attentions_by_forward,
    attentions_by_tree,
    coordinates,
    corrected,
)
from .attention_states import OPERANDS
from .attention_traced import traced_attentions
from .dataflow import dataflow_of, keeps_tokens, norm_shape_in, shape_in
from .ends import Ends
from .ffn import find_ffns
from .ffn_merged import find_traced_ffns
from .layers import Shape, is_conv, is_list, is_norm, is_spatial_conv, linear_shape
from .module_tree import Projections, Site, Tree, element, holders, in_order, stretch
from .path import generalise
from .trace import Trace
from .weights import (
    ParameterSite,
    operand_weights,
    parameter_site,
    reader_by_forward,
    torch_projections,
)


def roles_of(tree: Tree) -> dict[str, list[Site]]:
    """The sites of every role, in the order of the walk; worked out once for a tree."""
    roles = _anatomy(tree).roles
    return {**roles, **tree.memo["told"]} if "told" in tree.memo else roles


def roles_by_modules(tree: Tree) -> dict[str, list[Site]]:
    """The same as modules alone tell, whatever a forward does."""
    if dataflow_of(tree) is None:
        return roles_of(tree)
    if "by modules" not in tree.memo:
        tree.memo["by modules"] = roles_of(Tree(tree.model))
    roles: dict[str, list[Site]] = tree.memo["by modules"]
    return roles


def tell_roles(tree: Tree, roles: dict[str, list[Site]]) -> None:
    """Take these roles as a forward told them elsewhere."""
    tree.memo["told"] = roles


def told_roles(tree: Tree) -> dict[str, list[Site]]:
    """The roles that a forward tells otherwise than the modules alone do, elsewhere or here.

    With an example, and operands too: the query, key and value of attentions.
    """
    if dataflow_of(tree) is not None and "told here" not in tree.memo:
        of_modules, makes = roles_by_modules(tree), operands(tree)
        told = {word: [s for s in makes if makes[s] == {word}] for word in OPERANDS}
        for word, sites in torch_operands(tree).items():
            told[word] = in_order([*told[word], *sites])
        for name, sites in roles_of(tree).items():
            if _described(sites) != _described(of_modules[name]):
                told[name] = sites
        tree.memo["told here"] = told
    found: dict[str, list[Site]] = tree.memo.get("told here", tree.memo.get("told", {}))
    return found


def torch_operands(tree: Tree) -> dict[str, list[Site]]:
    """The weights of torch's own attentions that make the query, the key, the value: rows, too."""
    attentions = [s for s in roles_of(tree)["attn"] if torch_projections(tree, s)[0]]
    apart = [operand_weights(tree, attn) for attn in attentions]
    return {word: [three[i] for three in apart] for i, word in enumerate(OPERANDS)}


def _described(sites: list[Site]) -> list[tuple[str, Shape]]:
    return [(site.path, site.shape) for site in sites]


def operands(tree: Tree) -> dict[Site, set[str]]:
    """What each projection of an attention makes, as a forward tells: query, key, value, or all."""
    words: dict[Site, set[str]] = {}
    for attention in _anatomy(tree).attentions:
        for site, made in attention.words.items():
            words.setdefault(site, set()).update(made)
    return {site: words[site] for site in roles_of(tree)["qkv"] if site in words}


def unprojected(tree: Tree) -> list[Site]:
    """What makes queries, keys or values and is no projection that is called."""
    return in_order(site for a in _anatomy(tree).attentions for site in a.other)


def holder_of_loose(tree: Tree, site: Site) -> Site | None:
    """The smallest module with several of those projections of attention that lie in no attn.

    None for any other. (CrossViT's, which pool; slot attention, whose place nothing else shares.)
    """
    roles = roles_of(tree)
    loose = [s for s in roles["qkv"] if not any(_holds(attn, s) for attn in roles["attn"])]
    if site not in loose:
        return None
    around = (h for h in site.above() if sum(_holds(h, s) for s in loose) > 1)
    return next(around, site)


def _holds(site: Site, inner: Site) -> bool:
    return site.entry.order <= inner.order < site.exit.end


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
        self.trace = dataflow.trace if dataflow else None
        by_forward = self._read_forward(self.trace) if self.trace else []
        self.attending = [s for a in by_forward for s in (*a.qkv, *([a.site] if a.site else []))]
        self.rest = {s for s in self.projections.all if s not in self.ffns.projections}
        self.blocks = in_order(self._block(ffn) for ffn in self.ffns.sites)
        self.attentions = attentions_by_tree(
            self.projections, self.ffns.sites, self.ffns.projections, self.blocks
        )
        of_tree = {a.site for a in self.attentions}
        if self.trace:
            self.attentions = corrected(self.attentions, by_forward, self.trace, self.projections)
            self.blocks = in_order([*self.blocks, *self._blocks_without_ffn()])
        self.attentions = [_with_weights(a, tree) for a in self.attentions]
        self.attns = in_order(a.site for a in self.attentions if a.site)
        self._read_shapes()
        self._leave_out_pooling(of_tree)
        self.roles = self._roles()

    def _leave_out_pooling(self, of_tree: set[Site | None]) -> None:
        """No part goes round an attention that gives fewer tokens (timm's CrossViT)."""
        trace = self.trace
        if trace is not None:
            self.attns = [s for s in self.attns if s in of_tree or keeps_tokens(trace, s)]

    def _read_forward(self, trace: Trace) -> list[Attention]:
        """The attentions that a forward shows; and no network is what it shows to be none.

        One of an attention (Reformer's), or two layers of which the first does not feed the last
        (CrossViT's, around an attention).
        """
        self.ffns = find_traced_ffns(trace, self.projections, self.ffns)
        sure = self.ffns.seen
        mixing = traced_attentions(trace)
        found = attentions_by_forward(trace, mixing, self.projections, self.ffns.sites, sure)
        theirs = {s for a in found for s in (*a.qkv, *a.proj)}
        for site in [s for s in self.ffns.sites if s not in sure]:
            layers = [s for s in self.projections.below(site) if s in self.ffns.projections]
            alone = element(site) is None and _ran(layers, mixing.feeding)  # embeds a time, say
            if alone or theirs & set(layers) or _are_apart(layers, mixing.feeding):
                self.ffns.sites.remove(site)
                self.ffns.projections.difference_update(layers)
        return found

    def _read_shapes(self) -> None:
        """Read the widths of blocks and attentions off their features, not off coordinates.

        Nor off networks where anything else tells: MViT's last of a stage gives more than d.
        """
        inside = {s for ffn in self.ffns.sites for s in self.projections.below(ffn)}
        spatial = {s for attn in self.attns for s in coordinates(attn, self.projections)}
        for site in (*self.blocks, *self.attns):
            site.read_shape(leave_out=spatial | inside)
            if not site.shape.out:
                site.read_shape(leave_out=spatial)
            if self.trace and (shape := shape_in(self.trace, site)):
                site._shape = shape
        if self.trace:
            _read_norms(self.tree, self.trace)
        for a in self.attentions:
            if a.site and not a.proj and _makes_thirds(a):  # of which one is mixed, and comes out
                a.site._shape = Shape(a.qkv[0].width, a.qkv[0].width, a.qkv[0].axis)

    def _roles(self) -> dict[str, list[Site]]:
        layers = [self._layers(ffn) for ffn in self.ffns.sites]
        theirs = {s for a in self.attentions for s in (*a.qkv, *a.proj)}
        around = self.blocks or (self.attns if self.trace else [])
        ends = Ends(self.projections, around, self.trace, theirs)
        return {
            "ffn": self.ffns.sites,
            "block": self.blocks,
            "attn": self.attns,
            "norm": [s for s in self.tree.sites if is_norm(s.module)],
            "fc1": [s for fc1, _ in layers for s in fc1],
            "fc2": [s for _, fc2 in layers for s in fc2],
            "head": ends.heads(),
            "embed": ends.embeddings(),
            **self._projecting(),
        }

    def _projecting(self) -> dict[str, list[Site]]:
        """The roles of what projects in attentions."""
        return {
            "qkv": in_order(s for a in self.attentions for s in a.qkv),
            "proj": in_order(s for a in self.attentions for s in a.proj),
            "fused": in_order(a.qkv[0] for a in self.attentions if _makes_thirds(a)),
        }

    def _layers(self, ffn: Site) -> tuple[list[Site], list[Site]]:
        """The linear layers of a feed-forward network: what widens (and gates), what narrows."""
        layers = [s for s in self.projections.below(ffn) if linear_shape(s.module)]
        fc2 = _narrowing(layers, ffn)
        hidden = {s.width for s in fc2}
        reading = [s for s in layers if s not in fc2 and s.width == ffn.width]
        return [s for s in reading if s.out in hidden or s.out // 2 in hidden], fc2

    def _block(self, ffn: Site) -> Site:
        """The nearest container element around an FFN that also projects; else the nearest.

        (T5 lists attention and FFN as elements of a block. Convolutions do not count, or
        FastViT's and MobileNetV4's stages would be blocks.) Where attentions and FFNs alternate in
        one list, as in x-transformers, from an attention to the FFN behind it.
        """
        elements = [s for s in holders(ffn) if s.is_element]
        for site in elements:
            if self._also_projects(site):
                return site
        for site in elements:
            if first := self._first_of(site):
                return stretch(first, site)
        called = [s for s in holders(ffn) if not is_list(s.module)]
        alone = [s for s in called if s.parent and self._also_projects(s)]  # Perceiver IO's first
        return [*elements, *alone, *called, ffn][0]

    def _also_projects(self, site: Site) -> bool:
        """Whether it attends: projects otherwise, or a forward shows it, in a list of parts."""
        if is_list(site.module) and any(site.order <= s.order < site.end for s in self.attending):
            return True  # (LeViT's and CvT's 1x1 convolutions)
        return any(s in self.rest and not is_conv(s.module) for s in self.projections.below(site))

    def _first_of(self, last: Site) -> Site | None:
        """The first of the attentions before an element, where a list begins with one.

        (A dict of a list of attentions and one of networks begins with a list, and has no block.)
        """
        if is_list(last.module) and sum(_holds(last, ffn) for ffn in self.ffns.sites) > 1:
            return None
        siblings = last.parent.children if last.parent else []
        with_ffn = [self._holds_ffn(site) for site in siblings]
        if (
            not with_ffn
            or with_ffn[0]
            or not all(
                ffn or self._also_projects(site)
                for ffn, site in zip(with_ffn, siblings, strict=True)
            )
        ):
            return None
        first = last.parent.children.index(last) if last.parent else 0
        while first and not with_ffn[first - 1]:
            first -= 1
        return siblings[first] if siblings[first] is not last else None

    def _holds_ffn(self, site: Site) -> bool:
        return any(_holds(site, ffn) for ffn in self.ffns.sites)

    def _blocks_without_ffn(self) -> list[Site]:
        """The elements of lists all of which attend, and hold no network (Flux's single blocks)."""
        elements = {e for a in self.attentions if a.site and (e := element(a.site))}
        inside = [s for b in self.blocks for s in (b, *b.entry.above())]
        lists = {e.parent for e in elements} - set(inside) - {None}
        return [
            site
            for parent in lists
            if parent and set(parent.children) <= elements and not self._are_in_blocks(parent)
            for site in parent.children
        ]

    def _are_in_blocks(self, site: Site) -> bool:
        return any(b.order <= site.order < b.exit.end for b in self.blocks)


def _read_norms(tree: Tree, trace: Trace) -> None:
    """Read the widths of norms that fix none off what comes to them."""
    for norm in tree.sites:
        if is_norm(norm.module):
            norm._shape = norm_shape_in(trace, norm) or norm._shape


def _narrowing(layers: list[Site], ffn: Site) -> list[Site]:
    """Those of the layers of a network that narrow; where d is h, all but the first that give d."""
    narrows = [s for s in layers if s.out == ffn.out != s.width != ffn.width]
    return narrows or [s for s in layers[1:] if s.out == ffn.out]


def _ran(layers: list[Site], feeding: dict[int, set[int]]) -> bool:
    return bool(layers) and id(layers[-1].module) in feeding


def _are_apart(layers: list[Site], feeding: dict[int, set[int]]) -> bool:
    """Whether none of some layers feeds the last, and something else does."""
    feeders = feeding.get(id(layers[-1].module), set()) if len(layers) > 1 else set()
    return bool(feeders) and not feeders & {id(layer.module) for layer in layers}


def _with_weights(a: Attention, tree: Tree) -> Attention:
    """An attention with the weights of torch's own, which it holds, as projections.

    And those of layers that are not called, as a forward tells.
    """
    a = _with_uncalled(a, tree)
    whole = {s: torch_projections(tree, s) for s in (*a.qkv, *a.proj, *a.other)}
    if not any(makes for makes, _ in whole.values()):
        return a
    rest = [[s for s in sites if not whole[s][0]] for sites in (a.qkv, a.proj, a.other)]
    qkv = [*rest[0], *(s for makes, _ in whole.values() for s in makes)]
    proj = [*rest[1], *(s for _, gives in whole.values() for s in gives)]
    return Attention(a.site, qkv, proj, a.words, rest[2])


def _with_uncalled(a: Attention, tree: Tree) -> Attention:
    """An attention whose layers that it does not call are their weights."""
    uncalled = {
        site: parameter_site(tree, site, "weight")
        for site in (*a.qkv, *a.proj)
        if not isinstance(site, ParameterSite) and reader_by_forward(tree, site)
    }
    if not uncalled:
        return a
    qkv, proj = ([uncalled.get(s, s) for s in sites] for sites in (a.qkv, a.proj))
    words = {uncalled.get(s, s): made for s, made in a.words.items()}
    return Attention(a.site, qkv, proj, words, a.other)


def _makes_thirds(attention: Attention) -> bool:
    """Whether one projection makes query, key and value, each as wide as what the output takes."""
    if len(attention.qkv) != 1 or len(attention.proj) > 1:
        return False
    (one,) = attention.qkv
    words = attention.words.get(one)
    whole = words is None or len(words) == len(OPERANDS)
    return whole and one.out == 3 * (attention.proj[0] if attention.proj else one).width
