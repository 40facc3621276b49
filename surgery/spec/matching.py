"""Laws of matching: where rules act. m is the model, S the operated one, p and q patterns."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._inputs import call
from .._preserve import fingerprint
from .._text import first_few
from ..engine.reports import anatomy
from ..errors import MatchError, SurgeryError
from ..rules.edits import unfreeze
from ..rules.roles import attn, ffn
from ..rules.rule import Rule, at
from ..rules.selector import Selector, where
from ..structure.anatomy import roles_of
from ..structure.module_tree import Site, Tree
from .case import FLAGS, Case, mark
from .laws import Broken, Draw, applies, holds
from .snapshot import raised, unchanged
from .strategies import from_model

Spot = tuple[int, int]


def matching_is_pure(case: Case, draw: Draw) -> None:
    """Planning, matching and looking leave all of m and all random numbers as they were.

    Bytes, identities, hooks, flags, gradients; the states of torch's, numpy's and Python's numbers.
    """
    model = case.model()
    pattern = draw(from_model(model).patterns(), "pattern")
    mark(model, draw(FLAGS, "flags"))
    before = fingerprint(model)
    plan = case.plan(model)
    _ = str(plan), plan.added, plan.trainable, plan.record
    pattern.find(Tree(model))
    _ = str(anatomy(model, case.inputs()))
    unchanged(
        before, fingerprint(model), f"planning {first_few(case.rules)} and matching {pattern!r}"
    )


def patterns_are_a_boolean_algebra(case: Case, draw: Draw) -> None:
    """match(p & q) = match(p) n match(q); | is the union, ~ the complement; De Morgan; "**" is all.

    As sets of sites, and of the spans and weights that p and q speak of.
    """
    model = case.model()
    tree, patterns = Tree(model), from_model(model).patterns()
    p, q = draw(patterns, "p"), draw(patterns, "q")
    known = dict.fromkeys([*tree.sites, *p.candidates(tree), *q.candidates(tree)])
    of_p = {*tree.sites, *p.candidates(tree)}

    def match(pattern: Selector) -> set[Site]:
        return {site for site in known if pattern.test(tree, site) is not None}

    def find(pattern: Selector) -> set[Site]:
        return set(pattern.find(tree))

    laws = {
        "p & q is not the intersection": (find(p & q), match(p) & match(q)),
        "p | q is not the union": (find(p | q), match(p) | match(q)),
        "~p is not the complement": (find(~p), of_p - match(p)),
        "p & ~p is not empty": (find(p & ~p), set()),
        "p | ~p is not all": (find(p | ~p), of_p),
        "~~p is not p": (find(~~p), find(p)),
        "~(p | q) is not ~p & ~q": (match(~(p | q)), find(~p & ~q)),
        "~(p & q) is not ~p | ~q": (match(~(p & q)), find(~p | ~q)),
        '"**" is not all': (find(where("**")), {*tree.sites}),
    }
    for message, (left, right) in laws.items():
        other = sorted(site.path for site in left ^ right)
        holds(not other, f"{message} at {first_few(other)}, p={p!r}, q={q!r}")


def addresses_match_whole_paths(case: Case, draw: Draw) -> None:
    """match(address) = the paths that a regular expression matches, positions written out.

    Independent of the matcher: each step of a path becomes `name@position@siblings.`, each step of
    an address the expression of all such texts that it stands for.
    """
    model = case.model()
    tree, address = Tree(model), draw(from_model(model).addresses(), "address")
    expression = _expression(address, tree)
    matches = where(address).find(tree)
    for site in tree.sites:
        texts = [_text(steps) for steps in (site.steps, *site.aliases)]
        fits = next((fit for text in texts if (fit := re.fullmatch(expression, text))), None)
        want = None if fits is None else fits.groupdict()
        holds(
            matches.get(site) == want,
            f'"{address}" at {site.path or "the root"} captures {matches.get(site)}, not {want}',
        )


def _text(steps: tuple[object, ...]) -> str:
    return "".join("{}@{}@{}.".format(*step) for step in steps)  # type: ignore[misc]


def _expression(address: str, tree: Tree) -> str:
    positions = {
        (step.position, step.siblings)
        for site in tree.sites
        for steps in (site.steps, *site.aliases)
        for step in steps
    }
    steps, captured = re.split(r"\.(?![^\[]*\])", address) if address else [], set[str]()
    return "".join(_step_expression(step, positions, captured) for step in steps)


def _step_expression(step: str, positions: set[tuple[int, int]], captured: set[str]) -> str:
    """The texts that a step stands for; the name that it captures is put in `captured`."""
    if step == "**":
        return r"(?:[^.]+\.)*"
    if step == "*":
        return r"[^.]+\."
    if step[0] == "[":
        chosen = "|".join(f"@{p}@{n}" for p, n in positions if p in _chosen(step, n))
        return rf"[^@.]+(?:{chosen or '(?!)'})\."
    if step[0] != "{":
        return rf"{re.escape(step)}@\d+@\d+\."
    if "," in step:
        names = "|".join(re.escape(name.strip()) for name in step[1:-1].split(","))
        return rf"(?:{names})@\d+@\d+\."
    name = step[1:-1]
    group = f"(?P={name})" if name in captured else f"(?P<{name}>[^@.]+)"
    captured.add(name)
    return rf"{group}@\d+@\d+\."


def _chosen(step: str, siblings: int) -> list[int]:
    """The positions that Python means by `[...]`."""
    parts = step[1:-1].split(":")
    try:
        if len(parts) == 1:
            return [list(range(siblings))[int(parts[0])]]
        return list(range(siblings))[slice(*(int(p) if p else None for p in parts))]
    except IndexError:
        return []


def names_mean_nothing_to_roles(case: Case, draw: Draw) -> None:
    """match(role, r(m)) = r(match(role, m)) for a renaming r of all attributes, one to one."""
    model = case.model()
    before = _spots(model)
    names = {id(module): path for path, module in model.named_modules()}
    for i, module in enumerate(list(model.modules())):
        children = list(module._modules.values())
        letters = ("".join(pair) for pair in product(string.ascii_letters, repeat=2))
        module._modules.clear()
        module._modules.update({f"{next(letters)}{i}": child for child in children})
    after = _spots(model)
    for role, spots in before.items():
        lost = [names[spot[0]] for spot in sorted(spots ^ after[role])]
        holds(not lost, f"{role} finds other sites once all names are others: {first_few(lost)}")


def _spots(model: nn.Module) -> dict[str, set[Spot]]:
    roles = roles_of(Tree(model))
    return {
        n: {(id(s.entry.module), id(s.exit.module)) for s in sites} for n, sites in roles.items()
    }


def roles_do_what_they_say(case: Case, draw: Draw) -> None:
    """At an ffn site f, d f(x)_i / d x_j = 0 exactly for positions i != j; attention has some != 0.

    A position is one token of one sample. Taken between what the site is given and what it gives,
    in a forward of the whole model.
    """
    model = case.model()
    roles = {ffn.name: ffn.find(Tree(model)), attn.name: attn.find(Tree(model))}
    sites = [(role, site) for role, of_role in roles.items() for site in of_role]
    applies(sites, "no feed-forward network and no attention was found by structure")
    role, site = draw(st.sampled_from(sites), "site", lambda pair: pair[1].path)
    mixing = list(_mixing(case, model, site))
    applies(mixing, f"{site.path} gave no gradient in this forward")
    reads = [f"position {i} reads {first_few(others, 2)}" for i, others in mixing if others]
    mixes = bool(reads)
    if role == ffn.name:
        fact = "; ".join(reads)
        holds(not mixes, f"{site.path} is taken for a feed-forward network, and yet {fact}")
    else:
        applies(_positions(case, model, site) > 1, f"{site.path} was given one position")
        holds(mixes, f"{site.path} is taken for attention, and yet no position reads another")


def _mixing(case: Case, model: nn.Module, site: Site) -> Iterator[tuple[int, list[int]]]:
    """For the first and the last position, which others its answer depends on."""
    x, y = _between(case, model, site)
    if x is None or y is None or not y.requires_grad:
        return
    flat = _flat(y, site.out, site.axis)
    for i in sorted({0, len(flat) // 2, len(flat) - 1}):
        (grad,) = torch.autograd.grad(
            flat[i].square().sum(), x, retain_graph=True, allow_unused=True
        )
        if grad is None:
            continue
        read = _flat(grad, site.shape.width, site.axis).abs().amax(-1)
        if len(read) == len(flat):
            yield i, [j for j in read.nonzero().flatten().tolist() if j != i]


def _positions(case: Case, model: nn.Module, site: Site) -> int:
    x, _ = _between(case, model, site)
    return 0 if x is None else x.numel() // max(site.shape.width, 1)


def _flat(x: Tensor, width: int, axis: int) -> Tensor:
    """(positions, features), wherever features lie."""
    if x.dim() > 2 and axis != -1 and x.shape[axis] == width:
        x = x.movedim(axis, -1)
    return x.flatten(0, -2)


def _between(case: Case, model: nn.Module, site: Site) -> tuple[Tensor | None, Tensor | None]:
    """What a site is given, as a leaf of the graph, and what it gives, in one forward."""
    ends: dict[str, Tensor] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        inputs, spec = pytree.tree_flatten((args, kwargs))
        first = next((t for t in inputs if isinstance(t, Tensor) and t.is_floating_point()), None)
        if first is None:
            return None
        leaf = ends["x"] = first.detach().clone().requires_grad_()
        return pytree.tree_unflatten([leaf if t is first else t for t in inputs], spec)

    def leave(module: nn.Module, args: object, output: object) -> None:
        outputs = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        if outputs:
            ends["y"] = outputs[0]

    hooks = [
        site.entry.module.register_forward_pre_hook(enter, with_kwargs=True),
        site.exit.module.register_forward_hook(leave),
    ]
    try:
        with torch.enable_grad():
            call(model, case.inputs())
    finally:
        for hook in hooks:
            hook.remove()
    return ends.get("x"), ends.get("y")


def grafts_are_invisible(case: Case, draw: Draw) -> None:
    """match(p, S) = match(p, m), with what each site captures, its width and its role."""
    model = case.model()
    drawn = from_model(model).patterns() | st.sampled_from(case.patterns)
    pattern = draw(drawn, "pattern")
    before = _read(pattern, model)
    case.operated(model, stirred=0)
    after = _read(pattern, model)
    differ = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
    holds(not differ, f"once operated, {pattern!r} finds other sites: {first_few(differ)}")


def _read(pattern: Selector, model: nn.Module) -> dict[str, object]:
    matches = pattern.find(Tree(model))
    return {site.path: (captures, site.shape, site.index) for site, captures in matches.items()}


def missing_or_miscounted_sites_raise(case: Case, draw: Draw) -> None:
    """0 matches, or not `times` matches, raise MatchError, and m is unchanged.

    0 matches of one address among others, too. The error says rule, fact and remedy, with the
    address and the count as the user wrote them.
    """
    model = case.model()
    before = fingerprint(model)
    rule = draw(st.sampled_from(case.rules), "rule")
    times = draw(st.integers(1, 99), "times")
    nowhere = f"{draw(from_model(model).addresses(), 'address')}.nowhere".lstrip(".")
    count = len(next(sites for other, sites in case.plan(model).matches if other is rule))
    if times != count and count:
        miscounted = at(rule.where, *rule.rest, times=times)
        _check_refusal(model, case, miscounted, f"times={times}", str(count))
    _check_refusal(model, case, at(nowhere, unfreeze), nowhere)
    for some in (rule.where | where(nowhere), rule.where & ~where(nowhere)):
        _check_refusal(model, case, at(some, *rule.rest), nowhere)
    unchanged(before, fingerprint(model), "a rule that was refused")


def _check_refusal(model: nn.Module, case: Case, rule: Rule, *words: str) -> None:
    """Raise Broken unless a rule raises MatchError with these words in it."""
    error = raised(MatchError, lambda: case.operated(model, [rule]), f"{rule!r}")
    assert isinstance(error, SurgeryError)
    missing = [word for word in words if word not in str(error)]
    if missing or not (error.fact and error.remedy):
        raise Broken(f"the error of {rule!r} does not say {first_few(missing)}: {error}")


LAWS = (
    matching_is_pure,
    patterns_are_a_boolean_algebra,
    addresses_match_whole_paths,
    names_mean_nothing_to_roles,
    roles_do_what_they_say,
    grafts_are_invisible,
    missing_or_miscounted_sites_raise,
)
