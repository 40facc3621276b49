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
from ..rules.rule import at
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
    made = case.plan(model)
    _ = str(made), made.added, made.trainable, made.record
    pattern.find(Tree(model))
    _ = str(anatomy(model, case.inputs()))
    unchanged(
        before, fingerprint(model), f"planning {first_few(case.rules)} and matching {pattern!r}"
    )


def patterns_are_a_boolean_algebra(case: Case, draw: Draw) -> None:
    """match(p & q) = match(p) n match(q); | is the union, ~ the complement; De Morgan; "**" is all.

    As sets of sites, and of the spans that p and q speak of.
    """
    model = case.model()
    tree, patterns = Tree(model), from_model(model).patterns()
    p, q = draw(patterns, "p"), draw(patterns, "q")
    known = dict.fromkeys([*tree.sites, *p.candidates(tree), *q.candidates(tree)])

    def match(pattern: Selector) -> set[Site]:
        return {site for site in known if pattern.test(tree, site) is not None}

    def found(pattern: Selector) -> set[Site]:
        return set(pattern.find(tree))

    laws = {
        "p & q is not the intersection": (found(p & q), match(p) & match(q)),
        "p | q is not the union": (found(p | q), match(p) | match(q)),
        "~p is not the complement": (found(~p), (found(p) | {*tree.sites}) - match(p)),
        "p & ~p is not empty": (found(p & ~p), set()),
        "p | ~p is not all": (found(p | ~p), found(p) | {*tree.sites}),
        "~~p is not p": (found(~~p), found(p)),
        "~(p | q) is not ~p & ~q": (match(~(p | q)), found(~p & ~q)),
        "~(p & q) is not ~p | ~q": (match(~(p & q)), found(~p | ~q)),
        '"**" is not all': (found(where("**")), {*tree.sites}),
    }
    for told, (left, right) in laws.items():
        other = sorted(site.path for site in left ^ right)
        holds(not other, f"{told} at {first_few(other)}, p={p!r}, q={q!r}")


def addresses_match_whole_paths(case: Case, draw: Draw) -> None:
    """match(address) = the paths that a regular expression matches, positions written out.

    Independent of the matcher: each step of a path becomes `name@position@siblings.`, each step of
    an address the expression of all such texts that it stands for.
    """
    model = case.model()
    tree, address = Tree(model), draw(from_model(model).addresses(), "address")
    expression = _expression(address, tree)
    found = where(address).find(tree)
    for site in tree.sites:
        ways = [_text(steps) for steps in (site.steps, *site.aliases)]
        fits = next((hit for way in ways if (hit := re.fullmatch(expression, way))), None)
        want = None if fits is None else fits.groupdict()
        holds(
            found.get(site) == want,
            f'"{address}" at {site.path or "the root"} captures {found.get(site)}, not {want}',
        )


def _text(steps: tuple[object, ...]) -> str:
    return "".join("{}@{}@{}.".format(*step) for step in steps)  # type: ignore[misc]


def _expression(address: str, tree: Tree) -> str:
    places = {
        (s.position, s.siblings)
        for site in tree.sites
        for way in (site.steps, *site.aliases)
        for s in way
    }
    written, known = "", set[str]()
    for step in re.split(r"\.(?![^\[]*\])", address) if address else []:
        if step == "**":
            written += r"(?:[^.]+\.)*"
        elif step == "*":
            written += r"[^.]+\."
        elif step[0] == "{" and "," not in step:
            name = step[1:-1]
            group = f"(?P={name})" if name in known else f"(?P<{name}>[^@.]+)"
            known.add(name)
            written += rf"{group}@\d+@\d+\."
        elif step[0] == "{":
            names = "|".join(re.escape(name.strip()) for name in step[1:-1].split(","))
            written += rf"(?:{names})@\d+@\d+\."
        elif step[0] == "[":
            chosen = "|".join(f"@{p}@{n}" for p, n in places if p in _chosen(step, n))
            written += rf"[^@.]+(?:{chosen or '(?!)'})\."
        else:
            written += rf"{re.escape(step)}@\d+@\d+\."
    return written


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
    sites = [(role, site) for role, found in roles.items() for site in found]
    applies(sites, "no feed-forward network and no attention was found by structure")
    role, site = draw(st.sampled_from(sites), "site", lambda each: each[1].path)
    mixing = list(_mixing(case, model, site))
    applies(mixing, f"{site.path} gave no gradient in this forward")
    mixes = any(others for _, others in mixing)
    told = "; ".join(f"position {i} reads {first_few(others, 2)}" for i, others in mixing if others)
    if role == ffn.name:
        holds(not mixes, f"{site.path} is taken for a feed-forward network, and yet {told}")
    else:
        applies(_positions(case, model, site) > 1, f"{site.path} was given one position")
        holds(mixes, f"{site.path} is taken for attention, and yet no position reads another")


