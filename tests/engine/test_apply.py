"""Revert and `disabled` in every state: others around a forward, interrupts, calls inside."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

import surgery
from surgery import adapter, append, at, lora, parallel, prepend, replace, unfreeze
from surgery.spec.fault_injection import Tripwire, events
from tests.laws import checks as laws
from tests.laws.checks import Linears, Toy, outcome, plain, stir
from tests.models import images, tiny_vit

# others around a method of ours ----------------------------------------------------------------


def wrapped(module: nn.Module, name: str = "forward") -> Any:
    """Put a function around a method, as offloading does; returns what was there."""
    inner = getattr(module, name)

    @functools.wraps(inner)
    def method(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    setattr(module, name, method)
    return inner


REPLACED = at("one", replace(plain))


def build() -> nn.Module:
    torch.manual_seed(0)
    return Linears()


def test_a_replacement_that_others_still_call_is_the_base_after_revert() -> None:
    model, x = surgery.apply(build(), REPLACED), torch.randn(2, 8)
    found = wrapped(model.one)
    surgery.revert(model)
    assert torch.equal(model(x), build()(x))
    model.one.forward = found
    assert torch.equal(model(x), build()(x))


def test_it_may_be_replaced_again() -> None:
    model, x = surgery.apply(build(), REPLACED), torch.randn(2, 8)
    found = wrapped(model.one)
    surgery.revert(model)
    model.one.forward = found
    surgery.apply(model, REPLACED, example=x)
    assert not torch.equal(model(x), build()(x))
    assert torch.equal(surgery.revert(model)(x), build()(x))


def test_hooks_that_others_kept_do_nothing_after_revert() -> None:
    rules = [
        at("one", lora(rank=2), append(plain)),
        at("two", prepend(plain)),
        at("", append(plain)),
    ]
    model, x = surgery.apply(build(), rules), torch.randn(2, 8)
    assert not torch.equal(model(x), build()(x))
    kept = [
        (module, hook, key in module._forward_hooks_with_kwargs)
        for module in model.modules()
        for key, hook in module._forward_hooks.items()
    ]
    before = [(m, h) for m in model.modules() for h in m._forward_pre_hooks.values()]
    surgery.revert(model)
    for module, hook, kwargs in kept:
        module.register_forward_hook(hook, with_kwargs=kwargs)
    for module, hook in before:
        module.register_forward_pre_hook(hook, with_kwargs=True)
    assert torch.equal(model(x), build()(x))


def test_a_frozen_norm_that_others_still_switch_is_free_after_revert() -> None:
    model = surgery.apply(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), at("0", unfreeze))
    found = {name: wrapped(model[1], name) for name in ("train", "reset_running_stats")}
    assert not model.train()[1].training
    surgery.revert(model)
    for _ in range(2):
        assert model.train()[1].training
        model(torch.randn(4, 8))
        assert model[1].running_mean.any()
        model[1].reset_running_stats()
        assert not model[1].running_mean.any()
        assert not model.eval()[1].training
        for name, method in found.items():
            setattr(model[1], name, method)
    surgery.apply(model, at("0", unfreeze))
    assert not model.train()[1].training


# interrupts ------------------------------------------------------------------------------------

RULES: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "toy": (Toy, [at("mlp", parallel(plain)), at("bn", unfreeze), at("first", append(plain))]),
    "a replacement": (Linears, [REPLACED, at("two", unfreeze)]),
    "lora": (tiny_vit, "lora"),
}


def entered(model: nn.Module) -> None:
    with surgery.disabled(model):
        pass


@pytest.mark.parametrize("which", RULES)
def test_a_fault_at_any_line_of_disabled_leaves_the_operated_model(which: str) -> None:
    make, rules = RULES[which]
    model = surgery.apply(make(), rules)
    stir(model)
    before = surgery.fingerprint(model)
    lines = events(lambda: entered(model))
    for i, event in enumerate(laws.runs(lines)):
        wire = Tripwire(event, KeyboardInterrupt if i % 2 else laws.Fault)
        wire.run(lambda: entered(model))
        laws.assert_same(before, surgery.fingerprint(model), f"a fault at {wire.where}")


@pytest.mark.parametrize("which", RULES)
def test_a_fault_at_any_line_of_revert_leaves_the_operated_model_or_the_base(which: str) -> None:
    make, rules = RULES[which]
    model = make()
    base = surgery.fingerprint(model)
    surgery.apply(model, rules)
    chosen = laws.runs(events(lambda: surgery.revert(model)))
    for i, event in enumerate(chosen):
        surgery.apply(model, rules)
        stir(model)
        before = surgery.fingerprint(model)
        wire = Tripwire(event, KeyboardInterrupt if i % 2 else laws.Fault)
        wire.run(lambda: surgery.revert(model))
        if hasattr(model, "surgery"):
            laws.assert_same(before, surgery.fingerprint(model), f"a fault at {wire.where}")
            surgery.revert(model)
        laws.assert_same(base, surgery.fingerprint(model), f"a fault at {wire.where}")


def test_a_fault_at_any_line_of_unmerge_leaves_one_of_two_models() -> None:
    model = surgery.apply(build(), at("two", lora(rank=2)))
    stir(model)
    operated = surgery.fingerprint(model)
    lines = events(lambda: surgery.unmerge(surgery.merge(model)))
    surgery.merge(model)
    merged = surgery.fingerprint(model)
    lines = events(lambda: surgery.unmerge(model))
    for event in laws.runs(lines):
        if not model.surgery.default.merged:
            surgery.merge(model)
        wire = Tripwire(event)
        wire.run(lambda: surgery.unmerge(model))
        want = merged if model.surgery.default.merged else operated
        laws.assert_same(want, surgery.fingerprint(model), f"a fault at {wire.where}")


def test_a_table_that_a_forward_makes_as_long_as_the_tokens_that_come() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.ones(3, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(self.rows) != x.shape[1]:
                self.rows = torch.ones(x.shape[1], 1)
            return x * self.rows

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Table(), nn.Linear(4, 4)).eval()
    x = torch.randn(2, 3, 4)
    y = model(x)
    surgery.apply(model, at("0", append(lambda site: nn.Linear(4, 4))))
    model(torch.randn(2, 5, 4))
    table = model[1].rows
    with surgery.disabled(model):
        assert torch.equal(model(x), y)
    assert model[1].rows is table
    surgery.revert(model)
    assert len(model[1].rows) == 3
    assert torch.equal(model(x), y)


# inside disabled -------------------------------------------------------------------------------


def _calls(folder: Path) -> dict[str, Callable[[nn.Module], object]]:
    model = surgery.apply(build(), at("one", lora(rank=2)))
    path, state = surgery.save(model, folder / "a"), surgery.state_dict(model)
    again = at("one", append(adapter(rank=2)))
    return {
        "save": lambda m: surgery.save(m, folder / "b"),
        "state_dict": surgery.state_dict,
        "load": lambda m: surgery.load(m, path, name="again"),
        "load_state_dict": lambda m: surgery.load_state_dict(m, state),
        "merge": surgery.merge,
        "revert": surgery.revert,
        "apply": lambda m: surgery.apply(m, again, name="again"),
        "deepcopy": copy.deepcopy,
        "pickle": pickle.dumps,
        "torch.save": lambda m: torch.save(m, io.BytesIO()),
    }


@pytest.mark.parametrize("call", [
    "save", "state_dict", "load", "load_state_dict", "merge", "revert", "apply", "deepcopy",
    "pickle", "torch.save",
])  # fmt: skip
def test_inside_disabled_what_acts_on_the_model_is_refused(call: str, tmp_path: Path) -> None:
    model, act = surgery.apply(build(), at("one", lora(rank=2))), _calls(tmp_path)[call]
    stir(model)
    before = surgery.fingerprint(model)
    with surgery.disabled(model):
        inside = marks(model)
        with pytest.raises(surgery.OperationError, match=r"inside disabled\(model\)"):
            act(model)
        assert marks(model) == inside
        _ = str(surgery.report(model)), surgery.parameters(model)
        _ = surgery.plan(model, at("one", append(adapter(rank=2))), name="again").added
    assert surgery.fingerprint(model) == before
    act(model)


def marks(model: nn.Module) -> list[object]:
    """What a refused call must leave, seen without a state_dict, which is refused too."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return [
        hooks,
        [(n, t.data_ptr(), t._version, t.requires_grad, t.sum().item()) for n, t in tensors],
    ]


