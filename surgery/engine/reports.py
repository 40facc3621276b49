"""Tables and pictures of what a model is made of, what was done to it, and how it routes."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from .._table import Table
from .._text import first_few
from ..rules.relations import Nearest
from ..rules.roles import ROLES, attn, ffn, norm
from ..structure.anatomy import instead_of_ffns, operands, roles_of, stages
from ..structure.attention_states import OPERANDS
from ..structure.dataflow import attach_dataflow
from ..structure.module_tree import Site, Tree
from ..structure.path import generalise
from .apply import operated
from .conditions import check_example
from .losses import Routing
from .notes import corrections, state_of
from .operation import Operation, additions_of, check_operable, without_parts
from .summary import count_parameters, summary
from .trained import beyond_rules, trained_of
from .watched import check_watched

ASK = "by order; anatomy(model, example) runs a forward to see"


def anatomy(model: nn.Module, example: Any = None) -> Table:
    """What a model is made of: for each role its addresses, widths, feature axis, blocks, stage.

    Roles are found by structure in the module tree, and nothing is run. Which norm feeds what, and
    which projection makes the query, key and value, is read off a forward on `example` (a tensor,
    tuple or dict of inputs) where there is one. Blocks are counted from 0; a stage ends where the
    width changes or the container does.

    >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, norm_first=True), 2)
    >>> print(anatomy(model))
    Anatomy of TransformerEncoder
    role   address                             sites  features  axis  blocks  stage  feeds
    block  layers.*                                2  16        last  0 to 1  0
    norm   layers.*.norm1                          2  16        last  0 to 1  0      attn
    norm   layers.*.norm2                          2  16        last  0 to 1  0      ffn
    attn   layers.*.self_attn                      2  16        last  0 to 1  0
    qkv    layers.*.self_attn.in_proj_weight       2  16 to 48  last  0 to 1  0
    proj   layers.*.self_attn.out_proj.weight      2  16        last  0 to 1  0
    ffn    layers.*.(linear1 to linear2)           2  16        last  0 to 1  0
    what feeds what: by order; anatomy(model, example) runs a forward to see
    """
    check_operable(model)
    check_example(model, example, "anatomy(model, example)")
    tree = Tree(model)
    dataflow = attach_dataflow(tree, example, lambda: without_parts(model))
    rows: list[tuple[object, ...]] = []
    roles, feeds = roles_of(tree), _feeds(tree)
    if example is not None:
        makes = operands(tree).items()
        feeds |= {site: ", ".join(w for w in OPERANDS if w in words) for site, words in makes}
    for role in ROLES:
        rows += [(role.name, *row) for row in _grouped(roles[role.name], tree, feeds)]
    source = "by a forward" if dataflow.asked else ASK
    notes = [f"what feeds what: {source}"] if feeds else []
    if example is not None:
        notes += corrections((role.name for role in ROLES), tree)
    if not roles["ffn"]:
        notes.append(f"no feed-forward network was found: {instead_of_ffns(tree)}")
    columns = ("role", "address", "sites", "features", "axis", "blocks", "stage", "feeds")
    return Table(f"Anatomy of {type(model).__name__}", columns, rows, notes)


def report(model: nn.Module) -> Table:
    """What was done to a model: every rule with its sites, parts, sharing and parameter counts.

    The last line counts what is trained now, and a note names what no rule unfroze. Raises
    OperationError on a model that was never operated.

    >>> from surgery import adapter, apply, at, parallel
    >>> print(report(apply(nn.Sequential(nn.Linear(8, 8)), at("0", parallel(adapter(rank=2))))))
    Report on Sequential
    sites  edits                      parts       added  unfrozen
    *      parallel(adapter(rank=2))  0/parallel     42         0
    added 42, unfrozen 0: 42 trainable, 58.33 % of the base's 72
    """
    done = operated(model, "report(model)", merged=None)
    additions = additions_of(model) or nn.Module()  # outside of a merged model
    base = count_parameters([model, additions]) - count_parameters([additions])
    rows: list[tuple[object, ...]] = []
    notes: list[str] = []
    counted: set[int] = set()
    for operation in done:
        table = _done_by(operation, model, base, counted)
        prefix = f"{operation.name}: " if len(done) > 1 else ""
        rows += table.rows
        notes += [prefix + note for note in table.notes]
    notes += _who_acts(done)
    return Table(f"Report on {type(model).__name__}", table.columns, rows, notes)


def _done_by(operation: Operation, model: nn.Module, base: int, counted: set[int]) -> Table:
    """What one operation did; what it trains is counted unless an earlier one's count has it."""
    if not operation.merged:
        check_watched(operation, "report(model)")
    parts = {key: part for key, part in operation._modules.items() if part is not None}
    places = [p for p in trained_of(model, operation) if id(p.tensor) not in counted]
    counted.update(id(place.tensor) for place in places)
    unfrozen = sum(p.tensor.numel() for p in places if p.tensor.requires_grad)
    table = summary(operation.record, parts, base, "", unfrozen)
    if beyond := [p.path for p in beyond_rules(model, operation) if p.tensor.requires_grad]:
        table.notes.insert(0, f"note: trained without a rule: {first_few(beyond)}")
    return table


