"""MoSA's sparse experts against their formula, what is deployed of them, and their loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

import surgery
from surgery.errors import MatchError, OperationError, RuleError
from surgery.methods.sparse_experts import mosa
from surgery.parts.mosa import SparseExperts, deployed, sparse_experts, symmetric_kl
from tests.methods.reference import (
    BACKBONES,
    BOTH,
    INPUTS,
    agrees,
    blocks,
    close,
    parts,
    starts_as_the_base,
    stirred,
    trains_and_comes_off,
    vit,
    vit_b,
)


@pytest.mark.parametrize(("rules", "count"), [(mosa(), 792_768), (mosa(experts=1), 322_752)])
def test_counts_on_a_vit_base(rules: Any, count: int) -> None:
    assert surgery.plan(vit_b(), rules).trainable == count


@BOTH
def test_all_is_trained_starts_as_the_base_and_comes_off(backbone: str) -> None:
    rules = mosa(rank=4)
    assert starts_as_the_base(backbone, rules)
    # of four experts one is drawn twice: then `down` too has a gradient
    trains_and_comes_off(backbone, rules, steps=5)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def hidden(part: Any, u: Tensor) -> Tensor:
    """gelu(down(norm(u)))."""
    mean, var = u.mean(-1, keepdim=True), u.var(-1, correction=0, keepdim=True)
    normed = (u - mean) / (var + 1e-6).sqrt() * part.norm.weight + part.norm.bias
    return gelu(normed @ part.down.weight.T + part.down.bias)


def expert(part: Any, i: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of expert i: zero but where it is the owner."""
    return torch.where(part.owner == i, part.up[i], torch.zeros(())), part.up_bias[i]


@BOTH
def test_mosa_in_eval_mode_is_the_mean_of_its_experts(backbone: str) -> None:
    def rewrite(plain: nn.Module, parts: dict[str, Any]) -> None:
        for block, part in zip(blocks(plain), parts.values(), strict=True):
            norm, mlp, stream = block.norm2.forward, block.mlp.forward, {}

            def keep(u: Tensor, norm: Any = norm, stream: Any = stream) -> Any:
                stream["u"] = u
                return norm(u)

            def add(z: Tensor, mlp: Any = mlp, stream: Any = stream, part: Any = part) -> Any:
                weights, biases = zip(*(expert(part, i) for i in range(4)), strict=True)
                up = hidden(part, stream["u"]) @ (sum(weights) / 4).T + sum(biases) / 4
                return mlp(z) + 0.1 * up

            block.norm2.forward, block.mlp.forward = keep, add

    agrees(backbone, mosa(rank=8), rewrite)


def mixture(**how: Any) -> SparseExperts:
    torch.manual_seed(0)
    part = SparseExperts(12, rank=4, **how).double()
    with torch.no_grad():
        for p in part.parameters():
            p.add_(torch.randn_like(p))
    return part


