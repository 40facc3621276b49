"""Laws of parameters: what is added, trained, shared. m is the model, S the operated one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from .._text import first_few
from ..engine.placement import Placement
from ..rules.edits import Trained
from ..rules.part import Shared
from ..structure.layers import keeps_statistics, named_modules
from ..structure.module_tree import ADDITIONS
from .case import FLAGS, SEEDS, Case, actions, mark, operation, train
from .function import runs
from .laws import Draw, applies, holds
from .snapshot import ties, used


def freezing_is_exact(case: Case, draw: Draw) -> None:
    """{p : p.requires_grad} = what the rules say, the last word counting; the rest never moves.

    After three steps of AdamW all other parameters have no gradient and the same bytes.
    """
    model = case.model()
    declared = _declared(case, model)
    case.operated(model, seed=draw(SEEDS, "seed"))
    parts = {id(p): f"{ADDITIONS}.{n}" for n, p in operation(model).named_parameters()}
    names = {id(p): n for n, p in _base_parameters(model)}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    own = {id(p) for p in operation(model).parameters() if p.requires_grad}
    frozen_by_mistake = [names[i] for i in declared - trained]
    free_by_mistake = [names.get(i, parts.get(i, "?")) for i in trained - declared - own]
    holds(
        not frozen_by_mistake, f"the rules unfreeze {first_few(frozen_by_mistake)}, which is frozen"
    )
    holds(not free_by_mistake, f"no rule unfreezes {first_few(free_by_mistake)}, which is trained")
    rest = [(n, p, p.detach().clone()) for n, p in _base_parameters(model) if id(p) not in declared]
    norms = [
        m
        for _, m in named_modules(model, aliases=True)
        if keeps_statistics(m) and [*m.parameters()]
    ]
    still = [m for m in norms if not declared & {id(p) for p in m.parameters()}]
    counted = [(type(m).__name__, b, b.clone()) for m in still for b in m.buffers()]
    train(case, model)
    drifted = [kind for kind, b, was in counted if not torch.equal(b, was)]
    holds(not drifted, f"training moved statistics of {first_few(drifted)}, which is frozen")
    moved = [n for n, p, was in rest if not torch.equal(p, was)]
    holds(not moved, f"training moved {first_few(moved)}, which is frozen")
    graded = [n for n, p, _ in rest if p.grad is not None]
    holds(not graded, f"a gradient came to {first_few(graded)}, which is frozen")


def _base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [
        (f"{path}.{name}".strip("."), p)
        for path, module in named_modules(model, aliases=True)
        for name, p in module._parameters.items()
        if p is not None
    ]


def _declared(case: Case, model: nn.Module) -> set[int]:
    """Ids of the parameters of the base that the rules leave trained, rule after rule."""
    chosen: set[int] = set()
    for rule, sites in case.plan(model).matches:
        for edit in rule.rest:
            if not isinstance(edit, Trained):
                continue
            for site in sites:
                ends = (site.entry.module, site.exit.module)
                held = [p for end in ends for _, p in edit.parameters(end)]
                ids = {id(p) for p in held if p.is_floating_point()}
                chosen = chosen | ids if edit.trained else chosen - ids
    return chosen


def gradients_reach_every_part(case: Case, draw: Draw) -> None:
    """Within two steps every trained tensor of every part has had a gradient that is not zero.

    (Where one factor starts at zero, the other's first gradient is zero: one step says nothing.)
    A module that a rule unfreezes has had one for one tensor at least, unless the rule is optional.
    """
    model = case.operated(seed=draw(SEEDS, "seed"))
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(chosen, lr=0.01)
    reached: set[int] = set()
    for seed in range(3):
        optimiser.zero_grad()
        case.loss(model, seed).backward()  # type: ignore[no-untyped-call]
        reached |= {id(p) for p in chosen if p.grad is not None and p.grad.any()}
        optimiser.step()
    parts = operation(model).named_parameters()
    dry = [name for name, p in parts if p.requires_grad and id(p) not in reached]
    holds(not dry, f"no gradient comes to {first_few(dry)}")
    for rule, site in case.places:
        if rule.optional or not any(isinstance(e, Trained) and e.trained for e in rule.rest):
            continue
        ends = (model.get_submodule(site.entry.path), model.get_submodule(site.exit.path))
        held = [p for end in ends for p in end.parameters() if p.requires_grad]
        holds(not held or any(id(p) in reached for p in held), f"no gradient comes to {site.path}")


def counts_are_closed_forms(case: Case, draw: Draw) -> None:
    """added = sum over sites of numel(part) where each has its own, numel(part) once where shared.

    Shared: once for each width, device, dtype and captured name, however many sites. plan(m) says
    the same numbers as S holds.
    """
    model = case.model()
    made = case.plan(model)
    want, groups = 0, set[Any]()
    for p in made.placed:
        group = _group(p)
        if group is None or group not in groups:
            want += sum(q.numel() for q in p.sketch().parameters())
        groups.add(group)
    placed = {p.key for p in made.placed}
    want += sum(q.numel() for k, m in made.parts.items() if k not in placed for q in m.parameters())
    added, trainable = made.added, made.trainable
    made.apply()
    holds(added == want, f"plan(m).added is {added:,}, and its parts have {want:,} parameters")
    here = sum(p.numel() for p in operation(model).parameters())
    holds(here == added, f"S holds {here:,} new parameters, and plan(m).added said {added:,}")
    free = sum(p.numel() for p in model.parameters() if p.requires_grad)
    holds(
        free == trainable, f"S trains {free:,} parameters, and plan(m).trainable said {trainable:,}"
    )


def _group(p: Placement) -> Any:
    """What a shared part must be the same for; None for a part of one site."""
    part, site = p.edit.part, p.site
    if not isinstance(part, Shared):
        return None
    inner = part.part if hasattr(part.part, "word") else id(part.part)
    captured = site.captures.get(part.by) if isinstance(part.by, str) else part.by and p.key
    return inner, part.name, part.by, captured, site.width, site.out, p.device, p.dtype


def sharing_is_kept(case: Case, draw: Draw) -> None:
    """As many distinct parts as planned, each at all of its sites, in S and in its copies.

    Copies: deepcopy, pickle, .to(dtype), load_state_dict. The state holds each tensor once.
    """
    model = case.model()
    made = case.plan(model)
    applies(made.placed, "these rules join no part")
    groups: dict[Any, list[str]] = {}
    for i, p in enumerate(made.placed):
        groups.setdefault(_group(p) or i, []).append(p.site.path)
    want = sorted(sorted(paths) for paths in groups.values())
    made.apply()
    way = draw(st.sampled_from([*COPIES]), "copy")
    for name, each in (("S", model), (f"S after {way}", COPIES[way](model))):
        found: dict[int, list[str]] = {}
        for hooked, action in actions(each):
            found.setdefault(id(action.part), []).append(hooked.path)
        have = sorted(sorted(paths) for paths in found.values())
        holds(have == want, f"{name} has {len(have)} parts, not {len(want)}: {_uneven(want, have)}")
        own = [p.data_ptr() for p in operation(each).state_dict().values() if p.numel()]
        holds(len(own) == len(set(own)), f"{name} holds a tensor under two keys")
        tied = {id(p) for p in operation(each).parameters()}
        base = {id(p) for p in each.parameters()} - tied
        run = {id(p) for _, action in actions(each) for p in used(action.part)} - base
        holds(tied == run, f"{name} runs parts that it does not hold")
        if way != ".to(bfloat16)":
            runs(case, each)


def _uneven(want: list[list[str]], have: list[list[str]]) -> str:
    other = [paths for paths in have if paths not in want] or [p for p in want if p not in have]
    return first_few(other[0]) if other else ""


def pickled(model: nn.Module) -> nn.Module:
    """A copy by way of bytes."""
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def cast(model: nn.Module) -> nn.Module:
    """A copy in bfloat16."""
    return copy.deepcopy(model).to(torch.bfloat16)


def filled(model: nn.Module) -> nn.Module:
    """A copy that was filled with the state of another."""
    copied, state = copy.deepcopy(model), {k: v.clone() for k, v in model.state_dict().items()}
    copied.load_state_dict(state)
    return copied


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    ".to(bfloat16)": cast,
    "load_state_dict": filled,
}


def aliases_are_kept(case: Case, draw: Draw) -> None:
    """m.a is m.b if and only if S.a is S.b, for all pairs of paths to modules and tensors.

    After training too.
    """
    model = case.model()
    before = ties(model)
    case.operated(model, seed=draw(SEEDS, "seed"))
    train(case, model, 1)
    after = ties(model)
    split = [sorted(group) for group in before - after]
    joined = [sorted(group) for group in after - before]
    holds(not split, f"one and the same in m, and not in S: {first_few(split[0] if split else [])}")
    holds(
        not joined, f"one and the same in S, and not in m: {first_few(joined[0] if joined else [])}"
    )


def parts_are_like_their_site(case: Case, draw: Draw) -> None:
    """A part has dtype, device and training flag of its site; of its first one, where shared.

    In float64, float32 and bfloat16.
    """
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), "dtype")
    model = case.model().to(dtype)
    mark(model, draw(FLAGS, "flags"))
    try:
        made = case.plan(model)
    except RuntimeError as error:
        applies(False, f"the base does not run in {dtype}: {error}")
    applies(made.placed, "these rules join no part")
    first = {p.key: p.site for p in reversed(made.placed)}
    modes = {key: site.module.training for key, site in first.items()}
    made.apply()
    for key, site in first.items():
        part, want = operation(model)._modules[key], modes[key]
        assert part is not None
        told = f"the part at {site.path} has training={part.training}, its site {want}"
        holds(part.training == want, told)
        for weight in [t for t in site.entry.module.parameters() if t.is_floating_point()][:1]:
            for t in part.parameters():
                told = (
                    f"the part at {site.path} is {t.dtype} on {t.device}, its site {weight.dtype}"
                )
                holds((t.dtype, t.device) == (weight.dtype, weight.device), told)


LAWS = (
    freezing_is_exact,
    gradients_reach_every_part,
    counts_are_closed_forms,
    sharing_is_kept,
    aliases_are_kept,
    parts_are_like_their_site,
)
