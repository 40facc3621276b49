"""Blocks that nobody calls: lists whose elements a loop calls and adds up, `x = attn(x) + x`.

What runs at them is compared with the same model written with blocks that are called.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import surgery
from surgery import append, at, block, insert, parallel, prepend, replace, unfreeze, until
from surgery.engine.ends import Noted
from surgery.errors import FileError, GraftError, RuleError, SurgeryError
from surgery.parts import adapter, prompt
from tests.laws import checks as laws
from tests.laws.checks import raised

WIDTH = 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = q @ k.transpose(-1, -2) / 6
        scores = scores if mask is None else scores + mask
        return self.out(scores.softmax(-1) @ v)  # type: ignore[no-any-return]


def ffn() -> nn.Module:
    layers = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)
    return nn.Sequential(*layers)


def elements() -> list[nn.Module]:
    return [Attention(), ffn(), nn.LayerNorm(WIDTH), nn.Dropout(0.1)]


class Uncalled(nn.ModuleList):
    def __init__(self) -> None:
        super().__init__(elements())
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))


class Called(Uncalled):
    """The same block with a forward."""

    def forward(self, x: Tensor, step: Any) -> Tensor:
        return step(self, x)  # type: ignore[no-any-return]


def plain(e: Any, x: Tensor) -> Tensor:
    x = e[0](x) + x
    return e[1](x) + x  # type: ignore[no-any-return]


def in_place(e: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x += e[0](x)
    x += e[1](x)
    return x


def scaled(e: Any, x: Tensor) -> Tensor:
    x = x + e.scale * F.dropout(e[0](x), 0.1, e.training)
    return torch.addcmul(x, e.scale, e[1](x))


def dropped(e: Any, x: Tensor) -> Tensor:
    x = torch.add(x, e[3](e[0](x)))
    return (e[1](x) / 2).float().add(x)


def side_by_side(e: Any, x: Tensor) -> Tensor:
    return x + e[0](x) + e[1](x)  # type: ignore[no-any-return]


def summed_first(e: Any, x: Tensor) -> Tensor:
    return x + (e[0](x) + e[1](x))  # type: ignore[no-any-return]


def normed_after(e: Any, x: Tensor) -> Tensor:
    x = x + e[0](x)
    return e[2](x + e[1](x))  # type: ignore[no-any-return]


def normed_by_function(e: Any, x: Tensor) -> Tensor:
    x = x + e[0](F.layer_norm(x, (WIDTH,)))
    return x + e[1](x)  # type: ignore[no-any-return]


def normed_after_by_function(e: Any, x: Tensor) -> Tensor:
    x = x.lerp(F.normalize(e[0](x), dim=-1), e.scale)
    return F.normalize(x.lerp(F.normalize(e[1](x), dim=-1), e.scale), dim=-1)


def deep_norm(e: Any, x: Tensor) -> Tensor:
    x = e[2](x * 1.5 + e[0](x))
    return 1.5 * x + e[1](x)  # type: ignore[no-any-return]


def without_residual(e: Any, x: Tensor) -> Tensor:
    return e[1](e[0](x))  # type: ignore[no-any-return]


def checkpointed(e: Any, x: Tensor) -> Tensor:
    x = checkpoint(e[0], x, use_reentrant=False) + x
    return checkpoint(e[1], x, use_reentrant=False) + x  # type: ignore[no-any-return]


STEPS = [
    plain, scaled, dropped, side_by_side, summed_first, normed_after, deep_norm,
    normed_by_function, normed_after_by_function, without_residual, checkpointed,
]  # fmt: skip
Step = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    """Blocks and a head; `Kind` says whether blocks are called."""

    def __init__(self, kind: type[Uncalled], step: Step = plain, depth: int = 3) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(kind() for _ in range(depth))
        self.step = step

    def run(self, x: Tensor) -> Tensor:
        for each in self.layers:
            x = each(x, self.step) if isinstance(each, Called) else self.step(each, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.inp(x)))  # type: ignore[no-any-return]


class Pooled(Model):
    """As a ViT: class token and positions are raw sums, and so is what is read behind."""

    def __init__(self, kind: type[Uncalled], step: Step = plain, depth: int = 3) -> None:
        super().__init__(kind, step, depth)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos = nn.Parameter(torch.randn(1, 7, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.inp(x)], 1)
        x = self.run(x + self.pos)
        return self.head(x.mean(1) + x[:, 0])  # type: ignore[no-any-return]


class Dropping(Model):
    """What comes to the first block is handed on as it is, but in training."""

    def __init__(self, kind: type[Uncalled], step: Step = plain, depth: int = 3) -> None:
        super().__init__(kind, step, depth)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.drop(self.inp(x))))  # type: ignore[no-any-return]


class Inner(Model):
    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Holding(nn.Module):
    """As vit-pytorch: a module of its own runs the blocks."""

    def __init__(self, kind: type[Uncalled], step: Step = plain) -> None:
        super().__init__()
        self.inner, self.drop = Inner(kind, step), nn.Dropout(0.1)
        self.inp, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.inp(x) * 2)
        return self.head(self.inner(x).mean(1))  # type: ignore[no-any-return]


class Bare(Holding):
    """No module gives what comes to the blocks: the one that takes it is hooked."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.repeat(1, 1, 4)).mean(1))  # type: ignore[no-any-return]


