"""Law 6, no silent nothing: what models do not call, skip, fuse, detach or quantise."""

from __future__ import annotations

import copy
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
    moa,
    parallel,
    prepend,
    replace,
    shared,
    span,
    unfreeze,
)
from tests import models
from tests.laws import checks as laws
from tests.laws.checks import Linears, plain, raised

Build = Callable[[], nn.Module]
pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors is in prototype",  # torch's own, by its own doing
    "ignore:torch.ao.quantization is deprecated",
    "ignore:torch.quantize_per_tensor",
)


def told(model: nn.Module, rules: Any, example: Any) -> str:
    """What apply says of rules that come to nothing; the model must be as it was."""
    before = laws.fingerprint(model)
    error = raised(surgery.GraftError, lambda: surgery.apply(model, rules, example=example))
    laws.assert_same(before, laws.fingerprint(model), "a proof that failed")
    return str(error)


def refused(model: nn.Module, rules: Any) -> str:
    """What plan says of rules that can come to nothing only."""
    before = laws.fingerprint(model)
    error = raised(surgery.RuleError, lambda: surgery.plan(model, rules))
    laws.assert_same(before, laws.fingerprint(model), "a plan that failed")
    return str(error)


# 1: what example= proves -----------------------------------------------------------------------


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
    said = told(model, rules, torch.randn(2, 8))
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
    said = told(Branches("detached"), at(nn.Linear, unfreeze), torch.randn(2, 8))
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
    said = told(Branches("whole"), at("two", append(plain)), torch.randn(2, 8))
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
    assert "two/parallel" in told(Wrapping("detached"), at("two", parallel(plain)), x)


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
        told(other, rule, torch.ones(2, 8))
    model(torch.randn(2, 8)).sum().backward()
    assert all(p.grad is not None for p in surgery.parameters(model))


def test_a_graft_that_runs_with_gradients_only_is_an_error() -> None:
    class Fast(Linears):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                return super().forward(x)
            return F.linear(F.relu(self.one(x)), self.two.weight, self.two.bias)

    assert "(two) never ran" in told(Fast(), at("two", append(plain)), torch.randn(2, 8))


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
        assert "carries no gradient" in told(model, rules, torch.randn(2, 8))
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
    said = told(Linears(), at("one", parallel(Claims)), x)
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


# 2: torch's fused encoder ----------------------------------------------------------------------


def encoder(**changes: Any) -> nn.TransformerEncoder:
    """Width 24, two layers, even heads: as torch fuses it in eval mode without gradients."""
    chosen: dict[str, Any] = {"dim_feedforward": 48, "dropout": 0.0, "batch_first": True}
    layer = nn.TransformerEncoderLayer(24, 4, **{**chosen, **changes})
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(24))


LAYOUTS = [{}, {"norm_first": True}, {"batch_first": False}, {"activation": F.gelu}]


