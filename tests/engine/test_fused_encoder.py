"""Torch's fused encoder: what is operated answers alike in every mode, without its fast path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery import (
    adapter,
    append,
    at,
    ffn,
    parallel,
    prepend,
    replace,
    span,
    unfreeze,
)
from tests.laws import checks as laws
from tests.laws.checks import plain, raised

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors is in prototype",  # torch's own, by its own doing
)


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
