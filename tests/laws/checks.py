"""The laws of DESIGN.md, section 3, as plain functions that raise AssertionError where broken.

`test_laws.py` calls them on the engine as it is, `test_sabotage.py` on engines broken on purpose:
each must fail there, or it would show nothing here.
"""

from __future__ import annotations

import copy
import gc
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame

import surgery
from surgery import (
    adapter,
    append,
    at,
    ffn,
    freeze,
    head,
    moa,
    nearest,
    norm,
    parallel,
    prepend,
    shared,
    unfreeze,
)
from surgery._preserve import fingerprint
from surgery.spec.fault_injection import Fault, Line, Tripwire, committed, events
from surgery.spec.snapshot import raised
from surgery.spec.snapshot import unchanged as assert_same
from surgery.structure.layers import named_modules
from surgery.structure.module_tree import Tree
from tests.models import images, tiny_vit

ADAPTERX = [
    at(ffn, parallel(shared(moa(rank=4, heads=3)), scale=0.1)),
    at(nearest(norm, before=ffn), unfreeze),
    at(head, unfreeze),
]


class Toy(nn.Module):
    """As little as can be broken: an alias, a tie, two norms with buffers, flags of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.bn = nn.BatchNorm1d(8)
        self.again = self.first
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.mlp[2].weight = self.mlp[0].weight
        self.mlp[0].bias.requires_grad_(False)
        self.mlp.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.again(self.bn(self.first(x))))


class Linears(nn.Module):
    """Two linears in a row, without any trap."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


def plain(site: surgery.Site) -> nn.Linear:
    """A part that does not start as the identity."""
    return nn.Linear(site.width, site.out)


def stir(model: nn.Module, seed: int = 1) -> None:
    """Give every trainable parameter of the parts another value, so that parts do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in surgery.parameters(model):
            p += 0.2 * torch.randn(p.shape, generator=generator).to(p)


def stir_parts(model: nn.Module, seed: int = 1) -> None:
    """As `stir`, and leave what was unfrozen in the base alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.surgery.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator).to(p)


