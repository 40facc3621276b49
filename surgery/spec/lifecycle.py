"""Laws of the life cycle: reverted, repeated, in another order, through faults, files, copies."""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from .._preserve import fingerprint
from .._text import first_few
from ..engine.activity import activate
from ..engine.apply import apply, revert
from ..engine.merging import merge, unmerge
from ..engine.operation import operations
from ..engine.placement import Placement
from ..engine.tokens import ON_OUTPUT
from ..errors import FileError, OperationError, SurgeryError
from ..rules.edits import append
from ..rules.rule import at
from ..rules.selector import where
from ..state import checkpoint
from ..structure.layers import named_modules
from ..structure.module_tree import Site
from ..structure.weights import ParameterSite
from .case import FLAGS, SEEDS, Case, actions, mark, operation, stir, train
from .fault_injection import Fault, Tripwire, committed, events, source
from .function import gap_all
from .laws import Broken, Draw, applies, holds
from .parameters import COPIES
from .snapshot import MODEL, equal, near, raised, rounding, unchanged

BY_TRAINING = ("random", "gradient")  # what it may move, and revert need not bring back


def revert_is_exact(case: Case, draw: Draw) -> None:
    """fp(revert(S)) = fp(m): bytes, identities, flags, hooks, keys; after training too.

    With modules in train and eval mode, parameters frozen and not, and a hook of the user's own.
    """
    model = case.model()
    mark(model, draw(FLAGS, "flags"))
    before = fingerprint(model)
    steps = draw(st.integers(0, 2), "steps of training")
    case.operated(model, seed=draw(SEEDS, "seed"))
    if steps:
        train(case, model, steps)
    revert(model)
    when = f"apply, {steps} steps of training and revert"
    unchanged(before, fingerprint(model), when, but=BY_TRAINING)


def copies_revert_too(case: Case, draw: Draw) -> None:
    """revert of a copy of S, trained, gives a model that answers as m, with m's flags and keys."""
    model = case.operated()
    train(case, model, 1)
    way = draw(st.sampled_from(["deepcopy", "pickle"]), "copy")
    back = revert(COPIES[way](model))
    fresh = case.model()
    equal(case.outputs(back), case.outputs(fresh), f"a {way} of S, reverted, does not answer as m")
    holds(
        list(back.state_dict()) == list(fresh.state_dict()),
        f"a {way} of S, reverted, has other keys",
    )
    pairs = zip(back.named_parameters(), fresh.parameters(), strict=True)
    wrong = [
        n for (n, p), q in pairs if p.requires_grad != q.requires_grad or not torch.equal(p, q)
    ]
    holds(not wrong, f"a {way} of S, reverted, has other values or flags: {first_few(wrong)}")


def twice_is_refused(case: Case, draw: Draw) -> None:
    """R on S again raises OperationError that names an earlier rule, and S is unchanged."""
    model = case.operated(stirred=draw(SEEDS, "seed"))
    before = fingerprint(model)
    error = raised(OperationError, lambda: case.operated(model), "the same rules again")
    unchanged(before, fingerprint(model), "the same rules again, refused,")
    holds(repr(case.rules[0]) in str(error), f"the error does not name {case.rules[0]!r}: {error}")


def stacked_operations_come_off_in_order(case: Case, draw: Draw) -> None:
    """A second operation comes off alone and leaves S as it was, which answers alone beside it."""
    replaces = any(edit.word == "replace" for rule in case.rules for edit in rule.rest)
    applies(not replaces, "what is replaced cannot be replaced again")
    model = case.operated(stirred=draw(SEEDS, "seed"))
    before, want = fingerprint(model), case.outputs(model)
    case.operated(model, name="second")
    holds(len(operations(model)) == 2, "there are not two operations")
    activate(model, "default")
    equal(case.outputs(model), want, "where a second operation is there, and not active")
    activate(model, ["default", "second"])
    revert(model, name="second")
    unchanged(before, fingerprint(model), "a second operation, taken off,", but=("random",))
    equal(case.outputs(model), want, "after a second operation was taken off")


