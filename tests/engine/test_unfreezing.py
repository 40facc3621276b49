"""What rules unfreeze must be able to take a gradient; what is quantised beside it is no matter."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import RuleError, at, ffn, freeze, head, lora, norm, unfreeze
from tests.laws.test_backbones import SETS
from tests.models import images, tiny_vit
from tests.structure.test_quantised import Int8

pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz.*")
WORDS = vars(surgery)


class Stored(nn.Module):
    """A head as quantisers make them: integers as a parameter, or as a buffer, and scales."""

    def __init__(self, as_buffer: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = 24, 5
        whole = torch.randint(0, 9, (5, 24), dtype=torch.uint8)
        self.register_buffer("scale", torch.full((5,), 0.1))
        if as_buffer:
            self.register_buffer("qweight", whole)
        else:
            self.qweight = nn.Parameter(whole, requires_grad=False)
            self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.float() * self.scale[:, None]).T


def with_head(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_vit().eval()
    if kind == "wrapped":
        data = torch.randint(-9, 9, (5, 24), dtype=torch.int8)
        model.head.weight = nn.Parameter(Int8(data, torch.full((5, 1), 0.1)), requires_grad=False)
    elif kind == "packed":
        model.head = torch.ao.quantization.quantize_dynamic(nn.Sequential(model.head), {nn.Linear})
    else:
        model.head = Stored(kind == "buffer")
    return model


KINDS = ["wrapped", "packed", "parameter", "buffer"]


@pytest.mark.parametrize("rules", [at("head", unfreeze), at("", unfreeze), at("**", unfreeze)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_takes_no_gradient_is_not_unfrozen(kind, rules):
    model = with_head(kind)
    before = surgery.fingerprint(model)
    for call in (surgery.plan, surgery.apply):
        with pytest.raises(RuleError, match=r"head.* is quantised") as caught:
            call(model, rules)
    assert surgery.fingerprint(model) == before
    suggested = re.search(r"after this rule by (at\(.*\)); or", caught.value.remedy)
    leave_out = [eval(suggested[1], WORDS)]
    others = [] if kind in ("wrapped", "parameter") else [at(norm, unfreeze)]
    assert surgery.plan(model, [rules, *leave_out, *others]).trainable


@pytest.mark.parametrize("kind", KINDS)
def test_an_optional_rule_leaves_it_with_a_note(kind):
    model = with_head(kind)
    rules = [at(norm, unfreeze), at("head", unfreeze, optional=True)]
    note = "note: quantised, so it stays frozen: head"
    assert note in str(surgery.plan(model, rules))
    assert note in str(surgery.report(surgery.apply(model, rules)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_beside_it_is_trained_saved_and_reverted(kind, tmp_path):
    model, x = with_head(kind), images()
    before, rules = surgery.fingerprint(model), [at(norm, unfreeze), at(ffn, lora(rank=2))]
    surgery.apply(model, rules, example=x)
    optimiser = torch.optim.AdamW(surgery.parameters(model), lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        optimiser.step()
    surgery.save(model, tmp_path / "x.safetensors")
    again = surgery.load(with_head(kind), tmp_path / "x.safetensors")
    assert torch.equal(again(x), model(x))
    surgery.revert(model)
    assert {k: v for k, v in surgery.fingerprint(model).items() if v != before[k]} == {}


def test_a_name_that_means_no_quantised_tensor_is_fine():
    model = with_head("wrapped")
    assert surgery.plan(model, at("head", unfreeze("bias"))).trainable == 5
    assert surgery.plan(model, [at("head", unfreeze), at("head", freeze("weight"))]).trainable == 5


def test_indices_among_the_parameters_are_left_as_ever():
    model = tiny_vit()
    model.head.index = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    assert surgery.plan(model, at(head, unfreeze)).trainable == 25 * 5


@pytest.mark.parametrize("name", SETS)
def test_no_rule_set_trains_a_quantised_head(name):
    """Each plans, with the head left as it is, or refuses; none hands it to an optimiser."""
    model = with_head("wrapped")
    try:
        surgery.apply(model, name)
    except surgery.SurgeryError:
        assert not hasattr(model, "surgery")
    else:
        assert not any(p is model.head.weight for p in surgery.parameters(model))


def test_torchao(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = tiny_vit(embed_dim=48, num_classes=16).eval()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    x = images()
    with pytest.raises(RuleError, match=r"head\.weight is quantised"):
        surgery.apply(build(), at(head, unfreeze))
    for rules in ("lora", "adapter", at(norm, unfreeze)):
        model = build()
        before = surgery.fingerprint(model)
        surgery.apply(model, rules, example=x)
        model(x).square().sum().backward()
        torch.optim.SGD(surgery.parameters(model), lr=0.1).step()
        surgery.save(model, tmp_path / "x.safetensors")
        assert torch.equal(surgery.load(build(), tmp_path / "x.safetensors")(x), model(x))
        surgery.revert(model)
        assert surgery.fingerprint(model) == before