def train(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    """A few steps in training mode."""
    model.train()
    optimiser = torch.optim.AdamW(surgery.parameters(model), lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()


# 1 ---------------------------------------------------------------------------------------------


def grafts_are_invisible() -> None:
    """Law 1: patterns find in an operated model just what they found in the untouched one."""
    model = tiny_vit()
    patterns = ["**", "blocks.[-1].**", nn.Linear, ffn, norm, surgery.attn, head]
    patterns += [~surgery.where(nn.Linear), surgery.holding(ffn), nearest(norm, before=ffn)]

    def found() -> list[list[str]]:
        tree = Tree(model)
        return [[s.path for s in surgery.where(p).find(tree)] for p in patterns]

    before, table = found(), str(surgery.anatomy(model))
    surgery.apply(model, [*ADAPTERX, at(surgery.attn, append(adapter(rank=2)))])
    assert found() == before
    assert str(surgery.anatomy(model)) == table


def rules_meet_the_untouched_model() -> None:
    """Law 1: a rule never matches what an earlier rule of the same call, or operation, added."""
    model = Linears()
    both = [at("one", append(plain)), at(nn.Linear, parallel(plain))]
    assert len(surgery.plan(model, both).sites) == 2
    surgery.apply(model, both)
    again = surgery.plan(model, at(nn.Linear, parallel(plain)), name="again")
    assert [site.path for site in again.sites] == ["one", "two"]
    again.apply()


# 2 ---------------------------------------------------------------------------------------------


def no_match_is_an_error() -> None:
    """Law 2: the error names the nearest addresses that do exist, and how to write them."""
    model = tiny_vit()
    before = surgery.fingerprint(model)
    rule = at("blocks.*.feed_forward", parallel(adapter(rank=2)))
    told = str(raised(surgery.MatchError, lambda: surgery.apply(model, rule)))
    near = re.findall(r"(blocks\.\*\.\w+) \(3\)", told)
    assert near, told
    assert all(len(surgery.where(address).find(Tree(model))) == 3 for address in near)
    assert f'Write at("{near[0]}"' in told
    assert_same(before, surgery.fingerprint(model), "no match")


def no_match_of_one_name_is_an_error() -> None:
    """Law 2: of each address that a rule writes: the one without a match is named."""
    model = tiny_vit()
    before = surgery.fingerprint(model)
    for where in ("blocks.*.{mlp,attnn}", ffn | surgery.where("blocks.*.attnn")):
        rule = at(where, parallel(adapter(rank=2)))
        told = str(raised(surgery.MatchError, lambda rule=rule: surgery.apply(model, rule)))
        assert "blocks.*.attnn" in told
        assert "blocks.*.attn (3)" in told
    assert_same(before, surgery.fingerprint(model), "no match of one name")


def a_quantised_weight_is_not_unfrozen() -> None:
    """What takes no gradient is an error, and a note where the rule is optional."""
    model = tiny_vit()
    model.head.codes = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    before = surgery.fingerprint(model)
    told = str(raised(surgery.RuleError, lambda: surgery.apply(model, at(head, unfreeze))))
    assert "head.codes is quantised" in told
    assert_same(before, surgery.fingerprint(model), "a quantised weight")
    note = str(surgery.plan(model, at(head, unfreeze, optional=True)))
    assert "so it stays frozen: head.codes" in note


def wrong_times_is_an_error() -> None:
    """Law 2: `times` is exact, and the error says how many there are."""
    model = tiny_vit()
    for times in (1, 2, 4):
        rule = at(ffn, parallel(adapter(rank=2)), times=times)
        told = str(raised(surgery.MatchError, lambda rule=rule: surgery.apply(model, rule)))
        assert "matched 3 sites" in told
        assert f"times={times}" in told
    surgery.apply(model, at(ffn, parallel(adapter(rank=2)), times=3))


# 3 ---------------------------------------------------------------------------------------------


def two_replacements_conflict() -> None:
    """Law 3: two rules that replace one site are refused, the model untouched."""
    model = Linears()
    before = surgery.fingerprint(model)
    rules = [at("one", surgery.replace(plain)), at(nn.Linear, surgery.replace(plain))]
    told = str(raised(surgery.ConflictError, lambda: surgery.apply(model, rules)))
    assert "one" in told
    assert_same(before, surgery.fingerprint(model), "conflict")


def composed(*words: str) -> tuple[Tensor, Tensor]:
    """What edits at one site give, and what composing them by hand, in rule order, gives."""
    edits = {"parallel": parallel, "prepend": prepend, "append": append}
    model = Linears().double()
    base = copy.deepcopy(model.one)
    rules = [at("one", edits[word](lambda s: plain(s))) for word in words]
    surgery.apply(model, rules)
    parts = _keyed(model, words)
    x = torch.randn(3, 8, dtype=torch.float64)
    seen: list[Tensor] = []
    handle = model.one.register_forward_hook(lambda m, args, y: seen.append(y))
    model(x)
    handle.remove()
    return seen[0], _by_hand(base, list(zip(words, parts, strict=True)))(x)


def _keyed(model: nn.Module, words: tuple[str, ...]) -> list[nn.Module]:
    room, counts, parts = model.surgery.default, Counter[str](), []
    for word in words:
        counts[word] += 1
        n = counts[word]
        parts.append(room.get_submodule(f"one/{word}" + (f"/{n}" if n > 1 else "")))
    return parts


def _by_hand(f: Callable[[Tensor], Tensor], steps: list[tuple[str, nn.Module]]) -> Any:
    for word, part in steps:
        f = _step(f, word, part)
    return f


def _step(f: Any, word: str, part: nn.Module) -> Any:
    return {
        "parallel": lambda x: f(x) + part(x),
        "prepend": lambda x: f(part(x)),
        "append": lambda x: part(f(x)),
    }[word]


ORDERS = [
    ("parallel", "prepend"),
    ("prepend", "parallel"),
    ("append", "append"),
    ("append", "parallel"),
    ("parallel", "append"),
    ("prepend", "prepend"),
    ("parallel", "prepend", "parallel", "append", "prepend", "parallel"),
]


def edits_act_in_rule_order() -> None:
    """Law 3: each edit wraps what the rules before it made of the site."""
    for words in ORDERS:
        got, want = composed(*words)
        assert torch.equal(got, want), words


# 4 ---------------------------------------------------------------------------------------------

# words only: a fault in an `except` clause (as for rules with code) unbalances CPython's own state
FAULTY = [
    at("mlp", parallel(shared(moa(experts=2, rank=1, heads=1))), prepend(adapter(rank=1))),
    at("first", surgery.replace(adapter(rank=2))),
    at("bn", unfreeze),
    at(surgery.span("mlp.0", "mlp.2"), append(adapter(rank=1), residual=True)),
]


def faults(model: nn.Module, call: Callable[[], object], chosen: list[int]) -> None:
    """Raise at each of the chosen line events of `call`; each time, nothing may have changed."""
    before = fingerprint(model)
    for i, event in enumerate(chosen):
        wire = Tripwire(event, KeyboardInterrupt if i % 2 else Fault)
        wire.run(call)
        file, line = wire.where or ("", 0)
        when = f"a fault at {Path(file).name}:{line} (line event {event})"
        if wire.where is None or (committed(wire.where) and hasattr(model, "surgery")):
            surgery.revert(model, name="default")  # no fault, or too late a one: it was done
        assert_same(before, fingerprint(model), when)
        assert gc.isenabled(), f"{when} leaves the garbage collector off"
        assert eval_frame._stance == eval_frame.DynamoStance(), f"{when} leaves torch.compile off"


def runs(lines: list[Line], first: int = 1) -> list[int]:
    """The numbers (from 1) of the first few runs of every line, and of its last."""
    by_line: dict[Line, list[int]] = {}
    for number, line in enumerate(lines, 1):
        by_line.setdefault(line, []).append(number)
    return sorted({n for all_of in by_line.values() for n in (*all_of[:first], all_of[-1])})


def apply_is_all_or_nothing(
    build: Callable[[], nn.Module] = Toy,
    rules: Any = None,
    first: int = 1,
    proof: bool = False,
) -> None:
    """Law 4: a fault at any line of apply leaves the model, and all random numbers, as they were.

    first  at each line, the first how many times that it runs; and always the last
    proof  with an example, by which apply proves what it did
    """
    model, again = build(), build()
    example = torch.randn(4, 8) if proof else None
    rules = rules or FAULTY

    def operate(model: nn.Module = model) -> None:
        surgery.apply(model, rules, example=example)

    operate(build())  # fills caches, so that all runs are the same
    lines = events(lambda: operate(again))
    assert len(set(lines)) > 200
    faults(model, operate, runs(lines, first))


def failed_apply_keeps_gradients() -> None:
    """Law 4: gradients that the user has gathered outlive an apply that failed."""
    model = Linears()
    model(torch.randn(2, 8)).sum().backward()

    def fails(site: surgery.Site) -> nn.Module:
        raise Fault

    before = fingerprint(model)
    rules = [at("one", unfreeze), at("two", append(fails))]
    raised(Fault, lambda: surgery.apply(model, rules))
    assert_same(before, fingerprint(model), "a failing part")


# 5 ---------------------------------------------------------------------------------------------


def base_is_kept() -> None:
    """Law 5: keys, classes, aliases and tensors of the base are what they were."""
    model = Toy()
    paths = {p: (id(m), type(m)) for p, m in named_modules(model, aliases=True)}
    tensors = {k: (t.data_ptr(), t.clone()) for k, t in model.state_dict().items()}
    surgery.apply(model, [*FAULTY, at("mlp.0", unfreeze)])
    assert {p: (id(m), type(m)) for p, m in named_modules(model, aliases=True)} == paths
    now = {k: t for k, t in model.state_dict().items() if "surgery." not in k}
    assert list(now) == list(tensors)
    for key, (pointer, value) in tensors.items():
        assert now[key].data_ptr() == pointer
        assert torch.equal(now[key], value)
    assert model.first is model.again
    assert model.mlp[0].weight is model.mlp[2].weight


def base_checkpoint_loads(build: Callable[[], nn.Module] = Toy, rules: Any = None) -> None:
    """Law 5: a base checkpoint loads strictly, and what was added stays as it is."""
    model, wanted = build(), copy.deepcopy(build().state_dict())
    surgery.apply(model, rules or FAULTY)
    added = {k: t.clone() for k, t in model.state_dict().items() if k not in wanted}
    assert added
    assert all("surgery." in key for key in added)
    model.load_state_dict(wanted)
    now = model.state_dict()
    assert all(torch.equal(now[key], tensor) for key, tensor in {**wanted, **added}.items())


# 6 ---------------------------------------------------------------------------------------------


class Skipping(nn.Module):
    """Reads the weight of `unused` without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.used(x), self.unused.weight)


def a_site_that_never_runs_is_an_error() -> None:
    """Law 6: a site that never runs is told by apply(example=), or else by the first forward."""
    model, x = Skipping(), torch.randn(2, 8)
    rule = at(nn.Linear, parallel(plain))
    before = fingerprint(model)
    told = str(raised(surgery.GraftError, lambda: surgery.apply(model, rule, example=x)))
    assert "unused" in told
    assert "1 of 2 sites" in told
    assert_same(before, fingerprint(model), "an idle site, proved")
    surgery.apply(model, rule)
    told = str(raised(surgery.GraftError, lambda: model(x)))
    assert "unused" in told
    surgery.revert(model)
    assert_same(before, fingerprint(model), "an idle site, reverted")


# 7 ---------------------------------------------------------------------------------------------


def outcome(model: nn.Module, x: Any) -> Tensor:
    """The output tensor of a model in eval mode, whatever it is wrapped in."""
    with torch.no_grad():
        out = model.eval()(x)
    return out if isinstance(out, Tensor) else out[0]


def starts_as_the_identity(
    build: Callable[[], nn.Module] = tiny_vit, x: Any = None, rules: Any = "adapterx_ffn"
) -> None:
    """Law 7: the output of a freshly operated model is that of the base, to the bit."""
    model, x = build(), images() if x is None else x
    want = outcome(model, x)
    surgery.apply(model, rules, example=x)
    assert want.isfinite().all()
    assert want.std() > 0, "this model answers nothing"
    assert torch.equal(outcome(model, x), want)
    stir_parts(model)
    assert not torch.equal(outcome(model, x), want), "the parts do nothing at all"


# 8 ---------------------------------------------------------------------------------------------


def revert_is_bitwise(
    build: Callable[[], nn.Module] = Toy,
    x: Any = None,
    rules: Any = None,
    via: Callable[[nn.Module], nn.Module] | None = None,
) -> None:
    """Law 8: revert brings back every byte, flag, hook and buffer, after training and in copies."""
    x = torch.randn(6, 8) if x is None else x
    model = build()
    model.register_forward_hook(_user_hook)
    seen, before = shape_of(model), fingerprint(model)
    surgery.apply(model, rules or [*FAULTY, at("mlp.0", unfreeze)])
    train(model, x)
    model = via(model) if via else model
    surgery.revert(model)
    assert_same(seen, shape_of(model), "revert")
    if via is None:
        assert_same(before, fingerprint(model), "revert", but=["random"])  # training may draw


def _user_hook(module: nn.Module, args: Any, output: Any) -> None:
    return None


def shape_of(model: nn.Module) -> dict[str, Any]:
    """A snapshot without identities: equal for a model and its copy."""
    seen: dict[str, Any] = {"keys": tuple(model.state_dict())}
    for path, module in model.named_modules(remove_duplicate=False):
        hooks = {k: list(map(_named, v.values())) for k, v in vars(module).items() if "_hooks" in k}
        seen[path] = (type(module), module.training, tuple(vars(module)), hooks)
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                raw = tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()
                seen[f"{path}:{name}"] = tensor.requires_grad, tensor.dtype, tensor.shape, raw
    ties: dict[int, list[str]] = {}
    for path, p in model.named_parameters(remove_duplicate=False):
        ties.setdefault(id(p), []).append(path)
    seen["ties"] = sorted(ties.values())
    return seen


def _named(hook: object) -> object:
    return getattr(hook, "__qualname__", hook)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


# 9 ---------------------------------------------------------------------------------------------


def looking_changes_nothing() -> None:
    """Law 9: match, plan, report and anatomy leave the model and all random numbers alone."""
    model = tiny_vit()
    before = fingerprint(model)
    plan = surgery.plan(model, "adapterx_ffn")
    _ = str(plan), repr(plan), plan.added, plan.trainable, plan.sites, plan.parts, plan.record
    _ = str(surgery.anatomy(model)), str(surgery.rulesets())
    _ = [surgery.where(p).find(Tree(model)) for p in (ffn, "**", nn.Linear)]
    assert_same(before, fingerprint(model), "plan")
    surgery.apply(model, "adapterx_ffn")
    model(images())
    before = fingerprint(model)
    _ = str(surgery.report(model)), surgery.parameters(model), surgery.routing(model)
    _ = surgery.balance_loss(model), surgery.state_dict(model)
    assert_same(before, fingerprint(model), "report")


def random_part(site: surgery.Site) -> nn.Module:
    """A part that draws from every generator there is."""
    part = nn.Linear(site.width, site.out)
    with torch.no_grad():
        part.weight += torch.rand(1, device="cpu").item() + random.random() + np.random.rand()
    return part


def planning_draws_nothing() -> None:
    """Law 9: not even where a part of the user's own draws random numbers as it is made."""
    model = Linears()
    before = fingerprint(model)
    surgery.plan(model, at("one", parallel(random_part)))
    assert_same(before, fingerprint(model), "plan")


def applying_draws_nothing() -> None:
    """Law 4: apply leaves the random numbers that come after it as they were."""
    model = Linears()
    before = fingerprint(model)
    surgery.apply(model, at("one", parallel(random_part)))
    after = fingerprint(model)
    for generator in ("torch", "Python", "numpy"):
        assert (
            before[f"random numbers of {generator}"] == after[f"random numbers of {generator}"]
        ), generator


# 10 --------------------------------------------------------------------------------------------


Mistake = tuple[type[surgery.SurgeryError], str, Callable[[], object]]


def mistakes(model: nn.Module) -> Iterator[Mistake]:
    """(kind of error, a value of the user's own that it must show, the mistake)."""
    part = parallel(adapter(rank=2))
    rules = {
        "adapterx_fn": surgery.RuleError,
        at("blocks.*.fed", part): surgery.MatchError,
        at(ffn, part, times=7): surgery.MatchError,
        at(ffn, parallel(moa(heads=7))): surgery.RuleError,
        at(ffn, parallel(lambda site: 3)): surgery.RuleError,
        at(ffn, parallel(shared(adapter(rank=2), by="stage"))): surgery.RuleError,
    }
    shown = ("adapterx_fn", "blocks.*.fed", "times=7", "heads=7", "blocks.0.mlp", "stage")
    for (rule, kind), own in zip(rules.items(), shown, strict=True):
        yield kind, own, lambda rule=rule: surgery.apply(model, rule)
    yield surgery.RuleError, "blocks..", lambda: at("blocks..mlp", part)
    yield surgery.OperationError, "revert", lambda: surgery.revert(model)
    yield surgery.OperationError, "a.b", lambda: surgery.apply(model, at(ffn, part), name="a.b")
    wrapped = nn.DataParallel(model)
    yield surgery.OperationError, ".module", lambda: surgery.apply(wrapped, at(ffn, part))


def errors_say_rule_fact_remedy() -> None:
    """Law 10: every error has all three, shows the user's own values, and changes nothing."""
    model = tiny_vit()
    before = fingerprint(model)
    for kind, own, mistake in mistakes(model):
        error = raised(kind, mistake)
        assert_same(before, fingerprint(model), own)
        assert isinstance(error, surgery.SurgeryError)
        assert own in str(error), f"{own} is not in: {error}"
        assert error.fact
        assert error.remedy
        assert error.fact in str(error)
        assert error.remedy in str(error)
        assert str(error).rstrip().endswith((".", ")")), str(error)


# beside the ten --------------------------------------------------------------------------------


def copies_are_independent(via: Callable[[nn.Module], nn.Module] = copied) -> None:
    """A copy runs its own parts: changing them leaves the original alone, and the reverse."""
    model = surgery.apply(tiny_vit().eval(), ADAPTERX)
    stir(model)
    x = images()
    want = outcome(model, x)
    clone = via(model)
    assert torch.equal(outcome(clone, x), want)
    stir_parts(clone, seed=2)
    assert not torch.equal(outcome(clone, x), want)
    assert torch.equal(outcome(model, x), want)


def containers_stay_containers() -> None:
    """A root that is a container keeps its length, order, indices, output and its own keys."""
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]
    for root in (
        nn.Sequential(*layers),
        nn.ModuleList(layers),
        nn.ModuleDict(dict(zip("abc", layers, strict=True))),
    ):
        keys, children = list(root.state_dict()), list(root.children())
        indices = list(root)
        rule = at(nn.Linear, parallel(plain))
        surgery.apply(
            root, rule, example=torch.randn(2, 8) if type(root) is nn.Sequential else None
        )
        assert len(root) == 3
        assert list(root) == indices
        assert list(root.children()) == children
        assert [k for k in root.state_dict() if "surgery." not in k] == keys
        assert len(root.state_dict()) == len(keys) + 4
        surgery.revert(root)
        assert list(root.state_dict()) == keys


def disjoint_rules_commute() -> None:
    """Rules at disjoint sites give the same model in either order: seeds are not a sequence."""
    rules = [at("blocks.0.mlp", parallel(plain)), at("blocks.1.attn", append(plain))]
    a, b = (surgery.apply(_same_vit(), order) for order in (rules, rules[::-1]))
    x, y = surgery.state_dict(a), surgery.state_dict(b)
    assert set(x) == set(y)
    assert all(torch.equal(x[key], y[key]) for key in x)
    assert torch.equal(outcome(a, images()), outcome(b, images()))


def _same_vit() -> nn.Module:
    torch.manual_seed(3)
    return tiny_vit()


def aliased_sites_are_joined_once() -> None:
    """A module under two names is one site: its part runs whichever name it is called by."""
    model = Toy().eval()
    surgery.apply(model, at(nn.Linear, parallel(plain)))
    assert len(surgery.state_dict(model)) == 2 * 3
    calls: list[int] = []
    part = model.surgery.default.get_submodule("first/parallel")
    part.register_forward_hook(lambda *_: calls.append(1))
    model(torch.randn(2, 8))
    assert len(calls) == 2


def every_call_under_an_alias_is_hooked() -> None:
    """Hooks on a module called under several names act in each call."""
    model = Toy().eval()
    x = torch.randn(2, 8)
    base = copy.deepcopy(model)
    surgery.apply(model, at("again", append(plain)))
    part = model.surgery.default.get_submodule("first/append")
    want = base.mlp(part(base.first(base.bn(part(base.first(x))))))
    assert torch.equal(model(x), want)


def disabled_is_the_base() -> None:
    """Inside disabled() the base answers, trained norms and buffers too; after it, all is back."""
    model, x = Toy().eval(), torch.randn(6, 8)
    base = copy.deepcopy(model)
    surgery.apply(model, FAULTY)
    train(model, x)
    tuned = outcome(model, x)
    with surgery.disabled(model):
        assert torch.equal(outcome(model, x), outcome(base, x))
    assert torch.equal(outcome(model, x), tuned)
    assert not torch.equal(tuned, outcome(base, x))


def disabled_may_be_nested() -> None:
    """The inner disabled() does not end the outer one."""
    model, x = surgery.apply(Linears(), at("one", append(plain), unfreeze)), torch.randn(2, 8)
    stir(model)
    tuned = outcome(model, x)
    with surgery.disabled(model):
        base = outcome(model, x)
        assert not torch.equal(base, tuned)
        with surgery.disabled(model):
            assert torch.equal(outcome(model, x), base)
        assert torch.equal(outcome(model, x), base)
    assert torch.equal(outcome(model, x), tuned)


def the_last_word_counts() -> None:
    """Of freeze and unfreeze on one parameter the later rule decides; the rest is frozen."""
    model = Toy()
    surgery.apply(model, [at("mlp", unfreeze), at("mlp.0", freeze), at("bn", freeze, unfreeze)])
    free = {k for k, p in model.named_parameters() if p.requires_grad}
    assert free == {"bn.weight", "bn.bias", "mlp.2.bias"}


def parts_are_like_their_site() -> None:
    """A part has the device, dtype and training flag of its site."""
    model = Toy().to(torch.bfloat16)
    surgery.apply(model, [at("mlp", parallel(plain)), at("first", parallel(plain))])
    frozen, live = (model.surgery.default.get_submodule(f"{p}/parallel") for p in ("mlp", "first"))
    assert {p.dtype for p in (*frozen.parameters(), *live.parameters())} == {torch.bfloat16}
    assert not frozen.training
    assert live.training
    assert model(torch.randn(4, 8).bfloat16()).dtype == torch.bfloat16


def shared_part_is_stored_once() -> None:
    """However many sites a shared part serves, the state holds it once."""
    model = surgery.apply(tiny_vit(), ADAPTERX)
    parts = [key for key in surgery.state_dict(model) if key.startswith("parts.")]
    assert len(parts) == 6
    assert sum("surgery." in key for key in model.state_dict()) == 6


def user_hooks_come_first() -> None:
    """Hooks of the user's own fire once each, in their old order, before any graft."""
    model, told = Linears(), list[str]()
    model.one.register_forward_hook(lambda *_: told.append("hook 1"))
    model.one.register_forward_pre_hook(lambda *_: told.append("pre 1"))
    model.one.register_forward_hook(lambda *_: told.append("hook 2"))
    model.one.register_forward_pre_hook(lambda *_: told.append("pre 2"))
    surgery.apply(
        model,
        at("one", prepend(lambda s: Telling(told, "in")), append(lambda s: Telling(told, "out"))),
    )
    model(torch.randn(2, 8))
    assert told == ["pre 1", "pre 2", "in", "hook 1", "hook 2", "out"]


class Telling(nn.Module):
    """The identity, which writes down that it ran."""

    def __init__(self, told: list[str], word: str) -> None:
        super().__init__()
        self.told, self.word = told, word

    def forward(self, x: Tensor) -> Tensor:
        self.told.append(self.word)
        return x


def balance_is_never_missing() -> None:
    """balance_loss refuses where its gradient would silently be zero."""
    model = surgery.apply(tiny_vit(), ADAPTERX)
    with torch.no_grad():
        model(images())
    raised(surgery.GraftError, lambda: surgery.balance_loss(model))
    model(images())
    assert surgery.balance_loss(model).requires_grad


CHECKS = {name: f for name, f in list(globals().items()) if (f.__doc__ or "").startswith("Law ")}
