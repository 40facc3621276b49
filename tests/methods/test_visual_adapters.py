"""Adapter+, Mona and SCT against blocks written out with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import surgery
from surgery import RuleError, append, at, attn
from surgery.methods import visual_adapters as sets
from surgery.parts.visual_adapters import AdapterPlus, Mona, Salient, mona, salient
from tests.methods.reference import (
    BOTH,
    agrees,
    blocks,
    close,
    starts_as_the_base,
    trains_and_comes_off,
    vit,
    vit_b,
)


def plus(p: Any, x: Tensor) -> Tensor:
    hidden = F.gelu(x @ p.down.weight.t() + p.down.bias)
    return p.s * (hidden @ p.up.weight.t() + p.up.bias)


def convolved(p: Any, x: Tensor) -> Tensor:
    """The published operation on a map (b, c, h, w)."""
    y = (
        sum(F.conv2d(x, c.weight, c.bias, padding=k // 2, groups=x.shape[1])
            for c, k in zip(p.convs, (3, 5, 7), strict=True)) / 3 + x
    )  # fmt: skip
    return y + F.conv2d(y, p.mix.weight[:, :, None, None], p.mix.bias)


def multiscale(p: Any, x: Tensor) -> Tensor:
    """Mona; tokens beyond a square are maps of one pixel each."""
    scaled, down = p.down
    norm = F.layer_norm(x, x.shape[-1:], scaled.norm.weight, scaled.norm.bias)
    hidden = F.linear(norm * scaled.g + x * scaled.h, down.weight, down.bias)
    if x.dim() == 4:
        mixed = rearrange(convolved(p.conv, rearrange(hidden, "b h w c -> b c h w")),
                          "b c h w -> b h w c")  # fmt: skip
    else:
        side = int(x.shape[1] ** 0.5)
        first = x.shape[1] - side**2
        alone = [convolved(p.conv, hidden[:, i, :, None, None])[..., 0] for i in range(first)]
        square = rearrange(hidden[:, first:], "b (i j) c -> b c i j", i=side)
        rows = [*alone, convolved(p.conv, square).flatten(2)]
        mixed = torch.cat(rows, 2).mT
    return F.linear(F.gelu(mixed), p.up.weight, p.up.bias)


def channels(p: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for i, c in enumerate(p.index.tolist()):
        y[..., c] = p.scale * (x[..., p.index] @ p.M[i] + p.b[i])
    return y


def behind_block(block: Any, p: Any, formula: Any) -> None:
    own = block.forward

    def forward(*given: Any, **named: Any) -> Tensor:
        x: Tensor = own(*given, **named)
        return x + formula(p, x)

    block.forward = forward


def behind_attention(block: Any, p: Any, formula: Any) -> None:
    """z = x + p(x), then z + FFN(norm(z)): the norm reads z, and p(x) is in the sum."""
    kept: list[Tensor] = []
    norm, mlp = block.norm2.forward, block.mlp.forward

    def first(x: Tensor) -> Tensor:
        kept[:] = [formula(p, x)]
        y: Tensor = norm(x + kept[0])
        return y

    def then(x: Tensor) -> Tensor:
        y: Tensor = mlp(x) + kept[0]
        return y

    block.norm2.forward, block.mlp.forward = first, then


def rewritten(formula: Any, attention: bool, whole: bool) -> Any:
    def rewrite(plain: nn.Module, parts: dict[str, Any]) -> None:
        shared = [p for key, p in parts.items() if key.startswith("shared/")]
        own = [p for key, p in parts.items() if not key.startswith("shared/")]
        assert len(shared) == attention * len(blocks(plain))
        assert len(own) == whole * len(blocks(plain))
        for block, p in zip(blocks(plain), shared, strict=attention):
            behind_attention(block, p, formula)
        for block, p in zip(blocks(plain), own, strict=whole):
            behind_block(block, p, formula)

    return rewrite


CASES: dict[str, tuple[list[Any], Any]] = {
    "adapter_plus": (sets.adapter_plus(rank=4), rewritten(plus, False, True)),
    "mona": (sets.mona(hidden=6), rewritten(multiscale, True, True)),
    "sct": (sets.sct(channels=7, scale=0.5), rewritten(channels, True, False)),
}


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_the_stream_is_that_of_the_formula(case: str, backbone: str) -> None:
    agrees(backbone, *CASES[case], eps=64 if case == "mona" else 16)


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_it_starts_away_from_the_base_trains_and_comes_off(case: str, backbone: str) -> None:
    assert not starts_as_the_base(backbone, CASES[case][0])
    trains_and_comes_off(backbone, CASES[case][0])


def test_the_starts_are_those_of_the_papers() -> None:
    small = AdapterPlus(768)
    for layer in (small.down, small.up):
        assert 0.018 < layer.weight.abs().max() <= 0.02
        assert layer.weight.std().item() == pytest.approx(0.01 * 0.88, rel=0.05)
        assert not layer.bias.any()
    assert (small.s == 1).all()
    scaled: Any = Mona(768).down[0]
    assert (scaled.h == 1).all()
    assert (scaled.g == 1e-6).all()
    assert Salient(768).M.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("rules", "count"),
    [
        (sets.adapter_plus(), 12 * (2 * 8 * 768 + 8 + 2 * 768)),
        (sets.mona(), 24 * (4 * 768 + 768 * 64 + 64 + 64 * (9 + 25 + 49 + 3)
                            + 64 * 64 + 64 + 64 * 768 + 768)),
        (sets.sct(), 12 * (96 * 96 + 96)),
    ],
    ids=["adapter_plus", "mona", "sct"],
)  # fmt: skip
def test_it_trains_as_much_of_a_vit_b_as_its_formula_says(rules: Any, count: int) -> None:
    assert surgery.plan(vit_b(), rules).trainable == count


def test_a_token_alone_is_a_map_of_one_pixel() -> None:
    part, x = Mona(8, 4).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        want = torch.stack(
            [convolved(part.conv, t[:, :, None, None])[..., 0, 0] for t in x.unbind(1)], 1
        )
        close(part.conv.alone(x), want)


def test_salient_channels_are_aimed_at_and_checked() -> None:
    part = Salient(8, 3)
    part.aim(torch.tensor([5, 0, 2]))
    y = part(torch.randn(4, 8))
    assert y.any(0).nonzero().flatten().tolist() == [0, 2, 5]
    for wrong in ([5, 0], [5, 5, 0], [5, 0, 8], [[5, 0, 2]]):
        with pytest.raises(RuleError, match="no channels of 8"):
            part.aim(torch.tensor(wrong))
    assert part.index.tolist() == [5, 0, 2]
    assert len(Salient(8, 96).index) == 8


def test_errors_say_whose_they_are() -> None:
    with pytest.raises(surgery.GraftError, match=r"mona\(prefix=0\)"):
        Mona(16, prefix=0)(torch.randn(2, 5, 16))
    with pytest.raises(RuleError, match=r"mona\(prefix=-1\)"):
        surgery.plan(vit(), at(attn, append(mona(prefix=-1), residual=True)))
    with pytest.raises(RuleError, match="to return 72"):
        surgery.plan(vit(), at("**.qkv", surgery.parallel(salient())))
