"""Law 6, no silent nothing: what `apply(example=)` proves of gradients and of the start."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import surgery
from surgery import (
    adapter,
    append,
    at,
    ffn,
    insert,
    moa,
    parallel,
    prompt,
    shared,
    unfreeze,
)
from surgery.errors import GraftError
from tests import models
from tests.engine.refusals import apply_error
from tests.laws import checks as laws
from tests.laws.checks import Linears, plain, raised


class Branches(nn.Module):
    """Two linears, of which `how` says what becomes of the second."""

    def __init__(self, how: str = "used") -> None:
        super().__init__()
        self.one, self.two, self.how = nn.Linear(8, 8), nn.Linear(8, 8), how

    def forward(self, x: Tensor) -> Any:
        y = self.one(x)
        if self.how == "detached":
            return y + self.two(x).detach()
        if self.how == "no_grad":
            with torch.no_grad():
                return y + self.two(x)
        if self.how == "dropped":
            self.two(x)
            return y
        if self.how == "whole":
            return (y + self.two(x)).argmax(-1)
        return y + self.two(x)


@pytest.mark.parametrize("how", ["detached", "no_grad", "dropped"])
@pytest.mark.parametrize("edit", [parallel, append], ids=["parallel", "append"])
def test_a_part_that_no_gradient_comes_to_is_named(how: str, edit: Any) -> None:
    if how == "no_grad":
        model: nn.Module = nn.Sequential(_NoGrad(), nn.Linear(8, 8))
        rules, names = at(nn.Linear, edit(plain)), f"0.inner/{edit.__name__}.weight"
    else:
        model = Branches(how)
        rules, names = at(nn.Linear, edit(plain)), f"two/{edit.__name__}.weight"
    said = apply_error(model, rules, torch.randn(2, 8))
    assert names.replace(".inner", "/inner") in said
    assert "at(where(nn.Linear), ...)" in said
    assert f"one/{edit.__name__}" not in said


class _NoGrad(nn.Module):
    """A frozen backbone, as its author saw it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_an_unfrozen_tensor_that_no_gradient_comes_to_is_named() -> None:
    said = apply_error(Branches("detached"), at(nn.Linear, unfreeze), torch.randn(2, 8))
    assert "two.weight, two.bias" in said
    assert "one.weight" not in said
    assert "at(where(nn.Linear), ...)" in said


def test_unfreezing_the_whole_model_excuses_what_it_does_not_use() -> None:
    model = surgery.apply(Branches("detached"), "full", example=torch.randn(2, 8))
    assert len(surgery.parameters(model)) == 4


def test_an_unfrozen_module_may_hold_a_tensor_that_is_not_used() -> None:
    class Masked(Linears):
        def __init__(self) -> None:
            super().__init__()
            self.mask_token = nn.Parameter(torch.zeros(8))

    surgery.apply(nn.Sequential(Masked()), at("0", unfreeze), example=torch.randn(2, 8))


def test_an_output_without_any_gradient_is_told_as_such() -> None:
    said = apply_error(Branches("whole"), at("two", append(plain)), torch.randn(2, 8))
    assert "carries no gradient" in said
    assert "two/append.weight" in said


def test_top_one_experts_without_a_token_are_no_error() -> None:
    rules = at(ffn, parallel(shared(moa(experts=8, rank=2, heads=1))))
    model = surgery.apply(models.tiny_vit(), rules, example=models.images()[:1])
    assert all(p.grad is None for p in model.parameters())


def test_a_part_of_the_users_that_runs_one_of_its_experts_is_no_error() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            return self.experts[0](x)

    surgery.apply(Linears(), at("one", append(lambda s: Picks())), example=torch.randn(2, 8))


