"""The ways PyTorch runs a model: right outputs and gradients in each, or a clear refusal."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgery
from surgery import at, ffn, head, moa, nearest, norm, parallel, prepend, replace, shared, unfreeze
from tests.laws import checks as laws
from tests.laws.checks import raised
from tests.models import images, tiny_vit

WEIGHT = 1.0  # of the balance loss; large, so that it is seen
Grads = dict[str, Tensor]


def rules(top_k: int | None = 1) -> list[surgery.Rule]:
    """adapterx_ffn without dropout."""
    mixture = shared(moa(rank=4, heads=3, top_k=top_k))
    return [
        at(ffn, parallel(mixture, scale=0.1)),
        at(nearest(norm, before=ffn), unfreeze),
        at(head, unfreeze),
    ]


def operated(
    *, balance: Any = None, top_k: int | None = 1, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """A ViT in training mode whose parts have left the identity; always the same one."""
    torch.manual_seed(0)
    model = tiny_vit().to(dtype).train()
    surgery.apply(model, rules(top_k), balance=balance)
    laws.stir(model)
    return model


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    return images().to(dtype)


def gradients(model: nn.Module) -> Grads:
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def explicit(model: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> Grads:
    """Gradients of task loss + WEIGHT * balance_loss(model)."""
    x = inputs(next(model.parameters()).dtype).requires_grad_()
    y = model(x) if run is None else run(x)
    loss = y.square().sum() + WEIGHT * surgery.balance_loss(model)
    loss.backward()
    return gradients(model)


def implicit(model: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> Grads:
    """Gradients of the task loss alone, for a model that adds the balance loss by itself."""
    x = inputs(next(model.parameters()).dtype).requires_grad_()
    y = model(x) if run is None else run(x)
    y.square().sum().backward()
    return gradients(model)


def reference(top_k: int | None = 1) -> Grads:
    return explicit(operated(top_k=top_k))


def assert_close(got: Grads, want: Grads, tolerance: float = 1e-12) -> None:
    assert got.keys() == want.keys()
    for key, b in want.items():
        off = (got[key] - b).abs().max().item()
        assert off <= tolerance * b.abs().max().item() + 1e-300, f"{key}: {off}"


def router(grads: Grads) -> Tensor:
    return next(g for key, g in grads.items() if key.endswith("reduction"))


WAYS: dict[str, tuple[Any, Callable[..., Grads]]] = {
    "balance_loss": (None, explicit),
    "balance=": (WEIGHT, implicit),
    "balance=function": (lambda: WEIGHT, implicit),
}
BOTH_WAYS = pytest.mark.parametrize("way", WAYS)
BOTH_KINDS = pytest.mark.parametrize("top_k", [1, None], ids=["top-1", "dense"])


def test_the_balance_loss_matters_in_these_tests() -> None:
    """Without it the router's gradient is another: a missing one would be seen."""
    want, without = router(reference()), router(implicit(operated()))
    assert (want - without).abs().max() > 0.01 * want.abs().max()


@BOTH_KINDS
@BOTH_WAYS
def test_eager(way: str, top_k: int | None) -> None:
    balance, run = WAYS[way]
    assert_close(run(operated(balance=balance, top_k=top_k)), reference(top_k))


# compile and export ----------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")


@BOTH_KINDS
@BOTH_WAYS
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_whole_graph(way: str, top_k: int | None) -> None:
    balance, run = WAYS[way]
    model = operated(balance=balance, top_k=top_k)
    want = operated(top_k=top_k)(inputs())
    run_compiled = compiled(model)
    assert_close(run(model, run_compiled), reference(top_k))
    assert_close({"y": run_compiled(inputs())}, {"y": want})


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_before_apply_is_refused() -> None:
    wrapped = compiled(tiny_vit())
    told = str(raised(surgery.OperationError, lambda: surgery.apply(wrapped, rules())))
    assert "_orig_mod" in told


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_follows_disabled_and_revert() -> None:
    model, x = operated().eval(), inputs()
    run, tuned = compiled(model), operated().eval()(x)
    assert_close({"y": run(x)}, {"y": tuned})
    torch.manual_seed(0)
    base = tiny_vit().double().eval()(x)
    with surgery.disabled(model):
        assert_close({"y": run(x)}, {"y": base})
    assert_close({"y": run(x)}, {"y": tuned})
    surgery.revert(model)
    assert_close({"y": run(x)}, {"y": base})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, tracing
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_follows_every_edit() -> None:
    model, x = tiny_vit().double().eval(), inputs()
    more = [
        at("blocks.0.attn", prepend(laws.plain)),
        at("blocks.1.mlp", replace(laws.plain)),
        at(surgery.span(norm, "blocks.2.mlp"), parallel(laws.plain), prepend(laws.plain)),
    ]
    surgery.apply(model, more)
    want = model(x)
    assert_close({"y": compiled(model)(x)}, {"y": want})


