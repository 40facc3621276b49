"""NOAH's supernet: slices against a ViT written out with them."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import at, qkv
from surgery.errors import OperationError, RuleError
from surgery.methods.noah_supernet import noah
from surgery.parts.elastic import elastic_adapter, elastic_lora, elastic_prompt
from surgery.training.noah import (
    Space,
    Subnet,
    choose,
)
from tests.methods.reference import (
    INPUTS,
    agrees,
    by_hand,
    close,
    merges,
    parts,
    stirred,
    swin,
    trains_and_comes_off,
    vit,
)

SIZES = noah(tokens=4, rank=3, hidden=5)
MIXED = Subnet((2, 0, 4), (0, 3, 1), (5, 2, 0))
FULL = Subnet((4,) * 3, (3,) * 3, (5,) * 3)
NONE = Subnet((0,) * 3, (0,) * 3, (0,) * 3)
SMALL = Space(blocks=3, width=24, depths=(1, 2, 3), tokens=(1, 2, 4), rank=(1, 3), hidden=(2, 5))


# the parts -------------------------------------------------------------------------------------


def with_tokens(self: Any, x: Tensor, p: Tensor) -> Tensor:
    """A block's forward with prompts after the class token, which are dropped behind it."""
    k = len(p)
    y = type(self).forward(self, torch.cat([x[:, :1], p.expand(len(x), -1, -1), x[:, 1:]], 1))
    return torch.cat([y[:, :1], y[:, 1 + k :]], 1)


def with_adapter(self: Any, x: Tensor, part: Any, k: int) -> Tensor:
    """An FFN's forward and its adapter of k hidden units."""
    m: Tensor = type(self).forward(self, x)
    if k == 0:
        return m
    down, up = part.down, part.up
    h = m @ down.weight[:k].T + down.bias[:k]
    h = h * torch.sigmoid(1.702 * h)
    return m + h @ up.weight[:, :k].T + up.bias


def written(subnet: Subnet) -> Any:
    def rewrite(plain: Any, parts: dict[str, Any]) -> None:
        for i, (block, p, r, a) in enumerate(zip(plain.blocks, *subnet, strict=True)):
            prompt, low, adapt = (
                parts[f"blocks/{i}{rest}"]
                for rest in ("/insert", "/attn/qkv/parallel", "/mlp/append")
            )
            block.attn.qkv.weight += low.B[0, :, :r] @ low.A[0, :r]
            tokens = prompt.tokens[:p]
            block.forward = MethodType(lambda s, x, t=tokens, **_: with_tokens(s, x, t), block)
            mlp = block.mlp
            mlp.forward = MethodType(lambda s, x, q=adapt, k=a: with_adapter(s, x, q, k), mlp)

    return rewrite


def test_the_supernet_is_what_its_formulas_say() -> None:
    agrees("vit", SIZES, written(FULL))


@pytest.mark.parametrize("subnet", [MIXED, FULL, Subnet((1,) * 3, (1,) * 3, (1,) * 3)])
def test_a_chosen_subnet_is_the_first_units_of_each_part(subnet: Subnet) -> None:
    model = choose(stirred("vit", SIZES), subnet)
    x = INPUTS["vit"]
    with torch.no_grad():
        want = by_hand("vit", model, written(subnet))(x)
        other = by_hand("vit", model, written(NONE))(x)
        close(model(x), want)
    assert (want - other).abs().max() > 1e-3


def test_at_size_zero_the_base_answers_bit_for_bit() -> None:
    model = choose(stirred("vit", [*SIZES[:3], at("", surgery.unfreeze("cls_token"))]), NONE)
    x = INPUTS["vit"]
    with torch.no_grad():
        assert torch.equal(model(x), by_hand("vit", model, lambda plain, parts: None)(x))
        choose(model, Subnet((0, 0, 1), (0,) * 3, (0,) * 3))
        assert not torch.equal(model(x), by_hand("vit", model, lambda plain, parts: None)(x))


def test_lora_and_adapter_start_at_zero_and_prompts_as_in_vpt() -> None:
    model = surgery.apply(vit(), noah(tokens=100, rank=50, hidden=50)).eval()
    for key, part in parts(model).items():
        if key.endswith("insert"):
            assert 0.98 * (6 / 48) ** 0.5 < part.tokens.abs().max() <= (6 / 48) ** 0.5
        elif key.endswith("append"):
            assert not any(t.any() for t in (part.up.weight, part.up.bias, part.down.bias))
            assert 0.98 * 24**-0.5 < part.down.weight.abs().max() <= 24**-0.5
        else:
            assert not part.B.any()
            assert 0.98 * 24**-0.5 < part.A.abs().max() <= 24**-0.5
    choose(model, Subnet((0,) * 3, (50,) * 3, (50,) * 3))
    with torch.no_grad():
        assert torch.equal(model(INPUTS["vit"]), vit()(INPUTS["vit"]))


def test_dropout_is_that_of_noah() -> None:
    model = surgery.apply(vit(), SIZES)
    drops = [m.p for part in parts(model).values() for m in part.modules() if type(m) is nn.Dropout]
    assert drops == [0.1] * 9


def test_all_of_the_supernet_is_trained_and_comes_off() -> None:
    trains_and_comes_off("vit", SIZES)


def test_only_the_active_units_get_a_gradient() -> None:
    model = choose(stirred("vit", SIZES), MIXED)
    model(INPUTS["vit"]).square().sum().backward()
    for i in range(3):
        p, r, a = (row[i] for row in MIXED)
        held = parts(model)
        seen = {
            "tokens": (held[f"blocks/{i}/insert"].tokens.grad, p),
            "A": (held[f"blocks/{i}/attn/qkv/parallel"].A.grad, r),
            "down": (held[f"blocks/{i}/mlp/append"].down.weight.grad, a),
        }
        for grad, size in seen.values():
            rows = [] if grad is None else grad.flatten(0, -2).abs().sum(-1)
            assert [bool(g) for g in rows][:size] == [True] * size
            assert not any(bool(g) for g in rows[size:])


def test_the_supernet_does_not_merge_and_its_lora_alone_does() -> None:
    with pytest.raises(OperationError, match="ElasticPrompt stands at a Block"):
        surgery.merge(stirred("vit", SIZES))
    with pytest.raises(OperationError, match="ElasticAdapter stands at a Mlp"):
        surgery.merge(stirred("vit", SIZES[2:]))
    for backbone in ("vit", "swin"):
        merges(backbone, at(qkv, elastic_lora(rank=3)))


def test_lora_merges_at_the_rank_that_is_active() -> None:
    model = choose(stirred("vit", at(qkv, elastic_lora(rank=3))), MIXED)
    with torch.no_grad():
        want = model(INPUTS["vit"])
        close(surgery.merge(model)(INPUTS["vit"]), want)


def test_windows_take_no_prompts() -> None:
    with pytest.raises(RuleError, match="tokens cannot be inserted"):
        surgery.apply(swin(), SIZES)


@pytest.mark.parametrize(
    "rules",
    [
        at(surgery.block, elastic_prompt(tokens=0)),
        at(qkv, elastic_lora(rank=-1)),
        at(surgery.ffn, surgery.append(elastic_adapter(rank=1.5), residual=True)),  # type: ignore[arg-type]
    ],
)
def test_wrong_sizes_are_told(rules: Any) -> None:
    with pytest.raises(RuleError, match=r"elastic_\w+\(.*an integer from 1 up"):
        surgery.apply(vit(), rules)