def modes(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The answers of a model in the four ways that it is run."""
    answers = {"train": model.train()(*args, **kwargs).detach()}
    answers["eval"] = model.eval()(*args, **kwargs).detach()
    with torch.no_grad():
        answers["no_grad"] = model(*args, **kwargs)
    with torch.inference_mode():
        answers["inference_mode"] = model(*args, **kwargs).clone()
    return answers


def assert_alike(answers: dict[str, Tensor]) -> None:
    for mode, answer in answers.items():
        off = (answer - answers["train"]).abs().max().item()
        assert off < 1e-5, f"{mode}: {off}"


class Half(nn.Module):
    """A layer that takes what a layer takes."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return src / 2


JOINED = [
    *(at(where, edit(plain)) for where in (ffn, "layers.*", "layers.[-1]", "layers.*.self_attn")
      for edit in (parallel, append, prepend)),
    *(at(where, edit(plain)) for where in ("**.norm1", "**.norm2", "**.linear1", "**.linear2")
      for edit in (append, prepend)),
    *(at(f"**.{name}", append(lambda s: nn.Linear(24, 24)))
      for name in ("dropout1", "dropout2")),
    at("**.dropout", append(lambda s: nn.Linear(48, 48))),
    at("**.linear1", replace(plain)),
    at("**.norm2", replace(plain)),
    at("layers.*", replace(lambda s: Half())),
    at("norm", append(plain)),
    at("", append(plain)),
    at(span("**.norm1", "**.linear2"), append(plain)),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("rule", JOINED, ids=repr)
def test_an_operated_encoder_answers_alike_in_every_mode(rule: Any, layout: Any) -> None:
    if isinstance(rule.where, type(surgery.where(span("a", "b")))) and layout.get("norm_first"):
        rule = at(span("**.norm2", "**.linear2"), *rule.rest)
    x, padded = torch.randn(3, 5, 24), torch.arange(5) >= torch.tensor([[5], [3], [2]])
    x = x if layout.get("batch_first", True) else x.transpose(0, 1)
    for mask in (None, padded):
        model = encoder(**layout).requires_grad_(False)
        base = modes(model, x, src_key_padding_mask=mask)
        surgery.apply(model, rule, example={"src": x, "src_key_padding_mask": mask})
        answers = modes(model, x, src_key_padding_mask=mask)
        assert_alike(answers)
        assert not torch.allclose(answers["train"], base["train"], atol=1e-3), "it does nothing"


def test_without_parts_an_encoder_keeps_its_own_ways() -> None:
    model, x = encoder(), torch.randn(3, 5, 24)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    surgery.apply(
        model, [at("**.norm2", unfreeze)], example={"src": x, "src_key_padding_mask": mask}
    )
    assert model.use_nested_tensor
    laws.stir(model)
    answers = modes(model, x, src_key_padding_mask=mask)
    assert_alike({mode: answer[~mask] for mode, answer in answers.items()})


def test_nested_tensors_come_back_with_revert() -> None:
    outer = nn.ModuleDict({"a": encoder(), "b": encoder()})
    surgery.apply(outer, at("a.layers.0", append(plain)))
    surgery.apply(outer, at("a.layers.1", append(plain)), name="again")
    assert (outer["a"].use_nested_tensor, outer["b"].use_nested_tensor) == (False, True)
    clone = surgery.revert(copy.deepcopy(outer))
    assert clone["a"].use_nested_tensor
    surgery.revert(outer, name="again")
    assert not outer["a"].use_nested_tensor
    surgery.revert(outer)
    assert outer["a"].use_nested_tensor


def test_a_nested_tensor_of_the_users_is_refused_by_name() -> None:
    model = surgery.apply(nn.Sequential(nn.Linear(8, 8)), at("0", parallel(plain)))
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    said = str(raised(surgery.GraftError, lambda: model(nested)))
    assert "nested tensor" in said
    assert "graft at 0" in said


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("edit", [parallel, append, prepend], ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("where", [ffn, "layers.*", "**.self_attn", "**.multihead_attn"], ids=repr)
def test_an_operated_decoder_answers_alike_in_every_mode(
    where: Any, edit: Any, layout: Any
) -> None:
    chosen: dict[str, Any] = {"dim_feedforward": 48, "dropout": 0.0, "batch_first": True, **layout}
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 4, **chosen), 2)
    x, memory = torch.randn(4, 4, 24), torch.randn(4, 4, 24)
    base = modes(model, x, memory)
    surgery.apply(model, at(where, edit(plain)), example=(x, memory))
    answers = modes(model, x, memory)
    assert_alike(answers)
    assert not torch.allclose(answers["train"], base["train"], atol=1e-3), "it does nothing"


class Reader(nn.Module):
    """Reads sequences of tokens, some of them padding, and says which token comes most often."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder, self.head = nn.Embedding(4, 24), encoder(), nn.Linear(24, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encoder(self.embed(ids), src_key_padding_mask=ids == 3)
        return self.head(x.mean(1))


def test_a_trained_adapter_scores_alike_in_every_mode() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 3, (64, 9))
    ids[torch.arange(9) >= torch.randint(4, 10, (64, 1))] = 3  # padding
    ids[0] = ids[0].clamp(max=2)
    want = torch.stack([(ids == k).sum(1) for k in range(3)], 1).argmax(1)
    rules = [at(ffn, parallel(adapter(rank=8))), at("head", unfreeze)]
    model = surgery.apply(Reader(), rules, example=ids)
    optimiser = torch.optim.AdamW(surgery.parameters(model), lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(model(ids), want).backward()
        optimiser.step()
    answers = modes(model, ids)
    scores = {mode: (answer.argmax(1) == want).sum().item() for mode, answer in answers.items()}
    assert_alike(answers)
    assert len(set(scores.values())) == 1, scores
    assert scores["train"] > 50
    laws.stir_parts(model)
    assert not torch.allclose(modes(model, ids)["no_grad"], answers["no_grad"])


# 3: weights that are read, not called ------------------------------------------------------------


@pytest.mark.parametrize("edit", [parallel, append, prepend, replace], ids=lambda e: e.__name__)
def test_the_output_projection_of_multihead_attention_is_refused_at_once(edit: Any) -> None:
    said = refused(encoder(), at("**.out_proj", edit(plain)))
    assert 'at("**.out_proj", ...)' in said
    assert "nn.MultiheadAttention reads the weight of layers.0.self_attn.out_proj" in said
    assert 'at("layers.0.self_attn", ...)' in said
    said = refused(encoder(), at(nn.Linear, edit(plain)))
    assert "~inside(nn.MultiheadAttention)" in said
    surgery.plan(encoder(), at(nn.Linear & ~surgery.inside(nn.MultiheadAttention), edit(plain)))


def test_a_span_may_not_end_there_either() -> None:
    said = refused(
        encoder(), at(span("layers.*.self_attn.out_proj", "layers.*.linear1"), append(plain))
    )
    assert "layers.0.self_attn.out_proj" in said


def test_the_output_projection_may_be_unfrozen() -> None:
    model, x = encoder(), torch.randn(2, 5, 24)
    surgery.apply(model, at("**.out_proj", unfreeze), example=x)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in surgery.parameters(model))


def test_attention_that_calls_its_projection_is_not_refused() -> None:
    class Calling(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.out_proj(x)

    model = nn.Sequential(Calling(24, 4))
    surgery.apply(model, at("**.out_proj", append(plain)), example=torch.randn(2, 24))


def test_a_container_that_is_never_called_is_refused_at_once() -> None:
    said = refused(encoder(), at("layers", append(plain)))
    assert "layers is a ModuleList" in said
    assert 'at("layers.*", ...)' in said


def beit() -> nn.Module:
    from timm.models.beit import Beit

    return Beit(16, 8, embed_dim=24, depth=2, num_heads=3, num_classes=5, init_values=0.1)


def eva() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(16, 8, embed_dim=24, depth=2, num_heads=3, num_classes=5)


def swin_v2() -> nn.Module:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "window_size": 4, "num_classes": 5}
    return SwinTransformerV2(**sizes, depths=(1, 1), num_heads=(3, 3))


def torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    sizes = {"patch_size": [4, 4], "embed_dim": 24, "window_size": [4, 4], "num_classes": 5}
    return SwinTransformer(**sizes, depths=[1, 1], num_heads=[3, 3], stochastic_depth_prob=0.0)


READERS: dict[str, tuple[Build, int, str]] = {
    "beit": (beit, 16, "blocks.0.attn.qkv"),
    "eva": (eva, 16, "blocks.0.attn.qkv"),
    "swin v2": (swin_v2, 32, "layers.0.blocks.0.attn.qkv"),
    "torchvision swin": (torchvision_swin, 32, "features.1.0.attn.qkv"),
    "torchvision swin proj": (torchvision_swin, 32, "features.1.0.attn.proj"),
}


@pytest.mark.parametrize("edit", [parallel, append, prepend, replace], ids=lambda e: e.__name__)
@pytest.mark.parametrize("family", READERS)
def test_a_weight_that_is_read_without_a_call_is_named(family: str, edit: Any) -> None:
    build, size, path = READERS[family]
    model, x = build().eval(), models.images(size=size)
    said = told(model, at(path, edit(plain)), x)
    assert f"1 of 1 sites ({path}) never ran" in said
    assert f"the model reads the weight of {path} without calling it" in said
    assert f'at("{path.rpartition(".")[0]}", ...)' in said
    surgery.apply(model, at(path, unfreeze), example=x)
    surgery.revert(model)
    surgery.apply(model, at(path, edit(plain)))
    assert path in str(raised(surgery.GraftError, lambda: model(x)))


def test_a_module_that_is_skipped_is_told_apart_from_one_that_is_read() -> None:
    class Skips(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return self.one(x).to(self.two.weight.dtype)

    said = told(Skips(), at(nn.Linear, append(plain)), torch.randn(2, 8))
    assert "1 of 2 sites (two) never ran" in said
    assert "reads" not in said
    assert "Give an example" in said


def test_a_span_whose_beginning_is_read_only_is_no_silence() -> None:
    class Reads(Linears):
        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.linear(x, self.one.weight))

    for edit in (parallel, prepend):
        model, x = Reads(), torch.randn(2, 8)
        said = told(model, at(span("one", "two"), edit(plain)), x)
        assert "(one to two)" in said
        inner = at(span("0.one", "0.two"), edit(plain))
        if edit is prepend:
            assert 'such as at("0", ...)' in told(nn.Sequential(Reads()), inner, x)
        surgery.apply(model, at(span("one", "two"), edit(plain)))
        raised(surgery.GraftError, lambda model=model, x=x: model(x))


# 4: bases of every kind --------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """What 8-bit layers look like: integers for weights, a scale, features in the model's dtype."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        weight = torch.randint(-127, 127, (8, 8)).to(torch.int8)
        if kind == "float8":
            weight = torch.randn(8, 8).to(torch.float8_e4m3fn)
        self.scale = nn.Parameter(torch.full((8, 1), 0.01), requires_grad=False)
        if kind == "buffer":
            self.register_buffer("weight", weight)
        else:
            self.weight = nn.Parameter(weight, requires_grad=False)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class Quantised(nn.Module):
    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.lin = Int8Linear(kind, dtype)
        self.norm = nn.LayerNorm(8, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.lin(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["parameter", "float8"])
def test_parts_beside_quantised_weights_are_of_the_norms_dtype(kind: str, dtype: Any) -> None:
    model, x = nn.Sequential(Quantised(kind, dtype)), torch.randn(4, 8, dtype=dtype)
    mark = surgery.fingerprint(model)
    for edit in (append, parallel):
        surgery.apply(model, at("0.lin", edit(lambda s: nn.Linear(8, 8))), example=x)
        assert {p.dtype for p in model.surgery.parameters()} == {dtype}
        model(x).float().square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in surgery.parameters(model))
        surgery.revert(model)
        assert surgery.fingerprint(model) == mark


def test_parts_beside_weights_in_buffers_and_without_any_norm() -> None:
    part = append(lambda s: nn.Linear(8, 8))
    model = surgery.apply(
        nn.Sequential(Int8Linear("parameter", torch.float32)),
        at("0", part),
        example=torch.ones(2, 8),
    )
    assert {p.dtype for p in surgery.parameters(model)} == {torch.float32}
    bare = nn.Sequential(nn.Identity())
    bare.register_buffer("table", torch.zeros(2, 2, dtype=torch.int8, device="meta"))
    surgery.apply(bare, at("0", part))
    assert {(p.dtype, p.device.type) for p in surgery.parameters(bare)} == {(torch.float32, "meta")}


def test_the_bias_of_a_quantised_weight_tells_its_dtype() -> None:
    model = Quantised("parameter", torch.float32)
    model.lin.bias = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    surgery.apply(model, at("lin", append(lambda s: nn.Linear(8, 8))))
    assert {p.dtype for p in model.surgery.parameters()} == {torch.bfloat16}


def test_integers_and_packed_weights_cannot_be_unfrozen_into_silence() -> None:
    model = nn.Sequential(Quantised("parameter", torch.float32))
    model[0].lin.scale = None
    raised(surgery.RuleError, lambda: surgery.apply(model, at("0.lin", unfreeze)))


def test_a_dynamically_quantised_base_can_be_adapted() -> None:
    quantise = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantise is None:
        pytest.skip("this torch quantises nothing by itself")
    x = torch.randn(2, 5, 24)
    model = quantise(models.tiny_vit(), {nn.Linear}, torch.qint8)
    base, x = laws.outcome(model, models.images()), models.images()
    rule = at("blocks.*.mlp", parallel(lambda s: surgery.parts.Adapter(24, 4)))
    surgery.apply(model, rule, example=x)
    assert {p.dtype for p in surgery.parameters(model)} == {torch.float32}
    assert torch.equal(laws.outcome(model, x), base)
    part = model.surgery.default.get_submodule("blocks/2/mlp/parallel")
    _last_block_alone(model, x, part)
    surgery.revert(model)
    assert torch.equal(laws.outcome(model, x), base)


def _last_block_alone(model: nn.Module, x: Tensor, part: nn.Module) -> None:
    """Gradient comes to the last part: torch has no derivative for what lies behind it."""
    out = model.norm(model.blocks[2](model.patch_embed(x).detach()))
    out.square().sum().backward()
    assert part.up.weight.grad.abs().sum() > 0


def test_a_meta_model_is_operated_then_materialised_and_loaded() -> None:
    rules = [at(ffn, parallel(shared(moa(rank=4, dropout=0.5)), scale=0.1)), at("head", unfreeze)]
    rules.append(at(ffn, append(adapter(rank=2), residual=True)))
    wanted = surgery.apply(models.tiny_vit().eval(), rules)
    laws.stir(wanted)
    with torch.device("meta"):
        model = models.tiny_vit().eval()
    surgery.plan(model, rules)
    surgery.apply(model, rules, example=torch.empty(1, 3, 16, 16, device="meta"))
    model.to_empty(device="cpu")
    model.load_state_dict(wanted.state_dict())
    assert [n for n, m in model.named_modules() if m.training and "/" in n] == []
    assert torch.equal(laws.outcome(model, models.images()), laws.outcome(wanted, models.images()))
    trained = [k for k, p in wanted.named_parameters() if p.requires_grad]
    assert [k for k, p in model.named_parameters() if p.requires_grad] == trained
    laws.train(model, models.images())
    surgery.revert(model)
    assert not hasattr(model, "surgery")


# 5: calls of every kind --------------------------------------------------------------------------


class Keyed(nn.Module):
    """A layer called by name only, in whatever order, that answers with a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = KeyedLayer()

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.layer(mask=torch.zeros_like(x), hidden=x)
        return hidden


class KeyedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, *, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(hidden) + mask, mask


def test_the_input_of_a_call_by_name_is_the_first_that_the_module_declares() -> None:
    model, x = Keyed(), torch.randn(2, 8)
    base = copy.deepcopy(model)
    surgery.apply(model, at("layer", prepend(plain), parallel(plain), append(plain)), example=x)
    pre, beside, after = map(
        model.surgery.default.get_submodule,
        ("layer/prepend", "layer/parallel", "layer/append"),
    )
    assert torch.equal(model(x), after(base.layer.inner(pre(x)) + beside(x)))


@pytest.mark.parametrize("named", [False, True])
def test_what_comes_before_self_attention_reaches_query_key_and_value(named: bool) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(24, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            if named:
                return self.attn(value=x, key=x, query=x)[0]
            return self.attn(x, x, x)[0]

    model, x = Attending(), torch.randn(2, 5, 24)
    base = copy.deepcopy(model)
    surgery.apply(model, at("attn", prepend(plain)), example=x)
    y = model.surgery.default.get_submodule("attn/prepend")(x)
    assert torch.allclose(model(x), base(y), atol=1e-6)


class Albert(nn.Module):
    """One block, three times, with an alias."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Linears()
        self.again = self.block

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.block(self.block(x)))


