"""DAPT, DAPT-X and IDPT against a ViT written out with them; their parts, their prompts left in.

On Point-MAE, with a head that reads prompts, and with counts: tests/laws/test_points.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery import at, ffn, parallel, prompt_generator
from surgery.errors import RuleError
from surgery.methods import dapt, daptx, idpt
from surgery.parts import (
    DynamicAdapter,
    InstancePrompt,
    MixtureOfDynamicAdapters,
    dynamic_adapter,
    dynamic_moa,
    instance_prompt,
)
from surgery.parts.instance_prompts import nearest_tokens
from tests.methods.reference import (
    INPUTS,
    agrees,
    by_hand,
    close,
    parts,
    reverts,
    starts_as_the_base,
    stirred,
    untrained,
)
from tests.models import images, tiny_vit

SETS: dict[str, Any] = {"dapt": dapt(rank=4), "daptx": daptx(rank=4), "idpt": idpt(k=3)}


def nothing(plain: nn.Module, found: Any) -> None:
    """The backbone as it is."""


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def dynamic(p: Any, x: Tensor) -> Tensor:
    """relu(w . z + b) * (U gelu(D z + c) + k), z = LN(x)."""
    z = norm(x, p.norm.weight, p.norm.bias)
    scale = torch.relu(z @ p.scale.weight[0] + p.scale.bias)[..., None]
    down, up = p.adapter.down, p.adapter.up
    return scale * (F.gelu(z @ down.weight.T + down.bias) @ up.weight.T + up.bias)


def mixture(p: Any, x: Tensor, top_k: int | None = 1) -> Tensor:
    """Eq. 2 to 5 of Adapter-X, sub-token by sub-token, with dynamic adapters for experts."""
    out = torch.zeros_like(x)
    c = x.shape[-1] // p.heads
    unit = p.embeddings / p.embeddings.norm(dim=1, keepdim=True)
    for n, i, j in torch.cartesian_prod(*map(torch.arange, (*x.shape[:2], p.heads))).tolist():
        s = x[n, i, j * c : (j + 1) * c]
        g = ((p.reduction @ s) @ unit.T).softmax(0)
        for e in [int(g.argmax())] if top_k else range(len(g)):
            z = norm(s, p.norm_weight[e], p.norm_bias[e])
            scale = torch.relu(p.scale_weight[e] @ z + p.scale_bias[e])
            hidden = F.gelu(p.down[e] @ z + p.down_bias[e])
            out[n, i, j * c : (j + 1) * c] += g[e] * scale * (p.up[e] @ hidden + p.up_bias[e])
    return out


def shifted(found: Any, key: str, x: Tensor) -> Tensor:
    p = found[f"{key}/append"]
    return x * p.gamma + p.beta


def embedded(plain: Any, x: Tensor) -> Tensor:
    embedded: Tensor = plain._pos_embed(x)
    return embedded


def prompt(p: Any, heard: Tensor, act: Any) -> Tensor:
    times = heard.shape[2] // len(p.gamma)
    return p.gamma.repeat(times) * act(heard).mean(1, keepdim=True) + p.beta.repeat(times)


def with_new(x: Tensor, new: Tensor) -> Tensor:
    return torch.cat([x[:, :1], new, x[:, 1:]], 1)


def attention(block: Any, x: Tensor, after: Any = lambda name, y: y) -> Tensor:
    b, n, d = x.shape
    heads = block.attn.num_heads
    qkv = after("qkv", block.attn.qkv(x)).reshape(b, n, 3, heads, d // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) * (d // heads) ** -0.5).softmax(3)
    out: Tensor = after("proj", block.attn.proj((weights @ v).transpose(1, 2).reshape(b, n, d)))
    return out


def test_dapt_written_out() -> None:
    model = stirred("vit", SETS["dapt"])
    plain: Any = by_hand("vit", model, nothing)
    found = parts(model)
    with torch.no_grad():
        x = shifted(found, "patch_embed", plain.patch_embed(INPUTS["vit"]))
        x = embedded(plain, x)
        for i, block in enumerate(plain.blocks):

            def after(name: str, y: Tensor, i: int = i) -> Tensor:
                return shifted(found, f"blocks/{i}/attn/{name}", y)

            u = x + attention(block, shifted(found, f"blocks/{i}/norm1", block.norm1(x)), after)
            z = shifted(found, f"blocks/{i}/norm2", block.norm2(u))
            a = dynamic(found[f"blocks/{i}/mlp/parallel"], z)
            hidden = shifted(found, f"blocks/{i}/mlp/fc1", block.mlp.fc1(z))
            y = shifted(found, f"blocks/{i}/mlp/fc2", block.mlp.fc2(F.gelu(hidden)))
            key = f"blocks/{i + 1}/insert" if i < 2 else "norm/insert"
            x = with_new(u + y + a, prompt(found[key], a, F.gelu))
        assert x.shape[1] == 5 + 3
        x = shifted(found, "norm", plain.norm(x))
        close(model(INPUTS["vit"]), plain.head(x[:, 0]), 64)  # scaled and shifted 20 times


@pytest.mark.parametrize(
    "generator", [None, prompt_generator(), prompt_generator(activation=nn.GELU)],
    ids=["width / heads", "width", "GELU"],
)  # fmt: skip
def test_daptx_written_out(generator: Any) -> None:
    model = stirred("vit", daptx(rank=4, generator=generator))
    plain: Any = by_hand("vit", model, nothing)
    found = parts(model)
    act = F.gelu if "GELU" in repr(generator) else torch.nn.Identity()
    (one,) = [p for key, p in found.items() if key.startswith("shared/")]
    with torch.no_grad():
        x = embedded(plain, plain.patch_embed(INPUTS["vit"]))
        for i, block in enumerate(plain.blocks):
            u = x + attention(block, block.norm1(x))
            z = block.norm2(u)
            a = mixture(one, z)
            key = f"blocks/{i + 1}/insert" if i < 2 else "norm/insert"
            x = with_new(u + block.mlp(z) + a, prompt(found[key], a, act))
        assert x.shape[1] == 5 + 3
        close(model(INPUTS["vit"]), plain.head(plain.norm(x)[:, 0]))


def edges(p: Any, x: Tensor) -> Tensor:
    """max_j leaky(BN(W [x_j - x_i; x_i])), edge by edge; batch norm in eval mode."""
    out = torch.empty_like(x)
    for n in range(len(x)):
        for i in range(x.shape[1]):
            near = (x[n] - x[n, i]).square().sum(1).argsort()[: p.k]
            both = torch.cat([x[n, near] - x[n, i], x[n, i].expand(len(near), -1)], 1)
            y = both @ p.edge.weight.T
            y = (y - p.norm.running_mean) / (p.norm.running_var + p.norm.eps).sqrt()
            out[n, i] = F.leaky_relu(y * p.norm.weight + p.norm.bias, 0.2).amax(0)
    return out


def instance(p: Any, x: Tensor) -> Tensor:
    seen = [x[:, 1:]]
    for layer in p.layers:
        seen.append(edges(layer, seen[-1]))
    y = torch.cat(seen[1:], 2) @ p.fuse.weight.T
    y = (y - p.norm.running_mean) / (p.norm.running_var + p.norm.eps).sqrt()
    return F.leaky_relu(y * p.norm.weight + p.norm.bias, 0.2).amax(1, keepdim=True)


def test_idpt_written_out() -> None:
    model = stirred("vit", SETS["idpt"])
    (made,) = parts(model).values()
    for module in made.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.copy_(torch.linspace(-1, 1, 24))
            module.running_var.copy_(torch.linspace(0.5, 2, 24))
    plain: Any = by_hand("vit", model, nothing)
    with torch.no_grad():
        x = embedded(plain, plain.patch_embed(INPUTS["vit"]))
        for i, block in enumerate(plain.blocks):
            x = block(with_new(x, instance(made, x)) if i == 2 else x)
        assert x.shape[1] == 6
        close(model(INPUTS["vit"]), plain.head(plain.norm(x)[:, 0]), 64)  # sums of 72, thrice


@pytest.mark.parametrize("top_k", [1, None])
def test_the_mixture_by_both_formulae(top_k: int | None) -> None:
    torch.manual_seed(0)
    part = MixtureOfDynamicAdapters(24, 4, top_k=top_k).double()
    with torch.no_grad():
        for p in part.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    close(part(x).output, mixture(part, x, top_k))


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_the_dynamic_adapter_beside_an_ffn(backbone: str) -> None:
    def rewrite(plain: Any, found: dict[str, Any]) -> None:
        for key, p in found.items():
            mlp: Any = plain.get_submodule(key.removesuffix("/parallel").replace("/", "."))

            def forward(x: Tensor, was: Any = mlp.forward, p: Any = p) -> Tensor:
                y: Tensor = was(x) + dynamic(p, x)
                return y

            mlp.forward = forward

    agrees(backbone, at(ffn, parallel(dynamic_adapter(rank=4))), rewrite)


@pytest.mark.parametrize("name", SETS)
def test_all_of_it_is_trained_and_comes_off(name: str) -> None:
    """But for the last prompt, which a head that reads the class token alone does not see."""
    dead = [f"surgery.default.norm/insert.{each}" for each in ("gamma", "beta")]
    # steps: where an adapter's scale is 0 at all of the few tokens, no gradient comes to it
    assert untrained("vit", SETS[name], steps=6) == (dead if name != "idpt" else [])
    reverts("vit", SETS[name])


@pytest.mark.parametrize("backbone", ["vit", "swin"])
def test_adapters_start_by_adding_nothing(backbone: str) -> None:
    for part in (dynamic_adapter(rank=4), dynamic_moa(rank=4)):
        assert starts_as_the_base(backbone, at(ffn, parallel(part)))


def test_starts() -> None:
    torch.manual_seed(0)
    one, many = DynamicAdapter(96, 8), MixtureOfDynamicAdapters(288, 8)
    for weight, width in ((one.scale.weight, 96), (one.adapter.down.weight, 96), (many.down, 96),
                          (many.scale_weight, 96)):  # fmt: skip
        assert 0.9 * width**-0.5 < weight.abs().max() <= width**-0.5
    for zero in (one.scale.bias, one.adapter.up.weight, many.up, many.scale_bias, many.norm_bias):
        assert not zero.any()
    assert (many.norm_weight == 1).all()


def test_a_prompt_of_the_tokens_alone() -> None:
    torch.manual_seed(0)
    part = InstancePrompt(24, k=4).eval()
    x = torch.randn(2, 9, 24)
    other = x.clone()
    other[:, 0] += 1  # the class token
    assert torch.equal(part(x), part(other))
    shuffled = torch.cat([x[:, :1], x[:, 1:].flip(1)], 1)
    torch.testing.assert_close(part(x), part(shuffled))
    assert part(x[:, :3]).shape == (2, 1, 24), "fewer tokens than k"


def test_neighbours_are_right_far_from_the_origin_and_in_half_types() -> None:
    x = torch.randn(2, 64, 24, generator=torch.Generator().manual_seed(0))
    x[..., 0] += 300
    want = (x[:, :, None].double() - x[:, None].double()).square().sum(3).argsort(2)[..., :8]
    for given, context in ((x, False), (x, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=context):
            assert torch.equal(nearest_tokens(given, 8), want)
    rounded = x.bfloat16()
    exact = rounded.double()
    want = (exact[:, :, None] - exact[:, None]).square().sum(3).sort(2).values[..., :8]
    have = nearest_tokens(rounded, 8)
    near = exact.gather(1, have.flatten(1)[..., None].expand(-1, -1, 24)).unflatten(1, (64, 8))
    torch.testing.assert_close((near - exact[:, :, None]).square().sum(3), want)


def test_models_without_a_class_token_are_told() -> None:
    model = tiny_vit(class_token=False, global_pool="avg")
    for rules in SETS.values():
        with pytest.raises(surgery.MatchError, match=r"no parameter for unfreeze\(token\)"):
            surgery.plan(model, rules)
    surgery.apply(model, idpt(k=3, first=0), example=images())
    (made,) = parts(model).values()
    assert made.skip == 0


def test_a_pooled_model_takes_no_last_prompt() -> None:
    model = tiny_vit(global_pool="avg")
    with pytest.raises(surgery.GraftError, match=r"\(2, 24\).*\n.*behind the pooling"):
        surgery.apply(model, daptx(rank=4), example=images())
    surgery.apply(model, daptx(rank=4, last=False), example=images())


def test_heads_fit_the_width() -> None:
    model = tiny_vit(embed_dim=32, num_heads=2)
    surgery.apply(model, daptx(rank=4), example=images())
    assert "4 heads: the divisor of 32 nearest to 3" in str(surgery.report(model))


def test_wrong_values_are_told() -> None:
    for wrong in (dynamic_adapter(rank=0), dynamic_moa(experts=0), instance_prompt(k=0),
                  instance_prompt(skip=-1)):  # fmt: skip
        with pytest.raises(RuleError, match=r"=(0|-1)"):
            surgery.plan(
                by_hand("vit", stirred("vit", SETS["idpt"]), nothing), at(ffn, parallel(wrong))
            )