@dataclass
class Opaque:
    hidden: Any


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (torch.ones(2, dtype=torch.long), (y,)),
    "dict": lambda y: {"count": 3, "more": [{"y": y}]},
    "dataclass": lambda y: Opaque({"y": y}),
    "object": lambda y: torch.distributions.Normal(y, 1.0),
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_gradient_is_found_in_any_output(wrap: str) -> None:
    class Wrapping(Branches):
        def forward(self, x: Tensor) -> Any:
            return WRAPS[wrap](super().forward(x))

    x = torch.randn(2, 8)
    surgery.apply(Wrapping(), at("two", parallel(plain)), example=x)
    assert "two/parallel" in apply_error(Wrapping("detached"), at("two", parallel(plain)), x)


def test_gradient_is_found_in_a_model_output_of_transformers() -> None:
    ids = torch.randint(0, 32, (2, 6))
    for build in (models.hf_bert, models.hf_gpt2, models.hf_llama):
        surgery.apply(build(), "adapterx_ffn", example={"input_ids": ids})


def test_the_proof_leaves_gradients_flags_and_the_example_alone() -> None:
    class Normalising(Linears):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(1.0))

    model, x = Normalising().train(), torch.zeros(2, 8)
    model.one.weight.grad = torch.ones(8, 8)
    model.two.eval()
    random = torch.get_rng_state()
    surgery.apply(model, [at("one", parallel(plain), unfreeze)], example=x)
    assert torch.equal(model.one.weight.grad, torch.ones(8, 8))
    assert torch.equal(x, torch.zeros(2, 8))
    assert torch.equal(random, torch.get_rng_state())
    assert (model.training, model.one.training, model.two.training) == (True, True, False)
    assert all(p.grad is None for p in model.surgery.parameters())


def test_a_cache_in_the_example_does_not_grow() -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    example = {"input_ids": torch.randint(0, 32, (2, 6)), "past_key_values": cache}
    surgery.apply(models.hf_llama(), "adapterx_ffn", example=example)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("outside", [torch.no_grad, torch.inference_mode])
def test_apply_proves_gradients_whatever_the_mode_it_is_called_in(outside: Any) -> None:
    model, other, rule = Linears(), Branches("detached"), at("two", append(plain))
    with outside():
        surgery.apply(model, rule, example=torch.ones(2, 8))
        apply_error(other, rule, torch.ones(2, 8))
    model(torch.randn(2, 8)).sum().backward()
    assert all(p.grad is not None for p in surgery.parameters(model))


def test_a_graft_that_runs_with_gradients_only_is_an_error() -> None:
    class Fast(Linears):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return super().forward(x)
            return F.linear(F.relu(self.one(x)), self.two.weight, self.two.bias)

    assert "(two) never ran" in apply_error(Fast(), at("two", append(plain)), torch.randn(2, 8))


def test_a_meta_model_is_proved_too() -> None:
    with torch.device("meta"):
        model, other = models.tiny_vit(), Branches("detached")
    x = torch.empty(2, 3, 16, 16, device="meta")
    surgery.apply(model, "adapterx_ffn", example=x)
    x = torch.empty(2, 8, device="meta")
    error = raised(
        surgery.GraftError, lambda: surgery.apply(other, at("two", append(plain)), example=x)
    )
    assert "two/append" in str(error)


def test_an_example_may_be_what_a_tokenizer_gives() -> None:
    from transformers import BatchEncoding

    ids = torch.randint(0, 32, (2, 6))
    surgery.apply(models.hf_bert(), "adapter", example=BatchEncoding({"input_ids": ids}))


def test_a_scripted_module_beside_the_site_is_no_hindrance() -> None:
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 8)))
    surgery.apply(model, at("0", parallel(plain)), example=torch.randn(2, 8))


class Checkpointed(Linears):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_checkpointing_is_seen_through_or_refused(reentrant: bool, first: bool) -> None:
    """Reentrant checkpointing trains what is inside only if its input asks for a gradient."""
    model = nn.Sequential(nn.Linear(8, 8), Checkpointed(reentrant))
    rules = [at("1.two", append(plain)), *([at("0", unfreeze)] if first else [])]
    if reentrant and not first:
        assert "carries no gradient" in apply_error(model, rules, torch.randn(2, 8))
        return
    surgery.apply(model, rules, example=torch.randn(2, 8))
    model(torch.randn(2, 8)).sum().backward()
    assert all(p.grad is not None for p in surgery.parameters(model))