def _who_acts(done: list[Operation]) -> list[str]:
    """Of each of several operations, whether it is active and how much of it is trained."""
    if len(done) == 1 and done[0].strength == 1:
        return []
    return [f"{operation.name}: {state_of(operation)}" for operation in done]


def draw_loads(loads: dict[str, Routing], path: str | os.PathLike[str], title: str = "") -> Path:
    """Draw the load of every expert at every site, as Fig. 4 (left) of Li et al. 2024.

    loads  what `routing(model)` returns; a bar a site, each expert's fraction of the sub-tokens;
           dotted lines are where the bars would part if all were loaded alike

    Writes a picture (PNG, by the ending of `path`) and returns its path. Needs matplotlib.

    >>> import tempfile, torch
    >>> gates = torch.eye(4)
    >>> site = {"blocks.0.mlp": Routing(gates, torch.full((4,), 0.25))}
    >>> draw_loads(site, tempfile.mkdtemp() + "/loads.png").name
    'loads.png'
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 + 0.55 * len(loads), 3.6), layout="constrained")
    axes = figure.subplots()
    bottom = [0.0] * len(loads)
    experts = max(len(routing.load) for routing in loads.values())
    for expert in range(experts):
        heights = [float(routing.load[expert]) for routing in loads.values()]
        axes.bar(range(len(loads)), heights, bottom=bottom, width=0.7, label=f"expert {expert + 1}")
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        axes.axhline((expert + 1) / experts, color="grey", linestyle=":", linewidth=0.8)
    axes.set(ylim=(0, 1), ylabel="fraction of sub-tokens", title=title)
    addresses = {generalise(path) for path in loads}
    if len(addresses) == 1:  # the numbers of blocks alone tell them apart
        axes.set_xticks(range(len(loads)))
        axes.set_xlabel(addresses.pop())
    else:
        axes.set_xticks(range(len(loads)), list(loads), rotation=30, ha="right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
    return Path(path)


def _feeds(tree: Tree) -> dict[Site, str]:
    """Which norms feed attention, which a feed-forward network, and which the output."""
    feeds: dict[Site, str] = {}
    for role in (attn, ffn):
        for near, _ in Nearest(norm, before=role).pairs(tree):
            words = [feeds[near]] if near in feeds and feeds[near] != role.name else []
            feeds[near] = ", ".join([*words, role.name])
    return feeds | dict.fromkeys(_final(tree, feeds), "output")


def _final(tree: Tree, known: Collection[Site]) -> list[Site]:
    """The norm of what all blocks give: the first after the last, or the only one outside."""
    roles = roles_of(tree)
    if not roles["block"]:
        return []
    last = roles["block"][-1]
    inner = {order for s in (*roles["block"], *roles["embed"]) for order in range(s.order, s.end)}
    outside = [s for s in roles["norm"] if s.order not in inner]
    outside = [s for s in outside if s.width == last.out and s not in known]
    late = [s for s in outside if s.order >= last.end]
    return late[:1] or (outside if len(outside) == 1 else [])


def _grouped(sites: list[Site], tree: Tree, feeds: dict[Site, str]) -> list[tuple[object, ...]]:
    """A row for each address, width, axis and stage, with how many sites, in which blocks."""
    blocks, stage = roles_of(tree)["block"], stages(tree)
    grouped: dict[tuple[str, str, str, str, str], list[int]] = {}
    for site in sites:
        axis, features = site.axis, _features(site)
        inside = [i for i, b in enumerate(blocks) if b.order <= site.order and site.end <= b.end]
        where = str(stage[inside[-1]]) if inside else ""
        lies = "last" if axis == -1 else str(axis)
        key = (generalise(site.path), features, lies, where, feeds.get(site, ""))
        grouped.setdefault(key, []).append(inside[-1] if inside else -1)
    return [
        (address, len(inside), features, axis, _range(inside), where, fed)
        for (address, features, axis, where, fed), inside in grouped.items()
    ]


def _features(site: Site) -> str:
    """In and out, or the one number where both are the same or nothing comes in."""
    if isinstance(site.module, nn.Embedding):
        return f"{site.module.embedding_dim}"
    width, out, _ = site.shape
    return f"{width or ''}" if width == out else f"{width} to {out}"


def _range(blocks: list[int]) -> str:
    first, last = min(blocks), max(blocks)
    return "" if first < 0 else str(first) if first == last else f"{first} to {last}"
