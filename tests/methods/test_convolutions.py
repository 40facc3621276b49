"""RepAdapter and Convpass against a ViT and a Swin rewritten with their formulae."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn

import surgery
from surgery import at, attn, ffn, parallel, prepend
from surgery.methods.convolutions import convpass as bypasses
from surgery.methods.convolutions import convpass_att, repadapter_att
from surgery.methods.convolutions import repadapter as linears
from surgery.parts.conv import Convpass, convpass
from surgery.parts.rep_adapter import RepAdapter, repadapter
from tests.methods.reference import (
    BOTH,
    agrees,
    blocks,
    close,
    merges,
    parts,
    starts_as_the_base,
    stirred,
    trains_and_comes_off,
    vit,
    vit_b,
)
from tests.models import encoder, hf_vit, images

LINEAR = {
    "both": linears(),
    "attention": repadapter_att(scale=0.5),
    "no bias": linears(rank=6, groups=3, scale=2.0, bias=False),
}
CONV = {"both": bypasses(scale=0.25), "attention": convpass_att(hidden=5, scale=0.5, xavier=True)}
ALL = pytest.mark.parametrize("rules", [*LINEAR.values(), *CONV.values()], ids=lambda r: "")
EACH_LINEAR = pytest.mark.parametrize("name", LINEAR)
EACH_CONV = pytest.mark.parametrize("name", CONV)
SCALES = {"both": 1.0, "attention": 0.5, "no bias": 2.0}


def grouped(part: Any, x: Tensor, scale: float) -> Tensor:
    """z + s B(A z), A and B as 1 x 1 convolutions over tokens, B in groups."""
    tokens = x.reshape(1, -1, x.shape[-1]).transpose(1, 2)
    hidden = F.conv1d(tokens, part.down.weight[:, :, None], part.down.bias)
    up = F.conv1d(hidden, part.up.weight[:, :, None], part.up.bias, groups=part.up.groups)
    return x + scale * up.transpose(1, 2).reshape(x.shape)


def found(parts: dict[str, Any], suffix: str) -> list[Any]:
    return [part for key, part in parts.items() if key.endswith(suffix)]


def linears_rewritten(scale: float) -> Any:
    def rewrite(plain: nn.Module, parts: dict[str, Any]) -> None:
        for suffix, layer in (("attn", lambda b: b.attn.qkv), ("mlp", lambda b: b.mlp.fc1)):
            own = found(parts, suffix)
            for block, part in zip(blocks(plain), own, strict=bool(own)):
                before(layer(block), part, scale)

    return rewrite


def before(layer: Any, part: Any, scale: float) -> None:
    layer.forward = lambda x: F.linear(grouped(part, x, scale), layer.weight, layer.bias)


@BOTH
@EACH_LINEAR
def test_layers_read_what_a_linear_adapter_moved(backbone: str, name: str) -> None:
    agrees(backbone, LINEAR[name], linears_rewritten(SCALES[name]))


def test_a_large_scale_agrees_at_the_site() -> None:
    """At the end of the model, s = 10 leaves rounding errors of the size of what it moved."""
    part = RepAdapter(24, scale=10.0).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    with torch.no_grad():
        for p in part.parameters():
            p.normal_(std=0.3)
        close(x + part(x), grouped(part, x, 10.0))


def quick(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def convolved(part: Any, x: Tensor, scale: float, side: int) -> Tensor:
    """s up(Q(conv(Q(down z)))), what is no patch as a 1 x 1 map of its own, zeros around it."""
    conv, hidden = part.conv, quick(F.linear(x, part.down.weight, part.down.bias))
    maps = [h[:, :, None, None] for h in hidden[:, : x.shape[1] - side**2].unbind(1)]
    square = rearrange(hidden[:, x.shape[1] - side**2 :], "b (i j) c -> b c i j", i=side, j=side)
    rows = [
        F.conv2d(each, conv.weight, conv.bias, padding=1).flatten(2).transpose(1, 2)
        for each in (*maps, square)
    ]
    return scale * F.linear(quick(torch.cat(rows, 1)), part.up.weight, part.up.bias)


def beside(module: Any, part: Any, scale: float, side: int | None) -> None:
    """y = m(x) + convolved(x); side None: that of all the tokens."""
    own = module.forward

    def forward(x: Tensor, **rest: Any) -> Tensor:
        y: Tensor = own(x, **rest)
        return y + convolved(part, x, scale, side or round(x.shape[1] ** 0.5))

    module.forward = forward


def bypassed(scale: float, side: int | None) -> Any:
    def rewrite(plain: nn.Module, parts: dict[str, Any]) -> None:
        for suffix in ("attn", "mlp"):
            own = found(parts, f"{suffix}/parallel")
            for block, part in zip(blocks(plain), own, strict=bool(own)):
                beside(getattr(block, suffix), part, scale, side)

    return rewrite


@BOTH
@EACH_CONV
def test_attention_and_ffn_have_a_convolution_beside_them(backbone: str, name: str) -> None:
    scale = {"both": 0.25, "attention": 0.5}[name]
    agrees(backbone, CONV[name], bypassed(scale, 2 if backbone == "vit" else None))


def stirred_part(prefix: int | None = None) -> Convpass:
    torch.manual_seed(0)
    part = Convpass(16, 4, prefix=prefix).double()
    with torch.no_grad():
        for p in part.parameters():
            p.normal_(std=0.5)
    return part


@pytest.mark.parametrize(
    ("n", "prefix", "side"),
    [
        (197, None, 14),
        (197, 1, 14),
        (49, None, 7),
        (201, None, 14),
        (198, 2, 14),
        (9, 5, 2),
        (2, 1, 1),
    ],
)
def test_patches_are_a_square_and_the_rest_stand_alone(n: int, prefix: Any, side: int) -> None:
    part, x = stirred_part(prefix), torch.randn(2, n, 16, dtype=torch.float64)
    close(part(x), convolved(part, x, 1.0, side))


def test_a_patch_reads_the_eight_around_it_and_a_class_token_none() -> None:
    part = stirred_part()
    x = torch.randn(1, 26, 16, dtype=torch.float64, requires_grad=True)
    for token, reads in ((0, {0}), (1 + 7, {1 + i for i in (1, 2, 3, 6, 7, 8, 11, 12, 13)})):
        (slope,) = torch.autograd.grad(part(x)[0, token].sum(), x)
        assert set(slope[0].abs().amax(-1).nonzero().flatten().tolist()) == reads
    assert part.mixes_tokens


def test_a_map_is_taken_as_it_is() -> None:
    part, x = stirred_part(), torch.randn(2, 5, 3, 16, dtype=torch.float64)
    conv = part.conv
    hidden = quick(F.linear(x, part.down.weight, part.down.bias)).permute(0, 3, 1, 2)
    mixed = F.conv2d(hidden, conv.weight, conv.bias, padding=1).permute(0, 2, 3, 1)
    close(part(x), F.linear(quick(mixed), part.up.weight, part.up.bias))
    square = torch.randn(2, 4, 4, 16, dtype=torch.float64)
    assert torch.equal(part(square), part(square.flatten(1, 2)).reshape(square.shape))


@BOTH
@ALL
def test_it_starts_as_the_base_trains_and_comes_off(backbone: str, rules: Any) -> None:
    assert starts_as_the_base(backbone, rules)
    trains_and_comes_off(backbone, rules)


def test_the_starts_are_those_of_the_papers() -> None:
    for part in (RepAdapter(768), Convpass(768), Convpass(768, xavier=True)):
        assert part.starts_at_zero
        bound = (6 / (768 + 8)) ** 0.5
        assert 0.99 * bound < part.down.weight.abs().max() <= bound
        assert not any(p.any() for p in (part.down.bias, part.up.weight, part.up.bias))
    plain, random = Convpass(768).conv, Convpass(768, xavier=True).conv
    x = torch.randn(1, 8, 5, 5)
    assert torch.allclose(plain(x), x, atol=1e-6)
    bound = (6 / (2 * 72)) ** 0.5
    assert 0.98 * bound < random.weight.abs().max() <= bound
    assert plain.bias is not None
    assert random.bias is not None
    assert not plain.bias.any()
    assert not random.bias.any()


def test_dropout_is_on_the_hidden_units() -> None:
    for rules, layer in ((linears(), "drop"), (bypasses(), "act.1")):
        for part in parts(surgery.apply(vit(), rules)).values():
            dropped: Any = part.get_submodule(layer)
            assert isinstance(dropped, nn.Dropout)
            assert dropped.p == 0.1
    part, seen = RepAdapter(24, dropout=0.5), list[Tensor]()
    part.drop.register_forward_hook(lambda module, args, out: seen.append(out))
    part(torch.randn(300, 24))
    assert seen[0].shape == (300, 8)
    assert 0.4 < (seen[0] == 0).double().mean() < 0.6
    other = Convpass(24, dropout=0.5)
    act: Any = other.act
    act[1].register_forward_hook(lambda module, args, out: seen.append(out))
    other(torch.randn(30, 10, 24))
    assert seen[1].shape == (30, 10, 8)
    assert 0.4 < (seen[1] == 0).double().mean() < 0.6


@BOTH
@EACH_LINEAR
def test_a_linear_adapter_merges_into_the_layers(backbone: str, name: str) -> None:
    merges(backbone, LINEAR[name])


def test_merged_weights_are_those_of_the_formula() -> None:
    model: Any = stirred("vit", linears(scale=0.5))
    fc1, part = model.blocks[2].mlp.fc1, found(parts(model), "mlp")[2]
    dense = torch.zeros(24, 8, dtype=torch.float64)
    with torch.no_grad():
        dense[:12, :4], dense[12:, 4:] = part.up.weight[:12], part.up.weight[12:]
        weight = fc1.weight @ (torch.eye(24) + 0.5 * dense @ part.down.weight)
        bias = fc1.bias + 0.5 * fc1.weight @ (dense @ part.down.bias + part.up.bias)
        surgery.merge(model)
        close(fc1.weight, weight)
        close(fc1.bias, bias)


@EACH_CONV
def test_a_convolution_does_not_merge(name: str) -> None:
    with pytest.raises(surgery.OperationError, match="Convpass stands at a"):
        surgery.merge(stirred("vit", CONV[name]))


@pytest.mark.parametrize(
    ("rules", "count"),
    [
        (linears(), 239_808),
        (repadapter_att(), 119_904),
        (linears(bias=False), 221_184),
        (bypasses(), 327_552),
        (convpass_att(), 163_776),
    ],
)
def test_counts_on_vit_b(rules: Any, count: int) -> None:
    model = vit_b()
    assert surgery.plan(model, rules).trainable == count


def test_separate_projections_share_one_linear_adapter(tmp_path: Path) -> None:
    model: Any = surgery.apply(hf_vit(), linears())
    with torch.no_grad():
        for p in surgery.parameters(model):
            p.normal_(std=0.1)
    made = parts(model)
    assert len(made) == 3 + 3
    plain: Any = hf_vit()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "surgery." not in k})
    for i, layer in enumerate(plain.vit.layers):
        own = layer.attention
        for linear in (own.q_proj, own.k_proj, own.v_proj):
            before(linear, found(made, "attention")[i], 1.0)
        before(layer.mlp.fc1, found(made, "mlp")[i], 1.0)
    with torch.no_grad():
        want = plain(images()).logits
        assert torch.allclose(model(images()).logits, want, atol=1e-5)
        assert torch.allclose(surgery.merge(model)(images()).logits, want, atol=1e-5)
    surgery.unmerge(model)
    surgery.save(model, tmp_path / "rep.safetensors")
    with safe_open(tmp_path / "rep.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith("parts.")]  # noqa: SIM118
    assert len(keys) == 6 * 4
    base: Any = hf_vit()
    base.load_state_dict(plain.state_dict())
    other = surgery.load(base, tmp_path / "rep.safetensors", rules=linears())
    with torch.no_grad():
        assert torch.equal(other(images()).logits, model(images()).logits)


def test_torch_attention_is_taken_whole() -> None:
    for rules in (linears(), bypasses()):
        model = surgery.apply(encoder().eval(), rules, example=torch.randn(2, 5, 24))
        assert [key for key in parts(model) if "self_attn" in key]


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (repadapter(rank=0), r"repadapter\(rank=0\): it must be an integer"),
        (repadapter(groups=1.5), r"repadapter\(groups=1.5\): it must be an integer"),  # type: ignore[arg-type]
        (repadapter(rank=8, groups=3), r"8 hidden units do not divide by 3 groups"),
        (repadapter(rank=5, groups=5), r"24 features do not divide by 5 groups"),
        (convpass(hidden=0), r"convpass\(hidden=0\): it must be an integer"),
        (convpass(prefix=-1), r"convpass\(prefix=-1\): it is no number of tokens"),
        (convpass(prefix=True), r"convpass\(prefix=True\): it is no number of tokens"),
    ],
)
def test_a_wrong_number_is_told(part: Any, told: str) -> None:
    with pytest.raises(surgery.RuleError, match=told):
        surgery.apply(vit(), at(ffn, prepend(part, residual=True)))


@pytest.mark.parametrize(
    ("prefix", "shape", "told"),
    [
        (
            None,
            (2, 99, 16),
            "99 tokens, whose patches should be a square map, and the nearest .* 81",
        ),
        (0, (2, 197, 16), r"convpass\(prefix=0\): .* 197 tokens, .* and 197 is none"),
        (2, (2, 197, 16), r"convpass\(prefix=2\): .* and 195 is none"),
        (5, (2, 5, 16), "and 0 is none"),
        (7, (2, 5, 16), "and -2 is none"),
        (None, (2, 0, 16), "and the nearest square is 0"),
        (None, (5, 16), "neither tokens"),
        (None, (2, 2, 2, 2, 16), "neither tokens"),
    ],
)
def test_patches_that_are_no_square_are_told(prefix: Any, shape: Any, told: str) -> None:
    with pytest.raises(surgery.GraftError, match=told):
        Convpass(16, prefix=prefix)(torch.randn(shape))


def test_patches_that_are_no_square_are_taken_as_the_model_makes_them() -> None:
    wide: Any = timm.create_model("vit_tiny_patch16_224", img_size=(64, 256), depth=1)
    x = torch.randn(1, 3, 64, 256)
    told = r"65 tokens, of which the model made 4 x 16 patches.\nGive prefix=1"
    with pytest.raises(surgery.GraftError, match=told):
        surgery.apply(wide, at(attn, parallel(convpass(prefix=0))), example=x)
    surgery.apply(wide, at(attn, parallel(convpass(prefix=1))), example=x)