# balance under accumulation --------------------------------------------------------------------


def _gradients(batches: list[Tensor], balance: Any, explicit: float = 0.0) -> list[Tensor]:
    """Of a mean loss over micro-batches; `explicit` is the coefficient of a balance loss in it."""
    rules = at(surgery.ffn, parallel(surgery.shared(surgery.moa(rank=2, heads=3))))
    torch.manual_seed(0)
    model = surgery.apply(tiny_vit().double().eval(), rules, balance=balance)
    stir(model)
    for x in batches:
        loss = model(x).square().mean() + explicit * surgery.balance_loss(model)
        (loss / len(batches)).backward()
    return [p.grad for p in surgery.parameters(model) if p.grad is not None]


def _close(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.allclose(x, y, rtol=1e-9, atol=1e-12) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("k", [1, 2])
def test_balance_over_micro_batches_is_the_explicit_form_when_divided(k: int) -> None:
    batches = [*torch.cat([images(), -images()]).double().chunk(k)]
    want = _gradients(batches, None, explicit=0.5)
    assert _close(_gradients(batches, lambda: 0.5 / k), want)
    assert _close(_gradients(batches, lambda: 0.5), want) is (k == 1)


def test_no_warning_is_given_where_all_comes_back() -> None:
    model, x = (
        surgery.apply(build(), [at("one", lora(rank=2)), at("two", unfreeze)]),
        torch.ones(1, 8),
    )
    stir(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with surgery.disabled(model):
            assert torch.equal(outcome(model, x), outcome(build(), x))
        surgery.revert(model)


# a graph of before it ---------------------------------------------------------------------------


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.first(x)))
        return out