EDITS: dict[str, Callable[[nn.Module, nn.Module, Tensor], Tensor]] = {
    "parallel": lambda base, part, x: base(x) + part(x),
    "append": lambda base, part, x: part(base(x)),
    "prepend": lambda base, part, x: base(part(x)),
    "replace": lambda base, part, x: part(x),
}


@pytest.mark.parametrize("where", ["block", "again", span("block.one", "block.two")], ids=repr)
@pytest.mark.parametrize("word", EDITS)
def test_every_call_of_a_module_is_met_by_every_edit(word: str, where: Any) -> None:
    if word == "replace" and not isinstance(where, str):
        where = "block"
    model, x = Albert().double(), torch.randn(2, 8, dtype=torch.float64)
    base = copy.deepcopy(model.block)
    surgery.apply(model, at(where, getattr(surgery, word)(plain)), example=x)
    (part,) = model.surgery.default.children()
    want = x
    for _ in range(3):
        want = EDITS[word](base, part, want)
    assert torch.allclose(model(x), want, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), want, atol=1e-12)


@pytest.mark.parametrize("word", EDITS)
def test_albert_of_transformers_runs_its_part_in_every_layer(word: str) -> None:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        hidden_size=24,
        embedding_size=12,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=48,
        vocab_size=32,
        max_position_embeddings=16,
    )
    model, calls = AlbertModel(config).eval(), list[int]()
    ids = torch.randint(0, 32, (2, 6))
    where = "**.ffn" if word == "replace" else ffn
    surgery.apply(model, at(where, getattr(surgery, word)(plain)), example={"input_ids": ids})
    (part,) = model.surgery.default.children()
    part.register_forward_hook(lambda *_: calls.append(1))
    model(input_ids=ids)
    assert len(calls) == 3


