"""LAE, ScaLearn and one part per domain: what is put together, against formulae written out."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import surgery
from surgery import FileError, GraftError, OperationError, RuleError, append, at, ffn, shared
from surgery.methods.many_adapters import adapter_fusion, lae, language_adapter, scalearn
from surgery.parts.adapter_sum import Combined, coefficients, combined, fusion, scaled
from surgery.parts.adapters import adapter
from surgery.parts.domain_adapters import Domains, choose, domains
from surgery.state.averaging import average, ensemble, fill, one_domain
from tests.methods.reference import (
    BACKBONES,
    BOTH,
    EPS,
    INPUTS,
    agrees,
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
from tests.models import tiny_vit

PLAIN = [at(ffn, append(adapter(rank=4), residual=True))]
X = INPUTS["vit"]


def linear(site: surgery.Site) -> nn.Module:
    return nn.Linear(site.width, site.out)


def bottleneck(part: Any, x: Tensor, act: Any) -> Tensor:
    hidden = act(x @ part.down.weight.T + part.down.bias)
    return hidden @ part.up.weight.T + part.up.bias


def by_hand(module: nn.Module, new: Any) -> None:
    module.forward = new  # type: ignore[method-assign]


def random(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A state of the model's keys with other values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: 0.3 * torch.randn(tensor.shape, generator=generator).to(tensor)
        for key, tensor in surgery.state_dict(model).items()
    }


# LAE -------------------------------------------------------------------------------------------


def rewrite_lae(plain: nn.Module, held: dict[str, Any]) -> None:
    chosen = blocks(plain)[:2]
    for block, part in zip(chosen, held.values(), strict=True):

        def forward(x: Tensor, mlp: Any = block.mlp, part: Any = part) -> Tensor:
            base = type(mlp).forward(mlp, x)
            return base + part.scale * bottleneck(part.part, x, nn.functional.gelu)

        by_hand(block.mlp, forward)


@BOTH
def test_lae_is_a_scaled_adapter_beside_the_first_ffns(backbone: str) -> None:
    agrees(backbone, lae(blocks=2), rewrite_lae)
    assert starts_as_the_base(backbone, lae())
    trains_and_comes_off(backbone, lae())


def test_lae_counts_and_does_not_merge() -> None:
    count = 5 * (2 * 768 * 5 + 5 + 768 + 1)
    assert surgery.plan(vit_b(), lae()).trainable == count == 42_270
    with pytest.raises(OperationError, match="Scaled"):
        surgery.merge(stirred("vit", lae()))


def test_a_scaled_linear_part_merges() -> None:
    merges("vit", at(surgery.proj, surgery.parallel(scaled(linear, start=0.5))))


# ScaLearn --------------------------------------------------------------------------------------


def sources(backbone: str, count: int = 3) -> list[dict[str, Tensor]]:
    model = surgery.apply(BACKBONES[backbone](), PLAIN)
    return [random(model, seed) for seed in range(count)]


def rewrite_scalearn(plain: nn.Module, held: dict[str, Any]) -> None:
    states = sources("vit" if hasattr(plain, "pos_embed") else "swin")
    found = [(key, part) for key, part in held.items() if hasattr(part, "copies")]
    for block, (key, part) in zip(blocks(plain), found, strict=True):
        own = [(s, f"parts.{key}.") for s in states]

        def forward(
            x: Tensor, mlp: Any = block.mlp, omega: Any = part.omega, own: Any = own
        ) -> Any:
            base = type(mlp).forward(mlp, x)
            y = base
            for t, (s, k) in enumerate(own):
                hidden = (base @ s[k + "down.weight"].T + s[k + "down.bias"]).relu()
                y = y + omega.weight[t] * (hidden @ s[k + "up.weight"].T + s[k + "up.bias"])
            return y

        by_hand(block.mlp, forward)


@BOTH
@pytest.mark.parametrize("by_feature", [True, False])
@pytest.mark.parametrize("once", [True, False])
def test_scalearn_is_the_sum_of_its_formula(backbone: str, by_feature: bool, once: bool) -> None:
    omega = coefficients(count=3, by_feature=by_feature)
    part = combined(adapter(rank=4), shared(omega) if once else omega)
    rules = [at(ffn, append(part, residual=True))]
    model = stirred(backbone, rules)
    fill(model, sources(backbone))
    have = model(INPUTS[backbone])
    from tests.methods import reference

    plain = reference.by_hand(backbone, model, rewrite_scalearn)
    close(have, plain(INPUTS[backbone]), 16)
    assert (have - BACKBONES[backbone]()(INPUTS[backbone])).abs().max() > 1e-3
    assert sum("omega" in key or "coefficients" in key for key in surgery.state_dict(model)) == (
        len({b.mlp.fc1.in_features for b in blocks(model)}) if once else len(blocks(model))
    )


@BOTH
def test_scalearn_trains_omega_alone(backbone: str) -> None:
    model = surgery.apply(BACKBONES[backbone](), scalearn(rank=4)).train()
    fill(model, sources(backbone))
    model(INPUTS[backbone]).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(
        name.endswith("omega.weight")
        for name in trained - {"head.weight", "head.bias"}
        if "head" not in name
    )
    reverts(backbone, scalearn(rank=4))


def test_scalearn_starts_at_two_over_count_and_as_the_base() -> None:
    assert starts_as_the_base("vit", scalearn())
    model = surgery.apply(tiny_vit(), scalearn(count=4))
    for part in parts(model).values():
        assert part.omega.weight.shape == (4, 24)
        assert (part.omega.weight - 0.5).abs().max() < 0.006
        assert 0.0005 < part.omega.weight.std() < 0.002
        assert part.omega.drop.p == 0.3


def test_scalearn_counts() -> None:
    model = vit_b()
    assert surgery.plan(model, scalearn()).trainable == 12 * 3 * 768 == 27_648
    assert surgery.plan(model, scalearn(by_feature=False)).trainable == 12 * 3
    for omega, count in ((coefficients(), 3 * 768), (coefficients(by_feature=False), 3)):
        rules = at(ffn, append(combined(adapter(rank=48), shared(omega)), residual=True))
        assert surgery.plan(model, rules).trainable == count


def test_scalearn_merges_where_its_parts_are_linear() -> None:
    part = combined(linear, coefficients(count=2))
    merges("vit", at(surgery.proj, append(part, residual=True)), 16)
    model = stirred("vit", scalearn())
    with pytest.raises(OperationError, match="Combined"):
        surgery.merge(model)


def test_shared_coefficients_are_stored_once_and_borrowed_by_all(tmp_path: Path) -> None:
    rules = at(ffn, append(combined(adapter(rank=2), shared(coefficients())), residual=True))
    model = surgery.apply(vit(), rules)
    file = surgery.save(model, tmp_path / "x.safetensors")
    with safe_open(file, framework="pt") as held:
        assert sum("coefficients" in key for key in held.keys()) == 1  # noqa: SIM118
        assert not any(".omega" in key for key in held.keys())  # noqa: SIM118
    again = surgery.load(vit(), file, rules=rules)
    for each in (model, copy.deepcopy(model), again):
        own = [m.omega for m in each.modules() if isinstance(m, Combined)]
        assert len(own) == 3
        assert {id(omega) for omega in own} == {id(parts(each)["shared/coefficients/24"])}


def test_filling_is_all_or_nothing() -> None:
    model = surgery.apply(vit(), scalearn(count=2, rank=4))
    good, before = sources("vit", 2), average([surgery.state_dict(model)])
    (first, *_) = good[0]
    bad = [
        good[:1],
        [good[0], {k: t for k, t in good[1].items() if k != first}],
        [good[0], {**good[1], "parts.more": torch.ones(1)}],
        [good[0], {**good[1], first: torch.ones(1)}],
        [good[0], {**good[1], first: good[1][first].float()}],
    ]
    for states in bad:
        with pytest.raises(FileError):
            fill(model, states)
        assert all(torch.equal(t, before[k]) for k, t in surgery.state_dict(model).items())
    fill(model, good)
    for key, part in parts(model).items():
        for state, each in zip(good, part.copies, strict=True):
            assert torch.equal(each.down.weight, state[f"parts.{key}.down.weight"])
    with pytest.raises(OperationError, match="no combined part"):
        fill(surgery.apply(vit(), PLAIN), good)


def test_what_cannot_be_combined_is_told() -> None:
    for part in (
        combined(shared(adapter())),
        combined(surgery.moa(heads=3)),
        combined(adapter(), omega=adapter()),
        combined(adapter(), coefficients(count=0)),
    ):
        with pytest.raises(RuleError):
            surgery.plan(vit(), at(ffn, append(part, residual=True)))


# domains ---------------------------------------------------------------------------------------


def rewrite_domains(chosen: Any) -> Any:
    def rewrite(plain: nn.Module, held: dict[str, Any]) -> None:
        for block, part in zip(blocks(plain), held.values(), strict=True):

            def forward(x: Tensor, mlp: Any = block.mlp, part: Any = part) -> Tensor:
                base = type(mlp).forward(mlp, x)
                rows = [
                    y + bottleneck(part.by_domain[chosen[i]], y, torch.relu)
                    for i, y in enumerate(base)
                ]
                return torch.stack(rows)

            by_hand(block.mlp, forward)

    return rewrite


@BOTH
@pytest.mark.parametrize("ids", [0, 2, torch.tensor([2, 0]), torch.tensor([1, 1])])
def test_each_sample_goes_through_the_part_of_its_domain(backbone: str, ids: Any) -> None:
    from tests.methods import reference

    model = stirred(backbone, language_adapter(domains=3, rank=4))
    choose(model, ids)
    rows = [ids, ids] if isinstance(ids, int) else ids.tolist()
    plain = reference.by_hand(backbone, model, rewrite_domains(rows))
    x = INPUTS[backbone]
    with torch.no_grad():
        have = model(x)
        close(have, plain(x), 16)
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again(x), have)
        assert torch.equal(copy.deepcopy(model)(x), have)


def test_only_the_chosen_domain_is_trained() -> None:
    model = surgery.apply(vit(), language_adapter(domains=2, rank=4)).train()
    for p in surgery.parameters(model):
        nn.init.normal_(p, std=0.1)
    optimiser = torch.optim.AdamW(surgery.parameters(model), lr=0.1)
    for domain, other in ((1, 0), (0, 1)):
        choose(model, domain)
        before = average([one_domain(surgery.state_dict(model), other)])
        optimiser.zero_grad()
        model(X).square().sum().backward()
        optimiser.step()
        now = one_domain(surgery.state_dict(model), other)
        assert all(torch.equal(now[key], before[key]) for key in now if key.startswith("parts."))
        for part in parts(model).values():
            assert all(p.grad is None for p in part.by_domain[other].parameters())
            assert all(p.grad.any() for p in part.by_domain[domain].parameters())


@BOTH
def test_domains_start_as_the_base_train_and_come_off(backbone: str) -> None:
    rules = language_adapter(rank=4)
    assert starts_as_the_base(backbone, rules)
    assert (
        untrained(backbone, language_adapter(domains=1, rank=4)) == []
    )  # of two, one does not run
    reverts(backbone, rules)


def test_two_domains_are_trained_by_a_batch_of_both() -> None:
    model = surgery.apply(vit(), language_adapter(domains=2, rank=4)).train()
    choose(model, torch.tensor([0, 1]))
    for p in surgery.parameters(model):
        nn.init.normal_(p, std=0.1)
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in surgery.parameters(model))
    model.zero_grad()
    choose(model, torch.tensor([1, 1]))
    model(X).square().sum().backward()
    for part in parts(model).values():
        assert all(p.grad is None for p in part.by_domain[0].parameters())


def test_domains_are_counted_and_do_not_merge() -> None:
    count = 2 * 12 * (2 * 768 * 384 + 384 + 768)
    assert surgery.plan(vit_b(), language_adapter()).trainable == count
    with pytest.raises(OperationError, match="Domains"):
        surgery.merge(stirred("vit", language_adapter()))


def test_domains_average_into_one_plain_part() -> None:
    model = stirred("vit", [at(ffn, append(domains(adapter(rank=4)), residual=True))])
    plain = surgery.apply(vit(), PLAIN)
    merged = average([one_domain(surgery.state_dict(model), i) for i in range(2)])
    surgery.load_state_dict(plain, merged)
    for one, many in zip(parts(plain).values(), parts(model).values(), strict=True):
        a, b = (each.up.weight for each in many.by_domain)
        assert (one.up.weight - (a + b) / 2).abs().max() < 4 * EPS
    with pytest.raises(FileError, match="no part of that domain"):
        one_domain(surgery.state_dict(model), 2)


def test_domains_that_are_none_are_told() -> None:
    model = surgery.apply(vit(), language_adapter(domains=2, rank=4))
    choose(model, 1)
    wrong: list[Any] = [
        2,
        -1,
        True,
        1.0,
        torch.tensor([0, 2]),
        torch.tensor([0.0]),
        torch.ones(2, 2),
    ]
    for domain in wrong:
        with pytest.raises(RuleError, match="2 domains"):
            choose(model, domain)
    assert all(m.active == 1 for m in model.modules() if isinstance(m, Domains))
    choose(model, torch.tensor([0, 1, 0]))
    with pytest.raises(GraftError, match="3 domains"):
        model(X)
    with pytest.raises(OperationError, match="no part of several domains"):
        choose(vit(), 0)
    for part in (domains(adapter(), count=0), domains(shared(adapter())), domains(surgery.moa())):
        with pytest.raises(RuleError):
            surgery.plan(vit(), at(ffn, append(part, residual=True)))


def test_what_a_forward_puts_in_place_of_a_buffer_goes_again() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(2, 2)
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.n = self.n + 1
            out: Tensor = self.lin(x)
            return out

    model = surgery.apply(Counts(), at("lin", surgery.unfreeze))
    mark = surgery.fingerprint(model)
    ensemble(model, [surgery.state_dict(model)], torch.ones(1, 2))
    assert surgery.fingerprint(model) == mark


def test_the_domains_that_were_chosen_are_kept() -> None:
    model = surgery.apply(nn.Sequential(nn.Linear(4, 4)), at("0", append(domains(linear))))
    ids = torch.tensor([0, 1])
    choose(model, ids)
    want = model(torch.ones(2, 4))
    ids.fill_(7)
    assert torch.equal(model(torch.ones(2, 4)), want)


# AdapterFusion ---------------------------------------------------------------------------------


def rewrite_fusion(plain: nn.Module, held: dict[str, Any]) -> None:
    states = sources("vit" if hasattr(plain, "pos_embed") else "swin")
    for block, (key, part) in zip(blocks(plain), held.items(), strict=True):
        own = [
            {
                name: s[f"parts.{key}.{name}.{kind}"]
                for name in ("down", "up")
                for kind in ["weight"]
            }
            | {f"{name} bias": s[f"parts.{key}.{name}.bias"] for name in ("down", "up")}
            for s in states
        ]

        def forward(x: Tensor, mlp: Any = block.mlp, part: Any = part, own: Any = own) -> Tensor:
            y: Tensor = type(mlp).forward(mlp, x)
            query = y @ part.query.weight.T + part.query.bias
            z = [
                ((y @ o["down"].T + o["down bias"]).relu() @ o["up"].T + o["up bias"]) for o in own
            ]
            weights = [(query * (each @ part.key.weight.T + part.key.bias)).sum(-1) for each in z]
            total = sum(weight.exp() for weight in weights)
            for weight, each in zip(weights, z, strict=True):
                y = y + (weight.exp() / total)[..., None] * (each @ part.value.weight.T)
            return y

        by_hand(block.mlp, forward)


@BOTH
def test_fusion_is_the_attention_of_its_formula(backbone: str) -> None:
    model = stirred(backbone, adapter_fusion(rank=4))
    fill(model, sources(backbone))
    from tests.methods import reference

    plain = reference.by_hand(backbone, model, rewrite_fusion)
    have = model(INPUTS[backbone])
    close(have, plain(INPUTS[backbone]), 64)
    assert (have - BACKBONES[backbone]()(INPUTS[backbone])).abs().max() > 1e-3


def test_fusion_trains_its_three_matrices_alone_and_holds_V_near_the_identity() -> None:
    model = surgery.apply(vit(), adapter_fusion(rank=4)).train()
    assert torch.equal(model(X), vit().train()(X))
    states = sources("vit")
    fill(model, states)
    before = {k: v.clone() for k, v in model.named_buffers() if ".copies." in k}
    for part in parts(model).values():
        off = part.value.weight - torch.eye(24).double()
        assert (off.diag() == 0).all()
        assert off.sum().item() == pytest.approx(24 * 23 * 1e-6)
        torch.nn.init.eye_(part.value.weight)
    assert surgery.penalty(model) == 0
    with torch.no_grad():
        part.value.weight[0, 1] = 2.0
    assert surgery.penalty(model).item() == pytest.approx(0.04)
    optimizer = torch.optim.SGD(surgery.parameters(model), lr=0.1)
    (model(X).square().sum() + surgery.penalty(model)).backward()
    own = [(n.rsplit("append.")[-1], p) for n, p in model.surgery.named_parameters()]
    names = {"query.weight", "query.bias", "key.weight", "value.weight"}
    assert {n for n, p in own if p.grad.abs().max() > 1e-12} == names
    assert {n for n, _ in own} - names == {"key.bias"}  # adds alike to all scores of a token
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers() if k in before)
    reverts("vit", adapter_fusion(rank=4))


def test_fusion_counts_does_not_merge_and_refuses_what_it_cannot_copy() -> None:
    assert surgery.plan(vit_b(), adapter_fusion()).trainable == 12 * (3 * 768**2 + 2 * 768)
    with pytest.raises(OperationError, match="Fused"):
        surgery.merge(stirred("vit", adapter_fusion()))
    with pytest.raises(RuleError, match=r"fusion\(shared"):
        surgery.plan(vit(), at(ffn, append(fusion(shared(adapter())))))
    with pytest.raises(FileError, match="2 states were given"):
        fill(surgery.apply(vit(), adapter_fusion(rank=4)), sources("vit", 2))
