"""Several operations on one model: present, active and trained are three things."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import (
    OperationError,
    activate,
    append,
    at,
    ffn,
    head,
    lora,
    prompt,
    qkv,
    scale_shift,
    train_only,
    unfreeze,
    where,
)
from tests.methods.test_methods import SETS, rules_of
from tests.models import images, tiny_vit

X = images().double()
ONCE = {"meft"}  # replaces blocks, which cannot be replaced twice


def vit() -> nn.Module:
    torch.manual_seed(0)
    return tiny_vit().double().eval()


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    out: Tensor = model(X)
    return out


def operation(model: nn.Module, name: str) -> Any:
    additions: Any = model.surgery
    return getattr(additions, name)


@torch.no_grad()
def train(model: nn.Module, name: str, seed: int) -> None:
    """Other values for all that an operation trains, as if it were trained."""
    generator = torch.Generator().manual_seed(seed)
    own = operation(model, name)
    base = [getattr(module, tensor) for module, tensor in own.claims]
    for p in {id(p): p for p in (*own.parameters(), *base)}.values():
        p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.05)


def bytes_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: t.clone() for key, t in surgery.state_dict(model, name=name).items()}


def alike(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two models are, which are not one."""
    return all(a.get(k) == v for k, v in b.items() if "identity" not in k) and len(a) == len(b)