def _keyed() -> tuple[nn.Module, Any]:
    return Keyed(), [at("layer", prepend(plain), append(plain))]


def _spanned() -> tuple[nn.Module, Any]:
    return Linears(), [at(span("one", "two"), prepend(plain), parallel(plain))]


def _attending() -> tuple[nn.Module, Any]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(layer), [at("**.self_attn", prepend(plain)), at(ffn, append(plain))]


@pytest.mark.parametrize("build", [_keyed, _spanned, _attending], ids=lambda b: b.__name__)
def test_compiled_in_one_graph_they_answer_alike(build: Any) -> None:
    torch._dynamo.reset()
    (model, rules), x = build(), torch.randn(2, 5, 8)
    surgery.apply(model, rules)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    assert torch.allclose(got, model(x), atol=1e-6)
    torch._dynamo.reset()


def test_what_an_optional_rule_unfreezes_in_vain_is_a_note() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    x = torch.randn(2, 4)
    with pytest.raises(
        surgery.GraftError, match=r"no gradient comes from the output to spare\.weight"
    ):
        surgery.apply(Spare(), at(nn.Linear, unfreeze), example=x)
    model = surgery.apply(Spare(), at(nn.Linear, unfreeze, optional=True), example=x)
    told = "note: no gradient comes to spare.weight, spare.bias with this example"
    assert told in str(surgery.report(model))
    with_all = surgery.apply(Spare(), at("used", unfreeze, optional=True), example=x)
    assert "no gradient" not in str(surgery.report(with_all))


