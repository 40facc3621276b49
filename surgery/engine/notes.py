"""What a plan and a report say beside their table: how sites were found, and what stays frozen."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import nn

from .._text import first_few
from ..rules.edits import Insert, Trained
from ..rules.roles import Role
from ..rules.rule import Rule
from ..rules.walk import selectors_in
from ..structure.anatomy import roles_by_modules, roles_of, told_roles, unprojected
from ..structure.attention_states import OPERANDS
from ..structure.dataflow import dataflow_of
from ..structure.module_tree import Site, Tree
from .decided import Decided
from .operation import Operation
from .summary import count_parameters, places
from .unfreezing import parameters_meant

GUESSED = ("block", "attn", "qkv", "proj", "fused", "head", "embed")  # FFNs show in the modules
Matches = Sequence[tuple[Rule, Collection[Site]]]


def how_found(matches: Matches, tree: Tree, asked: bool, decided: Decided | None) -> Iterator[str]:
    """Whether a forward told what feeds what, here or when a file was made, or modules alone."""
    if {"qkv", *OPERANDS} & set(_asked(matches)) and (other := unprojected(tree)):
        paths = places([site.path for site in other])
        yield f"queries, keys or values that no projection makes, or none that is called: {paths}"
    if asked:
        yield "what feeds what was read off a forward on the example"
        yield from corrections(_asked(matches), tree)
        return
    yield from _guesses(matches, tree)
    guessed, told = list[str](), list[Rule]()
    for i, (rule, _) in enumerate(matches):
        if decided and decided.find(i, rule, tree) is not None:
            told.append(rule)
            continue
        related = (pattern for pattern in selectors_in(rule) if not isinstance(pattern, Role))
        guessed += [repr(pattern) for pattern in related if pattern.told_by_forward(tree)]
    if guessed:
        which = first_few(dict.fromkeys(guessed))
        yield f"{which}: by the order of modules; example=inputs runs a forward to see"
    elif told:
        yield "what feeds what is as a forward told when the file was made"


def without_tokens(matches: Matches, tree: Tree, unheard: Iterable[Site]) -> Iterator[str]:
    """The lists of blocks, other towers or stages, none of which a rule of blocks gives tokens.

    (VPT-shallow's are put in before the first block: of CLIP's towers one, of T5's the encoder.)
    """
    left_out = [site.entry.parent for site in unheard]
    for rule, sites in matches:
        inserts = any(isinstance(edit, Insert) for edit in rule.rest)
        if inserts and "block" in _asked([(rule, sites)]):
            apart = _apart(sites, roles_of(tree)["block"])
            if apart := [block for block in apart if block.entry.parent not in left_out]:
                yield f"{rule.short} puts no token in at {places([b.path for b in apart])}"


def _apart(sites: Collection[Site], blocks: list[Site]) -> list[Site]:
    """The blocks of lists in which none of some sites begins, where any begins with a block."""
    firsts = {block.entry for block in blocks}
    begun = [site for site in sites if site.entry in firsts]
    lists = {site.entry.parent for site in begun}
    others = [block for block in blocks if begun and block.entry.parent not in lists]
    return [b for b in others if not any(s.order <= b.order < s.exit.end for s in begun)]


def _asked(matches: Matches) -> list[str]:
    """The roles that rules speak of."""
    selectors = (pattern for rule, _ in matches for pattern in selectors_in(rule))
    return list(dict.fromkeys(p.name for p in selectors if isinstance(p, Role)))


def corrections(names: Iterable[str], tree: Tree) -> Iterator[str]:
    """Where a forward finds other places for a role than the modules suggest."""
    told, of_modules = told_roles(tree), roles_by_modules(tree)
    for name in names:
        here = [site.path for site in told.get(name, [])]
        there = [site.path for site in of_modules.get(name, [])] if name in told else []
        more, less = ([p for p in a if p not in b] for a, b in ((here, there), (there, here)))
        changes = [f"with {places(more)}"] * bool(more) + [f"without {places(less)}"] * bool(less)
        if changes and name not in OPERANDS:
            yield f"{name}: {', '.join(changes)}, other than the modules suggest, by the forward"


def _guesses(matches: Matches, tree: Tree) -> Iterator[str]:
    told = tree.memo.get("told", {})
    names = [n for n in _asked(matches) if n in GUESSED and n not in told and roles_of(tree)[n]]
    if names:
        yield f"{', '.join(names)}: as the modules suggest; example=inputs runs a forward to see"


def frozen_norms(paths: Iterable[str]) -> list[str]:
    """That norms which are not trained are kept in eval mode."""
    frozen = list(paths)
    what = "frozen norms keep their running statistics, in eval mode in training too: "
    return [what + places(frozen)] if frozen else []


def frozen_head(matches: Matches, tree: Tree, trained: Collection[int]) -> list[str]:
    """That a head which no rule speaks of stays as it was made."""
    heads = _own_heads(tree)
    of_heads = {id(p) for site in heads for p in site.module.parameters()}
    if not of_heads or of_heads & set(trained) or _speaks_of(heads, of_heads, matches):
        return []
    word = "heads stay" if len(heads) > 1 else "head stays"
    return [f"the {word} frozen ({first_few(s.path for s in heads)}): at(head, unfreeze) trains it"]


def _own_heads(tree: Tree) -> list[Site]:
    """The heads that give something else than features: not those of words, which come as made."""
    of_modules = Tree(tree.model) if dataflow_of(tree) else tree  # a note runs no forward
    roles = roles_of(tree if "anatomy" in tree.memo else of_modules)
    widths = {site.out for site in roles["block"][-1:]}
    words = {s.module.num_embeddings for s in tree.sites if isinstance(s.module, nn.Embedding)}
    return [site for site in roles["head"] if site.out not in widths | words | {0}]


def _speaks_of(heads: list[Site], parameters: Collection[int], matches: Matches) -> bool:
    """Whether a rule acts on something in a head, or says of its parameters whether they train."""
    for rule, sites in matches:
        edits = [edit for edit in rule.rest if isinstance(edit, Trained)]
        if any(h.order <= s.entry.order and s.exit.end <= h.end for s in sites for h in heads):
            return True
        if any(id(p) in parameters for edit in edits for _, p in parameters_meant(edit, sites)):
            return True
    return False


def state_of(operation: Operation) -> str:
    """Whether it is active, and how many numbers of it are trained, in words."""
    strength = operation.strength
    how = "not active" if not strength else "active" if strength == 1 else f"active {strength:g}"
    base = [module._parameters.get(name) for module, name in operation.claims]
    tensors = {id(p): p for p in base if p is not None}
    trained = sum(p.numel() for p in tensors.values() if p.requires_grad)
    trained += count_parameters([operation], trainable=True)
    return f"{how}, {f'{trained:,} trained' if trained else 'not trained'}"


def beside(done: list[Operation], name: str) -> list[str]:
    """That earlier operations stay as they are, beside one of this name."""
    if not (earlier := [op for op in done if op.name != name]):
        return []
    told = "; ".join(f"{op.name} ({state_of(op)})" for op in earlier)
    return [f'{told} stays as it is: train_only(model, "{name}") freezes the rest']
