"""Skills mixed by task against their formula: Poly, MHR, MHR-z, MHR-mu."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributions import RelaxedBernoulli

import surgery
from surgery.errors import FileError, GraftError, MatchError, OperationError, RuleError
from surgery.methods.skills import mhr, mhr_mu, mhr_z, poly
from surgery.parts.skills import Skills, choose, inherit, skill_lora
from tests.methods.reference import (
    BACKBONES,
    BOTH,
    INPUTS,
    blocks,
    close,
    merges,
    parts,
    reverts,
    starts_as_the_base,
    stirred,
    trains_and_comes_off,
    untrained,
    vit,
    vit_b,
)


@pytest.mark.parametrize(
    ("rules", "count"),
    [
        (poly(), 298_560),
        (mhr(), 324_096),
        (mhr_z(), 1_536),
        (mhr_mu(), 36_864),
    ],
)
def test_counts_on_a_vit_base(rules: Any, count: int) -> None:
    assert surgery.plan(vit_b(), rules).trainable == count


@pytest.mark.parametrize("rules", [poly(2, tasks=3), mhr(2, tasks=3, heads=4)])
@BOTH
def test_all_is_trained_starts_as_the_base_and_comes_off(backbone: str, rules: Any) -> None:
    assert starts_as_the_base(backbone, rules)
    trains_and_comes_off(backbone, rules)


# skills ----------------------------------------------------------------------------------------


def delta(skills: Any, task: int, heads: int) -> Tensor:
    """x -> x delta, of one task: an A and a B put together head by head, skill by skill."""
    gates = torch.sigmoid(skills.Z[task])  # (heads, S)
    A, B = [], []
    for h in range(heads):
        g = gates[h] / (gates[h].sum() + 1e-12)
        A.append(sum(g[s] * skills.A[h, s] for s in range(len(g))))
        B.append(sum(g[s] * skills.B[h, s] for s in range(len(g))))
    product: Tensor = torch.cat(A, 0) @ torch.cat(B, 1)
    return product


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("task", [0, 2])
@BOTH
def test_mhr_mixes_every_head_of_the_skills_by_task(backbone: str, task: int, heads: int) -> None:
    rules = mhr(skills=3, rank=2, tasks=3, heads=heads)
    model = choose(stirred(backbone, rules), task)

    def rewrite(plain: nn.Module) -> nn.Module:
        for block, part in zip(blocks(plain), parts(model).values(), strict=True):
            qkv = block.attn.qkv.forward

            def add(x: Tensor, qkv: Any = qkv, part: Any = part) -> Tensor:
                q, k, v = qkv(x).chunk(3, -1)
                dq, dv = (delta(skills, task, heads) for skills in part.parts)
                return torch.cat([q + x @ dq, k, v + x @ dv], -1)

            block.attn.qkv.forward = add
        return plain

    plain = BACKBONES[backbone]()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "surgery." not in k})
    x = INPUTS[backbone]
    with torch.no_grad():
        assert (plain(x) - model(x)).abs().max() > 1e-3
        close(model(x), rewrite(plain)(x))


def test_poly_is_mhr_with_one_head() -> None:
    a, b = (surgery.plan(vit_b(), rules) for rules in (poly(), mhr(heads=1)))
    assert a.trainable == b.trainable == 298_560
    assert poly(2, 3, 4) == mhr(2, 3, 4, heads=1)


@BOTH
def test_samples_of_several_tasks_are_answered_as_each_alone(backbone: str) -> None:
    """On Swin too, whose windows of one sample come beside one another."""
    model = stirred(backbone, mhr(skills=3, tasks=5, heads=2))
    x = torch.cat([INPUTS[backbone]] * 2)
    tasks = torch.tensor([4, 0, 1, 4])
    with torch.no_grad():
        want = torch.cat([choose(model, int(t))(x[i : i + 1]) for i, t in enumerate(tasks)])
        close(choose(model, tasks)(x), want)
        assert (choose(model, 0)(x) - want).abs().max() > 1e-3


def test_in_training_gates_are_samples_of_the_relaxed_bernoulli() -> None:
    part = Skills(12, 12, skills=3, tasks=4, heads=2).double().train()
    with torch.no_grad():
        assert part.Z is not None
        part.Z.normal_()
    part.task = torch.tensor([1, 3, 1])
    logits = part.Z.detach()[part.task]
    torch.manual_seed(0)
    want = RelaxedBernoulli(1.0, logits=logits).rsample()
    torch.manual_seed(0)
    close(part.gates(sampled=True), want / (want.sum(-1, keepdim=True) + 1e-12))
    with torch.no_grad():
        part.B.normal_()
        x = torch.ones(3, 2, 12, dtype=torch.float64)
        one, two = part(x), part(x)
        assert not torch.allclose(one, two)
        assert not torch.allclose(one[0], one[2])  # a draw for each sample
        assert torch.equal(part.eval()(x), part(x))


def test_skills_start_as_their_paper_says() -> None:
    model = surgery.apply(vit(), mhr(skills=32, heads=4))
    for part in parts(model).values():
        for each in part.parts:
            assert not each.B.any()
            assert 0.95 * 6**-0.5 < each.A.abs().max() <= 6**-0.5  # of a head
            assert 0.95e-3 < each.Z.abs().max() <= 1e-3
            assert (each.A.shape, each.B.shape) == ((4, 32, 6, 1), (4, 32, 1, 6))
            assert each.Z.shape == (19, 4, 32)


def test_alpha_scales() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8)

    def answer(alpha: float | None) -> Tensor:
        rule = surgery.at("0", skill_lora(rank=2, alpha=alpha))
        model = filled(rule)
        out: Tensor = model(x)
        return out

    one, three = answer(None), answer(6.0)
    torch.testing.assert_close(three, 3 * one)
    model = filled(surgery.at("0", skill_lora(rank=2, alpha=6.0)))
    torch.testing.assert_close(surgery.merge(model)(x), three)


def filled(rule: Any) -> Any:
    linear = nn.Linear(8, 8, bias=False)
    nn.init.zeros_(linear.weight)
    model = surgery.apply(nn.Sequential(linear), rule).eval()
    with torch.no_grad():
        for each in parts(model).values():
            each.A.fill_(0.5)
            each.B.fill_(0.5)
    return model


@BOTH
def test_skills_merge_for_the_one_task_that_is_chosen(backbone: str) -> None:
    rules = mhr(skills=3, rank=2, tasks=3, heads=4)
    merges(backbone, rules)
    model = choose(stirred(backbone, rules), 2)
    x = INPUTS[backbone]
    with torch.no_grad():
        want = model(x)
        close(surgery.merge(model.train()).eval()(x), want)  # no draw, in training mode either
        with pytest.raises(OperationError, match="is merged, for one task"):
            choose(model, 1)
        assert torch.equal(surgery.unmerge(model)(x), want)
        assert (choose(model, 1)(x) - want).abs().max() > 1e-3


def test_skills_of_several_tasks_do_not_merge() -> None:
    model = choose(stirred("vit", mhr(2, tasks=3, heads=2)), torch.tensor([0, 2]))
    before = surgery.fingerprint(model)
    with pytest.raises(OperationError, match=r"tasks were chosen by sample \(2 of them\)"):
        surgery.merge(model)
    after = surgery.fingerprint(model)
    assert {key for key in before if before[key] != after[key]} == set()


@pytest.mark.parametrize(
    ("task", "match"),
    [
        (3, r"choose\(model, 3\): there is no task 3: they are numbered 0 to 2"),
        (-1, "there is no task -1"),
        (torch.tensor([0, 5]), r"choose\(model, a tensor \(2,\)\): there is no task 5"),
        (1.0, "it is no task"),
        (True, "it is no task"),
        ("flowers", "it is no task"),
        (torch.tensor([0.0]), "it is no task"),
        (torch.zeros(2, 2, dtype=torch.long), "it is no task"),
        (torch.zeros(0, dtype=torch.long), "it is no task"),
    ],
)
def test_a_task_that_is_none_is_told_and_nothing_changes(task: Any, match: str) -> None:
    model = choose(surgery.apply(vit(), mhr(2, tasks=3)), 1)
    with pytest.raises(RuleError, match=match):
        choose(model, task)
    assert all(e.task == 1 for e in model.modules() if isinstance(e, Skills))


def test_a_batch_of_another_size_is_told() -> None:
    model = choose(surgery.apply(vit(), mhr(2, tasks=3)), torch.tensor([0, 1, 2]))
    x = INPUTS["vit"]
    with pytest.raises(GraftError, match="3 tasks were chosen, one a sample, and 2 come"):
        model(x)
    with pytest.raises(GraftError, match="3 tasks were chosen, one a sample, and 4 come"):
        model(torch.cat([x, x]))


def test_a_model_without_tasks_is_told() -> None:
    for model in (vit(), surgery.apply(vit(), mhr_mu())):
        with pytest.raises(OperationError, match="has no part that mixes skills by task"):
            choose(model, 0)


def test_the_task_is_kept_by_copies_and_is_no_part_of_a_file(tmp_path: Path) -> None:
    model = choose(stirred("vit", mhr(2, tasks=3, heads=2)), 2)
    path = surgery.save(model, tmp_path / "x.safetensors")
    with safe_open(path, framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith("parts.")]  # noqa: SIM118
    assert sorted({key.rpartition(".")[2] for key in keys}) == ["A", "B", "Z"]
    assert len(keys) == 3 * 2 * 3
    x = INPUTS["vit"]
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))
        again = surgery.load(vit(), path, rules=mhr(2, tasks=3, heads=2)).eval()
        assert torch.equal(again(x), choose(model, 0)(x))


# few-shot: MHR-z and MHR-mu --------------------------------------------------------------------


def few(backbone: str, new: Any, **how: Any) -> tuple[nn.Module, nn.Module]:
    """A model of `mhr`, and one of the new rules with its skills, in eval mode."""
    trained = stirred(backbone, mhr(skills=3, tasks=4, **how))
    model = surgery.apply(BACKBONES[backbone](), new).eval()
    tensors = inherit(surgery.state_dict(model), surgery.state_dict(trained))
    surgery.load_state_dict(model, tensors)
    return trained, model


@BOTH
def test_mhr_z_has_the_skills_and_trains_the_selector_alone(backbone: str) -> None:
    rules = mhr_z(skills=3, heads=4)
    trained, model = few(backbone, rules, heads=4)
    head = [p for p in surgery.parameters(model) if p.dim() < 3]
    logits = [p for p in surgery.parameters(model) if p.dim() == 3]
    assert [tuple(p.shape) for p in logits] == [(1, 4, 3)] * 2 * len(blocks(model))
    assert len(head) == 2
    assert 0 < max(p.abs().max() for p in logits) <= 1e-3  # drawn afresh, for the new task
    x = INPUTS[backbone]
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in logits)
    with torch.no_grad():  # with the selector of an old task, and its head, it is the old model
        state = surgery.state_dict(trained)
        task = {k: t[2:3] for k, t in state.items() if k.endswith(".Z")}
        surgery.load_state_dict(model, {**state, **task})
        assert torch.equal(model(x), choose(trained, 2)(x))
    reverts(backbone, rules)


def test_mhr_z_without_skills_is_the_base() -> None:
    assert starts_as_the_base("vit", mhr_z(heads=2))
    assert len(untrained("vit", mhr_z(heads=2))) == 6


def test_mhr_z_merges() -> None:
    _, model = few("vit", mhr_z(skills=3, heads=4), heads=4)
    x = INPUTS["vit"]
    with torch.no_grad():
        want = model(x)
        assert (want - vit()(x)).abs().max() > 1e-3
        close(surgery.merge(model)(x), want)


@BOTH
def test_mhr_mu_starts_as_the_average_of_the_skills(backbone: str) -> None:
    trained, model = few(backbone, mhr_mu(), heads=4)

    def rewrite(plain: nn.Module) -> nn.Module:
        for block, part in zip(blocks(plain), parts(trained).values(), strict=True):
            qkv = block.attn.qkv
            d = qkv.in_features
            for each, at in zip(part.parts, (0, 2 * d), strict=True):
                A = torch.cat([each.A[h].mean(0) for h in range(4)], 0)
                B = torch.cat([each.B[h].mean(0) for h in range(4)], 1)
                qkv.weight[at : at + d] += (A @ B).T
        return plain

    x = INPUTS[backbone]
    with torch.no_grad():
        plain = rewrite(BACKBONES[backbone]())
        close(model(x), plain(x))
    trains_and_comes_off(backbone, mhr_mu())
    merges(backbone, mhr_mu())


def test_the_average_of_skills_can_be_trained_as_skills_too() -> None:
    """As the released code of MHR-mu does: all skills stay, under even gates."""
    rule = surgery.at(surgery.fused, skill_lora(skills=3, tasks=0, heads=4, rows="q _k v"))
    _, kept = few("vit", [rule, surgery.at(surgery.head, surgery.unfreeze)], heads=4)
    _, one = few("vit", mhr_mu(), heads=4)
    with torch.no_grad():
        close(kept(INPUTS["vit"]), one(INPUTS["vit"]))


def test_skills_that_do_not_fit_are_told() -> None:
    old = surgery.state_dict(surgery.apply(vit(), mhr(skills=3, heads=4)))
    for rules, match in (
        (mhr_z(skills=2, heads=4), r"A of \(4, 2, 6, 1\), and the old one one of \(4, 3, 6, 1\)"),
        (mhr_z(skills=3, heads=2), "and the old one"),
        (mhr_mu(rank=2), "and the old one"),
    ):
        with pytest.raises(FileError, match=match):
            inherit(surgery.state_dict(surgery.apply(vit(), rules)), old)
    new = surgery.state_dict(surgery.apply(vit(), mhr_mu()))
    with pytest.raises(FileError, match="no such tensor"):
        inherit(new, {})
    with pytest.raises(FileError, match="hold no skills"):
        inherit(surgery.state_dict(surgery.apply(vit(), "linear_probe")), old)


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (skill_lora(skills=0), r"skill_lora\(skills=0\)"),
        (skill_lora(tasks=-1), r"skill_lora\(tasks=-1\): it is no number of tasks"),
        (skill_lora(tasks=0, frozen=True), "leaves anything to train"),
        (skill_lora(heads=5), r"the widths 24 and 72 do not both divide by 5 heads"),
        (skill_lora(heads=48), "the widths 24 and 72"),
        (skill_lora(alpha=0), r"skill_lora\(alpha=0\)"),
        (skill_lora(rows="_q"), "names no rows"),
    ],
)
def test_wrong_arguments_are_told(part: Any, match: str) -> None:
    with pytest.raises(RuleError, match=match):
        surgery.apply(vit(), surgery.at(surgery.fused, surgery.parallel(part)))


@pytest.mark.parametrize("rules", [poly(), mhr(), mhr_z(), mhr_mu()])
def test_a_model_without_a_place_is_refused(rules: Any) -> None:
    with pytest.raises(MatchError):
        surgery.apply(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), rules)