# where features lie


WIDTHS = [(append, (12, 12)), (prepend, (8, 8)), (parallel, (8, 12))]


@pytest.mark.parametrize("side", [8, 12])
@pytest.mark.parametrize(("edit", "widths"), WIDTHS)
def test_features_are_where_the_weights_say_though_positions_are_as_many(edit, widths, side):
    conv = nn.Conv2d(8, 12, 1)
    model = nn.Sequential(conv)
    part = nn.Linear(*widths)
    surgery.apply(model, at("0", edit(lambda site: part)))
    x = torch.randn(2, 8, 3, side)
    by_hand = {
        append: lambda x: last(part, conv(x)),
        prepend: lambda x: conv(last(part, x)),
        parallel: lambda x: conv(x) + last(part, x),
    }
    got = model(x)
    surgery.revert(model)
    torch.testing.assert_close(got, by_hand[edit](x))


def last(part: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return part(x.movedim(1, -1)).movedim(-1, 1)


def test_what_a_part_of_its_own_raises_is_not_told_as_a_wrong_width():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("of its own")

    model = surgery.apply(nn.Sequential(nn.Linear(8, 8)), at("0", append(lambda site: Fails())))
    with pytest.raises(RuntimeError, match="of its own"):
        model(torch.randn(2, 8))
    model[0].weight, model[0].bias = nn.Parameter(torch.randn(4, 8)), None
    with pytest.raises(surgery.GraftError, match="taken to have 8 features"):
        model(torch.randn(2, 8))


SERIES = [(append, prepend), (append, parallel), (prepend, append), (append, prepend, parallel)]


@pytest.mark.parametrize("edits", SERIES)
def test_the_first_edit_at_a_site_does_not_say_what_the_others_are_given(edits):
    """Found by the suite: after append, a site was taken to be given as much as it gives."""
    linear = nn.Linear(3, 8)
    model = surgery.apply(nn.Sequential(linear), [at("0", edit(plain)) for edit in edits])
    parts, x = dict(model.surgery.default.named_children()), torch.randn(2, 8, 3)
    want = linear.forward
    for edit in edits:
        part, inner = parts[f"0/{edit.__name__}"], want
        want = {
            append: lambda x, f=inner, p=part: p(f(x)),
            prepend: lambda x, f=inner, p=part: f(p(x)),
            parallel: lambda x, f=inner, p=part: f(x) + p(x),
        }[edit]
    torch.testing.assert_close(model(x), want(x))


class Turned(nn.Module):
    """Linear weights, and yet features lie after the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


class Rows(Turned):
    """Gives the tokens of all samples in a row, as mixtures of experts do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).flatten(0, 1)