class Raw(Model):
    """Nothing but operations makes tokens of what the model takes."""

    def __init__(self, kind: type[Uncalled], step: Step = plain, depth: int = 3) -> None:
        super().__init__(kind, step, depth)
        self.weight = nn.Parameter(torch.randn(WIDTH, 8))
        self.pos = nn.Parameter(torch.randn(1, 6, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2).flatten(2).mT @ self.weight.t()
        return self.head(self.run(x + self.pos).mean(1))  # type: ignore[no-any-return]


Build = Callable[..., nn.Module]
BUILDS: list[Build] = [Model, Dropping, Pooled, Holding, Bare, Raw]
RULES = ["vpt_deep", "vpt_shallow", "adapterx"]


def inputs(batch: int = 2) -> Tensor:
    return torch.randn(batch, 6, 8, generator=torch.Generator().manual_seed(0))


def twins(build: Build, rules: Any, step: Step = plain) -> tuple[nn.Module, nn.Module]:
    """The model with blocks that nobody calls, and with blocks that are called; stirred parts."""
    made = []
    for kind in (Uncalled, Called):
        torch.manual_seed(0)
        model = build(kind, step).eval()
        surgery.apply(model, rules, example=inputs())
        laws.stir_parts(model)
        made.append(model)
    return made[0], made[1]


def grads(model: nn.Module, run: Any = None) -> dict[str, Tensor]:
    torch.manual_seed(1)
    y = (model if run is None else run)(inputs())
    y.square().sum().backward()
    return {"y": y} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_alike(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_every_way_to_add_up_answers_as_called_blocks(step: Step, rules: str) -> None:
    model, want = twins(Model, rules, step)
    assert_alike(grads(model), grads(want))
    assert_alike(grads(model.train()), grads(want.train()))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_wherever_the_first_value_comes_from_and_the_last_goes(build: Build, rules: str) -> None:
    model, want = twins(build, rules)
    assert_alike(grads(model), grads(want))
    assert_alike(grads(model.train()), grads(want.train()))
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs()), want.eval()(inputs()))


def fresh(build: Build = Model, step: Step = plain) -> nn.Module:
    torch.manual_seed(0)
    return build(Uncalled, step).eval()


class OneForAll(Model):
    """One activation, and one dropout, that all blocks list (Performer's kernel)."""

    def __init__(self, kind: type[Uncalled], step: Step = plain, depth: int = 3) -> None:
        super().__init__(kind, step, depth)
        for each in self.layers:
            each[1][2] = self.layers[0][1][2]
            each[3] = self.layers[0][3]


@pytest.mark.parametrize("step", [plain, dropped], ids=lambda step: step.__name__)
@pytest.mark.parametrize("rules", RULES)
def test_a_module_that_all_blocks_call_is_of_each(rules: str, step: Step) -> None:
    model, want = twins(OneForAll, rules, step)
    assert_alike(grads(model), grads(want))
    assert_alike(grads(model.train()), grads(want.train()))


class Nested(Model):
    """A block that is called, and ends with blocks that nobody calls (Perceiver's)."""

    class Outer(nn.Module):
        def __init__(self, kind: type[Uncalled], first: bool) -> None:
            super().__init__()
            self.cross, self.ff = (Attention(), ffn()) if first else (None, None)
            self.inner = nn.ModuleList([kind()])

        def forward(self, x: Tensor) -> Tensor:
            if self.cross is not None and self.ff is not None:
                x = x + self.cross(x)
                x = x + self.ff(x)
            for each in self.inner:
                x = each(x, plain) if isinstance(each, Called) else plain(each, x)
            return x

    def __init__(self, kind: type[Uncalled], step: Step = plain, depth: int = 3) -> None:
        super().__init__(kind, step, 0)
        self.layers = nn.ModuleList(self.Outer(kind, first=step is plain) for _ in range(2))

    def run(self, x: Tensor) -> Tensor:
        for each in self.layers:
            x = each(x)
        return x