@pytest.mark.slow
@BOTH_WAYS
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor(way: str) -> None:
    balance, run = WAYS[way]
    model = operated(balance=balance)
    for block in model.blocks:
        block.attn.fused_attn = False  # of which torch 2.11 has no backward in float64
    assert_close(run(model, torch.compile(model, fullgraph=True)), reference())


@BOTH_KINDS
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.usefixtures("fresh_compiler")
def test_export(strict: bool, top_k: int | None) -> None:
    model, x = operated(top_k=top_k).eval(), inputs()
    want = model(x)
    exported = torch.export.export(model, (x,), strict=strict).module()
    assert_close({"y": exported(x)}, {"y": want})
    other = torch.flip(x, (0,))
    assert_close({"y": exported(other)}, {"y": model(other)})


# copies ----------------------------------------------------------------------------------------


def saved_whole(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved_whole,
}


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a forward"])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("balance", [None, WEIGHT], ids=["balance_loss", "balance="])
def test_a_copy_has_the_gradients_and_the_original_none(
    how: str, balance: float | None, ran: bool
) -> None:
    model = operated(balance=balance)
    if ran:
        model(inputs())
    clone = COPIES[how](model)
    assert_close((explicit if balance is None else implicit)(clone), reference())
    assert gradients(model) == {}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_keeps_sharing_routing_and_disabling(how: str) -> None:
    model, x = operated().eval(), inputs()
    clone = COPIES[how](model)
    assert len(surgery.parameters(clone)) == len(surgery.parameters(model))
    clone(x)
    assert list(surgery.routing(clone)) == [f"blocks.{i}.mlp" for i in range(3)]
    with surgery.disabled(clone):
        base = clone(x)
    assert not torch.equal(base, clone(x))
    raised(surgery.GraftError, lambda: surgery.routing(model))


def test_functional_call_runs_with_the_tensors_it_is_given() -> None:
    model, x = operated().eval(), inputs()
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    assert torch.equal(torch.func.functional_call(model, tensors, (x,)), model(x))
    changed = {k: v + 0.1 if "surgery." in k else v for k, v in tensors.items()}
    other = torch.func.functional_call(model, changed, (x,))
    model.load_state_dict(changed)
    assert torch.equal(other, model(x))


@BOTH_WAYS
def test_functional_call_has_the_gradients(way: str) -> None:
    balance, _ = WAYS[way]
    model, x = operated(balance=balance), inputs()
    free = {k: p.detach().clone().requires_grad_() for k, p in named_free(model).items()}
    loss = torch.func.functional_call(model, free, (x,)).square().sum()
    if balance is None:
        loss = loss + WEIGHT * surgery.balance_loss(model)
    grads = torch.autograd.grad(loss, list(free.values()))
    assert_close(dict(zip(free, grads, strict=True)), reference())


def named_free(model: nn.Module) -> dict[str, Tensor]:
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


@BOTH_KINDS
def test_func_grad_equals_backward(top_k: int | None) -> None:
    model, x = operated(balance=WEIGHT, top_k=top_k), inputs()

    def loss(free: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, free, (x,)).square().sum()

    free = {k: p.detach() for k, p in named_free(model).items()}
    assert_close(torch.func.grad(loss)(free), reference(top_k))