class Claims(nn.Linear):
    """A part that says of itself what is not so."""

    starts_at_zero = True

    def __init__(self, site: surgery.Site) -> None:
        super().__init__(site.width, site.out)


def test_a_part_that_does_not_start_as_it_says_is_told() -> None:
    x = torch.randn(2, 8)
    said = apply_error(Linears(), at("one", parallel(Claims)), x)
    assert "starts_at_zero" in said
    surgery.apply(Linears(), at("one", append(Claims)), example=x)  # which claims nothing


def test_a_model_that_answers_differently_each_time_is_no_error() -> None:
    class Counting(Linears):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) * self.calls

    class Drawing(Linears):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(1)

    for build in (Counting, Drawing):
        surgery.apply(build(), at("one", parallel(adapter(rank=2))), example=torch.randn(2, 8))


def test_infinite_and_missing_numbers_in_the_output_are_no_difference() -> None:
    class Masked(Linears):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, torch.full((2,), torch.inf), torch.full((2,), torch.nan), y[:0]

    surgery.apply(Masked(), at("one", parallel(adapter(rank=2))), example=torch.randn(2, 8))


class Counts(nn.Module):
    """Counts its forwards in a buffer, in eval mode too, as caches and observers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


@pytest.mark.parametrize("fails", [False, True])
def test_the_proof_leaves_buffers_as_they_were(fails: bool) -> None:
    model, x = Counts(), torch.randn(2, 8)
    rule = at("linear", append(lambda s: nn.Linear(8, 3 if fails else 8)))
    with pytest.raises(surgery.GraftError) if fails else contextlib.nullcontext():
        surgery.apply(model, rule, example=x)
    assert model.calls.item() == 0


class Windowed(nn.Module):
    """A softmax over windows of 8 tokens, of which the last hears nothing where 8 divide no n."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        scores = y @ y.mT
        n = x.shape[1] // 4 * 4
        seen = torch.arange(x.shape[1]) < n
        first = torch.arange(x.shape[1]) // 4
        mask = (first[:, None] == first) & seen & seen[:, None]
        x = x + self.out(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ y)
        return x + self.down(self.up(x).relu())  # type: ignore[no-any-return]


def test_an_answer_that_is_no_number_is_refused_where_it_was_one() -> None:
    model = nn.Sequential(Windowed(), Windowed(), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 8, 8)
    before = laws.fingerprint(model)
    rules = at("{0,1}", insert(prompt(tokens=3)))
    told = raised(GraftError, lambda: surgery.apply(model, rules, example=x))
    assert "numbers of the answer are nan with its parts, and 0 without them" in str(told)
    assert "use a method that adds none" in str(told)
    laws.assert_same(before, laws.fingerprint(model), "a refusal")
    surgery.apply(model, at("{0,1}", insert(prompt(tokens=4))), example=x)


class Infinite(nn.Linear):
    def reset_parameters(self) -> None:
        self.weight.data.fill_(torch.inf)
        self.bias.data.fill_(-torch.inf)


def test_parts_that_overflow_are_told_so() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.ones(2, 4)
    rules = at("0", append(lambda site: Infinite(4, 4)))
    told = raised(GraftError, lambda: surgery.apply(model, rules, example=x))
    assert "Give parts that start smaller" in str(told)


def test_an_answer_that_was_no_number_may_be_none() -> None:
    class Masks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super().forward(x), torch.full((len(x), 1), torch.nan)], 1)

    model, x = nn.Sequential(nn.Linear(4, 4), Masks(4, 2)), torch.ones(2, 4)
    surgery.apply(model, at("0", parallel(adapter(rank=2))), example=x)