@pytest.mark.parametrize("step", [plain, dropped], ids=["behind", "alone"])
def test_blocks_that_nobody_calls_lie_within_one_that_is_called(step: Step) -> None:
    rules = [at("layers.*", prompt(tokens=2)), at("layers.*.inner.*", prompt(tokens=3))]
    for some in (rules, rules[::-1]):
        model, want = twins(Nested, some, step)
        assert_alike(grads(model), grads(want))


def into_the_branch(e: Any, x: Tensor) -> Tensor:
    y = e[0](x)
    y += x
    z = e[1](y)
    z += y
    return z  # type: ignore[no-any-return]


def scaled_in_place(e: Any, x: Tensor) -> Tensor:
    x = x + e[0](x)
    y = e[3](e[1](x))
    y *= 0.5
    y += x
    return y  # type: ignore[no-any-return]


def added(e: Any, x: Tensor) -> Tensor:
    x = x + e[0](x)
    return e[1](x).add_(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("kind", [into_the_branch, scaled_in_place], ids=lambda k: k.__name__)
def test_a_sum_may_be_written_in_place(kind: Step, rules: str) -> None:
    model, want = twins(Pooled, rules, kind)
    assert_alike(grads(model), grads(want))
    with torch.no_grad(), torch.device("cpu"):  # a mode of torch's own around every function
        assert torch.equal(model(inputs()), want(inputs()))


def proof(step: Step) -> str:
    model = fresh(step=step)
    before = laws.fingerprint(model)
    told = raised(GraftError, lambda: surgery.apply(model, "vpt_deep", example=inputs()))
    laws.assert_same(before, laws.fingerprint(model), "a proof that failed")
    return str(told)


def test_what_is_written_in_place_is_refused_where_nothing_may_take_its_place() -> None:
    assert "writes its sum into a tensor there (x.add_(y))" in proof(added)


def test_what_writes_over_what_backward_needs_is_refused() -> None:
    assert "the model writes into a tensor that backward needs" in proof(in_place)


class Turns(Model):
    """Attentions and feed-forward networks in turn, each called."""

    def __init__(self, kind: Any, step: Step = plain) -> None:
        super().__init__(kind, step, 0)
        self.layers = nn.ModuleList(f() for _ in range(2) for f in (Attention, ffn))

    def run(self, x: Tensor) -> Tensor:
        for each in self.layers:
            x = x + each(x)
        return x


def test_an_element_that_is_called_may_leave_its_sum_to_the_owner() -> None:
    class Whole(Turns):
        def run(self, x: Tensor) -> Tensor:
            x = torch.cat([x[:, :1], self.rows.expand(len(x), -1, -1), x[:, 1:]], 1)
            x = super().run(x)
            return torch.cat([x[:, :1], x[:, 1 + len(self.rows) :]], 1)

    torch.manual_seed(0)
    model = Turns(None).eval()
    new = at(until(block[0], block), insert(prompt(tokens=3)))
    norms = at(surgery.nearest(surgery.norm, before=surgery.ffn), unfreeze)
    surgery.apply(model, [new, norms], example=inputs())
    laws.stir_parts(model)
    torch.manual_seed(0)
    want: Any = Whole(None).eval()
    want.rows = next(p for n, p in model.surgery.named_parameters() if n.endswith("tokens"))
    torch.testing.assert_close(model(inputs()), want(inputs()))


@pytest.mark.parametrize("rules", ["vpt_shallow", surgery.methods.idpt(k=2, first=0)], ids=str)
def test_sums_outside_of_what_is_called_are_told_by_a_forward_alone(
    rules: Any, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    model, other = Turns(None).eval(), Turns(None).eval()
    before = laws.fingerprint(model)
    told = raised(RuleError, lambda: surgery.apply(model, rules))
    assert "only a forward tells who adds up what they give" in str(told)
    laws.assert_same(before, laws.fingerprint(model), "a refusal")
    surgery.apply(model, rules, example=inputs())
    surgery.save(model, tmp_path / "a.safetensors")
    raised(SurgeryError, lambda: surgery.load(other, tmp_path / "a.safetensors"))


def test_a_module_that_takes_or_gives_the_value_is_hooked_and_no_note_is_made() -> None:
    model = fresh(Holding)
    surgery.apply(model, "vpt_shallow", example=inputs())
    given: list[type] = []
    last: Any = model.get_submodule("inner.layers.2.1")
    last.register_forward_hook(lambda module, args, y: given.append(type(y)))
    model(inputs())
    assert given == [Tensor]


def test_no_note_is_made_while_parts_are_off() -> None:
    model = fresh(Pooled)
    surgery.apply(model, "vpt_deep", example=inputs())
    given: list[type] = []
    last: Any = model.get_submodule("layers.2.1")
    last.register_forward_hook(lambda module, args, y: given.append(type(y)))
    model(inputs())
    with surgery.disabled(model), torch.no_grad():
        model(inputs())
    assert given == [Noted, Tensor]


@pytest.mark.parametrize("edit", [parallel, append, prepend], ids=lambda e: e.__name__)
def test_any_part_may_stand_at_them(edit: Any) -> None:
    rules = [at(block, edit(adapter(rank=4)))]
    for build in BUILDS:
        model, want = twins(build, rules)
        assert_alike(grads(model), grads(want))


def test_nothing_replaces_what_nobody_calls() -> None:
    rules = at("layers.*", replace(lambda site: nn.Identity()))
    told = raised(RuleError, lambda: surgery.plan(fresh(), rules, example=inputs()))
    assert "never called" in str(told)
    assert 'Put the rule on what it holds: at("layers.0.*", ...)' in str(told)


@pytest.mark.parametrize("rules", ["vpt_deep", "adapterx"])
def test_without_an_example_it_is_refused_with_the_remedy(rules: str) -> None:
    told = raised(RuleError, lambda: surgery.plan(fresh(), rules))
    assert "is a Uncalled, which holds modules and is never called" in str(told)
    assert "Give example=inputs: a forward may tell" in str(told)


def test_dicts_and_holders_are_lists_too() -> None:
    class Dicts(Model):
        def __init__(self, kind: Any, step: Step = plain) -> None:
            super().__init__(kind, step, 0)
            self.layers = nn.ModuleList(
                nn.ModuleDict({"a": Attention(), "f": ffn()}) for _ in range(3)
            )

        def run(self, x: Tensor) -> Tensor:
            for e in self.layers:
                x = x + e["a"](x)
                x = x + e["f"](x)
            return x

    model, x = Dicts(None).eval(), inputs()
    base = model(x)
    surgery.apply(model, "vpt_deep", example=x)
    assert not torch.equal(model(x), base)
    with surgery.disabled(model), torch.no_grad():
        assert torch.equal(model(x), base)


# what goes on around it --------------------------------------------------------------------------


@pytest.mark.parametrize("step", [plain, scaled], ids=lambda step: step.__name__)
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_revert_and_disabled_give_back_the_base(build: Build, step: Step) -> None:
    model = fresh(build, step)
    before, y = laws.fingerprint(model), model(inputs())
    surgery.apply(model, "adapterx", example=inputs())
    laws.stir_parts(model)
    assert not torch.equal(model(inputs()), y)
    with surgery.disabled(model), torch.no_grad():
        assert torch.equal(model(inputs()), y)
    surgery.revert(model)
    laws.assert_same(before, laws.fingerprint(model), "revert")
    assert torch.equal(model(inputs()), y)


@pytest.mark.parametrize("second", ["vpt_deep", "vpt_shallow", "adapterx"])
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_two_operations_are_as_at_called_blocks(build: Build, second: str) -> None:
    made = []
    for kind in (Uncalled, Called):
        torch.manual_seed(0)
        model = build(kind, scaled).eval()
        surgery.apply(model, "vpt_deep", example=inputs())
        once = model(inputs())
        surgery.apply(model, second, example=inputs(), name="second", seed=1)
        laws.stir_parts(model)
        made.append(model)
    assert_alike(grads(made[0]), grads(made[1]))
    surgery.revert(made[0], name="second")
    assert made[0](inputs()).shape == once.shape


@pytest.mark.parametrize("rules", RULES)
def test_copies_go_their_own_ways(rules: str) -> None:
    model, _ = twins(Holding, rules, scaled)
    y = model(inputs())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(inputs()), y)
        laws.stir_parts(other, seed=3)
        assert not torch.equal(other(inputs()), y)
        assert torch.equal(model(inputs()), y)
        surgery.revert(other)
        assert torch.equal(other(inputs()), fresh(Holding, scaled)(inputs()))


def test_parts_may_be_joined_where_an_end_is_met() -> None:
    """The last branch has a note, and parts of a later operation stand at it."""
    rules = at("layers.*.1", parallel(adapter(rank=4)))
    made = []
    for kind in (Uncalled, Called):
        torch.manual_seed(0)
        model = Pooled(kind).eval()
        surgery.apply(model, "vpt_deep", example=inputs())
        surgery.apply(model, rules, example=inputs(), name="second")
        surgery.apply(model, at("head", prepend(adapter(rank=4))), name="third")
        laws.stir_parts(model)
        made.append(model)
    assert_alike(grads(made[0]), grads(made[1]))


@pytest.mark.parametrize("rules", RULES)
def test_under_autocast(rules: str) -> None:
    model, want = twins(Pooled, rules, scaled)
    with torch.autocast("cpu", torch.bfloat16):
        assert_alike(grads(model), grads(want))


@pytest.mark.parametrize("rules", RULES)
def test_all_of_the_blocks_in_one_checkpoint(rules: str) -> None:
    model, want = twins(Pooled, rules)
    inner: Any = model.run
    model.run = lambda x: checkpoint(inner, x, use_reentrant=False)  # type: ignore[assignment]
    assert_alike(grads(model), grads(want))


def reentrant(e: Any, x: Tensor) -> Tensor:
    x = checkpoint(e[0], x, use_reentrant=True) + x
    return checkpoint(e[1], x, use_reentrant=True) + x  # type: ignore[no-any-return]


@pytest.mark.parametrize("rules", ["vpt_deep", "vpt_shallow"])
def test_reentrant_checkpoints_of_the_branches(rules: str) -> None:
    model, want = twins(Pooled, rules)
    model.step = reentrant
    assert_alike(grads(model), grads(want))


def test_what_comes_without_a_gradient_is_refused_there_too() -> None:
    model, _ = twins(Pooled, "adapterx")
    model.step = reentrant
    assert "use_reentrant=False" in str(raised(GraftError, lambda: grads(model)))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_whole(rules: str) -> None:
    model, want = twins(Pooled, rules, scaled)
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_alike(grads(model, run), grads(want))
    surgery.revert(model)
    assert torch.equal(run(inputs()), fresh(Pooled, scaled)(inputs()))


@pytest.mark.usefixtures("fresh_compiler")
def test_modules_compiled_one_by_one() -> None:
    model, want = twins(Pooled, "adapterx", scaled)
    for each in model.layers:  # type: ignore[union-attr]
        each[0].compile(backend="aot_eager")
        each[1].compile(backend="aot_eager")
    assert_alike(grads(model), grads(want))


def test_several_threads_run_it_at_once() -> None:
    model, want = twins(Pooled, "adapterx", scaled)
    batches = [inputs(b + 1) for b in range(4)]
    got: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        with torch.no_grad():
            got[i] = [model(batches[i]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(batches):
        assert all(torch.allclose(y, want(x), atol=1e-5) for y in got[i])


def test_prompts_do_not_merge() -> None:
    model, _ = twins(Model, "vpt_deep")
    told = raised(SurgeryError, lambda: surgery.merge(model))
    assert "layers.0" in str(told)


def test_a_file_needs_an_example_to_be_loaded(tmp_path: Any) -> None:
    model, _ = twins(Pooled, "adapterx")
    surgery.save(model, tmp_path / "a.safetensors")
    other = fresh(Pooled)
    told = raised(FileError, lambda: surgery.load(other, tmp_path / "a.safetensors"))
    assert "example=inputs" in str(told)
    surgery.load(other, tmp_path / "a.safetensors", example=inputs())
    assert torch.equal(other(inputs()), model(inputs()))


# refused by name ---------------------------------------------------------------------------------


def refused(step: Step, rules: Any = "vpt_deep", build: Build = Model) -> str:
    model = fresh(build, step)
    before = laws.fingerprint(model)
    told = raised(RuleError, lambda: surgery.apply(model, rules, example=inputs()))
    laws.assert_same(before, laws.fingerprint(model), "a refusal")
    return str(told)


def test_what_is_made_for_the_number_of_tokens_is_refused() -> None:
    table = torch.zeros(6, 6)

    def masked(e: Any, x: Tensor) -> Tensor:
        return x + e[1](x + e[0](x, table))  # type: ignore[no-any-return]

    def placed(e: Any, x: Tensor) -> Tensor:
        return x + e[1](x + e[0](x + table[:, :1]))  # type: ignore[no-any-return]

    assert "a tensor (6, 6) that is made for 6 tokens" in refused(masked)
    assert "a tensor (6, 1) that is made for 6 tokens" in refused(placed)


def test_a_mask_that_comes_later_is_refused_where_it_comes() -> None:
    class Masked(Model):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = self.inp(x)
            for e in self.layers:
                x = x + e[0](x, mask=mask)  # type: ignore[index]
                x = x + e[1](x)  # type: ignore[index]
            return self.head(x)  # type: ignore[no-any-return]

    for rules in ("vpt_deep", "adapterx"):
        model = fresh(Masked)
        surgery.apply(model, rules, example=inputs())
        assert torch.isfinite(model(inputs())).all()
        told = str(raised(GraftError, lambda m=model: m(inputs(), torch.zeros(6, 6))))
        assert "a tensor (6, 6) that is made for 6 tokens" in told
        assert torch.isfinite(model(inputs())).all()
        copied = copy.deepcopy(model)
        assert "made for 6" in str(
            raised(GraftError, lambda m=copied: m(inputs(), torch.ones(6, 6)))
        )


@pytest.mark.parametrize("rules", ["daptx", "idpt"])
def test_tokens_may_stay_in(rules: str) -> None:
    model, want = twins(Pooled, rules)
    assert_alike(grads(model), grads(want))


def test_what_reads_inside_is_refused() -> None:
    def looking(e: Any, x: Tensor) -> Tensor:
        x = e[0](x) + x
        x.mean(1)
        return e[1](x) + x  # type: ignore[no-any-return]

    class Skipping(Model):
        def run(self, x: Tensor) -> Tensor:
            return super().run(x) + x

    assert "mean in the model reads a value that lies inside of it" in refused(looking)
    assert "reads a value that lies inside of it" in refused(plain, build=Skipping)


def test_a_sum_around_all_blocks_belongs_to_their_stretch() -> None:
    class Around(Model):
        def run(self, x: Tensor) -> Tensor:
            return super().run(x) + x

    class Written(Model):
        def run(self, x: Tensor) -> Tensor:
            new = torch.full((1, 1, WIDTH), 0.5).expand(len(x), 4, -1)
            x = torch.cat([x[:, :1], new, x[:, 1:]], 1)
            x = super().run(x) + x
            return torch.cat([x[:, :1], x[:, 5:]], 1)

    model = fresh(Around)
    surgery.apply(model, at(until(block[0], block), insert(Half)), example=inputs())
    assert torch.equal(model(inputs()), fresh(Written)(inputs()))


class Half(nn.Module):
    def __init__(self, site: surgery.Site) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.full((4, site.width), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.rows.expand(len(x), -1, -1)


def test_what_runs_several_times_is_refused() -> None:
    class Twice(Model):
        def run(self, x: Tensor) -> Tensor:
            return super().run(super().run(x))

    told = refused(plain, build=Twice)
    assert "does not tell where a part there would act: it runs 2 times in one forward" in told
    assert "never run" not in told


def test_what_is_heard_must_be_of_samples() -> None:
    def in_a_row(e: Any, x: Tensor) -> Tensor:
        x = x + e[0](x)
        return x + e[1](x.flatten(0, 1)).unflatten(0, x.shape[:2])  # type: ignore[no-any-return]

    model = fresh(step=in_a_row)
    before = laws.fingerprint(model)
    told = raised(GraftError, lambda: surgery.apply(model, "adapterx", example=inputs()))
    assert "it hears (12, 32) from layers.0.1.(1 to 3), where tokens of 2 samples" in str(told)
    laws.assert_same(before, laws.fingerprint(model), "a proof that failed")


def test_two_streams_are_refused() -> None:
    class Reversible(Model):
        def run(self, x: Tensor) -> Tensor:
            a, b = x, x * 2
            for e in self.layers:
                a = a + e[0](b)  # type: ignore[index]
                b = b + e[1](a)  # type: ignore[index]
            return a + b

    assert "add in the model reads a value that lies inside" in refused(plain, build=Reversible)