def disjoint_rules_commute(case: Case, draw: Draw) -> None:
    """S_RQ = S_QR, state and answer to the bit, for R and Q at disjoint sites: halves of a rule."""
    plan = case.plan(case.model())
    rule = draw(st.sampled_from(case.rules), "rule")
    places = [site for other, sites in plan.matches if other is rule for site in sites]
    applies(len(places) > 1, "this rule has fewer than two sites to be divided")
    cut = draw(st.integers(1, len(places) - 1), "cut")
    applies(_apart(places[:cut], places[cut:]), "its sites lie in one another, or are tied")
    paths = {site.path for site in places[:cut]}
    n = case.rules.index(rule)
    r = at(where(rule.where) & where(lambda s: s.path in paths), *rule.rest)
    q = at(where(rule.where) & where(lambda s: s.path not in paths), *rule.rest)
    orders = ([*case.rules[:n], *pair, *case.rules[n + 1 :]] for pair in ([r, q], [q, r]))
    one, two = (case.operated(rules=rules) for rules in orders)
    a, b = checkpoint.state_dict(one), checkpoint.state_dict(two)
    holds(set(a) == set(b), f"in the other order, other keys: {first_few(sorted(set(a) ^ set(b)))}")
    differ = [key for key in a if not torch.equal(a[key], b[key])]
    holds(not differ, f"in the other order, other values: {first_few(differ)}")
    equal(case.outputs(one), case.outputs(two), "in the other order, another answer")


