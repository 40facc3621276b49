"""Laws of parameters: what is added, trained, shared. m is the model, S the operated one."""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from .._preserve import Marks, fingerprint
from .._text import first_few
from ..engine.apply import parameters, revert
from ..engine.placement import Placement
from ..engine.reports import report
from ..rules.edits import Trained
from ..rules.part import Shared
from ..state import checkpoint
from ..structure.layers import keeps_statistics, named_modules
from ..structure.module_tree import ADDITIONS, CONTAINERS
from .case import FLAGS, SEEDS, Case, actions, mark, operation, train
from .function import runs
from .laws import Draw, applies, holds
from .snapshot import equal, ties, unchanged, used


def freezing_is_exact(case: Case, draw: Draw) -> None:
    """{p : p.requires_grad} = what the rules say, the last word counting; the rest never moves.

    After three steps of AdamW all other parameters have no gradient and the same bytes.
    """
    model = case.model()
    declared = _declared(case, model)
    case.operated(model, seed=draw(SEEDS, "seed"))
    _check_flags(model, declared)
    frozen = [
        (n, p, p.detach().clone()) for n, p in _base_parameters(model) if id(p) not in declared
    ]
    statistics = _frozen_statistics(model, declared)
    train(case, model)
    drifted = [kind for kind, buffer, was in statistics if not torch.equal(buffer, was)]
    holds(not drifted, f"training moved statistics of {first_few(drifted)}, which is frozen")
    moved = [name for name, p, was in frozen if not torch.equal(p, was)]
    holds(not moved, f"training moved {first_few(moved)}, which is frozen")
    graded = [name for name, p, _ in frozen if p.grad is not None]
    holds(not graded, f"a gradient came to {first_few(graded)}, which is frozen")


def _check_flags(model: nn.Module, declared: set[int]) -> None:
    """Raise Broken unless what asks for a gradient is what is declared, and parts."""
    parts = {id(p): f"{ADDITIONS}.{n}" for n, p in operation(model).named_parameters()}
    names = {**parts, **{id(p): n for n, p in _base_parameters(model)}}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    of_parts = {id(p) for p in operation(model).parameters() if p.requires_grad}
    frozen_by_mistake = [names[i] for i in declared - trained]
    free_by_mistake = [names.get(i, "?") for i in trained - declared - of_parts]
    holds(
        not frozen_by_mistake, f"the rules unfreeze {first_few(frozen_by_mistake)}, which is frozen"
    )
    holds(not free_by_mistake, f"no rule unfreezes {first_few(free_by_mistake)}, which is trained")


def _frozen_statistics(model: nn.Module, declared: set[int]) -> list[tuple[str, Tensor, Tensor]]:
    """(class, buffer, its values now) of the norms with weights of which nothing is declared."""
    frozen = []
    for _, module in named_modules(model, aliases=True):
        weights = {id(p) for p in module.parameters()}
        if keeps_statistics(module) and weights and not declared & weights:
            frozen += [(type(module).__name__, b, b.clone()) for b in module.buffers()]
    return frozen


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
                named = [pair for end in ends for pair in edit.parameters(end)]
                ids = {id(p) for _, p in named if p.is_floating_point()}
                chosen = chosen | ids if edit.trained else chosen - ids
    return chosen


def gradients_reach_every_part(case: Case, draw: Draw) -> None:
    """Within two steps every trained tensor of every part has had a gradient that is not zero.

    (Where one factor starts at zero, the other's first gradient is zero: one step says nothing.)
    A module that a rule unfreezes has had one for one tensor at least, unless the rule is optional.
    """
    model = case.operated(seed=draw(SEEDS, "seed"))
    reached = _reached(case, model)
    parts = operation(model).named_parameters()
    dry = [name for name, p in parts if p.requires_grad and id(p) not in reached]
    holds(not dry, f"no gradient comes to {first_few(dry)}")
    for rule, site in case.places:
        unfreezes = any(isinstance(edit, Trained) and edit.trained for edit in rule.rest)
        if unfreezes and not rule.optional:
            ends = (model.get_submodule(site.entry.path), model.get_submodule(site.exit.path))
            trained = {id(p) for end in ends for p in end.parameters() if p.requires_grad}
            holds(not trained or trained & reached, f"no gradient comes to {site.path}")


