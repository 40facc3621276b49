"""Point-PEFT against sampling, neighbours and attention written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import surgery
from surgery.methods import point_peft
from surgery.parts import geometry_adapter, local_attention
from surgery.parts.geometry import CentreDistances, GeometryAdapter, LocalAttention, far_apart
from tests.laws.test_points import clouds, tiny
from tests.methods.reference import close


def test_centres_are_chosen_as_pointcloud_chooses_them() -> None:
    from pointcloud.sample import farthest_points

    points = clouds(n=9).double()
    index = farthest_points(points, 5)
    assert torch.equal(far_apart(points, 5), index)
    D = CentreDistances()(points, points)
    assert D.shape == (3, 5, 9)
    for cloud, chosen, rows in zip(points, index, D, strict=True):
        for i, row in zip(chosen, rows, strict=True):
            want = torch.stack([(cloud[i] - other).square().sum() for other in cloud])
            want[i] = -1.0
            close(row, want)


def test_points_in_one_place_have_neighbours_too() -> None:
    D = CentreDistances()(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3))
    part = GeometryAdapter(8, 2, LocalAttention(8), 4)
    assert part(torch.randn(1, 5, 8), D).isfinite().all()
    half = part.eval().half()(torch.randn(1, 5, 8).half(), D.half())
    assert half.isfinite().all()


def attended(p: Any, z: Tensor) -> Tensor:
    """Of one group (k, c), head by head."""
    x = F.layer_norm(z, z.shape[-1:], p.norm.weight, p.norm.bias)
    q, k, v = (x @ p.qkv.weight.t()).chunk(3, -1)
    heads = []
    for a, b, c in zip(q.split(3, -1), k.split(3, -1), v.split(3, -1), strict=True):
        heads.append((a @ b.t() / 18**0.5).softmax(-1) @ c)
    return z + torch.cat(heads, -1) @ p.proj.weight.t() + p.proj.bias


def adapted(p: Any, x: Tensor, centers: Tensor, k: int = 16) -> Tensor:
    """Token by token; norms by what they have kept, as in eval mode."""
    out = []
    g = centers.shape[1]
    for tokens, points in zip(x, centers, strict=True):
        own = tokens[-g:]
        chosen = far_apart(points[None], (g + 1) // 2)[0]
        made = []
        for i in chosen:
            near = (points - points[i]).square().sum(-1).argsort()[:k]
            most = attended(p.local, own[near]).amax(0)
            n = p.norm
            normed = (most - n.running_mean) / (n.running_var + n.eps).sqrt() * n.weight + n.bias
            made.append(F.gelu(normed) + 0.3 * own[i])
        spread = []
        for point in points:
            w = 1 / ((points[chosen] - point).square().sum(-1) + 1e-8)
            spread.append(sum(a * m for a, m in zip(w / w.sum(), made, strict=True)))
        tokens = torch.cat([tokens[:-g], own + 0.3 * torch.stack(spread)])
        h = tokens @ p.down.weight.t() + p.down.bias
        h = h * torch.sigmoid(1.702 * h)
        out.append(tokens + h @ p.up.weight.t() + p.up.bias)
    return torch.stack(out)


@torch.no_grad()
def test_the_stream_is_that_of_the_formula() -> None:
    rules = point_peft(rank=4, tokens=2, first=2)
    model, plain, points = tiny().double(), tiny().double(), clouds().double()
    surgery.apply(model, rules, example=points)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    before = model(points)
    for p in surgery.parameters(model):
        p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "surgery." not in k})
    centers: list[Tensor] = []
    plain.pos_embed.register_forward_pre_hook(lambda m, args: centers.append(args[0]))
    held = dict(model.surgery.default.named_children())
    for i, block in enumerate(plain.blocks.blocks):
        key = f"blocks/blocks/{i}"
        geometry, behind = held[f"{key}/append"], held[f"{key}/mlp/append"]
        prompts = held[f"{key}/insert"].tokens if i < 2 else torch.zeros(0, 24).double()
        _around(block, geometry, behind, prompts, centers)
    want = plain(points)
    close(model(points), want, 2048)
    assert (want - before).abs().max() > 1e-3


def _around(block: Any, geometry: Any, behind: Any, prompts: Tensor, centers: list[Tensor]) -> None:
    def ffn(x: Tensor, mlp: Any = block.mlp) -> Tensor:
        y: Tensor = type(mlp).forward(mlp, x)
        h = y @ behind.down.weight.t() + behind.down.bias
        h = h * torch.sigmoid(1.702 * h)
        return y + h @ behind.up.weight.t() + behind.up.bias

    def whole(x: Tensor) -> Tensor:
        put = prompts.expand(len(x), *prompts.shape)
        y: Tensor = type(block).forward(block, torch.cat([x[:, :1], put, x[:, 1:]], 1))
        return adapted(geometry, torch.cat([y[:, :1], y[:, 1 + len(prompts) :]], 1), centers[-1])

    block.mlp.forward, block.forward = ffn, whole


def test_it_counts_as_its_formula_says_with_one_attention_for_all() -> None:
    prompts, behind = 6 * 2 * 24, 3 * (4 * 49 + 24)
    geometry = 3 * (4 * 49 + 3 * 24) + 4 * 18 * 24 + 3 * 24
    plan = surgery.plan(tiny(), point_peft(rank=4, tokens=2))
    assert plan.added == prompts // 2 + behind + geometry  # three blocks, of six


def test_what_is_trained_of_the_base() -> None:
    model = surgery.apply(tiny(), point_peft(rank=4))
    own = {n for n, p in model.named_parameters() if p.requires_grad and "surgery" not in n}
    assert {"cls_token", "cls_pos", "norm.weight", "blocks.blocks.0.norm1.bias"} <= own
    assert not {n for n in own if n.startswith(("encoder", "pos_embed"))}
    assert all(n.endswith("bias") for n in own if n.startswith("blocks"))


def test_it_needs_tokens_of_its_centres() -> None:
    with pytest.raises(surgery.GraftError, match="and 8 centres"):
        GeometryAdapter(8, 4, LocalAttention(8), 4)(torch.randn(2, 7, 8), torch.randn(2, 4, 8))
    for part in (geometry_adapter(k=0), geometry_adapter(core=local_attention(heads=0))):
        with pytest.raises(surgery.RuleError, match=r"=0\)"):
            surgery.plan(tiny(), surgery.at(surgery.block, surgery.append(part)))
