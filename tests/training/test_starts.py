"""EVA, CorDA, LoRA-GA and salient channels, against what a forward and a backward show by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery import OperationError, RuleError
from surgery.methods import lora, pissa, sct
from surgery.training import (
    aim_at_salient,
    corda,
    eva,
    eva_rules,
    loftq,
    loftq_base,
    lora_ga,
)
from surgery.training.starts import oriented
from tests.methods.reference import close, parts, vit

BATCHES = [torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(i)).double()
           for i in range(2)]  # fmt: skip
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), LABELS)


def given(paths: list[str]) -> dict[str, Tensor]:
    """All features that come to modules of the base, (rows, width)."""
    model, seen = vit(), dict[str, list[Tensor]]()
    for path in paths:
        kept = seen.setdefault(path, [])
        model.get_submodule(path).register_forward_pre_hook(
            lambda m, args, kept=kept: kept.append(args[0].flatten(0, -2))  # type: ignore[misc]
        )
    with torch.no_grad():
        for x in BATCHES:
            model(x)
    return {path: torch.cat(rows) for path, rows in seen.items()}


QKV = [f"blocks.{i}.attn.qkv" for i in range(3)]


def at_qkv(model: nn.Module) -> dict[str, Any]:
    return {key.removesuffix("/parallel").replace("/", "."): p for key, p in parts(model).items()}


def unmoved(model: nn.Module) -> None:
    """It answers as the base, to the bit, and trains."""
    with torch.no_grad():
        assert torch.equal(model(BATCHES[0]), vit()(BATCHES[0]))


def test_eva_starts_from_the_directions_of_the_features() -> None:
    model = eva(surgery.apply(vit(), lora(rank=3)), BATCHES)
    unmoved(model)
    rows = given(QKV)
    for path, p in at_qkv(model).items():
        V = torch.linalg.svd(rows[path] - rows[path].mean(0), full_matrices=False)[2][:3]
        torch.testing.assert_close((p.A[0] @ V.t()).abs(), torch.eye(3).double(), atol=1e-9, rtol=0)


def test_eva_gives_each_chunk_of_rows_the_same() -> None:
    rules = surgery.at(surgery.fused, surgery.lora(rank=2, rows="q _k v"))
    for p in at_qkv(eva(surgery.apply(vit(), rules), BATCHES)).values():
        assert torch.equal(p.A[0], p.A[1])
        close(p.A[0] @ p.A[0].t(), torch.eye(2).double())


def pefts_eva(net: nn.Module, x: Tensor, rank: int, rho: float) -> dict[str, Tensor]:
    """A of every linear that keeps a rank, by address."""
    import peft

    config = peft.LoraConfig(
        r=rank, target_modules=["0", "1", "2"], init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=rho),
    )  # fmt: skip
    made = peft.get_peft_model(net, config)
    peft.initialize_lora_eva_weights(
        made, [{"input": x}], prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )  # fmt: skip
    found = {name: m for name, m in made.named_modules() if hasattr(m, "lora_A")}
    assert {m.scaling["default"] for m in found.values()} == {8 / rank}
    return {name.rpartition(".")[2]: m.lora_A["default"].weight for name, m in found.items()}


@pytest.mark.filterwarnings("ignore:lora with eva")
@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0])
def test_eva_moves_ranks_as_peft_does(rho: float) -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 20), nn.Linear(20, 3))
    with torch.no_grad():
        net[0].weight.mul_(torch.tensor([8.0, 4, *[0.2] * 10])[:, None])
        net[0].bias.copy_(net[0].weight.sum(1) * -9.0)  # which lets the mean stay behind
    x = torch.randn(200, 16) * 0.8 ** torch.arange(16) + 9.0
    theirs = pefts_eva(copy.deepcopy(net), x, rank=4, rho=rho)
    net = net.double()
    rules = eva_rules(net, surgery.at("*", surgery.lora(rank=4, alpha=8)), [x.double()], rho)
    model = eva(surgery.apply(net, rules), [x.double()])
    ours = {key.rpartition("/")[0]: p for key, p in parts(model).items()}
    ranks = {path: p.rank for path, p in ours.items()}
    assert ranks == {path: len(A) for path, A in theirs.items()}
    assert sum(ranks.values()) == 12
    assert max(ranks.values()) <= round(4 * rho)
    assert (len({*ranks.values()}) > 1) is (rho > 1)
    for path, p in ours.items():
        turned = (p.A[0] @ theirs[path].double().t()).abs()
        torch.testing.assert_close(turned, torch.eye(p.rank).double(), atol=2e-3, rtol=0)
        assert p.scale == 2.0


def test_moved_ranks_are_saved_loaded_merged_and_reverted(tmp_path: Path) -> None:
    model = vit()
    mark = surgery.fingerprint(model)
    rules = eva_rules(model, lora(rank=5), BATCHES, rho=3.0)
    assert surgery.fingerprint(model) == mark
    assert not hasattr(model, "surgery")
    eva(surgery.apply(model, rules, example=BATCHES[0]), BATCHES)
    unmoved(model)
    ranks = [p.rank for p in at_qkv(model).values()]
    assert sum(ranks) == 15
    assert len({*ranks}) > 1
    with torch.no_grad():
        for p in surgery.parameters(model):
            p += 0.1 * torch.randn_like(p)
    want = model(BATCHES[0])
    surgery.save(model, tmp_path / "a.safetensors")
    again = surgery.load(vit(), tmp_path / "a.safetensors")
    assert torch.equal(again(BATCHES[0]), want)
    torch.testing.assert_close(surgery.merge(again)(BATCHES[0]), want)
    assert surgery.fingerprint(surgery.revert(model)) == mark


def test_a_place_without_ranks_keeps_its_other_edits() -> None:
    net = nn.Sequential(nn.Linear(16, 2), nn.Linear(2, 4))
    nn.init.orthogonal_(net[0].weight)
    rules = [
        surgery.at("*", surgery.lora(rank=1, alpha=3.0, root=True), surgery.unfreeze),
        surgery.at("1", surgery.parallel(surgery.shared(surgery.lora(rank=1)))),
        surgery.at("*", surgery.lora(rank=1)),
    ]
    assert eva_rules(net, rules[:2], [torch.eye(16)]) == [
        surgery.at("0", surgery.unfreeze),
        surgery.at("1", surgery.lora(rank=2, alpha=3.0 * 2**0.5, root=True), surgery.unfreeze),
        rules[1],
    ]
    assert eva_rules(net, rules[2], [torch.eye(16)]) == [surgery.at("1", surgery.lora(rank=2))]


@pytest.mark.parametrize("keep", [True, False])
def test_corda_starts_from_triplets_in_the_metric_of_the_features(keep: bool) -> None:
    model = corda(surgery.apply(vit(), pissa(rank=3)), BATCHES, keep)
    unmoved(model)
    rows, base = given(QKV), vit()
    for path, p in at_qkv(model).items():
        W: Any = base.get_submodule(path).weight
        C = rows[path].t() @ rows[path] / len(rows[path])
        C = C + 0.01 * C.diagonal().mean() * torch.eye(24)
        U, S, V = torch.linalg.svd(W @ C, full_matrices=False)
        chosen = [-3, -2, -1] if keep else [0, 1, 2]
        want = U[:, chosen] @ S[chosen].diag() @ V[chosen] @ torch.linalg.inv(C)
        torch.testing.assert_close(p.B @ p.A, want, atol=1e-9, rtol=0)
        assert torch.equal(p.B @ p.A, p.B0 @ p.A0)


def test_corda_is_what_peft_makes_of_a_weight_and_a_covariance() -> None:
    from peft.tuners.lora.corda import collect_eigens_for_layer

    linear: Any = nn.Linear(12, 8)
    x = torch.randn(50, 12)
    linear.covariance_matrix = x.t() @ x / 50
    theirs = collect_eigens_for_layer(linear, None)
    W, C = linear.weight.detach().double(), linear.covariance_matrix.double()
    for keep, chosen in ((True, slice(-3, None)), (False, slice(3))):
        A, B = oriented(W, C, 3, keep)
        U, S, V = theirs.U_WC[:, chosen], theirs.S_WC[chosen], theirs.V_WC[:, chosen]
        want = (U @ S.diag() @ V.t()).double()
        torch.testing.assert_close(B @ A, want, atol=1e-5, rtol=0)


def test_lora_ga_starts_along_the_gradient_of_the_weight() -> None:
    model = lora_ga(surgery.apply(vit(), pissa(rank=3)), BATCHES, loss, gamma=9.0)
    unmoved(model)
    base: Any = vit()
    sum((loss(base, x) for x in BATCHES), torch.zeros(())).backward()
    for path, p in at_qkv(model).items():
        gradient = base.get_submodule(path).weight.grad
        U, _, V = torch.linalg.svd(gradient, full_matrices=False)
        scale = 72**0.25 / 3
        for have, want in ((p.A, V[:3]), (p.B.t(), U[:, 3:6].t())):
            turned = (have @ want.t() / scale).abs()
            torch.testing.assert_close(turned, torch.eye(3).double(), atol=1e-6, rtol=0)
    assert all(p.grad is None for p in model.parameters())


def rounded(W: Tensor) -> Tensor:
    """To 3 bits or so."""
    step = W.abs().max() / 4
    return (W / step).round() * step


def test_loftq_starts_from_what_quantising_took_away() -> None:
    weights = {path: vit().get_submodule(path).weight.detach() for path in QKV}
    model: Any = vit()
    with torch.no_grad():
        for path in QKV:
            model.get_submodule(path).weight.copy_(rounded(weights[path]))
    surgery.apply(model, surgery.at(surgery.qkv, surgery.lora(rank=4, alpha=8)))
    loftq(model, weights, rounded)
    surgery.merge(model)
    for path, W in weights.items():
        U, S, V = torch.linalg.svd(W - rounded(W), full_matrices=False)
        close(model.get_submodule(path).weight, rounded(W) + U[:, :4] @ S[:4].diag() @ V[:4], 64)
        assert (model.get_submodule(path).weight - W).norm() < (rounded(W) - W).norm()


def test_loftq_is_what_peft_starts_from() -> None:
    from peft.utils.loftq_utils import _low_rank_decomposition

    torch.manual_seed(0)
    W = torch.randn(64, 64)
    theirs = _low_rank_decomposition(W - rounded(W), 3)
    model: Any = surgery.apply(nn.Sequential(nn.Linear(64, 64)), surgery.at("0", surgery.lora(3)))
    (part,) = parts(loftq(model, {"0": W}, rounded)).values()
    torch.testing.assert_close(part.B[0] @ part.A[0], theirs["L"] @ theirs["R"], atol=1e-5, rtol=0)


def quantised(rules: Any, iterations: int) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """A model whose base holds the last turn; W by path; what was quantised."""
    weights = {path: vit().get_submodule(path).weight.detach() for path in QKV}
    model: Any = surgery.apply(vit(), rules)
    base = loftq_base(model, weights, rounded, iterations)
    surgery.revert(model)
    with torch.no_grad():
        for path in QKV:
            model.get_submodule(path).weight.copy_(rounded(base[path]))
    return surgery.apply(model, rules), weights, base


@pytest.mark.parametrize("rows", [None, "q _k v"])
def test_loftq_takes_turns(rows: str | None) -> None:
    rules = surgery.at(surgery.fused, surgery.lora(rank=4, alpha=8, rows=rows))
    left = []
    for iterations in (1, 2, 5):
        model, weights, base = quantised(rules, iterations)
        loftq(model, weights, rounded, iterations)
        surgery.merge(model)
        left.append(0.0)
        for path, W in weights.items():
            low, before = torch.zeros_like(W), W
            for _ in range(iterations):
                before = W - low
                for chunk in [slice(0, 72)] if rows is None else [slice(0, 24), slice(48, 72)]:
                    U, S, V = torch.linalg.svd((W - rounded(before))[chunk], full_matrices=False)
                    low[chunk] = U[:, :4] @ S[:4].diag() @ V[:4]
            close(base[path], before, 64)
            have = model.get_submodule(path).weight
            close(have, rounded(before) + low, 64)
            left[-1] += (have - W).norm().item()
    assert left[0] > left[1] > left[2]


def test_loftq_tells_of_a_base_that_took_no_turns() -> None:
    rules = surgery.at(surgery.qkv, surgery.lora(rank=4))
    model, weights, _ = quantised(rules, 1)
    with pytest.raises(OperationError, match=r"blocks\.0\.attn\.qkv holds other numbers"):
        loftq(model, weights, rounded, 5)
    with pytest.raises(RuleError, match="iterations=0"):
        loftq(model, weights, rounded, 0)


def test_loftq_is_of_each_chunk_of_rows() -> None:
    rules = surgery.at(surgery.fused, surgery.lora(rank=2, rows="q _k v"))
    weights = {path: vit().get_submodule(path).weight.detach() for path in QKV}
    for path, p in at_qkv(loftq(surgery.apply(vit(), rules), weights, rounded)).items():
        W: Any = weights[path] - rounded(weights[path])
        for k, rows in enumerate((slice(0, 24), slice(48, 72))):
            U, S, V = torch.linalg.svd(W[rows], full_matrices=False)
            close(p.B[k] @ p.A[k], U[:, :2] @ S[:2].diag() @ V[:2], 64)


def test_salient_channels_are_those_of_the_longest_features_in_the_base() -> None:
    model = surgery.apply(vit(), sct(channels=5, scale=100.0))
    aim_at_salient(model, BATCHES)
    rows = given([f"blocks.{i}.norm2" for i in range(3)])
    found = [p for key, p in parts(model).items()]
    for x, p in zip(rows.values(), found, strict=True):
        want = x.square().sum(0).topk(5).indices
        assert set(p.index.tolist()) == set(want.tolist())


def test_the_model_is_left_as_it_was_but_for_the_starts() -> None:
    model = surgery.apply(vit(), pissa(rank=3)).train()
    mark = surgery.fingerprint(model)
    lora_ga(model, BATCHES, loss)
    now = surgery.fingerprint(model)
    moved = {key for key in mark if mark[key] != now[key]}
    assert moved
    assert all("surgery" in str(key) for key in moved), moved


def test_what_cannot_be_is_told() -> None:
    with pytest.raises(OperationError, match="no part of the kind LoRA"):
        eva(surgery.apply(vit(), pissa(rank=2)), BATCHES)
    for rules, rho, fact in (("pissa", 2.0, "join no LoRA"), ("lora", 0.5, "from 1 up")):
        with pytest.raises(RuleError, match=fact):
            eva_rules(model := vit(), rules, BATCHES, rho)
        assert not hasattr(model, "surgery")
    with pytest.raises(OperationError, match=r"holds none for blocks\.0\.attn\.qkv"):
        loftq(surgery.apply(vit(), lora(rank=2)), {}, rounded)
    with pytest.raises(RuleError, match="holds no batch"):
        corda(surgery.apply(vit(), pissa(rank=2)), [])
    with pytest.raises(RuleError, match="no 2 \\* 13 singular triplets"):
        lora_ga(surgery.apply(vit(), pissa(rank=13)), BATCHES, loss)
    with pytest.raises(OperationError, match="operated"):
        eva(vit(), BATCHES)
    with pytest.raises(OperationError, match="knows no base weight"):
        corda(surgery.apply(vit(), "olora"), BATCHES)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 48, batch_first=True), 1,
                                    enable_nested_tensor=False)  # fmt: skip
    with pytest.raises(OperationError, match="nothing came to the part"):
        eva(surgery.apply(encoder, lora(rank=2)), [torch.randn(2, 5, 24)])
