"""The shared mixture of adapters against Algorithm 1 written out as a plain loop over experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgery
from surgery import at, moa, ops, parallel, shared
from surgery.parts import MixtureOfAdapters

WIDTH, HEADS, RANK, EXPERTS = 48, 3, 8, 4
NAMES = ("reduction", "embeddings", "down", "down_bias", "up", "up_bias")
EPS = torch.finfo(torch.float64).eps
TOLERANCE = {torch.float64: 16 * EPS, torch.float32: 1e-5}
BOTH = pytest.mark.parametrize("top_k", [1, None], ids=["top-1", "dense"])


def mixture(
    top_k: int | None = None,
    dtype: torch.dtype = torch.float64,
    *,
    width: int = WIDTH,
    rank: int = RANK,
    experts: int = EXPERTS,
    heads: int = HEADS,
    activation: type[nn.Module] = nn.ReLU,
    out: int | None = None,
) -> MixtureOfAdapters:
    """One whose parameters are all random, with gates that are neither even nor saturated."""
    torch.manual_seed(0)
    made = MixtureOfAdapters(
        width, rank, experts, heads, top_k=top_k, activation=activation, out=out
    )
    made = made.to(dtype)
    with torch.no_grad():
        for name in NAMES[2:]:
            getattr(made, name).normal_(std=0.3)
        made.reduction.mul_(4)
    return made


def loop(m: MixtureOfAdapters, x: Tensor) -> tuple[Tensor, Tensor]:
    """Algorithm 1: sub-tokens, gates, then the experts one after the other."""
    u = x.reshape(-1, x.shape[-1] // m.heads)
    unit = m.embeddings / m.embeddings.norm(dim=-1, keepdim=True)
    gates = torch.softmax(u @ m.reduction.T @ unit.T, dim=-1)
    weights = gates
    if m.top_k == 1:
        weights = gates * F.one_hot(gates.argmax(-1), gates.shape[-1]).to(gates)
    mixed = u.new_zeros(len(u), m.up.shape[1])
    for i in range(len(m.down)):
        hidden = m.act(u @ m.down[i].T + m.down_bias[i])
        mixed = mixed + weights[:, i, None] * (hidden @ m.up[i].T + m.up_bias[i])
    return mixed.reshape(*x.shape[:-1], mixed.shape[1] * m.heads), gates


def cotangents(m: MixtureOfAdapters, x: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = x.numel() // (x.shape[-1] // m.heads)
    shapes = (x.shape, (rows, len(m.down)))
    a, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return a.to(x), b.to(x)


def results(m: MixtureOfAdapters, run: Callable[[Tensor], Any], x: Tensor) -> dict[str, Tensor]:
    """Values, and the gradients of a random linear function of them."""
    x = x.detach().requires_grad_()
    m.zero_grad()
    y, gates = run(x)
    cot, cot_gates = cotangents(m, x)
    ((y * cot).sum() + (gates * cot_gates).sum()).backward()
    grads = {name: getattr(m, name).grad.clone() for name in NAMES}
    return {"y": y.detach(), "gates": gates.detach(), "x": x.grad, **grads}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """max|a - b| <= tolerance * max|b|, tensor by tensor."""
    for name, b in want.items():
        a = got[name]
        assert a.shape == b.shape, name
        assert a.dtype == b.dtype, name
        if b.numel():
            off, size = (a - b).abs().max().item(), b.abs().max().item()
            assert off <= tolerance * size, f"{name}: {off / max(size, 1e-300):.2e}"


def compare(m: MixtureOfAdapters, x: Tensor, times: float = 1) -> None:
    want = results(m, lambda t: loop(m, t), x)
    assert_close(results(m, m, x), want, times * TOLERANCE[x.dtype])


# values and gradients --------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4), (9,), ()], ids=str)
def test_it_equals_the_loop(top_k: int | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(mixture(top_k, dtype), torch.randn(*shape, WIDTH, dtype=dtype))


@BOTH
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_equals_the_loop_at_the_size_of_vit_b(top_k: int | None, dtype: torch.dtype) -> None:
    # the loop with its rows in another order is itself 16 eps away from the loop, at these sums
    m = mixture(top_k, dtype, width=768, rank=64)
    compare(m, torch.randn(4, 197, 768, dtype=dtype), times=2 if dtype == torch.float64 else 1)


@BOTH
@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, surgery.QuickGELU])
def test_it_equals_the_loop_for_other_activations(
    top_k: int | None, activation: type[nn.Module]
) -> None:
    m = mixture(top_k, activation=activation)
    compare(m, torch.randn(5, 7, WIDTH, dtype=torch.float64))


@BOTH
@pytest.mark.parametrize("heads", [1, 2, 6, 48])
def test_it_equals_the_loop_for_any_heads(top_k: int | None, heads: int) -> None:
    compare(mixture(top_k, heads=heads), torch.randn(5, 7, WIDTH, dtype=torch.float64))


@BOTH
@pytest.mark.parametrize("out", [WIDTH // 2, 2 * WIDTH])
def test_it_equals_the_loop_where_it_gives_more_or_fewer(top_k: int | None, out: int) -> None:
    m, x = mixture(top_k, out=out), torch.randn(3, 5, WIDTH, dtype=torch.float64)
    output, gates = m(x)
    assert output.shape == (3, 5, out)
    for got, want in zip((output, gates), loop(m, x), strict=True):
        torch.testing.assert_close(got, want)


@BOTH
def test_it_equals_the_loop_on_what_is_not_contiguous(top_k: int | None) -> None:
    m = mixture(top_k)
    permuted = torch.randn(WIDTH, 7, 5, dtype=torch.float64).permute(2, 1, 0)
    strided = torch.randn(5, 7, 2 * WIDTH, dtype=torch.float64)[..., ::2]
    expanded = torch.randn(1, 7, WIDTH, dtype=torch.float64).expand(5, 7, WIDTH)
    for x in (permuted, strided, expanded):
        assert not x.is_contiguous()
        compare(m, x)


@BOTH
@pytest.mark.parametrize("shape", [(0, 7, WIDTH), (3, 0, WIDTH)], ids=str)
def test_an_empty_batch_gives_an_empty_answer_and_zero_gradients(
    top_k: int | None, shape: tuple[int, ...]
) -> None:
    m = mixture(top_k)
    compare(m, torch.empty(shape, dtype=torch.float64))
    assert all((getattr(m, name).grad == 0).all() for name in NAMES)


@BOTH
def test_gradients_agree_with_finite_differences(top_k: int | None) -> None:
    m = mixture(top_k, width=6, rank=2, activation=nn.Tanh)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *weights: Tensor) -> Any:
        named = dict(zip(NAMES, weights, strict=True))
        return tuple(torch.func.functional_call(m, named, (x,)))

    weights = [getattr(m, name) for name in NAMES]
    assert torch.autograd.gradcheck(run, (x, *weights))


def test_the_static_form_of_top_1_equals_the_sorted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x = mixture(1), torch.randn(5, 7, WIDTH, dtype=torch.float64)
    assert ops.may_sort(x)
    want = results(m, m, x)
    monkeypatch.setattr(ops, "may_sort", lambda u: False)
    assert_close(results(m, m, x), want, TOLERANCE[torch.float64])
    compare(m, x)


def test_an_expert_that_no_sub_token_chose_gets_a_zero_gradient() -> None:
    m, x = mixture(1), torch.randn(1, 1, WIDTH, dtype=torch.float64)
    compare(m, x)
    idle = ops.load(m(x).gates) == 0
    assert idle.any()
    assert all((getattr(m, name).grad[idle] == 0).all() for name in NAMES[2:])
    assert (m.down.grad[~idle] != 0).any()


@BOTH
def test_vmap_and_per_sample_gradients_equal_one_by_one(top_k: int | None) -> None:
    m, x = mixture(top_k), torch.randn(4, 5, WIDTH, dtype=torch.float64)
    weights = dict(m.named_parameters())

    def loss(w: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(m, w, (x,)).output.square().sum()

    per = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i in range(4):
        one = torch.func.grad(loss)(weights, x[i])
        assert_close({k: v[i] for k, v in per.items()}, one, 100 * EPS)


# low precision ---------------------------------------------------------------------------------


@BOTH
def test_bf16_stays_bf16_with_gates_in_float32(top_k: int | None) -> None:
    m = mixture(top_k, torch.float32).bfloat16()
    fine, x = copy.deepcopy(m).float(), torch.randn(5, 7, WIDTH).bfloat16()
    y, gates = m(x.requires_grad_())
    y.sum().backward()
    assert y.dtype == x.grad.dtype == m.down.grad.dtype == torch.bfloat16
    assert gates.dtype == torch.float32
    want, want_gates = loop(fine, x.detach().float())
    sure = want_gates.topk(2).values.diff().abs().flatten() > 0.1  # rounding cannot turn these
    assert sure.sum() > 50
    torch.testing.assert_close(gates, want_gates, rtol=0.1, atol=0.02)
    u, v = (ops.split_heads(t.float(), HEADS)[sure] for t in (y, want))
    torch.testing.assert_close(u, v, rtol=0.05, atol=0.1)


@BOTH
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_answers_as_a_linear_layer_does(top_k: int | None, half: torch.dtype) -> None:
    m, x = mixture(top_k, torch.float32), torch.randn(5, 7, WIDTH, requires_grad=True)
    with torch.autocast("cpu", half):
        y, gates = m(x)
    y.float().sum().backward()
    assert y.dtype == half
    assert gates.dtype == m.down.grad.dtype == x.grad.dtype == torch.float32
    want, want_gates = loop(m, x)
    sure = want_gates.topk(2).values.diff().abs().flatten() > 0.1
    u, v = (ops.split_heads(t.float(), HEADS)[sure] for t in (y, want))
    torch.testing.assert_close(u, v, rtol=0.05, atol=0.1)


@BOTH
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_under_autocast_keeps_gradients_bitwise(
    top_k: int | None, reentrant: bool
) -> None:
    m, x = mixture(top_k, torch.float32), torch.randn(5, 7, WIDTH, requires_grad=True)
    leaves = [x, *m.parameters()]

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x)
        y.float().square().sum().backward()
        return [leaf.grad.clone() for leaf in leaves]

    want = gradients(lambda t: m(t).output)
    got = gradients(lambda t: checkpoint(lambda t: m(t).output, t, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# layouts ---------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A module with features on one axis, to put a mixture beside."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        conv = layout == "b c h w"
        self.mlp = nn.Conv2d(WIDTH, WIDTH, 1) if conv else nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


SHAPES = {"b n c": (2, 5, WIDTH), "b h w c": (2, 3, 4, WIDTH), "b c h w": (2, WIDTH, 3, 4)}


@BOTH
@pytest.mark.parametrize("layout", SHAPES)
def test_a_graft_adds_the_loop_on_the_feature_axis(top_k: int | None, layout: str) -> None:
    model = Layer(layout).double()
    base, x = copy.deepcopy(model), torch.randn(SHAPES[layout], dtype=torch.float64)
    rule = at("mlp", parallel(shared(moa(rank=RANK, heads=HEADS, top_k=top_k)), scale=0.1))
    surgery.apply(model, rule, example=x)
    part = next(m for m in model.modules() if isinstance(m, MixtureOfAdapters))
    _randomise(part)
    last = x.movedim(1, -1) if layout == "b c h w" else x
    added, gates = loop(part, last)
    want = base(x) + 0.1 * (added.movedim(-1, 1) if layout == "b c h w" else added)
    got = model(x)
    assert_close({"y": got}, {"y": want}, TOLERANCE[torch.float64])
    assert_close({"g": surgery.routing(model)["mlp"].gates}, {"g": gates.detach()}, 16 * EPS)
    _same_gradients(part, got, want)


def _randomise(part: MixtureOfAdapters) -> None:
    with torch.no_grad():
        for name in NAMES[2:]:
            getattr(part, name).normal_(std=0.3)


def _same_gradients(part: MixtureOfAdapters, got: Tensor, want: Tensor) -> None:
    weights = [getattr(part, name) for name in NAMES]
    cot = torch.randn_like(got)
    a, b = (torch.autograd.grad((y * cot).sum(), weights) for y in (got, want))
    pair = (dict(zip(NAMES, g, strict=True)) for g in (a, b))
    assert_close(*pair, TOLERANCE[torch.float64])


@BOTH
def test_a_grafted_convnext_equals_one_whose_blocks_run_the_loop(top_k: int | None) -> None:
    from timm.models.convnext import ConvNeXt

    dims = (12, 12, 24, 24)
    model = ConvNeXt(num_classes=5, depths=(1, 1, 1, 1), dims=dims, conv_mlp=True).double().eval()
    rule = at(surgery.ffn, parallel(shared(moa(rank=4, top_k=top_k))), times=4)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    surgery.apply(model, rule, example=x)
    parts = [m for m in model.modules() if isinstance(m, MixtureOfAdapters)]
    assert len(parts) == 2
    for part in parts:
        _randomise(part)
    want = model(x)
    for part in parts:
        part.forward = lambda x, part=part: ops.Routed(*loop(part, x))
    assert_close({"y": model(x)}, {"y": want}, 1e-13)


# routing and balance ---------------------------------------------------------------------------


@BOTH
def test_gates_lie_on_the_simplex(top_k: int | None) -> None:
    gates = mixture(top_k)(torch.randn(50, WIDTH, dtype=torch.float64)).gates
    assert (gates >= 0).all()
    assert (gates.sum(-1) - 1).abs().max() <= EXPERTS * EPS
    assert gates.max(-1).values.std() > 0.02, "the gates of this test are all alike"


@BOTH
def test_a_single_expert_has_a_gate_of_exactly_one(top_k: int | None) -> None:
    m, x = mixture(top_k, experts=1), torch.randn(5, WIDTH, dtype=torch.float64)
    y, gates = m(x)
    assert (gates == 1).all()
    u = ops.split_heads(x, HEADS)
    alone = F.linear(m.act(F.linear(u, m.down[0], m.down_bias[0])), m.up[0], m.up_bias[0])
    assert_close({"y": y}, {"y": alone.reshape(x.shape)}, 4 * EPS)


@BOTH
def test_permuting_experts_with_their_embeddings_changes_nothing(top_k: int | None) -> None:
    m, x = mixture(top_k), torch.randn(5, WIDTH, dtype=torch.float64)
    want, order = m(x), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for name in NAMES[1:]:
            getattr(m, name).copy_(getattr(m, name)[order])
    got = m(x)
    assert_close({"y": got.output}, {"y": want.output}, 4 * EPS)
    assert_close({"g": got.gates}, {"g": want.gates[:, order]}, 4 * EPS)


def test_equal_experts_collapse_to_one_adapter_when_mixed() -> None:
    m, x = mixture(None), torch.randn(5, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        for name in NAMES[2:]:
            getattr(m, name).copy_(getattr(m, name)[:1].expand_as(getattr(m, name)).clone())
    u = ops.split_heads(x, HEADS)
    alone = F.linear(m.act(F.linear(u, m.down[0], m.down_bias[0])), m.up[0], m.up_bias[0])
    assert_close({"y": m(x).output}, {"y": alone.reshape(x.shape)}, 4 * EPS)


def switch(gates: Tensor) -> Tensor:
    """The Switch loss as it is written: n sum_p t_p mean(g_p)."""
    n = gates.shape[-1]
    chosen = F.one_hot(gates.argmax(-1), n).to(gates).mean(0)
    return n * (chosen * gates.mean(0)).sum()


def test_balance_is_the_switch_loss_with_its_gradient() -> None:
    gates = torch.randn(50, EXPERTS, dtype=torch.float64).softmax(-1).requires_grad_()
    got, want = ops.balance(gates), switch(gates)
    assert_close({"v": got.detach()}, {"v": want.detach()}, 4 * EPS)
    a, b = (torch.autograd.grad(v, gates)[0] for v in (got, want))
    assert_close({"g": a}, {"g": b}, 4 * EPS)


def test_balance_is_one_when_even_and_n_when_collapsed() -> None:
    even = torch.eye(EXPERTS).repeat(3, 1)
    assert ops.balance(even).item() == pytest.approx(1, abs=1e-6)
    flat = torch.full((12, EXPERTS), 1 / EXPERTS)
    assert ops.balance(flat).item() == pytest.approx(1, abs=1e-6)
    collapsed = torch.eye(EXPERTS)[:1].expand(12, EXPERTS)
    assert ops.balance(collapsed).item() == pytest.approx(EXPERTS, abs=1e-6)


def test_balance_is_not_bounded_below_by_one() -> None:
    e, t = 1e-9, 1 / 3
    rows = [[t + 2 * e, 0, t - e, t - e], [0, t + 2 * e, t - e, t - e]]
    gates = torch.tensor(rows, dtype=torch.float64).repeat(6, 1)
    assert ops.balance(gates).item() == pytest.approx(2 / 3, abs=1e-6)


def test_balance_lies_between_zero_and_n() -> None:
    for n in (2, 3, 8):
        gates = (4 * torch.randn(200, 10, n, dtype=torch.float64)).softmax(-1)
        values = torch.stack([ops.balance(g) for g in gates])
        assert (values > 0).all()
        assert (values <= n).all()
        assert values.std() > 0


def test_balance_of_no_sub_token_is_zero_with_a_zero_gradient() -> None:
    gates = torch.zeros(0, EXPERTS, requires_grad=True)
    value = ops.balance(gates)
    value.backward()
    assert value.item() == 0
    assert gates.grad.shape == (0, EXPERTS)


def test_load_counts_the_likeliest_expert() -> None:
    gates = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.1, 0.9], [0.51, 0.49]])
    assert ops.load(gates).tolist() == [0.75, 0.25]


@BOTH
def test_with_balance_passes_the_output_and_adds_the_gradient(top_k: int | None) -> None:
    m, x = mixture(top_k), torch.randn(5, 7, WIDTH, dtype=torch.float64)
    y, gates = m(x)
    (y.square().sum() + 0.7 * switch(gates)).backward()
    want = {name: getattr(m, name).grad.clone() for name in NAMES}
    for coefficient in (0.7, lambda: 0.7):
        m.zero_grad()
        routed = m(x)
        out = ops.with_balance(routed.output, routed.gates, coefficient)
        assert torch.equal(out, y)
        out.square().sum().backward()
        assert_close({name: getattr(m, name).grad for name in NAMES}, want, 100 * EPS)


def test_split_takes_contiguous_chunks_and_merge_puts_them_back() -> None:
    x = torch.arange(12.0).reshape(2, 6)
    u = ops.split_heads(x, 3)
    assert u.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert torch.equal(ops.merge_heads(u, x), x)


# the part --------------------------------------------------------------------------------------


def test_it_starts_by_adding_nothing_and_counts_as_the_paper() -> None:
    m = MixtureOfAdapters(768)
    assert (m(torch.randn(2, 3, 768)).output == 0).all()
    assert sum(p.numel() for p in m.parameters()) == 148_992


def test_heads_that_do_not_divide_are_refused_with_the_nearest_divisors() -> None:
    with pytest.raises(surgery.RuleError, match=r"heads=3.*\n.*2, 4") as caught:
        MixtureOfAdapters(32, heads=3)
    assert "fit=True" in caught.value.remedy


def test_fit_takes_the_nearest_divisor_and_the_report_says_so() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    surgery.apply(model, at("0", parallel(moa(heads=3, fit=True))))
    assert "4 heads: the divisor of 32 nearest to 3" in str(surgery.report(model))


def test_another_top_k_is_refused() -> None:
    for top_k in (0, 2, True + 1):
        with pytest.raises(surgery.RuleError, match="top_k"):
            MixtureOfAdapters(48, top_k=top_k)


@BOTH
def test_dropout_acts_on_hidden_units_in_training_only(top_k: int | None) -> None:
    m = MixtureOfAdapters(WIDTH, RANK, EXPERTS, HEADS, top_k=top_k, dropout=0.5)
    _randomise(m)
    x = torch.randn(5, WIDTH)
    assert not torch.equal(m(x).output, m(x).output)
    assert torch.equal(m.eval()(x).output, m(x).output)