# gradient checkpointing ------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Runs each block of a timm ViT under torch.utils.checkpoint."""

    def __init__(self, vit: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.vit, self.reentrant = vit, reentrant

    def forward(self, x: Tensor) -> Tensor:
        v = self.vit
        x = v.norm_pre(v.patch_drop(v._pos_embed(v.patch_embed(x))))
        for each in v.blocks:
            x = checkpoint(each, x, use_reentrant=self.reentrant)
        return v.forward_head(v.norm(x))


@BOTH_KINDS
@BOTH_WAYS
def test_checkpointing_not_reentrant(way: str, top_k: int | None) -> None:
    balance, run = WAYS[way]
    model = operated(balance=balance, top_k=top_k)
    assert_close(run(model, Checkpointed(model, False)), reference(top_k))


@BOTH_KINDS
def test_reentrant_checkpointing_with_balance_in_apply(top_k: int | None) -> None:
    model = operated(balance=WEIGHT, top_k=top_k)
    assert_close(implicit(model, Checkpointed(model, True)), reference(top_k))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_with_balance_loss_is_refused() -> None:
    model = operated()
    run = Checkpointed(model, True)
    for _ in range(2):  # the backward of a first step leaves gates with a gradient of their own
        y = run(inputs().requires_grad_())
        told = str(raised(surgery.GraftError, lambda: surgery.balance_loss(model)))
        assert "use_reentrant=False" in told
        assert "balance=0.01" in told
        y.sum().backward()
    with torch.no_grad():
        run(inputs())
        assert surgery.balance_loss(model) > 0


def test_balance_loss_between_a_reentrant_backward_and_the_next_forward_is_not_wrong() -> None:
    model = operated()
    Checkpointed(model, True)(inputs().requires_grad_()).sum().backward()
    model.zero_grad()
    with pytest.raises((surgery.GraftError, RuntimeError)):
        surgery.balance_loss(model).backward()


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("way", ["balance=", "balance=function"])
@pytest.mark.usefixtures("fresh_compiler")
def test_checkpointing_under_compile_with_balance_in_apply(way: str, reentrant: bool) -> None:
    balance, run = WAYS[way]
    model = operated(balance=balance)
    assert_close(run(model, compiled(Checkpointed(model, reentrant))), reference())


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.usefixtures("fresh_compiler")
def test_checkpointing_under_compile_with_balance_loss_is_right_or_refused(reentrant: bool) -> None:
    model = operated()
    try:
        got = explicit(model, compiled(Checkpointed(model, reentrant)))
    except (surgery.GraftError, torch._dynamo.exc.TorchDynamoException):
        return
    assert_close(got, reference())


@BOTH_WAYS
def test_timms_own_checkpointing(way: str) -> None:
    balance, run = WAYS[way]
    model = operated(balance=balance)
    model.set_grad_checkpointing(True)
    try:
        got = run(model)
    except surgery.GraftError:
        got = None
    assert got is not None or balance is None, "refused, where it should be right"
    assert_close(got or reference(), reference())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_that_drops_all_gradients_does_not_hide_it() -> None:
    class Whole(nn.Module):
        def __init__(self, vit: nn.Module) -> None:
            super().__init__()
            self.vit = vit

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.vit, x, use_reentrant=True)

    model = operated()
    Whole(model)(inputs())
    raised(surgery.GraftError, lambda: surgery.balance_loss(model))


def parts_alone() -> nn.Module:
    """A model in which nothing of the base is trained: no version counter moves in disabled()."""
    torch.manual_seed(0)
    model = tiny_vit().double().train()
    surgery.apply(model, rules()[:1], balance=WEIGHT)
    laws.stir(model)
    return model


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("build", [operated, parts_alone])
def test_a_checkpointed_backward_inside_disabled_is_not_silently_wrong(
    build: Callable[[], nn.Module], reentrant: bool
) -> None:
    want = implicit(build())
    model = build()
    y = Checkpointed(model, reentrant)(inputs().requires_grad_())
    with surgery.disabled(model):
        try:
            y.square().sum().backward()
        except (RuntimeError, surgery.SurgeryError):
            return
    assert_close(gradients(model), want)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own: no grad
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpointed_backward_of_a_disabled_forward_is_not_silently_wrong(
    reentrant: bool,
) -> None:
    model, x = parts_alone(), inputs().requires_grad_()
    torch.manual_seed(0)
    base, same = tiny_vit().double().train(), x.detach().clone().requires_grad_()
    base(same).square().sum().backward()
    with surgery.disabled(model):
        y = Checkpointed(model, reentrant)(x)
    try:
        y.square().sum().backward()
    except (RuntimeError, surgery.SurgeryError):
        return
    assert_close({"x": x.grad}, {"x": same.grad})
    assert all(not g.any() for g in gradients(model).values())


# autocast --------------------------------------------------------------------------------------


def under(dtype: torch.dtype, model: nn.Module, run: Any = None) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return (model if run is None else run)(x).float()

    return forward


def in_float32(dtype: torch.dtype, top_k: int | None = None) -> Grads:
    """The reference under autocast: the explicit form, without checkpointing."""
    model = operated(top_k=top_k, dtype=torch.float32)
    return explicit(model, under(dtype, model))