def _mixing(case: Case, model: nn.Module, site: Site) -> Iterator[tuple[int, list[int]]]:
    """For the first and the last position, which others its answer depends on."""
    x, y = _between(case, model, site)
    if x is None or y is None or not y.requires_grad:
        return
    flat = _rows(y, site.out, site.axis)
    for i in sorted({0, len(flat) // 2, len(flat) - 1}):
        (grad,) = torch.autograd.grad(
            flat[i].square().sum(), x, retain_graph=True, allow_unused=True
        )
        if grad is None:
            continue
        read = _rows(grad, site.shape.width, site.axis).abs().amax(-1)
        if len(read) == len(flat):
            yield i, [j for j in read.nonzero().flatten().tolist() if j != i]


def _positions(case: Case, model: nn.Module, site: Site) -> int:
    x, _ = _between(case, model, site)
    return 0 if x is None else x.numel() // max(site.shape.width, 1)


def _rows(x: Tensor, width: int, axis: int) -> Tensor:
    """(positions, features), wherever features lie."""
    if x.dim() > 2 and axis != -1 and x.shape[axis] == width:
        x = x.movedim(axis, -1)
    return x.flatten(0, -2)


def _between(case: Case, model: nn.Module, site: Site) -> tuple[Tensor | None, Tensor | None]:
    """What a site is given, as a leaf of its own, and what it gives, in one forward."""
    seen: dict[str, Tensor] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        first = next((t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()), None)
        if first is None:
            return None
        leaf = seen["x"] = first.detach().clone().requires_grad_()
        return pytree.tree_unflatten([leaf if t is first else t for t in leaves], spec)

    def leave(module: nn.Module, args: object, output: object) -> None:
        found = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        seen.update(y=found[0]) if found else None

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
    return seen.get("x"), seen.get("y")


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
    found = pattern.find(Tree(model))
    return {site.path: (captures, site.shape, site.index) for site, captures in found.items()}


def missing_or_miscounted_sites_raise(case: Case, draw: Draw) -> None:
    """0 matches, or not `times` matches, raise MatchError, and m is unchanged.

    The error says rule, fact and remedy, with the address and the count as the user wrote them.
    """
    model = case.model()
    before = fingerprint(model)
    rule = draw(st.sampled_from(case.rules), "rule")
    times = draw(st.integers(1, 99), "times")
    none = f"{draw(from_model(model).addresses(), 'address')}.nowhere".lstrip(".")
    count = len(next(sites for each, sites in case.plan(model).matches if each is rule))
    if times != count and count:
        wrong = at(rule.where, *rule.rest, times=times)
        _told(model, case, wrong, f"times={times}", str(count))
    _told(model, case, at(none, unfreeze), none)
    unchanged(before, fingerprint(model), "a rule that was refused")


def _told(model: nn.Module, case: Case, rule: object, *words: str) -> None:
    def act() -> None:
        case.operated(model, [rule])  # type: ignore[list-item]

    error = raised(MatchError, act, f"{rule!r}")
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
