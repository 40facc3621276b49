"""All parts, given tensors of odd shapes, strides and kinds: right, or refused in plain words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import at, insert, parallel
from surgery import parts as room
from surgery.parts import adapter, coefficients, convpass, prompt_generator
from surgery.rules.routing import Routed
from surgery.structure.module_tree import Site, Tree

WIDTH = 24
ODD = {
    "an empty batch": torch.randn(0, 5, WIDTH),
    "no tokens": torch.randn(2, 0, WIDTH),
    "one token": torch.randn(2, 1, WIDTH),
    "one row": torch.randn(1, WIDTH),
    "tokens in a row": torch.randn(5, WIDTH),
    "one vector": torch.randn(WIDTH),
    "a map": torch.randn(2, 3, 3, WIDTH),
    "transposed": torch.randn(WIDTH, 9, 2).permute(2, 1, 0),
    "expanded": torch.randn(1, 9, WIDTH).expand(3, 9, WIDTH),
    "channels last": torch.randn(2, WIDTH, 3, 3).permute(0, 2, 3, 1),
    "half": torch.randn(2, 9, WIDTH).half(),
    "bfloat16": torch.randn(2, 9, WIDTH).bfloat16(),
}
HELD = {"frozen", "phm_rule", "slow_factors", "tied", "tk_factors", "tt_factors", "coefficients"}
HELD |= {"bank", "bases", "places", "pool", "lily_ups", "tiny_vector"}
# they need a place, or another part
OTHERS = {
    "arc",
    "gated_prompt",
    "kadaptation",
    "reversible",
    "prompt_generator",
    "magnitude",
    "rows",
}
OTHERS |= {"back", "climb", "ladder", "spectral_adapter", "spectral_basis", "track"}  # hear others
OTHERS |= {"prefix", "prefix_features"}  # keys and values
OTHERS |= {"bypass", "centre_distances", "geometry_adapter", "heard", "local_attention", "mixer"}


def site() -> Site:
    found = Tree(nn.Sequential(nn.Linear(WIDTH, WIDTH))).sites[1]
    return found.seen(shape=found.shape)


def made(word: Any) -> nn.Module:
    """A part, with an adapter inside where it takes one."""
    try:
        return word()(site())
    except TypeError:
        return word(adapter(rank=2))(site())


WORDS = sorted(name for name in room.__all__ if name.islower() and name not in HELD | OTHERS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("x", ODD.values(), ids=ODD)
@pytest.mark.parametrize("name", WORDS)
def test_right_or_refused(name: str, x: Tensor, training: bool) -> None:
    part = made(getattr(room, name)).to(x.dtype).train(training)
    leaf = x.detach().requires_grad_()
    try:
        answer = part(leaf)
    except surgery.SurgeryError:
        return
    out: Tensor = answer.output if isinstance(answer, Routed) else answer
    assert out.isfinite().all()
    assert out.dtype == x.dtype
    torch.autograd.backward(out.float().sum())


def test_no_word_is_left_out() -> None:
    words = {name for name in room.__all__ if name.islower()}
    assert words == {*WORDS, *HELD, *OTHERS}


def encoder() -> nn.Module:
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, 2, 48, batch_first=True), 1, enable_nested_tensor=False
    )


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        *(
            (at("layers.*", parallel(getattr(room, name)())), "which has no forward: it is for ot")
            for name in sorted(HELD - {"coefficients"})
        ),
        (at("layers.*", parallel(coefficients())), r"Coefficients, whose forward\(\)"),
        (at("layers.*", insert(prompt_generator())), r"'heard'.*\n.*hears=ffn"),
    ],
)
def test_what_cannot_be_called_is_told_before_any_change(rule: Any, told: str) -> None:
    model = encoder()
    for call in (surgery.plan, surgery.apply):
        with pytest.raises(surgery.RuleError, match=told):
            call(model, rule)
    assert not hasattr(model, "surgery")


def test_a_part_of_ones_own_may_take_more() -> None:
    class Takes(nn.Module):
        def forward(self, x: Tensor, scale: float = 1.0, *rest: Any, **named: Any) -> Tensor:
            return scale * x

    model = surgery.apply(encoder().eval(), at("layers.*", parallel(lambda site: Takes())))
    assert model(torch.randn(2, 5, WIDTH)).isfinite().all()


def test_convpass_takes_no_layout_by_itself() -> None:
    x = torch.randn(2, 10, WIDTH)
    assert torch.equal(convpass(prefix=1)(site())(x), torch.zeros_like(x))