@pytest.mark.parametrize(("edit", "widths"), WIDTHS)
def test_features_are_where_so_many_are_though_the_weights_say_otherwise(edit, widths):
    turned, part, x = Turned(), nn.Linear(*widths), torch.randn(2, 8, 3, 5)
    model = surgery.apply(nn.Sequential(turned), at("0", edit(lambda site: part)))
    by_hand = {
        append: lambda x: last(part, Turned.forward(turned, x)),
        prepend: lambda x: Turned.forward(turned, last(part, x)),
        parallel: lambda x: Turned.forward(turned, x) + last(part, x),
    }
    torch.testing.assert_close(model(x), by_hand[edit](x))


def test_a_part_beside_what_gives_tokens_in_a_row_gives_them_in_a_row_too():
    rows, part, x = Rows(), nn.Linear(8, 12), torch.randn(2, 5, 8)
    model = surgery.apply(nn.Sequential(rows), at("0", parallel(lambda site: part)))
    torch.testing.assert_close(model(x), Rows.forward(rows, x) + part(x).flatten(0, 1))


def test_what_acts_after_a_module_hooks_nothing_before_it():
    model = surgery.apply(Linears(), at("one", append(plain), parallel(plain)))
    assert len(model.one._forward_hooks) == 1
    assert len(model.one._forward_pre_hooks) == 0
    surgery.revert(model)
    surgery.apply(model, at("one", prepend(plain)))
    assert len(model.one._forward_pre_hooks) == 1