@pytest.mark.parametrize("way", ["balance=", "balance=function"])
def test_bf16_autocast_has_the_gradients_of_the_explicit_form(way: str) -> None:
    balance, run = WAYS[way]
    model = operated(balance=balance, top_k=None, dtype=torch.float32)
    got = run(model, under(torch.bfloat16, model))
    assert all(g.dtype == torch.float32 for g in got.values())
    assert_close(got, in_float32(torch.bfloat16), 0.02)


def test_bf16_autocast_is_near_float32() -> None:
    model = operated(top_k=None, dtype=torch.float32)
    want = explicit(model)
    got = in_float32(torch.bfloat16)
    for key, b in want.items():
        assert (got[key] - b).norm() <= 0.1 * b.norm() + 1e-6, key


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_bf16_autocast_with_checkpointing(reentrant: bool) -> None:
    model = operated(balance=WEIGHT, top_k=None, dtype=torch.float32)
    got = implicit(model, under(torch.bfloat16, model, Checkpointed(model, reentrant)))
    assert_close(got, in_float32(torch.bfloat16), 0.02)


def test_fp16_autocast_refuses_a_number_for_balance() -> None:
    model = operated(balance=WEIGHT, dtype=torch.float32)
    told = str(raised(surgery.GraftError, lambda: under(torch.float16, model)(images())))
    assert "scaler.get_scale()" in told


@pytest.mark.usefixtures("fresh_compiler")
def test_fp16_autocast_refuses_a_number_for_balance_under_compile_too() -> None:
    model = operated(balance=WEIGHT, dtype=torch.float32)
    with pytest.raises(Exception, match=r"get_scale|Observed exception"):
        compiled(under(torch.float16, model))(images())


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_function_for_balance_follows_the_scale_of_the_loss(reentrant: bool | None) -> None:
    scale = 1024.0
    model = operated(balance=lambda: WEIGHT * scale, top_k=None, dtype=torch.float32)
    inner = model if reentrant is None else Checkpointed(model, reentrant)
    (
        under(torch.float16, model, inner)(images().requires_grad_()).square().sum() * scale
    ).backward()
    got = {k: g / scale for k, g in gradients(model).items()}
    assert_close(got, in_float32(torch.float16), 0.02)


def test_the_scale_is_asked_for_in_backward_not_in_forward() -> None:
    asked: list[float] = []
    model = operated(balance=lambda: asked.append(1.0) or WEIGHT)
    y = model(inputs())
    assert asked == []
    y.square().sum().backward()
    assert len(asked) == 3
    assert_close(gradients(model), reference())


def test_fp16_autocast_with_balance_loss_is_scaled_with_the_loss() -> None:
    model = operated(top_k=None, dtype=torch.float32)
    y = under(torch.float16, model)(images())
    ((y.square().sum() + WEIGHT * surgery.balance_loss(model)) * 1024.0).backward()
    got = {k: g / 1024 for k, g in gradients(model).items()}
    assert_close(got, in_float32(torch.float16), 0.02)


# reading balance and routing -------------------------------------------------------------------


def test_balance_loss_before_a_forward_is_refused() -> None:
    for model in (operated(), copy.deepcopy(operated())):
        raised(surgery.GraftError, lambda model=model: surgery.balance_loss(model))


def test_balance_loss_with_balance_in_apply_is_its_value_without_gradient() -> None:
    model, plain = operated(balance=WEIGHT), operated()
    model(inputs()), plain(inputs())
    value, want = surgery.balance_loss(model), surgery.balance_loss(plain)
    assert not value.requires_grad
    assert value.item() == pytest.approx(want.item(), rel=1e-12)


def test_balance_loss_sums_over_sites() -> None:
    model = operated()
    model(inputs())
    each = [surgery.ops.balance(r.gates).item() for r in surgery.routing(model).values()]
    assert len(each) == 3
    assert surgery.balance_loss(model).item() == pytest.approx(sum(each), rel=1e-6)


def test_balance_loss_is_as_fine_as_the_gates() -> None:
    model = operated()
    model(inputs())
    assert surgery.balance_loss(model).dtype == torch.float64


def test_balance_loss_of_a_model_that_does_not_route_is_zero() -> None:
    model = surgery.apply(tiny_vit(), "adapter")
    model(images())
    assert surgery.balance_loss(model).item() == 0


def test_nothing_accumulates_over_forwards() -> None:
    model = operated()
    for _ in range(3):
        model(inputs())
    assert surgery.balance_loss(model) <= 3 * 4
    assert_close(explicit(model), reference())


def test_gradient_accumulation_adds_up() -> None:
    model = operated(balance=WEIGHT)
    implicit(model)
    got = implicit(model)
    assert_close(got, {k: 2 * g for k, g in reference().items()})
