"""Tokens that no attention would hear: blocks without any, and attentions that lie in no block.

Whoever walks two lists side by side, `for attn, ff in zip(self.attns, self.ffs)`, has no module
and no stretch of a list that holds an attention and its network: what is found for a block holds
the network alone, or is the whole model (XLM, Flaubert).
"""

from __future__ import annotations

from collections.abc import Iterable

from .._text import first_few
from ..errors import RuleError
from ..rules.edits import Insert
from ..rules.roles import attn as ATTN
from ..rules.roles import block as BLOCK
from ..rules.roles import ffn as FFN
from ..structure.attention import attentions_by_tree
from ..structure.dataflow import dataflow_of
from ..structure.module_tree import Projections, Site, Tree, element
from ..structure.path import generalise
from .placement import Placement

REMEDY = "Put prompts at each attention, at(attn, prompt()), or use a method that adds no tokens."


def check_attended(placements: list[Placement], tree: Tree) -> None:
    """Raise RuleError where tokens are put into blocks that hold no attention, which lies apart."""
    inserting = [p for p in placements if isinstance(p.edit, Insert)]
    if not inserting:
        return
    blocks = _Blocks(tree)
    for p in inserting:
        if fact := blocks.apart(p.place):
            told = "Give example=inputs. " if dataflow_of(tree) is None else ""
            raise RuleError(p.rule.short, fact, told + REMEDY)


class _Blocks:
    """The blocks of a model, and what lies apart in them and beside them.

    deaf     those without attention
    mute     those without a feed-forward network
    outside  the attentions that lie in no block, or in a mute one
    """

    def __init__(self, tree: Tree) -> None:
        self.tree, self.all, self.ffns = tree, list(BLOCK.find(tree)), list(FFN.find(tree))
        self.projections = Projections(tree)
        theirs = {s for ffn in self.ffns for s in self.projections.below(ffn)}
        self.rest = [s for s in self.projections.all if s not in theirs]
        self.deaf = [b for b in self.all if not any(_holds(b, s) for s in self.rest)]
        self.mute = [b for b in self.all if not any(_holds(b, s) for s in self.ffns)]
        self.among = False
        self.outside = self._outside(theirs) if self.deaf else []

    def apart(self, place: Site) -> str:
        """What lies apart from what, where a place is made of such blocks; "" where nothing is."""
        if place in self.all and place.parent is None:
            return self._is_whole()
        within = {b for b in self.all if _holds(place, b)}
        apart = self.among or len(self.outside) >= len(self.deaf) > 0
        if not apart or not within or not within <= {*self.deaf, *self.mute}:
            return ""
        return (
            f"{_named(self.deaf)} hold feed-forward networks alone, and the attentions "
            f"{_named(self.outside)} lie apart: two lists are walked side by side, and no block is "
            "found that holds one of each, so tokens would miss some of them."
        )

    def _is_whole(self) -> str:
        """Why the model is no block: it lists several networks."""
        listed = [ffn for ffn in self.ffns if ffn.is_element or element(ffn)]
        if len(listed) < 2:
            return ""
        return (
            f"the one block that is found is the whole model: its {len(listed)} feed-forward "
            f"networks ({_named(listed)}) and its attentions are walked in lists side by side, and "
            "nothing holds one of each."
        )

    def _outside(self, theirs: set[Site]) -> list[Site]:
        """What attends apart from networks; of a forward, before the last of them that run.

        (Behind them it pools: SigLIP.)
        """
        whole = [b for b in self.all if b not in self.mute]
        dataflow = dataflow_of(self.tree)
        if dataflow is None:
            found = attentions_by_tree(self.projections, self.ffns, theirs, [self.tree.root])
            return _outside_of(whole, [a.site for a in found if a.site])
        runs = {id(call.module): i for i, call in enumerate(dataflow.trace.calls)}
        ran = [i for b in self.deaf if (i := runs.get(id(b.exit.module))) is not None]
        attns = _outside_of(whole, ATTN.find(self.tree))
        early = [s for s in attns if ran and runs.get(id(s.entry.module), ran[0]) < max(ran)]
        self.among = any(runs.get(id(s.entry.module), 0) > min(ran) for s in early)
        return early


def _outside_of(blocks: list[Site], sites: Iterable[Site]) -> list[Site]:
    return [s for s in sites if not any(_holds(b, s) for b in blocks)]


def _holds(around: Site, site: Site) -> bool:
    return around.entry.order <= site.order and site.exit.end <= around.exit.end


def _named(sites: list[Site]) -> str:
    return first_few(dict.fromkeys(generalise(site.path) for site in sites))
