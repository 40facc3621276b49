"""A merged model is plain: what follows meets the base, and unmerge brings all of it back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import OperationError, append, at, lora, parallel, replace, scale_shift, unfreeze
from surgery._preserve import fingerprint
from surgery.spec.fault_injection import Tripwire, committed, events
from surgery.spec.snapshot import unchanged
from tests.laws.checks import Linears, stir_parts
from tests.methods.test_methods import SETS, rules_of
from tests.models import images, tiny_vit

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
OF_STATES = ("_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


def linear(site: surgery.Site) -> nn.Module:
    return nn.Linear(site.width, site.out)


def vit() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tiny_vit().eval()


def tuned(name: str) -> nn.Module:
    model = surgery.apply(vit(), rules_of(name))
    stir_parts(model)
    return model


def merges(name: str) -> bool:
    try:
        surgery.merge(tuned(name))
    except OperationError:
        return False
    return True


MERGEABLE = [name for name in SETS if merges(name)]


def looks(model: nn.Module) -> dict[str, Any]:
    """What a tool sees of a model: modules, tensors, hooks, forwards; of the root's own
    attributes, `surgery` and the hooks of its states are left out.
    """
    seen: dict[str, Any] = {"keys": list(model.state_dict()), "class": type(model)}
    for path, module in model.named_modules(remove_duplicate=False):
        hidden = {"surgery", "train", "reset_running_stats", *(OF_STATES if not path else ())}
        seen[path] = type(module), [*module._modules], sorted(set(vars(module)) - hidden)
        seen[f"{path}: hooks"] = {
            name: len(hooks)
            for name, hooks in vars(module).items()
            if "_hooks" in name and name not in hidden
        }
    return seen


@pytest.mark.parametrize("name", MERGEABLE)
def test_merged_it_looks_like_the_base(name: str) -> None:
    model, plain, x = tuned(name), vit(), images()
    before, want = fingerprint(model), model(x)
    surgery.merge(model)
    assert looks(model) == looks(plain)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), want)
    assert torch.equal(plain(x), model(x))
    surgery.unmerge(model)
    unchanged(before, fingerprint(model), "merge and unmerge", but=["random"])
    surgery.merge(model, keep=False)
    torch.testing.assert_close(model(x), want)
    assert not hasattr(model, "surgery")
    alone = vit()
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in alone.parameters()
    ]
    assert list(vars(model)) == list(vars(alone))
    assert not any(hooks for k, hooks in vars(model).items() if "_hooks" in k)
    with pytest.raises(OperationError, match="never operated"):
        surgery.revert(model)


def test_some_rule_sets_merge() -> None:
    assert {"lora", "ssf", "repadapter", "bitfit"} <= set(MERGEABLE)
    assert "adapterx_ffn" not in MERGEABLE


TOOLS = {
    "script": lambda model: torch.jit.script(model),
    "trace": lambda model: torch.jit.trace(model, images()),
    "export": lambda model: torch.export.export(model, (images(),)).module(),
    "compile": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.filterwarnings("ignore")  # torch's own, of what is to go
@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
@pytest.mark.parametrize("name", ["lora", "ssf"])
def test_tools_take_it_as_they_take_the_base(name: str, tool: Any) -> None:
    model = tuned(name)
    want = model(images())
    torch.testing.assert_close(tool(surgery.merge(model))(images()), want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lora", "ssf"])
def test_quantised_it_is_the_merged_base_quantised(name: str) -> None:
    model, plain = surgery.merge(tuned(name)), vit()
    plain.load_state_dict(model.state_dict())
    a, b = (torch.ao.quantization.quantize_dynamic(m)(images()) for m in (model, plain))
    assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
def test_statistics_stay_frozen_while_merged_and_it_scripts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    surgery.apply(model, at("3", lora(rank=2)))
    surgery.merge(model).train()
    assert not model[1].training
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(torch.jit.script(model)(x), model(x))
    mean = model[1].running_mean.clone()
    surgery.merge(model, keep=False)(x)
    assert not model[1].training  # as it answered until now
    assert torch.equal(model[1].running_mean, mean)
    model.train()(x)
    assert not torch.equal(model[1].running_mean, mean)


def test_compiled_code_sees_merge_and_unmerge() -> None:
    torch._dynamo.reset()
    model = tuned("lora")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    want = model(images())
    for change in (surgery.merge, surgery.unmerge) * 2:
        change(model)
        torch.testing.assert_close(compiled(images()), want)
        if change is surgery.unmerge:
            stir_parts(model, seed=2)
            want = model(images())
            compiled(images())
    surgery.merge(model, keep=False)
    torch.testing.assert_close(compiled(images()), want)


def test_hooks_of_others_keep_their_places() -> None:
    model, told = Linears(), list[str]()
    surgery.apply(model, at("one", append(linear)))
    late = model.one.register_forward_hook(lambda *_: told.append("late"))
    surgery.apply(model, at("one", append(linear)), name="second")
    before, order = fingerprint(model), [*model.one._forward_hooks]
    with pytest.warns(UserWarning, match="hooks of others"):
        surgery.merge(model)
    model.one.register_forward_hook(lambda *_: told.append("last"))
    model(X)
    assert told == ["late", "last"]
    surgery.unmerge(model)
    assert [*model.one._forward_hooks][:3] == order
    model.one._forward_hooks.popitem()
    unchanged(before, fingerprint(model), "merge and unmerge", but=["random"])
    with pytest.warns(UserWarning, match="hooks of others"):
        surgery.merge(model)
    late.remove()
    surgery.unmerge(model)
    assert [*model.one._forward_hooks] == [order[0], order[2]]


def test_a_forward_that_others_put_there_since_is_told() -> None:
    model = surgery.merge(surgery.apply(Linears(), at("one", replace(linear))))
    real = model.one.forward
    model.one.forward = lambda x: real(x)
    before = fingerprint(model)
    with pytest.raises(OperationError, match="forward of Linear is another's since"):
        surgery.unmerge(model)
    unchanged(before, fingerprint(model), "a refused unmerge")
    surgery.merge(surgery.unmerge(_without(model.one, "forward", model)))
    model.one.forward = real
    surgery.merge(model, keep=False)
    assert model.one.forward is real


def _without(module: nn.Module, name: str, model: nn.Module) -> nn.Module:
    delattr(module, name)
    return model


def test_a_forward_that_was_replaced_does_not_come_back_for_good() -> None:
    model = Linears()
    model.one.forward = lambda x: 0 * x
    want = surgery.apply(model, at("one", replace(linear)))(X)
    surgery.merge(model, keep=False)
    torch.testing.assert_close(model(X), want)


@pytest.mark.parametrize("back", [surgery.unmerge, surgery.revert])
def test_parts_follow_where_the_model_goes(back: Any) -> None:
    class Drops(nn.Module):
        def __init__(self, site: surgery.Site) -> None:
            super().__init__()
            self.map, self.drop = nn.Linear(site.width, site.out), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.drop(self.map(x))
            return out

        def affine(self) -> tuple[Tensor, Tensor]:
            return self.map.weight, self.map.bias

    model = surgery.apply(Linears(), at("one", parallel(Drops)))
    assert model.training
    back(surgery.merge(model).double().eval())
    x = X.double()
    assert torch.equal(model(x), model(x))
    if back is surgery.unmerge:
        assert not any(module.training for module in model.modules())
        assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_for_good_also_after_it_was_merged_and_without_parts() -> None:
    model, x = surgery.apply(Linears(), [at("one", lora(rank=2)), at("two", unfreeze)]), X
    stir_parts(model)
    with torch.no_grad():
        model.two.weight.add_(1.0)
    want = surgery.merge(model)(x)
    assert torch.equal(surgery.merge(model, keep=False)(x), want)
    assert all(p.requires_grad for p in model.parameters())
    surgery.apply(model, at(nn.Linear, lora(rank=2)))
    surgery.revert(model)
    assert torch.equal(model(x), want)
    surgery.merge(surgery.apply(model, at("two", unfreeze)), keep=False)
    assert torch.equal(model(x), want)


def test_a_copy_lets_go_alone() -> None:
    model = tuned("lora")
    want = model(images())
    copied = surgery.merge(copy.deepcopy(surgery.merge(model)), keep=False)
    torch.testing.assert_close(copied(images()), want)
    assert torch.equal(surgery.unmerge(model)(images()), want)


def test_for_good_lets_go_of_all_operations() -> None:
    model = surgery.apply(Linears(), at("one", append(scale_shift())))
    surgery.apply(model, at(nn.Linear, parallel(linear)), name="second")
    want = model(X)
    surgery.merge(model, keep=False)
    torch.testing.assert_close(model(X), want)
    assert looks(model) == looks(Linears())


def test_a_container_as_root() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    plain = looks(model)
    surgery.apply(model, at(nn.Linear, parallel(linear)))
    before, want = fingerprint(model), model(X)
    assert looks(surgery.merge(model)) == plain
    torch.testing.assert_close(model(X), want)
    unchanged(before, fingerprint(surgery.unmerge(model)), "merge and unmerge", but=["random"])
    assert looks(surgery.merge(model, keep=False)) == plain


def faulty() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    surgery.apply(model, [at("0", replace(linear)), at(nn.Linear, append(scale_shift()))])
    return model


@pytest.mark.parametrize("keep", [True, False])
def test_a_fault_at_any_line_of_merge_leaves_the_model_or_is_too_late(keep: bool) -> None:
    model = faulty()
    count = len(events(lambda: surgery.merge(model, keep=keep)))
    for event in range(1, 1 + count, max(1, count // 60)):
        model = faulty()
        before, want = fingerprint(model), model.eval()(X)
        model.train()
        wire = Tripwire(event, KeyboardInterrupt)
        wire.run(lambda model=model: surgery.merge(model, keep=keep))
        if not hasattr(model, "surgery"):
            assert not keep
            torch.testing.assert_close(model.eval()(X), want)
        elif wire.where and not committed(wire.where):
            unchanged(before, fingerprint(model), f"a fault at {wire.where}", but=["random"])


def test_a_fault_at_any_line_of_unmerge_leaves_it_merged_or_unmerged() -> None:
    model = surgery.merge(faulty())
    count = len(events(lambda: surgery.unmerge(model)))
    for event in range(1, 1 + count, max(1, count // 60)):
        model = faulty()
        before = fingerprint(model)
        merged = fingerprint(surgery.merge(model))
        Tripwire(event, KeyboardInterrupt).run(lambda model=model: surgery.unmerge(model))
        assert hasattr(model, "surgery")
        want = before if "surgery" in model[0]._modules else merged
        unchanged(want, fingerprint(model), f"a fault at event {event}", but=["random"])
