"""Every rule set for point clouds on Point-MAE: tokens, positions, the head, statistics, counts."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from backbones.point_mae import PointMAE, PointMAEPartSeg
from surgery import at, block, insert, prompt, rulesets
from surgery.methods import dapt, daptx, idpt, point_peft, pointgst
from surgery.spec import PROPERTIES, Absent, Case
from surgery.spec.suite import Run

ALL = ("cls", "prompt", "patch")
SETS: dict[str, tuple[Any, int]] = {  # rules, and how many tokens the head is given beside 1 + 8
    "dapt": (dapt(rank=4), 3),
    "daptx": (daptx(rank=4), 3),
    "idpt": (idpt(k=3), 1),
    "pointgst": (pointgst(rank=4, local=4), 0),
    "point_peft": (point_peft(rank=4, tokens=2), 0),
    "adapterx_ffn": ("adapterx_ffn", 0),
    "adapterx": ("adapterx", 0),
    "linear_probe": ("linear_probe", 0),
    "full": ("full", 0),
    "ssf": ("ssf", 0),
    "lora": ("lora", 0),
    "adapter": ("adapter", 0),
    "vpt_deep": ("vpt_deep", 0),
    "bitfit": ("bitfit", 0),
}


def tiny(reads: tuple[str, ...] = ALL, groups: int = 8, **changes: Any) -> PointMAE:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "embed_dim": 24, "depth": 3, "num_heads": 2, "head_dim": 16, "drop_rate": 0.0,
        "drop_path": 0.0,
    }  # fmt: skip
    return PointMAE(5, num_groups=groups, group_size=6, reads=reads, **{**sizes, **changes}).eval()


def clouds(seed: int = 0, n: int = 48) -> Tensor:
    return torch.randn(3, n, 3, generator=torch.Generator().manual_seed(seed))


def seen_by(module: nn.Module, model: nn.Module, points: Tensor) -> Tensor:
    """What a module is given first in a forward."""
    kept: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        model(points)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("name", SETS)
def test_every_method_runs_learns_and_comes_off(name: str) -> None:
    rules, extra = SETS[name]
    model = tiny()
    mark = surgery.fingerprint(model)
    surgery.apply(model, rules, example=clouds())
    assert seen_by(model.norm, model, clouds()).shape[1] == 9 + extra
    optimizer = torch.optim.AdamW(surgery.parameters(model), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model.train()(clouds()), torch.tensor([0, 1, 2]))
        (loss + 0.01 * surgery.balance_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    surgery.revert(model)
    now = surgery.fingerprint(model)
    assert {key for key in mark if not key.startswith("random") and mark[key] != now[key]} == set()


@pytest.mark.parametrize("name", SETS)
def test_a_file_reproduces_what_was_trained(name: str, tmp_path: Path) -> None:
    """Frozen batch norms among it: they would drift in training, and the file not tell."""
    base = tiny()
    model = surgery.apply(copy.deepcopy(base), SETS[name][0])
    optimizer = torch.optim.SGD(surgery.parameters(model), lr=0.1)
    for seed in range(3):
        model.train()(clouds(seed)).square().mean().backward()
        optimizer.step()
    frozen = {k: v for k, v in model.encoder.state_dict().items() if "running" in k}
    kept = all(torch.equal(v, base.encoder.state_dict()[k]) for k, v in frozen.items())
    assert kept is (name not in ("full", "bitfit")), "those train the encoder's batch norms"
    file = surgery.save(model, tmp_path / f"{name}.safetensors")
    again = surgery.load(copy.deepcopy(base), file)
    with torch.no_grad():
        assert torch.equal(again.eval()(clouds(9)), model.eval()(clouds(9)))


def test_positions_are_added_anew_before_every_block_and_prompts_have_none() -> None:
    """Written out: VPT-deep's come and go, DAPT's stay, the newest right after the class token."""
    for keep in (False, True):
        rules = [at(block, insert(prompt(tokens=2), keep=keep))]
        model = surgery.apply(tiny().double(), rules).eval()
        with torch.no_grad():
            for p in surgery.parameters(model):
                p.normal_()
            cloud = clouds().double()
            tokens = seen_by(model.blocks, model, cloud)
            pos = torch.cat([model.cls_pos.expand(3, -1, -1), _centres(model, cloud)], 1)
            plain = tiny().double()
            prompts = [part.tokens for part in model.surgery.default.children()]
            x = tokens
            for new, one in zip(prompts, plain.blocks.blocks, strict=True):
                gap = torch.zeros(3, x.shape[1] - pos.shape[1], 24, dtype=x.dtype)
                x = x + torch.cat([pos[:, :1], gap, pos[:, 1:]], 1)
                x = one(torch.cat([x[:, :1], new.expand(3, -1, -1), x[:, 1:]], 1))
                x = x if keep else torch.cat([x[:, :1], x[:, 3:]], 1)
            have = seen_by(model.norm, model, cloud)
        assert have.shape == (3, 9 + 6 * keep, 24)
        torch.testing.assert_close(have, x, atol=1e-13, rtol=0)


def _centres(model: PointMAE, cloud: Tensor) -> Tensor:
    from pointcloud.group import group_points

    embedded: Tensor = model.pos_embed(group_points(cloud, 8, 6).centers)
    return embedded


@pytest.mark.parametrize("groups", [8, 24])
def test_what_the_encoder_gives_is_scaled_by_feature(groups: int) -> None:
    """Be there as many patches as features too."""
    model = surgery.apply(tiny(groups=groups), dapt(rank=4))
    part: Any = dict(model.surgery.default.named_children())["encoder/append"]
    with surgery.disabled(model), torch.no_grad():
        plain = seen_by(model.blocks, model, clouds())[:, 1:]
    with torch.no_grad():
        part.gamma.copy_(torch.arange(24.0))
        part.beta.zero_()
        have = seen_by(model.blocks, model, clouds())[:, 1:]
    torch.testing.assert_close(have, plain * torch.arange(24.0))


def test_the_head_reads_the_prompts() -> None:
    model = surgery.apply(tiny(), daptx(rank=4))
    with torch.no_grad():
        before = model(clouds())
        last: Any = dict(model.surgery.default.named_children())["norm/insert"]
        last.beta.add_(torch.linspace(-1, 1, len(last.beta)))
        assert not torch.allclose(model(clouds()), before)
        blind = surgery.apply(tiny(reads=("cls", "patch")), daptx(rank=4))
        before = blind(clouds())
        dict(blind.surgery.default.named_children())["norm/insert"].beta.add_(1.0)
        assert torch.equal(blind(clouds()), before)


@cache
def base() -> Case:
    """A case of the model; its rules are another's."""
    return Case(tiny(depth=2), "full", clouds)


@cache
def case(name: str) -> Case:
    return base().under(SETS[name][0])


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("law", PROPERTIES)
def test_the_laws_hold(name: str, law: str, examples: int) -> None:
    try:
        Run(PROPERTIES[law], case(name), examples, thorough=examples > 2)()
    except Absent as absent:
        pytest.skip(str(absent))


def test_a_head_in_pieces_is_trained_whole() -> None:
    """Part segmentation: batch norms beside the convolutions, which nothing else would train."""
    sizes: dict[str, Any] = {"num_groups": 8, "group_size": 6, "embed_dim": 24, "depth": 3}
    model = PointMAEPartSeg(num_heads=2, reads=(1, 2, 3), **sizes)
    surgery.apply(model, "linear_probe")
    backbone = ("encoder.", "pos_embed.", "blocks.", "norm.")
    for name, p in model.named_parameters():
        assert p.requires_grad is not name.startswith(backbone), name
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm1d):
            assert module.training is not name.startswith(backbone), name


def test_all_methods_of_the_paper_are_here() -> None:
    assert set(SETS) <= {row[0] for row in rulesets().rows}