def _apart(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists of sites have no module and no tensor in common."""

    def ids(sites: list[Any]) -> set[int]:
        modules = [m for s in sites for end in (s.entry, s.exit) for m in end.module.modules()]
        return {id(x) for m in modules for x in (m, *m.parameters(recurse=False))}

    return not ids(a) & ids(b)


def faults_leave_nothing(case: Case, draw: Draw) -> None:
    """For a fault at any line of apply: fp(m) is unchanged, random numbers and all.

    The fault is an exception, or an interrupt, at the k-th line of Surgery's own code to run.
    """
    model, lines = case.model(), case.lines
    k = draw(st.integers(1, len(lines)), "k")
    interrupt = draw(st.booleans(), "interrupt")
    plan = case.plan(model)
    before = fingerprint(model)
    wire = Tripwire(k, KeyboardInterrupt) if interrupt else Tripwire(k)
    wire.run(plan.apply)
    lines = [*lines[: k - 1], wire.where or lines[k - 1]]
    if wire.where is None or committed(wire.where):
        revert(model)  # too late a fault: it was done
    file, number = lines[k - 1]
    when = f"a fault at {Path(file).name}:{number} ({source((file, number))})"
    unchanged(before, fingerprint(model), when)


def faults_in_revert_leave_one_of_two(case: Case, draw: Draw) -> None:
    """For a fault at any line of revert: fp is that of S, or that of m; then revert gives m.

    The fault is an exception, or an interrupt, as a line of Surgery's own code runs.
    """
    model, other = case.model(), case.operated()
    base, lines = fingerprint(model), events(lambda: revert(other))
    case.operated(model, stirred=draw(SEEDS, "seed"))
    before = fingerprint(model)
    line = draw(st.sampled_from(sorted(set(lines), reverse=True)), "line")
    k = draw(st.sampled_from([i for i, it in enumerate(lines, 1) if it == line]), "k")
    wire = Tripwire(k, KeyboardInterrupt if draw(st.booleans(), "interrupt") else Fault)
    wire.run(lambda: revert(model))
    file, number = wire.where or line
    when = f"a fault at {Path(file).name}:{number} ({source((file, number))}) of revert"
    if operations(model):
        unchanged(before, fingerprint(model), when)
        revert(model)
    unchanged(base, fingerprint(model), when, but=("random",))


def failing_parts_leave_nothing(case: Case, draw: Draw) -> None:
    """For a part that cannot be made at the k-th place: fp(m) is unchanged."""
    model = case.model()
    placed = case.plan(model).placements
    applies(placed, "these rules join no part")
    mark(model, [True, False])
    path = draw(st.sampled_from([p.site.path for p in placed]), "site")
    rule = next(p.rule for p in placed if p.site.path == path)
    broken = at(where(rule.where) & where(lambda s: s.path == path), append(_failing))
    before = fingerprint(model)
    rules = [*case.rules, broken]
    raised(_Failed, lambda: case.operated(model, rules), "a part that cannot be made")
    unchanged(before, fingerprint(model), f"a part that could not be made at {path}")


class _Failed(Exception):
    """The part cannot be made."""


def _failing(site: Any) -> nn.Module:
    """Makes a part in a plan, on the meta device, and none for real."""
    if torch.empty(0).device.type == "meta":
        return nn.Identity()
    torch.rand(1)
    raise _Failed(site.path)


def base_keys_are_kept(case: Case, draw: Draw) -> None:
    """keys(m) is a subsequence of keys(S), and a checkpoint of m loads into S, strictly.

    What was added is then as it was; the base's tensors, classes and identities are those of m.
    """
    model, seed = case.model(), draw(SEEDS, "seed")
    keys, modules = list(model.state_dict()), _modules(model)
    checkpoint = copy.deepcopy(case.model().state_dict())
    case.operated(model, stirred=seed)
    now = list(model.state_dict())
    added = [key for key in now if key not in keys]
    holds(
        [key for key in now if key in keys] == keys, "the keys of the base are not in their order"
    )
    foreign = [key for key in added if "surgery." not in key]
    holds(not foreign, f"added keys lie outside of model.surgery: {first_few(foreign)}")
    after = _modules(model)
    other = [path for path in {*modules, *after} if modules.get(path) != after.get(path)]
    holds(not other, f"other modules than before: {first_few(other)}")
    wanted = {**checkpoint, **{k: t.clone() for k, t in model.state_dict().items() if k in added}}
    try:
        model.load_state_dict(checkpoint)
    except RuntimeError as error:
        raise Broken(f"a checkpoint of the base does not load strictly: {error}") from error
    filled = model.state_dict()
    wrong = [k for k, t in wanted.items() if not torch.equal(filled[k], t)]
    holds(not wrong, f"after a checkpoint of the base was loaded, others: {first_few(wrong)}")


def _modules(model: nn.Module) -> dict[str, tuple[int, type[nn.Module]]]:
    """By every path, which module it is, and its class."""
    return {path: (id(m), type(m)) for path, m in named_modules(model, aliases=True)}


def files_round_trip(case: Case, draw: Draw) -> None:
    """save(S), trained, load into a fresh m: the answer to the bit. Each tensor is stored once.

    A key too many or too few raises FileError, model untouched.
    """
    model = case.operated(stirred=draw(SEEDS, "seed"))
    train(case, model, 1)
    fresh, want = case.model(), case.outputs(model)
    with tempfile.TemporaryDirectory() as folder:
        file = checkpoint.save(model, f"{folder}/s.safetensors")
        rules = case.rules if operation(model).record["data"] == "" else None
        checkpoint.load(fresh, file, rules=rules, example=case.inputs())
    equal(case.outputs(fresh), want, "loaded into a fresh model, S")
    tensors = checkpoint.state_dict(model)
    places = [t.data_ptr() for t in tensors.values() if t.numel()]
    holds(len(places) == len(set(places)), "the state holds a tensor under two keys")
    if not tensors:
        return
    key = draw(st.sampled_from(sorted(tensors)), "key")
    before = fingerprint(fresh)
    too_few = {k: t for k, t in tensors.items() if k != key}
    too_many = {**tensors, f"{key}.x": tensors[key]}
    if key.startswith("parts.") or not _is_buffer(model, key):
        raised(FileError, lambda: checkpoint.load_state_dict(fresh, too_few), f"without {key}")
    raised(FileError, lambda: checkpoint.load_state_dict(fresh, too_many), f"with {key}.x")
    unchanged(before, fingerprint(fresh), "a state that does not fit")


def _is_buffer(model: nn.Module, key: str) -> bool:
    return key.removeprefix("base.") in dict(model.named_buffers())


def copies_are_independent(case: Case, draw: Draw) -> None:
    """A copy of S answers as S, to the bit; changing the copy leaves S, and changing S the copy.

    Copies: deepcopy, pickle, torch.save.
    """
    model = case.operated(stirred=draw(SEEDS, "seed"))
    ways: dict[str, Callable[[nn.Module], nn.Module]] = {
        "deepcopy": copy.deepcopy, "pickle": COPIES["pickle"], "torch.save": _torch_saved,
    }  # fmt: skip
    way = draw(st.sampled_from([*ways]), "copy")
    want = case.outputs(model)
    clone = ways[way](model)
    equal(case.outputs(clone), want, f"a {way} of S answers otherwise")
    pointers = {t.data_ptr() for t in model.state_dict().values() if t.numel()}
    both = [k for k, t in clone.state_dict().items() if t.numel() and t.data_ptr() in pointers]
    holds(not both, f"a {way} of S shares {first_few(both)} with it")
    stir(clone, 1)
    equal(case.outputs(model), want, f"changing a {way} of S changes S")
    moved = case.outputs(clone)
    stir(model, 2)
    equal(case.outputs(clone), moved, f"changing S changes its {way}")
    if any(p.requires_grad for p in operation(model).parameters()):
        holds(gap_all(moved, want) > 0, f"changing a {way} of S does not change its answer")


def _torch_saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def meta_has_the_same_plan(case: Case, draw: Draw) -> None:
    """On the meta device S has the keys, shapes and counts that it has in memory."""
    applies(
        not case.needs_example, "its places are read off a forward, which meta tensors have none of"
    )
    real, meta = case.operated(), case.model().to("meta")
    apply(meta, case.rules)
    a, b = ({k: (t.shape, t.dtype) for k, t in m.state_dict().items()} for m in (real, meta))
    differ = sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
    holds(not differ, f"on the meta device otherwise: {first_few(differ)}")


def merge_is_equivalent(case: Case, draw: Draw) -> None:
    """merge(S)(x) ~16 S(x) with m's keys, modules and hooks alone; unmerge is S again to the bit.

    The state of merge(S) goes into a fresh m, strictly, which then answers as merge(S).
    Or merge raises OperationError that names a part which is not linear, and S is unchanged.
    """
    model = case.operated(stirred=draw(SEEDS, "seed"))
    applies(actions(model), "these rules join no part")
    want = case.outputs(model)
    most = rounding(lambda: case.outputs(model), model.parameters(), MODEL)
    before = fingerprint(model)
    try:
        merge(model)
    except SurgeryError as error:
        unchanged(before, fingerprint(model), "a merge that was refused")
        kinds = {type(action.part).__name__ for _, action in actions(model)}
        holds(any(k in str(error) for k in kinds), f"the refusal names no part: {error}")
        applies(False, str(error).splitlines()[0])
    near(case.outputs(model), want, most, "merged, the answer")
    plain = case.twin(model)
    holds(list(model.state_dict()) == list(plain.state_dict()), "merged, it has other keys than m")
    odd = sorted(set(_seen(model).items()) ^ set(_seen(plain).items()))
    holds(
        not odd, f"merged, it is not plain: {first_few([path or 'the model' for path, _ in odd])}"
    )
    plain.load_state_dict(model.state_dict())
    equal(case.outputs(plain), case.outputs(model), "with a merged state, m")
    unmerge(model)
    unchanged(before, fingerprint(model), "merge and unmerge")


def _seen(model: nn.Module) -> dict[str, tuple[type[nn.Module], int, bool]]:
    """Of every module, by path: its class, how many hooks it calls, if its forward is its own."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return {
        path: (type(m), sum(len(vars(m)[name]) for name in hooks), "forward" in vars(m))
        for path, m in model.named_modules(remove_duplicate=False)
    }