def two(rules: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model with two operations, each trained where the other was not active; their answers."""
    model = vit()
    told = {"": answer(model)}
    for seed, name in enumerate("ab"):
        surgery.apply(
            activate(model, None) if told.keys() - {""} else model, rules, name=name, seed=seed
        )
        train(model, name, seed)
        told[name] = answer(model)
    return model, told


@pytest.mark.parametrize("name", [name for name in SETS if name not in ONCE])
def test_each_answers_alone_to_the_bit_in_every_order(name: str) -> None:
    mark = surgery.fingerprint(vit())
    model, told = two(rules_of(name))
    assert not torch.equal(told["a"], told["b"])
    assert not torch.equal(told["a"], told[""])
    activate(model, ["a", "b"])
    told["ab"] = answer(model)
    kept = {each: bytes_of(model, each) for each in "ab"}
    flags = [p.requires_grad for p in model.parameters()]
    for first, then in itertools.permutations(["", "a", "b", "ab"], 2):
        for chosen in (first, then):
            activate(model, list(chosen))
            assert torch.equal(answer(model), told[chosen]), (first, then)
            for each in "ab":
                now = bytes_of(model, each)
                assert now.keys() == kept[each].keys()
                assert all(torch.equal(now[key], kept[each][key]) for key in now)
    assert flags == [p.requires_grad for p in model.parameters()]
    for off, left in ("ab", "ba"):
        less = copy.deepcopy(activate(model, left))
        surgery.revert(less, name=off)
        assert torch.equal(answer(less), told[left])
        now = bytes_of(less, left)
        assert all(torch.equal(now[key], kept[left][key]) for key in now)
        surgery.revert(less)
        assert alike(surgery.fingerprint(less), mark)
    surgery.revert(model)
    assert alike(surgery.fingerprint(model), mark)


LINEAR = ["lora", "dora", "vera", "ssf", "oft", "hira", "bitfit", "linear_probe", "ia3", "rslora"]


@pytest.mark.filterwarnings("ignore:model.state_dict")  # it is compared, not kept
@pytest.mark.parametrize("name", LINEAR)
def test_a_mixture_is_of_products(name: str) -> None:
    """At each weight W + sum of strength * (merged - W), not what mixed factors would give."""
    strengths = {"a": 0.7, "b": 0.3}
    model, _ = two(rules_of(name))
    plain = {key: t.clone() for key, t in activate(model, None).state_dict().items()}
    merged = {}
    for each in strengths:
        surgery.merge(model, name=each)
        merged[each] = {key: t.clone() for key, t in model.state_dict().items()}
        surgery.unmerge(model)
    want = vit()
    state = {
        key: sum((s * (merged[n][key] - t) for n, s in strengths.items()), t)
        for key, t in plain.items()
        if not key.startswith("surgery.")
    }
    want.load_state_dict(state)
    got = answer(activate(model, strengths))
    if name in ("dora", "oft", "hira", "ssf", "ia3"):  # the second meets what the first made
        assert torch.isfinite(got).all()
    else:
        torch.testing.assert_close(got, answer(want), rtol=0, atol=1e-12)
    assert operation(model, "a").strength == 0.7


def test_each_strength_is_what_merging_gives() -> None:
    model, told = two(rules_of("lora"))
    activate(model, {"a": 0.5})
    half = answer(model)
    surgery.merge(model)
    torch.testing.assert_close(answer(model), half, rtol=0, atol=1e-12)
    surgery.unmerge(model)
    assert torch.equal(answer(model), half)
    surgery.merge(model, name="b")
    torch.testing.assert_close(answer(model), told["b"], rtol=0, atol=1e-12)
    surgery.unmerge(model)
    assert torch.equal(answer(model), half)
    surgery.merge(model, name="b", keep=False)
    torch.testing.assert_close(answer(model), told["b"], rtol=0, atol=1e-12)
    assert not hasattr(model, "surgery")


def test_a_stack_goes_on_from_what_is_below() -> None:
    """Applied on top of what is active, as ever: together they are what they were trained to be."""
    model = vit()
    rules = [at(qkv, lora(rank=2)), at(head, unfreeze)]
    base = answer(model)
    surgery.apply(model, rules, name="a")
    train(model, "a", 0)
    first = answer(model)
    surgery.apply(model, rules, name="b", seed=1)
    train(model, "b", 1)
    both = answer(model)
    assert torch.equal(answer(activate(model, "a")), first)
    assert torch.equal(answer(activate(model, None)), base)
    alone = answer(activate(model, "b"))
    assert not torch.equal(alone, both)
    assert torch.equal(answer(activate(model, ["a", "b"])), both)
    activate(model, "b")
    with pytest.warns(UserWarning, match=r"head.weight.* began as a had made"):
        surgery.revert(model, name="a")
    torch.testing.assert_close(answer(model), alone, rtol=0, atol=1e-12)
    surgery.revert(model)
    assert torch.equal(answer(model), base)


def test_what_is_trained_is_trained_of_the_last_that_is_active() -> None:
    model, told = two([at(head, unfreeze)])
    activate(model, ["a", "b"])
    with torch.no_grad():
        model.head.bias.add_(1.0)
    changed = answer(model)
    assert torch.equal(answer(activate(model, "a")), told["a"])
    assert not torch.equal(answer(activate(model, "b")), told["b"])
    torch.testing.assert_close(answer(activate(model, ["a", "b"])), changed, rtol=0, atol=1e-13)


def test_train_only() -> None:
    model, told = two([at(qkv, lora(rank=2)), at(head, unfreeze)])
    activate(model, "a")
    every = {n for n, p in model.named_parameters() if p.requires_grad}
    train_only(model, "b")
    asks = {n for n, p in model.named_parameters() if p.requires_grad}
    assert asks == {n for n in every if not n.startswith("surgery.a.")}
    assert torch.equal(answer(model), told["a"])
    assert operation(model, "a").strength == 1
    train_only(model, ["a", "b"])
    assert every == {n for n, p in model.named_parameters() if p.requires_grad}
    train_only(model, [])
    assert not any(p.requires_grad for p in model.parameters())
    surgery.revert(model, name="b")
    surgery.revert(model)
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_tensors_of_parts_stay_frozen() -> None:
    model = surgery.apply(vit(), "vera")
    asks = [n for n, p in model.named_parameters() if p.requires_grad]
    train_only(train_only(model, []), "default")
    assert asks == [n for n, p in model.named_parameters() if p.requires_grad]


def test_disabled_of_some() -> None:
    model, told = two([at(qkv, lora(rank=2)), at(head, unfreeze)])
    activate(model, ["a", "b"])
    both = answer(model)
    with surgery.disabled(model, "a"):
        assert torch.equal(answer(model), told["b"])
    with surgery.disabled(model, "b"):
        assert torch.equal(answer(model), told["a"])
    with surgery.disabled(model):
        assert torch.equal(answer(model), told[""])
    assert torch.equal(answer(model), both)
    with pytest.raises(OperationError, match='no operation "c"'), surgery.disabled(model, "c"):
        pass


WRONG: dict[str, tuple[Any, str]] = {
    "a name": ("c", "there are, in order: a, b"),
    "a word": ({"a": "much"}, "is no number"),
    "tokens": ({"a": 0.5}, "acts as a whole or not at all"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused_and_untouched(case: str) -> None:
    names, text = WRONG[case]
    model, told = two([at(surgery.block, prompt(tokens=2)), at(head, unfreeze)])
    mark = surgery.fingerprint(model)
    with pytest.raises(OperationError, match=text):
        activate(model, names)
    assert surgery.fingerprint(model) == mark
    assert torch.equal(answer(model), told["b"])


def test_inside_disabled_nothing_is_switched() -> None:
    model, _ = two(rules_of("lora"))
    with surgery.disabled(model):
        for call in (lambda: activate(model, "a"), lambda: train_only(model, "a")):
            with pytest.raises(OperationError, match="inside disabled"):
                call()


def test_an_interrupt_leaves_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.engine.journal import Journal

    model, told = two([at(qkv, lora(rank=2)), at(head, unfreeze)])
    write, calls = Journal.write, []

    def interrupted(self: Any, *given: Any, **named: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(self, *given, **named)

    monkeypatch.setattr(Journal, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        activate(model, "a")
    monkeypatch.undo()
    assert torch.equal(answer(model), told["b"])
    assert torch.equal(answer(activate(model, "a")), told["a"])


def test_gradients_are_of_what_is_active() -> None:
    model, _ = two(rules_of("lora"))
    activate(model, "a")
    model(X).square().sum().backward()
    assert all(p.grad is not None for p in operation(model, "a").parameters())
    assert all(p.grad is None for p in operation(model, "b").parameters())


def test_report_and_plan_say_who_acts() -> None:
    model, _ = two([at(qkv, lora(rank=2))])
    text = str(surgery.report(train_only(activate(model, {"a": 0.25}), "b")))
    assert "a: active 0.25, not trained" in text
    assert "b: not active, 576 trained" in text
    told = str(surgery.plan(model, at(ffn, lora(rank=2)), name="c"))
    assert "a (active 0.25, not trained); b (not active, 576 trained) stays as it is" in told
    assert 'train_only(model, "c")' in told
    assert "active" not in str(surgery.report(surgery.apply(vit(), "lora")))


def test_copies_pickles_and_files(tmp_path: Path) -> None:
    model, told = two([at(qkv, lora(rank=2)), at(head, unfreeze)])
    activate(model, "a")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(again), told["a"])
        assert torch.equal(answer(activate(again, "b")), told["b"])
        assert torch.equal(answer(activate(again, None)), told[""])
    for name in "ab":
        file = surgery.save(model, tmp_path / f"{name}.safetensors", name=name)
        assert torch.equal(answer(surgery.load(vit(), file)), told[name])


def test_frozen_statistics_stay_frozen_as_their_operation_goes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)).train()
    mark = surgery.fingerprint(model)
    for name in "ab":
        surgery.apply(model, at("2", append(scale_shift())), name=name)
    surgery.revert(model, name="a")
    assert not model.train()[1].training
    surgery.revert(model)
    assert model.train()[1].training
    assert surgery.fingerprint(model) == mark


@pytest.mark.parametrize("rules", [["lora", "vpt_deep"], ["adapterx", "bitfit"], ["full", "ssf"]])
def test_any_comes_off_first(rules: list[str]) -> None:
    mark = surgery.fingerprint(vit())
    for order in itertools.permutations(range(3)):
        model = vit()
        for i in range(3):
            surgery.apply(model, rules[i % 2], name=f"n{i}", seed=i)
            train(model, f"n{i}", i)
        for i in order[:-1]:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".* of later operations began as")
                surgery.revert(model, name=f"n{i}")
            answer(model)
        surgery.revert(model, name=f"n{order[-1]}")
        assert alike(surgery.fingerprint(model), mark)


def test_many_cycles_leak_nothing() -> None:
    model = surgery.apply(vit(), [at(qkv, lora(rank=2)), at(head, unfreeze)], name="stays")
    told = answer(model)

    def cycle(i: int) -> list[weakref.ref[Any]]:
        surgery.apply(model, "vpt_deep" if i % 2 else "lora", name="goes")
        activate(model, "goes")
        answer(model)
        left = [weakref.ref(operation(model, "goes"))]
        activate(model, "stays")
        surgery.revert(model, name="goes")
        return left

    refs = [ref for i in range(40) for ref in cycle(i)]
    gc.collect()
    assert [ref for ref in refs if ref() is not None] == []
    assert torch.equal(answer(model), told)
    assert len(operation(model, "stays").journal.entries) < 1000


def test_compiled_once_for_each_choice() -> None:
    from torch._dynamo.testing import CompileCounter

    model, told = two(rules_of("lora"))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(5):
        for name in "ab":
            activate(model, name)
            with torch.no_grad():
                torch.testing.assert_close(compiled(X), told[name])
    assert counter.frame_count <= 3  # a, b, and for any strengths


def test_what_is_written_under_autocast_is_met() -> None:
    model, told = two([at(qkv, lora(rank=2)), at(head, unfreeze)])
    model.float()
    x = X.float()
    with torch.autocast("cpu", torch.bfloat16):
        first = model(x)
        for name in ("a", None, "b"):
            activate(model, name)
            assert (model(x).float() - told[name or ""].float()).abs().max() < 0.1
        with surgery.disabled(model):
            assert (model(x).float() - told[""].float()).abs().max() < 0.1
        assert torch.equal(model(x), first)


def test_what_is_trained_while_nothing_that_trains_it_acts_is_told() -> None:
    model, _ = two([at(head, unfreeze)])
    surgery.apply(activate(model, None), at(qkv, lora(rank=2)), name="c")
    activate(model, "c")
    assert not any(p is model.head.weight for p in surgery.parameters(model))
    with torch.no_grad():
        model.head.weight.add_(1.0)
    with pytest.warns(UserWarning, match="weight of a Linear was trained while none of"):
        activate(model, "a")


def test_what_is_learnt_is_of_who_is_trained() -> None:
    model, _ = two([at(qkv, lora(rank=2)), at(head, unfreeze)])
    activate(model, ["a", "b"])
    train_only(model, "a")
    kept = bytes_of(model, "b")
    with torch.no_grad():
        model.head.weight.add_(0.5)
    both = answer(model)
    assert all(torch.equal(kept[key], t) for key, t in bytes_of(model, "b").items())
    activate(model, "b")
    torch.testing.assert_close(answer(activate(model, ["a", "b"])), both, rtol=0, atol=1e-12)


def test_one_alone_that_is_not_active_comes_off() -> None:
    model = vit()
    mark = surgery.fingerprint(model)
    surgery.apply(model, "lora", name="a")
    surgery.revert(activate(model, None), name="a")
    assert surgery.fingerprint(model) == mark


def test_flags_come_back_though_another_trained_them() -> None:
    model = vit()
    mark = surgery.fingerprint(model)
    surgery.apply(model, at(head, unfreeze), name="a")
    train_only(model, [])
    surgery.apply(activate(model, None), at(head, unfreeze), name="b")
    surgery.revert(activate(model, "b"), name="b")
    surgery.revert(model)
    assert surgery.fingerprint(model) == mark


@torch.no_grad()
def test_a_tied_head_merges_by_name_and_back() -> None:
    from tests.models import hf_gpt2, words_in

    model, x = hf_gpt2().eval(), words_in()
    for seed, name in enumerate("ab"):
        if name == "b":
            activate(model, None)
        surgery.apply(model, [at(qkv, lora(rank=2)), at(head, unfreeze)], name=name)
        train(model, name, seed)
    want = {name: activate(model, name)(x).logits for name in "ab"}
    surgery.merge(model, name="a")
    torch.testing.assert_close(model(x).logits, want["a"])
    assert torch.equal(surgery.unmerge(model)(x).logits, want["b"])


def norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).eval()


@pytest.mark.parametrize("active", [None, "a"])
@pytest.mark.parametrize("saved", [None, "a", "b"])
def test_statistics_and_heads_travel(saved: str | None, active: str | None, tmp_path: Path) -> None:
    x = torch.randn(5, 8)
    model = norms()
    want = {}
    for name in "ab":
        if name == "b":
            activate(model, None)
        surgery.apply(model, at("1" if name == "a" else where("1") | "2", unfreeze), name=name)
        optimizer = torch.optim.SGD(surgery.parameters(train_only(model, name)), lr=0.1)
        for _ in range(3):
            model.train()(torch.randn(9, 8) + 1).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        want[name] = model.eval()(x)
    activate(model, saved)
    files = {n: surgery.save(model, tmp_path / f"{n}.safetensors", name=n) for n in "ab"}
    again = norms()
    for name in "ab":
        surgery.load(again, files[name], name=name)
        if name == "a":
            activate(again, active)
    for name in "ba":
        assert torch.equal(activate(again, name).eval()(x), want[name])


def test_a_cast_model_saves_what_it_can_load(tmp_path: Path) -> None:
    model, _ = two([at(qkv, lora(rank=2)), at(head, unfreeze)])
    activate(model, "b").bfloat16()
    file = surgery.save(model, tmp_path / "a.safetensors", name="a")
    surgery.load(vit().bfloat16(), file)


def test_bytes_are_those_of_all_that_is_kept() -> None:
    """Parts, what was there before of what is trained, and what was made of it, once put by."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).double()
    surgery.apply(model, [at("0", lora(rank=2)), at("1", unfreeze)], name="a")
    (op,) = model.surgery.operations
    parts, norm, buffers = 2 * (4 + 8), 8 + 8, 8 + 8  # LoRA, weight and bias, mean and variance
    assert op.nbytes == 8 * (parts + norm + buffers) + 8  # and a count of batches
    activate(model, None)
    assert op.nbytes == 8 * (parts + 2 * norm + buffers) + 8