def _reached(case: Case, model: nn.Module) -> set[int]:
    """Ids of the parameters that have a gradient other than zero in some step of AdamW."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.01)
    reached: set[int] = set()
    for seed in range(3):
        optimiser.zero_grad()
        case.loss(model, seed).backward()  # type: ignore[no-untyped-call]
        reached |= {id(p) for p in trained if p.grad is not None and p.grad.any()}
        optimiser.step()
    return reached


def counts_are_closed_forms(case: Case, draw: Draw) -> None:
    """added = sum over sites of numel(part) where each has its own, numel(part) once where shared.

    Shared: once for each width, device, dtype and captured name, however many sites. plan(m) says
    the same numbers as S holds.
    """
    model = case.model()
    plan = case.plan(model)
    want, groups = 0, set[Any]()
    for placement in plan.placements:
        group = _group(placement)
        if group is None or group not in groups:
            want += sum(p.numel() for p in placement.sketch().parameters())
        groups.add(group)
    placed = {placement.key for placement in plan.placements}
    others = [part for key, part in plan.parts.items() if key not in placed]
    want += sum(p.numel() for part in others for p in part.parameters())
    added, trainable = plan.added, plan.trainable
    plan.apply()
    holds(added == want, f"plan(m).added is {added:,}, and its parts have {want:,} parameters")
    here = sum(p.numel() for p in operation(model).parameters())
    holds(here == added, f"S holds {here:,} new parameters, and plan(m).added said {added:,}")
    free = sum(p.numel() for p in model.parameters() if p.requires_grad)
    holds(
        free == trainable, f"S trains {free:,} parameters, and plan(m).trainable said {trainable:,}"
    )


def _group(placement: Placement) -> Any:
    """What a shared part must be the same for; None for a part of one site."""
    part, site = placement.edit.part, placement.site
    if not isinstance(part, Shared):
        return None
    maker = part.part if hasattr(part.part, "word") else id(part.part)
    captures, by = site.captures, part.by
    captured = captures.get(by) if isinstance(by, str) else by and placement.key
    widths = (site.width, site.out)
    return maker, part.name, by, captured, *widths, placement.device, placement.dtype


def sharing_is_kept(case: Case, draw: Draw) -> None:
    """As many distinct parts as planned, each at all of its sites, in S and in its copies.

    Copies: deepcopy, pickle, .to(dtype), load_state_dict. The state holds each tensor once.
    """
    model = case.model()
    plan = case.plan(model)
    applies(plan.placements, "these rules join no part")
    groups: dict[Any, list[str]] = {}
    for i, placement in enumerate(plan.placements):
        groups.setdefault(_group(placement) or i, []).append(placement.site.path)
    plan.apply()
    way = draw(st.sampled_from([*COPIES]), "copy")
    for name, copied in (("S", model), (f"S after {way}", COPIES[way](model))):
        _check_sharing(copied, name, sorted(sorted(paths) for paths in groups.values()))
        if way != ".to(bfloat16)":
            runs(case, copied)


def _check_sharing(model: nn.Module, name: str, want: list[list[str]]) -> None:
    """Raise Broken unless some lists of paths have a part each, and no tensor is held twice."""
    paths_of: dict[int, list[str]] = {}
    for hooked, action in actions(model):
        paths_of.setdefault(id(action.part), []).append(hooked.path)
    have = sorted(sorted(paths) for paths in paths_of.values())
    holds(have == want, f"{name} has {len(have)} parts, not {len(want)}: {_uneven(want, have)}")
    pointers = [t.data_ptr() for t in operation(model).state_dict().values() if t.numel()]
    holds(len(pointers) == len(set(pointers)), f"{name} holds a tensor under two keys")
    held = {id(p) for p in operation(model).parameters()}
    base = {id(p) for p in model.parameters()} - held
    run = {id(p) for _, action in actions(model) for p in used(action.part)} - base
    holds(held == run, f"{name} runs parts that it does not hold")


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
        plan = case.plan(model)
    except RuntimeError as error:
        applies(False, f"the base does not run in {dtype}: {error}")
    applies(plan.placements, "these rules join no part")
    first_sites = {placement.key: placement.site for placement in reversed(plan.placements)}
    modes = {key: site.module.training for key, site in first_sites.items()}
    plan.apply()
    for key, site in first_sites.items():
        part, want = operation(model)._modules[key], modes[key]
        assert part is not None
        holds(
            part.training == want,
            f"the part at {site.path} has training={part.training}, its site {want}",
        )
        for weight in [t for t in site.entry.module.parameters() if t.is_floating_point()][:1]:
            for t in part.parameters():
                holds(
                    (t.dtype, t.device) == (weight.dtype, weight.device),
                    f"the part at {site.path} is {t.dtype} on {t.device}, its site {weight.dtype}",
                )


class _PutIn(nn.Module):
    """A module with something to train, which no rule knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(3))