def test_every_entry_has_one_owner_and_the_owners_share_alike() -> None:
    torch.manual_seed(0)
    owner = SparseExperts(768, rank=16).owner
    assert owner is not None
    assert owner.flatten().bincount().tolist() == [768 * 16 // 4] * 4
    rows = (owner == 0).sum(1)
    assert rows.min() < 3 < 5 < rows.max()  # dealt at random, not by rows


def test_a_training_forward_runs_one_expert_at_random_and_trains_its_entries_alone() -> None:
    part, x = mixture(dropout=0.0).train(), torch.randn(5, 12, dtype=torch.float64)
    want = [hidden(part, x) @ expert(part, i)[0].T + expert(part, i)[1] for i in range(4)]
    drawn = []
    for seed in range(40):
        torch.manual_seed(seed)
        part.zero_grad()
        answer = part(x)
        (i,) = [i for i in range(4) if torch.allclose(answer, want[i], rtol=0, atol=1e-13)]
        drawn.append(i)
        answer.square().sum().backward()
        assert part.up.grad is not None
        assert part.up_bias.grad is not None
        trained = torch.zeros_like(part.up, dtype=torch.bool)
        trained[i] = part.owner == i
        assert torch.equal(part.up.grad != 0, trained)
        assert part.up_bias.grad.any(1).nonzero().flatten().tolist() == [i]
    assert all(4 <= drawn.count(i) <= 18 for i in range(4))
    close(part.eval()(x), torch.stack(want).mean(0))  # what a draw gives on average


def test_entries_of_others_stay_zero_in_training() -> None:
    model = surgery.apply(vit(), mosa(rank=4)).train()
    optimizer = torch.optim.AdamW(surgery.parameters(model), lr=0.1, weight_decay=0.1)
    for step in range(8):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(INPUTS["vit"]).square().sum().backward()
        optimizer.step()
    for part in parts(model).values():
        others = part.owner[None] != torch.arange(4)[:, None, None]
        assert part.up[~others].count_nonzero() > others[0].sum() / 2
        assert not part.up[others].any()


def test_mosa_starts_as_its_paper_says() -> None:
    model = surgery.apply(vit(), mosa())
    for part in parts(model).values():
        assert not part.up.any()
        assert not part.up_bias.any()
        assert not part.down.bias.any()
        assert 0.95 * 24**-0.5 < part.down.weight.abs().max() <= 24**-0.5
        assert (part.norm.weight == 1).all()
        assert part.norm.eps == 1e-6
        assert part.drop.p == 0.1


def test_different_sites_deal_their_entries_differently() -> None:
    first, second, *_ = parts(surgery.apply(vit(), mosa())).values()
    assert not torch.equal(first.owner, second.owner)


@BOTH
def test_what_is_deployed_answers_alike(backbone: str) -> None:
    model = stirred(backbone, mosa(rank=4))
    small = deployed(surgery.state_dict(model))
    bare = surgery.apply(BACKBONES[backbone](), mosa(rank=4, experts=1)).eval()
    surgery.load_state_dict(bare, small)
    with torch.no_grad():
        assert torch.equal(bare(INPUTS[backbone]), model(INPUTS[backbone]))
    assert not any(key.endswith("owner") for key in small)


def test_what_is_deployed_of_a_vit_base_has_the_printed_count() -> None:
    small = deployed(surgery.state_dict(surgery.apply(copy.deepcopy(vit_b()), mosa())))
    assert sum(tensor.numel() for tensor in small.values()) == 322_752


def test_mosa_does_not_merge_into_the_base() -> None:
    with pytest.raises(OperationError, match="SparseExperts stands at a span"):
        surgery.merge(stirred("vit", mosa(rank=4)))


def test_symmetric_kl_is_the_mean_of_both_ways() -> None:
    a, b = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    p, q = Categorical(logits=a), Categorical(logits=b)
    want = (kl_divergence(p, q) + kl_divergence(q, p)).sum() / 2 / 12
    close(symmetric_kl(a, b), want)
    close(symmetric_kl(b, a), want)
    assert symmetric_kl(a, a) == 0


def test_symmetric_kl_draws_each_answer_to_the_other_as_it_is() -> None:
    a, b = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grad = torch.autograd.grad(symmetric_kl(a, b), [a, b])
    p, q = a.softmax(-1), b.softmax(-1)
    close(grad[0], (p - q) / 3 / 2)  # of KL(q || p), q held fast
    close(grad[1], (q - p) / 3 / 2)


@pytest.mark.parametrize(
    ("part", "match"),
    [
        (sparse_experts(rank=0), r"sparse_experts\(rank=0\)"),
        (sparse_experts(experts=1.5), r"sparse_experts\(experts=1.5\)"),  # type: ignore[arg-type]
        (sparse_experts(experts=256), "255 at most"),
    ],
)
def test_wrong_arguments_are_told(part: Any, match: str) -> None:
    with pytest.raises(RuleError, match=match):
        surgery.apply(vit(), surgery.at(surgery.fused, surgery.parallel(part)))


def test_a_model_without_a_place_is_refused() -> None:
    with pytest.raises(MatchError):
        surgery.apply(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), mosa())