def test_a_part_of_another_width_is_told_and_what_a_forward_would_tell_of_a_span():
    wrong = parallel(lambda site: nn.Linear(site.width, 3))
    for where, spans in (("one", False), (surgery.span("one", "two"), True)):
        model = surgery.apply(Linears(), at(where, wrong))
        with pytest.raises(surgery.GraftError, match=r"returned \(2, 3\)") as told:
            model(torch.randn(2, 8))
        assert ("where to begin" in str(told.value)) is spans


def routed(**named: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8))
    return surgery.apply(model, at("0", parallel(surgery.moa(rank=2, heads=2))), **named)


def test_errors_of_a_graft_name_its_place() -> None:
    model = surgery.apply(Linears(), at("one", parallel(plain)))
    with (
        surgery.disabled(model),
        torch.enable_grad(),
        pytest.raises(surgery.GraftError, match="through one, by enable_grad"),
    ):
        model(torch.randn(2, 8))
    model.one.weight, model.one.bias = nn.Parameter(torch.randn(8, 4)), None
    with pytest.raises(surgery.GraftError, match=r"^Linear at one: it was given"):
        model(torch.randn(2, 4))


def test_a_graft_that_is_unmarked_has_not_run() -> None:
    model = surgery.apply(Linears(), at("one", parallel(plain)))
    model(torch.randn(2, 8))
    (hooked,) = model.surgery.default.hooked_sites
    assert hooked.ran
    hooked.reset_flags()
    assert not hooked.ran


def test_a_balance_that_is_not_scaled_is_refused_under_float16_autocast_alone() -> None:
    x = torch.randn(4, 8)
    for balance, dtype in (
        (0.1, torch.bfloat16),
        (lambda: 0.1, torch.float16),
        (None, torch.float16),
    ):
        with torch.autocast("cpu", dtype=dtype):
            routed(balance=balance)(x)
    routed(balance=0.1)(x)
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(surgery.GraftError, match="scal"),
    ):
        routed(balance=0.1)(x)