def what_is_trained_is_one_set(case: Case, draw: Draw) -> None:
    """{p : p.requires_grad} = handed out = in the file, each once = counted = brought back.

    Also of a layer that is unfrozen by hand after the rules were applied, and of a module that is
    put in then; before all of this is trained, and after it.
    """
    model = case.model()
    before = fingerprint(model)
    case.operated(model, seed=draw(SEEDS, "seed"))
    layers = [path for path, module in named_modules(model) if _is_frozen(module)]
    by_hand = draw(st.sampled_from([None, *layers]), "layer unfrozen by hand")
    if by_hand is not None:
        for p in model.get_submodule(by_hand)._parameters.values():
            _ = p is None or p.requires_grad_(True)
    put_in = draw(st.booleans(), "a module is put in") and not isinstance(model, CONTAINERS)
    if put_in:
        model.add_module("put_in", _PutIn())
    handed = parameters(model)
    with torch.no_grad():
        for p in handed:
            p.add_(0.01 * torch.randn_like(p))
    _check_counted(model, handed)
    fresh = case.model()
    if put_in:
        fresh.add_module("put_in", _PutIn())
    with tempfile.TemporaryDirectory() as folder:
        file = checkpoint.save(model, f"{folder}/s.safetensors")
        rules = case.rules if operation(model).record["data"] == "" else None
        checkpoint.load(fresh, file, rules=rules, example=case.inputs())
    equal(case.outputs(fresh), case.outputs(model), "loaded into a fresh model, S")
    _check_back(model, put_in, before)


def _is_frozen(module: nn.Module) -> bool:
    """Whether it holds parameters, which could be trained, and are not."""
    tensors = [p for p in module._parameters.values() if p is not None]
    return bool(tensors) and all(p.is_floating_point() and not p.requires_grad for p in tensors)


def _check_counted(model: nn.Module, handed: list[nn.Parameter]) -> None:
    """Raise Broken unless what is handed out is what the state holds, and the report counts."""
    names = {p.data_ptr(): name for name, p in model.named_parameters() if p.numel()}
    held = [t.data_ptr() for t in checkpoint.state_dict(model).values()]
    wrong = [names[p.data_ptr()] for p in handed if p.numel() and held.count(p.data_ptr()) != 1]
    holds(not wrong, f"handed out, and not in the state just once: {first_few(wrong)}")
    count = f"{sum(p.numel() for p in handed):,} trainable"
    told = report(model).notes[-1]
    holds(f" {count}" in told, f"{count} by what is handed out, and the report says: {told}")


def _check_back(model: nn.Module, put_in: bool, before: Marks) -> None:
    """Raise Broken unless revert restores what was handed out."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        revert(model)
    if put_in:
        new = model.get_submodule("put_in")._parameters["extra"]
        holds(new is not None and not new.any(), "revert left the trained values of a new module")
        holds("put_in.extra" in str(told[-1].message), "revert does not name the new module")
        del model._modules["put_in"]
    unchanged(before, fingerprint(model), "revert", but=("random",))


LAWS = (
    freezing_is_exact,
    gradients_reach_every_part,
    counts_are_closed_forms,
    sharing_is_kept,
    aliases_are_kept,
    parts_are_like_their_site,
    what_is_trained_is_one_set,
)