def user_hooks_come_first(case: Case, draw: Draw) -> None:
    """Hooks of the user's own at a site fire once a call, in their old order, before any graft."""
    model = case.model()
    placed = [p for p in case.plan(case.model()).placements if _has_hooks(p)]
    applies(placed, "these rules join no part to what is called")
    path = draw(st.sampled_from(sorted({p.site.path for p in placed})), "site")
    here = [p for p in placed if p.site.path == path]
    fired: list[str] = []
    _hook(model, here[0].site, fired)
    case.outputs(model)
    want = list(fired)
    case.operated(model)
    parts = {id(a.part): a.part for hooked, a in actions(model) if hooked.path == path}
    for part in parts.values():
        part.register_forward_pre_hook(lambda *_: fired.append("part"))
    fired.clear()
    case.outputs(model)
    holds(
        [word for word in fired if word != "part"] == want,
        f"{path}: hooks fire as {first_few(fired)}, not {first_few(want)}",
    )
    acts_on_output = {p.edit.place for p in here} <= {*ON_OUTPUT}
    if acts_on_output and len(parts) == 1:
        _check_part_is_last(path, fired)


def _has_hooks(p: Placement) -> bool:
    """Whether a part is joined by hooks at a module that is called."""
    return p.edit.place != "instead" and not isinstance(p.site, ParameterSite)


def _check_part_is_last(path: str, fired: list[str]) -> None:
    if fired.count("part") == 1 and "second after" in fired:
        last = fired.index("part") > fired.index("second after")
        holds(last, f"{path}: the part runs before the user's hooks: {first_few(fired, 8)}")


def _hook(model: nn.Module, site: Site, fired: list[str]) -> None:
    """Two hooks before a site and two after it, as a user has them, that say when they fire."""
    entry, exit = model.get_submodule(site.entry.path), model.get_submodule(site.exit.path)
    for word in ("first", "second"):
        entry.register_forward_pre_hook(lambda *_, w=word: fired.append(f"{w} before"))
        exit.register_forward_hook(lambda *_, w=word: fired.append(f"{w} after"))


LAWS = (
    revert_is_exact,
    copies_revert_too,
    twice_is_refused,
    stacked_operations_come_off_in_order,
    disjoint_rules_commute,
    faults_leave_nothing,
    faults_in_revert_leave_one_of_two,
    failing_parts_leave_nothing,
    base_keys_are_kept,
    files_round_trip,
    copies_are_independent,
    meta_has_the_same_plan,
    merge_is_equivalent,
    user_hooks_come_first,
)