def _stepped(model: nn.Module, between: bool) -> list[torch.Tensor]:
    """Those of three steps against the base, which is asked between forward and backward."""
    x = torch.linspace(-1, 1, 24).view(6, 4)
    optimiser = torch.optim.SGD(surgery.parameters(model), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        out = None if not between else model(x)
        with surgery.disabled(model):
            base = model(x)
        out = model(x) if out is None else out
        (out - base).square().mean().add(out.sum()).backward()
        optimiser.step()
    return [p.grad.clone() for p in surgery.parameters(model)]


@pytest.mark.parametrize("frozen", [False, True], ids=["norm trained", "norm frozen"])
def test_the_base_may_answer_between_forward_and_backward(frozen: bool) -> None:
    chosen = "head" if frozen else "{head,norm}"
    rules = [at("first", surgery.lora(rank=2)), at(chosen, surgery.unfreeze)]
    both = []
    for between in (True, False):
        torch.manual_seed(0)
        model = surgery.apply(Norms(), rules).train()
        places = [p.data_ptr() for p in model.parameters()]
        both.append(_stepped(model, between))
        assert places == [p.data_ptr() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_what_is_written_between_forward_and_backward_is_still_seen() -> None:
    model = surgery.apply(Norms(), at("{head,norm}", surgery.unfreeze)).eval()
    loss = model(torch.linspace(-1, 1, 24).view(6, 4)).square().sum()
    with surgery.disabled(model), torch.no_grad():
        model.norm.weight.mul_(2)  # which is given back
    with torch.no_grad():
        model.norm.weight.mul_(2)  # which is not
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


class Interrupted(nn.Module):
    """Is interrupted in its forward, if asked to be."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.interrupted = nn.Linear(4, 4), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        if self.interrupted:
            raise KeyboardInterrupt
        return y


def test_an_interrupted_forward_is_looked_into_no_more_and_holds_nobody_up() -> None:
    model = surgery.apply(Interrupted(), at("layer", lora(rank=2)))
    model.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(2, 4))
    (left,) = _get_current_function_mode_stack()
    torch.randn(1)
    assert not left.sites, "every call of torch is looked into, as of a forward that is over"
    surgery.apply(nn.Linear(4, 4), at("", lora(rank=2)))(torch.randn(2, 4))
    assert not _get_current_function_mode_stack()


def test_what_is_changed_does_not_wait_for_a_thread_that_was_interrupted(tmp_path: Path) -> None:
    model = surgery.apply(Interrupted(), at("layer", lora(rank=2)), name="a")
    file = surgery.save(model, tmp_path / "a.safetensors", name="a")
    model.interrupted = True
    over, done = threading.Event(), threading.Event()

    def run() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            model(torch.randn(2, 4))
        over.set()
        done.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    over.wait(60)
    swapper = threading.Thread(target=lambda: surgery.swap(model, "a", file), daemon=True)
    swapper.start()
    swapper.join(20)
    done.set()
    assert not swapper.is_alive()
