"""Point-MAE against its formulae, written out here in float64, and against the published names."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backbones.checkpoint import Loaded, load_checkpoint
from backbones.point_mae import PointMAE, PointMAEPartSeg, PointMAEPretrain
from pointcloud.group import group_points

EPS = torch.finfo(torch.float64).eps
WIDTH, DEPTH, HEADS, GROUPS, SIZE = 24, 3, 2, 8, 4
SMALL: dict[str, Any] = {
    "num_groups": GROUPS, "group_size": SIZE, "embed_dim": WIDTH, "depth": DEPTH,
    "num_heads": HEADS,
}  # fmt: skip
State = dict[str, Tensor]


def clouds(b: int = 2, n: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(b, n, 3, generator=generator, dtype=torch.float64)


def lively(model: nn.Module) -> nn.Module:
    """The model in float64 and eval, no number of it left at a start that hides a mistake."""
    model.double().eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.is_floating_point():
            fan = tensor[0].numel() if tensor.ndim > 1 and tensor.shape[0] > 1 else 4
            tensor.normal_(0.0, 1 / math.sqrt(fan))
            if tensor.ndim == 1 and name.endswith("weight"):
                tensor.add_(1.0)
    return model


# The formulae. Tokens (b, n, d); `s` are the tensors of the model, by published names.


def linear(s: State, name: str, x: Tensor) -> Tensor:
    weight = s[f"{name}.weight"]
    y = torch.einsum("...i,oi->...o", x, weight.reshape(weight.shape[:2]))
    return y + s[f"{name}.bias"] if f"{name}.bias" in s else y


def batch_norm(s: State, name: str, x: Tensor) -> Tensor:
    scale = s[f"{name}.weight"] / torch.sqrt(s[f"{name}.running_var"] + 1e-5)
    return (x - s[f"{name}.running_mean"]) * scale + s[f"{name}.bias"]


def layer_norm(s: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    return centred / deviation * s[f"{name}.weight"] + s[f"{name}.bias"]


def relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def tokens_of(s: State, name: str, patches: Tensor) -> Tensor:
    """mini-PointNet: (b, g, k, 3) to (b, g, d)."""
    x = relu(batch_norm(s, f"{name}.first_conv.1", linear(s, f"{name}.first_conv.0", patches)))
    x = linear(s, f"{name}.first_conv.3", x)
    x = torch.cat([x.max(2, keepdim=True).values.expand(x.shape), x], -1)
    x = relu(batch_norm(s, f"{name}.second_conv.1", linear(s, f"{name}.second_conv.0", x)))
    return linear(s, f"{name}.second_conv.3", x).max(2).values


def position(s: State, name: str, centers: Tensor) -> Tensor:
    return linear(s, f"{name}.2", gelu(linear(s, f"{name}.0", centers)))


def attention(s: State, name: str, x: Tensor) -> Tensor:
    b, n, d = x.shape
    q, k, v = linear(s, f"{name}.qkv", x).view(b, n, 3, HEADS, d // HEADS).unbind(2)
    score = torch.einsum("bihc,bjhc->bhij", q, k) / math.sqrt(d // HEADS)
    share = score.exp() / score.exp().sum(-1, keepdim=True)
    return linear(s, f"{name}.proj", torch.einsum("bhij,bjhc->bihc", share, v).reshape(b, n, d))


def block(s: State, name: str, x: Tensor) -> Tensor:
    x = x + attention(s, f"{name}.attn", layer_norm(s, f"{name}.norm1", x))
    hidden = gelu(linear(s, f"{name}.mlp.fc1", layer_norm(s, f"{name}.norm2", x)))
    return x + linear(s, f"{name}.mlp.fc2", hidden)


def classified(
    model: PointMAE, points: Tensor, *, every: bool = True, new: Sequence[Tensor | None] = ()
) -> Tensor:
    """Logits; new[i] are tokens that come in at block i, right after the class token."""
    s = model.state_dict()
    centers, patches, _ = group_points(points, GROUPS, SIZE)
    b = len(points)
    x = torch.cat([s["cls_token"].expand(b, 1, WIDTH), tokens_of(s, "encoder", patches)], 1)
    pos = position(s, "pos_embed", centers)
    for i in range(DEPTH):
        if every or i == 0:
            x = x.clone()
            x[:, 0] += s["cls_pos"][0, 0]
            x[:, -GROUPS:] += pos
        tokens = new[i] if i < len(new) else None
        if tokens is not None:
            x = torch.cat([x[:, :1], tokens.expand(b, -1, WIDTH), x[:, 1:]], 1)
        x = block(s, f"blocks.blocks.{i}", x)
    x = layer_norm(s, "norm", x)
    inserted = x[:, 1:-GROUPS]
    mean = inserted.mean(1) if inserted.shape[1] else torch.zeros_like(x[:, 0])
    read = {"cls": x[:, 0], "prompt": mean, "patch": x[:, -GROUPS:].max(1).values}
    x = torch.cat([read[name] for name in model.reads], -1)
    h = "cls_head_finetune"
    for a, c in ((0, 1), (4, 5)):
        x = relu(batch_norm(s, f"{h}.{c}", linear(s, f"{h}.{a}", x)))
    return linear(s, f"{h}.8", x)


def close(found: Tensor, wanted: Tensor, eps: float = 32) -> None:
    """Within `eps` roundings of the largest number: sums of up to 96 terms, ten in a row, in
    another order; a term left out or put twice shows at 1e-2 and more."""
    assert found.shape == wanted.shape
    error = (found - wanted).abs().max() / wanted.abs().max()
    assert error < eps * EPS, f"{error / EPS:.1f} eps"


def prompts_at(model: PointMAE, new: Sequence[Tensor | None]) -> None:
    """Hooks as a prompt-tuning toolkit sets them: tokens put in after the first, and left in."""

    def insert(tokens: Tensor) -> Callable[..., Any]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0]
            return (torch.cat([x[:, :1], tokens.expand(len(x), -1, -1), x[:, 1:]], 1),)

        return hook

    for layer, tokens in zip(model.blocks.blocks, new, strict=False):
        if tokens is not None:
            layer.register_forward_pre_hook(insert(tokens))


# Names, shapes, counts.


def block_keys(name: str, d: int = 384) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "norm1.weight": (d,), "norm1.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,),
        "attn.qkv.weight": (3 * d, d), "attn.proj.weight": (d, d), "attn.proj.bias": (d,),
        "mlp.fc1.weight": (4 * d, d), "mlp.fc1.bias": (4 * d,),
        "mlp.fc2.weight": (d, 4 * d), "mlp.fc2.bias": (d,),
    }  # fmt: skip
    return {f"{name}.{key}": shape for key, shape in shapes.items()}


def norm_keys(name: str, d: int) -> dict[str, tuple[int, ...]]:
    rows = ("weight", "bias", "running_mean", "running_var")
    return {**{f"{name}.{row}": (d,) for row in rows}, f"{name}.num_batches_tracked": ()}


def encoder_keys() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "encoder.first_conv.0.weight": (128, 3, 1), "encoder.first_conv.0.bias": (128,),
        "encoder.first_conv.3.weight": (256, 128, 1), "encoder.first_conv.3.bias": (256,),
        "encoder.second_conv.0.weight": (512, 512, 1), "encoder.second_conv.0.bias": (512,),
        "encoder.second_conv.3.weight": (384, 512, 1), "encoder.second_conv.3.bias": (384,),
        **norm_keys("encoder.first_conv.1", 128), **norm_keys("encoder.second_conv.1", 512),
        "pos_embed.0.weight": (128, 3), "pos_embed.0.bias": (128,),
        "pos_embed.2.weight": (384, 128), "pos_embed.2.bias": (384,),
        "norm.weight": (384,), "norm.bias": (384,),
    }  # fmt: skip
    for i in range(12):
        found |= block_keys(f"blocks.blocks.{i}")
    return found


def finetune_keys() -> dict[str, tuple[int, ...]]:
    h = "cls_head_finetune"
    return encoder_keys() | {
        "cls_token": (1, 1, 384), "cls_pos": (1, 1, 384),
        f"{h}.0.weight": (256, 768), f"{h}.0.bias": (256,), **norm_keys(f"{h}.1", 256),
        f"{h}.4.weight": (256, 256), f"{h}.4.bias": (256,), **norm_keys(f"{h}.5", 256),
        f"{h}.8.weight": (15, 256), f"{h}.8.bias": (15,),
    }  # fmt: skip


def pretrain_keys() -> dict[str, tuple[int, ...]]:
    found = {f"MAE_encoder.{key}": shape for key, shape in encoder_keys().items()}
    for i in range(4):
        found |= block_keys(f"MAE_decoder.blocks.{i}")
    return found | {
        "mask_token": (1, 1, 384),
        "MAE_decoder.norm.weight": (384,), "MAE_decoder.norm.bias": (384,),
        "decoder_pos_embed.0.weight": (128, 3), "decoder_pos_embed.0.bias": (128,),
        "decoder_pos_embed.2.weight": (384, 128), "decoder_pos_embed.2.bias": (384,),
        "increase_dim.0.weight": (96, 384, 1), "increase_dim.0.bias": (96,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("build", "keys", "file"),
    [(PointMAE, finetune_keys, "finetune"), (PointMAEPretrain, pretrain_keys, "pretrain")],
)
def test_names_and_shapes_are_the_published_ones(
    build: Callable[[], nn.Module], keys: Callable[[], Any], file: str
) -> None:
    with torch.device("meta"):
        state = build().state_dict()
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert found == keys()
    types = {key: tensor.dtype for key, tensor in state.items()}
    assert all((t == torch.int64) == k.endswith("tracked") for k, t in types.items())
    listed = Path(__file__).parents[3] / f"shared/reference/point_mae_{file}_keys.txt"
    if listed.is_file():  # the list the table above was made from, where the workplace has it
        rows = [line.split("\t") for line in listed.read_text().splitlines()]
        assert {key: shape for key, shape, _ in rows} == {k: str(v) for k, v in found.items()}


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: PointMAE(15), 22_093_327),
        (lambda: PointMAE(40), 22_099_752),
        (lambda: PointMAE(15, reads=("cls", "prompt", "patch")).cls_head_finetune, 365_839),
        (lambda: PointMAE(0), 21_825_024 + 2 * 384),
        (PointMAEPretrain, 29_006_432),
    ],
)
def test_parameters_are_as_many_as_published(build: Callable[[], nn.Module], count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == count


def test_starts_as_published() -> None:
    model = PointMAE(depth=1)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        else:  # cut at 2 absolute, hence plain normal; 4 deviations of the estimate of a deviation
            off = abs(float(p.detach().std()) / 0.02 - 1)
            assert off < 4 / math.sqrt(2 * p.numel()), name


def test_drop_path_grows_to_the_last_block() -> None:
    rates = [getattr(b.drop_path1, "drop_prob", 0.0) for b in PointMAE(**SMALL).blocks.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1])


# The classifier.

EVERY = ("cls", "prompt", "patch")


@pytest.mark.parametrize("reads", [("cls", "patch"), ("patch",), EVERY, ("patch", "cls")])
@pytest.mark.parametrize("every", [True, False])
def test_the_forward_is_the_formula(reads: tuple[str, ...], every: bool) -> None:
    model = PointMAE(5, head_dim=16, reads=reads, every_block=every, **SMALL)
    points = clouds()
    lively(model)
    close(model(points), classified(model, points, every=every))


def test_positions_are_added_before_every_block() -> None:
    model, points = PointMAE(5, **SMALL), clouds()
    lively(model)
    came: list[Tensor] = []
    gave: list[Tensor] = []
    for layer in model.blocks.blocks:
        layer.register_forward_pre_hook(lambda _, inputs: came.append(inputs[0]))
        layer.register_forward_hook(lambda _, inputs, output: gave.append(output))
    model(points)
    pos = position(model.state_dict(), "pos_embed", group_points(points, GROUPS, SIZE).centers)
    pos = torch.cat([model.cls_pos.expand(2, 1, WIDTH), pos], 1)
    for before, after in zip(gave[:-1], came[1:], strict=True):
        assert (after - before - pos).abs().max() < 4 * EPS * before.abs().max()
    assert (model(points) - classified(model, points, every=False)).abs().max() > 1e-3


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("counts", [(2, 0, 0), (1, 1, 1), (0, 3, 0), (0, 0, 2)])
def test_inserted_tokens_are_carried_without_position(every: bool, counts: tuple[int, ...]) -> None:
    model, points = PointMAE(5, reads=EVERY, every_block=every, **SMALL), clouds()
    lively(model)
    without = model(points)
    new = [torch.randn(1, n, WIDTH, dtype=torch.float64) if n else None for n in counts]
    prompts_at(model, new)
    close(model(points), classified(model, points, every=every, new=new))
    assert (model(points) - without).abs().max() > 1e-3


def test_patches_alone_are_the_maximum_and_prompts_alone_the_mean() -> None:
    model = PointMAE(0, reads=EVERY, **SMALL)
    x = torch.randn(2, 1 + 3 + GROUPS, WIDTH)
    token, mean, most = torch.split(model.read(x), WIDTH, -1)
    assert torch.equal(token, x[:, 0])
    assert torch.allclose(mean, (x[:, 1] + x[:, 2] + x[:, 3]) / 3)
    assert torch.equal(most, x[:, 4:].max(1).values)
    assert not model.read(x[:, 3:])[:, WIDTH : 2 * WIDTH].any()


def test_training_normalises_by_the_batch_and_learns_everywhere() -> None:
    model = PointMAE(5, **SMALL, drop_path=0.0)
    before = copy.deepcopy(model.state_dict())
    torch.autograd.backward(model(clouds(4).float()).square().sum())
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # what stands before a batch norm is centred again: such biases move no output
    assert set(dead) <= {"encoder.first_conv.0.bias", "encoder.second_conv.0.bias",
                         "cls_head_finetune.0.bias", "cls_head_finetune.4.bias"}  # fmt: skip
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert len(moved) == 12
    assert all("running" in key or "tracked" in key for key in moved)


def test_a_cloud_does_not_depend_on_its_batch() -> None:
    model, points = PointMAE(5, **SMALL), clouds(3)
    lively(model)
    close(model(points[1:2]), model(points)[1:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, points = PointMAE(5, reads=EVERY, **SMALL), clouds().to(dtype)
    lively(model)
    exact = model(points.double())
    found = model.to(dtype)(points)
    assert found.dtype == dtype
    # a dozen layers deep, each of which rounds what it gives
    assert (found.double() - exact).abs().max() < 16 * torch.finfo(dtype).eps * exact.abs().max()


def test_autocast() -> None:
    model, points = PointMAE(5, **SMALL).eval(), clouds().float()
    exact = model(points)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(points)
    assert found.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16).eps
    assert (found.float() - exact).abs().max() < 8 * eps * exact.abs().max()


def test_copies_pickles_and_compiles() -> None:
    model, points = PointMAE(5, **SMALL).eval(), clouds().float()
    expected = model(points)
    assert torch.equal(copy.deepcopy(model)(points), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(points), expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(points), expected, rtol=0, atol=1e-6)


def test_takes_a_batch_of_torch_geometric() -> None:
    data = pytest.importorskip("torch_geometric.data")
    model, points = PointMAE(5, **SMALL).eval(), clouds().float()
    batch = data.Batch.from_data_list([data.Data(pos=cloud) for cloud in points])
    assert torch.equal(model(batch), model(points))


@pytest.mark.parametrize("reads", [(), ("class",), ("cls", "mean")])
def test_other_reads_are_refused(reads: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"reads=.*'cls', 'prompt' and 'patch'.*Give"):
        PointMAE(reads=reads, **SMALL)


# Pre-training.


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rebuilt_by_formula(
    model: PointMAEPretrain, patches: Tensor, centers: Tensor, seen: Tensor, masked: Tensor
) -> Tensor:
    s = model.state_dict()
    rows = torch.arange(len(patches))[:, None]
    x = tokens_of(s, "MAE_encoder.encoder", patches)[rows, seen]
    pos = position(s, "MAE_encoder.pos_embed", centers[rows, seen])
    for i in range(DEPTH):
        x = block(s, f"MAE_encoder.blocks.blocks.{i}", x + pos)
    x = layer_norm(s, "MAE_encoder.norm", x)
    b, m = masked.shape
    x = torch.cat([x, s["mask_token"].expand(b, m, WIDTH)], 1)
    pos = position(s, "decoder_pos_embed", centers[rows, torch.cat([seen, masked], 1)])
    for i in range(len(model.MAE_decoder.blocks)):
        x = block(s, f"MAE_decoder.blocks.{i}", x + pos)
    x = layer_norm(s, "MAE_decoder.norm", x[:, seen.shape[1] :])
    return linear(s, "increase_dim.0", x).reshape(b, m, SIZE, 3)


def pretraining(**changes: Any) -> PointMAEPretrain:
    return PointMAEPretrain(**{**SMALL, "decoder_depth": 2, "decoder_heads": HEADS, **changes})


def test_the_loss_is_the_formula() -> None:
    model, points = pretraining(), clouds(3)
    lively(model)
    centers, patches, _ = group_points(points, GROUPS, SIZE)
    seen, masked = model.split(centers, seeded(5))
    made = rebuilt_by_formula(model, patches, centers, seen, masked)
    close(model.rebuild(patches, centers, seen, masked), made)
    there: list[float] = []
    back: list[float] = []
    for cloud in range(3):
        for j, group in enumerate(masked[cloud].tolist()):
            a, b = made[cloud, j].tolist(), patches[cloud, group].tolist()
            there += [min(math.dist(p, q) ** 2 for q in b) for p in a]
            back += [min(math.dist(p, q) ** 2 for p in a) for q in b]
    loss = sum(there) / len(there) + sum(back) / len(back)
    assert float(model(points, generator=seeded(5)).detach()) == pytest.approx(loss, rel=64 * EPS)


@pytest.mark.parametrize("block_mask", [False, True])
@pytest.mark.parametrize(("groups", "count"), [(64, 38), (8, 4), (30, 18), (5, 3)])
def test_just_as_many_patches_are_masked_in_every_cloud(
    groups: int, count: int, block_mask: bool
) -> None:
    model = pretraining(num_groups=groups, block_mask=block_mask)
    centers = torch.randn(6, groups, 3)
    seen, masked = model.split(centers, seeded(0))
    assert masked.shape == (6, count)
    both = torch.cat([seen, masked], 1).sort(1).values
    assert torch.equal(both, torch.arange(groups).expand(6, -1))
    assert torch.equal(masked, masked.sort(1).values)
    assert any(not torch.equal(row, masked[0]) for row in masked), (
        "every cloud has a mask of its own"
    )
    assert torch.equal(model.split(centers, seeded(0))[1], masked)
    assert not torch.equal(model.split(centers, seeded(1))[1], masked)


def test_random_masks_choose_every_patch_as_often() -> None:
    model = pretraining()
    masked = model.split(torch.randn(4000, GROUPS, 3), seeded(2))[1]
    share = masked.flatten().bincount(minlength=GROUPS) / 4000
    assert (share - 0.5).abs().max() < 4 * math.sqrt(0.25 / 4000)  # 4 deviations of a coin


def test_a_block_mask_is_what_is_nearest_to_one_patch() -> None:
    centers = torch.randn(6, 20, 3)
    masked = pretraining(num_groups=20, block_mask=True).split(centers, seeded(0))[1]
    for cloud, chosen in zip(centers, masked, strict=True):
        nearest = torch.cdist(cloud, cloud).argsort(1)[:, : len(chosen)].sort(1).values
        assert (nearest == chosen).all(1).any()


def test_without_a_generator_the_global_seed_decides() -> None:
    model, points = pretraining(drop_path=0.0), clouds().float()
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(float(model.eval()(points).detach()))
    assert losses[0] == losses[1] != losses[2]


def test_the_encoder_sees_no_masked_patch() -> None:
    model = pretraining().eval()
    centers, patches, _ = group_points(clouds().float(), GROUPS, SIZE)
    seen, masked = model.split(centers, seeded(0))
    found = model.MAE_encoder(patches, centers, seen)
    assert found.shape == (2, GROUPS - 4, WIDTH)
    other = patches.clone()
    other[0, masked[0]] += 1.0
    assert torch.equal(model.MAE_encoder(other, centers, seen), found)
    other[0, seen[0, 0]] *= -1.0
    assert not torch.equal(model.MAE_encoder(other, centers, seen), found)


@pytest.mark.parametrize("layer", [0, 1])
def test_tokens_inserted_before_the_patches_are_carried_and_dropped(layer: int) -> None:
    model, part, points = pretraining(), PointMAEPartSeg(7, 5, **SMALL, reads=(2, 3)), clouds()
    centers, patches, _ = group_points(points, GROUPS, SIZE)
    everything = torch.arange(GROUPS).expand(2, -1)
    new = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    lively(part), lively(model)
    for encoder in (part, model.MAE_encoder):
        encoder.blocks.blocks[layer].register_forward_pre_hook(
            lambda _, inputs: (torch.cat([new, inputs[0]], 1),)
        )
        s = encoder.state_dict()
        x, pos = tokens_of(s, "encoder", patches), position(s, "pos_embed", centers)
        outputs = []
        for i in range(DEPTH):
            x = torch.cat([x[:, :-GROUPS], x[:, -GROUPS:] + pos], 1)
            x = block(s, f"blocks.blocks.{i}", torch.cat([new, x], 1) if i == layer else x)
            outputs.append(layer_norm(s, "norm", x)[:, -GROUPS:])
        if encoder is part:
            found = part.read(part.tokens(patches), part.pos_embed(centers))
            close(found, torch.cat(outputs[1:], -1))
            assert part(points, torch.tensor([0, 1])).shape == (2, 40, 7)
        else:
            close(encoder(patches, centers, everything), outputs[-1])
            assert model(points).isfinite()


def test_batch_statistics_are_of_every_patch_as_published() -> None:
    model = pretraining()
    norm = model.MAE_encoder.encoder.first_conv[1]
    counted: list[int] = []
    norm.register_forward_hook(lambda _, inputs, output: counted.append(len(inputs[0])))
    model(clouds().float())
    assert counted == [2 * GROUPS]


def test_overfits_one_batch() -> None:
    torch.manual_seed(0)
    model, points = pretraining(drop_path=0.0), clouds(4).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        loss = model(points, generator=seeded(0))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_a_picture_gets_the_points_of_the_cloud() -> None:
    model, points = pretraining(), clouds()
    lively(model)
    found = model.reconstruct(points, generator=seeded(4))
    assert found.visible.shape == found.rebuilt.shape == found.true.shape == (2, 4, SIZE, 3)
    assert not found.rebuilt.requires_grad
    for part in (found.visible, found.true):
        far = torch.cdist(part.flatten(1, 2), points).min(-1).values
        assert far.max() < 1e-6  # cdist is a matrix product
    centers, patches, _ = group_points(points, GROUPS, SIZE)
    seen, masked = model.split(centers, seeded(4))
    assert torch.equal(found.centers, centers[torch.arange(2)[:, None], masked])
    made = rebuilt_by_formula(model, patches, centers, seen, masked)
    close(found.rebuilt, made + found.centers[:, :, None])


def test_a_batch_of_one_in_training_is_told() -> None:
    model = PointMAE(5, **SMALL)
    with pytest.raises(ValueError, match=r"batch of one cloud in training.*drop_last=True"):
        model(clouds(1).float())
    model.cls_head_finetune.eval()  # its statistics are kept: one cloud will do
    assert model(clouds(1).float()).shape == (1, 5)
    assert PointMAE(5, **SMALL).eval()(clouds(1).float()).shape == (1, 5)
    assert PointMAE(0, **SMALL)(clouds(1).float()).shape == (1, 2 * WIDTH)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0, -0.5])
def test_masks_of_nothing_or_everything_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"mask_ratio={ratio}, num_groups=8\): .* Give"):
        pretraining(mask_ratio=ratio)


# Part segmentation.


def test_part_segmentation_is_the_formula() -> None:
    model = PointMAEPartSeg(7, 5, **SMALL, reads=(1, 3))
    lively(model)
    s, points, category = model.state_dict(), clouds(), torch.tensor([4, 0])
    centers, patches, _ = group_points(points, GROUPS, SIZE)
    x, pos = tokens_of(s, "encoder", patches), position(s, "pos_embed", centers)
    kept = []
    for i in range(DEPTH):
        x = block(s, f"blocks.blocks.{i}", x + pos)
        kept.append(layer_norm(s, "norm", x))
    x = torch.cat([kept[0], kept[2]], -1)
    label = batch_norm(s, "label_conv.1", s["label_conv.0.weight"][:, :, 0].T[category])
    label = torch.where(label > 0, label, 0.2 * label)
    whole = torch.cat([x.max(1).values, x.mean(1), label], 1)
    each = torch.zeros(2, 40, 2 * WIDTH, dtype=torch.float64)
    for b in range(2):
        for p in range(40):
            square = ((centers[b] - points[b, p]) ** 2).sum(-1)
            near = square.argsort()[:3]
            share = 1 / (square[near] + 1e-8)
            each[b, p] = (share / share.sum()) @ x[b, near]
    y = torch.cat([points, each], -1)
    for i in range(2):
        name = "propagation_0.mlp"
        y = relu(batch_norm(s, f"{name}_bns.{i}", linear(s, f"{name}_convs.{i}", y)))
    y = torch.cat([y, whole[:, None].expand(2, 40, -1)], -1)
    for i in (1, 2):
        y = relu(batch_norm(s, f"bns{i}", linear(s, f"convs{i}", y)))
    close(model(points, category), linear(s, "convs3", y))


def test_part_segmentation_takes_tensors_alone() -> None:
    from torch_geometric.data import Batch, Data

    batch = Batch.from_data_list([Data(pos=torch.randn(n, 3)) for n in (30, 40)])
    model = PointMAEPartSeg(**SMALL, reads=(1,)).eval()
    with pytest.raises(
        TypeError, match=r"PointMAEPartSeg\(\): DataBatch is no tensor\. Give points"
    ):
        model(batch, torch.tensor([0, 1]))


def test_a_batch_of_no_clouds_gives_no_answers() -> None:
    none = torch.zeros(0, 40, 3)
    assert PointMAE(5, **SMALL).eval()(none).shape == (0, 5)
    model = PointMAEPartSeg(**SMALL, reads=(1, 3)).eval()
    assert model(none, torch.zeros(0, dtype=torch.int64)).shape == (0, 40, 50)


@pytest.mark.parametrize("skip", [False, True])
def test_skip_origin_reaches_the_grouping(skip: bool) -> None:
    points = 3 + torch.rand(2, 40, 3)
    points[:, 7] = 0.0  # far from all others: the second center, unless passed over
    classifier = PointMAE(5, **SMALL, skip_origin=skip)
    masked = pretraining(skip_origin=skip)
    for model, part, at in (
        (classifier, classifier.pos_embed, 0),
        (masked, masked.MAE_encoder, 1),
    ):
        seen: list[Tensor] = []
        part.register_forward_pre_hook(lambda _, args, at=at, seen=seen: seen.append(args[at]))
        model(points)
        assert (seen[0] == 0).all(-1).any(1).tolist() == [not skip] * 2


def test_drop_rate_reaches_the_head() -> None:
    head = PointMAE(5, **SMALL, drop_rate=0.3).cls_head_finetune
    assert [part.p for part in head if isinstance(part, nn.Dropout)] == [0.3, 0.3]


def test_part_segmentation_has_the_published_widths() -> None:
    with torch.device("meta"):
        model = PointMAEPartSeg()
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes["label_conv.0.weight"] == (64, 16, 1)
    assert shapes["propagation_0.mlp_convs.0.weight"] == (1536, 1155, 1)
    assert shapes["propagation_0.mlp_convs.1.weight"] == (1024, 1536, 1)
    assert shapes["convs1.weight"] == (512, 3392, 1)
    assert shapes["convs2.weight"] == (256, 512, 1)
    assert shapes["convs3.weight"] == (50, 256, 1)
    assert {k: shapes[k] for k in encoder_keys()} == encoder_keys()
    assert "cls_token" not in shapes


@pytest.mark.parametrize("reads", [(), (0,), (4,)])
def test_blocks_that_are_not_there_are_not_read(reads: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"numbered from 1 to 3\. Give"):
        PointMAEPartSeg(**SMALL, reads=reads)


# Checkpoints.


def published(model: nn.Module, file: Path, prefix: str = "module.") -> Path:
    """A file as the published training writes it."""
    state = {prefix + key: tensor for key, tensor in model.state_dict().items()}
    held = {"base_model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 300,
            "metrics": {"acc": torch.tensor(92.5)}, "best_metrics": {"acc": 93.0}}  # fmt: skip
    torch.save(held, file)
    return file


def test_a_pretrained_file_fills_all_but_the_new(tmp_path: Path) -> None:
    source, model = pretraining(), PointMAE(5, **SMALL)
    lively(source)
    head = copy.deepcopy(model.cls_head_finetune.state_dict())
    loaded = load_checkpoint(model, published(source.float(), tmp_path / "pretrain.pth"))
    news = {f"cls_head_finetune.{key}" for key in head} | {"cls_token", "cls_pos"}
    assert set(loaded.missing) == news
    state, other = model.state_dict(), source.state_dict()
    assert set(loaded.unexpected) == {k for k in other if not k.startswith("MAE_encoder.")}
    filled = set(state) - news
    assert all(torch.equal(state[key], other[f"MAE_encoder.{key}"]) for key in filled)
    assert len(filled) == len(state) - len(news) > 50
    assert all(torch.equal(state[f"cls_head_finetune.{k}"], v) for k, v in head.items())


@pytest.mark.parametrize("prefix", ["ACT_encoder.", "transformer_k.", "base_model.", ""])
@pytest.mark.parametrize("module", ["module.", ""])
def test_other_prefixes(tmp_path: Path, prefix: str, module: str) -> None:
    source, model = PointMAE(5, **SMALL), PointMAE(5, **SMALL)
    loaded = load_checkpoint(model, published(source, tmp_path / "a.pth", module + prefix))
    assert loaded == Loaded((), (), "")
    assert torch.equal(model.eval()(clouds().float()), source.eval()(clouds().float()))


@pytest.mark.parametrize("layout", ["base_model", "model", "state_dict", None])
def test_other_layouts(tmp_path: Path, layout: str | None) -> None:
    source, model = pretraining(), pretraining()
    state = source.state_dict()
    torch.save({layout: state} if layout else state, tmp_path / "a.pth")
    assert load_checkpoint(model, tmp_path / "a.pth") == Loaded((), ())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_what_is_missing_and_left_over_can_be_read(tmp_path: Path) -> None:
    source = PointMAE(5, **SMALL)
    state = dict(source.state_dict())
    del state["norm.weight"]
    torch.save({**state, "module.stray": torch.ones(1)}, tmp_path / "a.pth")
    loaded = load_checkpoint(PointMAE(5, **SMALL), str(tmp_path / "a.pth"))
    assert loaded.missing == ("norm.weight",)
    assert loaded.unexpected == ("stray",)
    assert str(loaded) == "1 missing: norm.weight\n1 unexpected: stray"
    assert "and 3 more" in str(Loaded(tuple("abcdefghi"), ()))


def test_a_head_of_other_classes_is_left_alone_and_told(tmp_path: Path) -> None:
    source, model = PointMAE(40, **SMALL), PointMAE(15, **SMALL)
    head = copy.deepcopy(model.cls_head_finetune.state_dict())
    file = published(source, tmp_path / "a.pth")
    told = r"head is not loaded.*cls_head_finetune\.8\.weight \(40, 256\) for \(15, 256\).*Train"
    with pytest.warns(UserWarning, match=told):
        loaded = load_checkpoint(model, file)
    assert set(loaded.missing) == {f"cls_head_finetune.{key}" for key in head}
    assert "(40, 256) for (15, 256)" in str(loaded)
    state = model.state_dict()
    assert all(torch.equal(state[f"cls_head_finetune.{k}"], v) for k, v in head.items())
    assert torch.equal(state["cls_token"], source.cls_token)


def test_other_shapes_are_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    file = published(PointMAE(5, **{**SMALL, "embed_dim": 48}), tmp_path / "a.pth")
    model = PointMAE(5, **SMALL)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"norm\.weight \(48,\) for \(24,\).*embed_dim"):
        load_checkpoint(model, file)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "held", [{"model": {"fc.weight": torch.ones(2)}}, {}, [1, 2], {1: torch.ones(2)}]
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, held: Any) -> None:
    torch.save(held, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"nothing in it fits PointMAE.*Give a file"):
        load_checkpoint(PointMAE(5, **SMALL), tmp_path / "a.pth")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"base_model": {}, "path": Path("x")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"more than tensors and plain values.*weights_only"):
        load_checkpoint(PointMAE(5, **SMALL), tmp_path / "a.pth")


@pytest.mark.parametrize("damage", ["empty", "text", "half"])
def test_a_damaged_file_is_told_by_its_path(tmp_path: Path, damage: str) -> None:
    file = published(PointMAE(5, **SMALL), tmp_path / "a.pth")
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "text": b"hello", "half": whole[: len(whole) // 2]}[damage])
    with pytest.raises(ValueError, match=r"a\.pth'\): refused at \w+Error, .*damaged"):
        load_checkpoint(PointMAE(5, **SMALL), file)
    with pytest.raises(FileNotFoundError, match=r"b\.pth"):
        load_checkpoint(PointMAE(5, **SMALL), tmp_path / "b.pth")


def test_a_safetensors_file_is_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, model = PointMAE(5, **SMALL), PointMAE(5, **SMALL)
    state = {f"module.{key}": tensor.clone() for key, tensor in source.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    assert load_checkpoint(model, tmp_path / "a.safetensors") == Loaded((), ())
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())
    (tmp_path / "b.safetensors").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"b\.safetensors'\): refused at SafetensorError"):
        load_checkpoint(model, tmp_path / "b.safetensors")


def test_two_tensors_of_one_name_are_told_unless_equal(tmp_path: Path) -> None:
    model, file = PointMAE(5, **SMALL), tmp_path / "a.pth"
    torch.save({"norm.bias": torch.ones(WIDTH), "MAE_encoder.norm.bias": torch.ones(WIDTH)}, file)
    assert "norm.bias" not in load_checkpoint(model, file).missing
    assert torch.equal(model.norm.bias, torch.ones(WIDTH))
    for other in (torch.zeros(WIDTH), torch.ones(1), torch.full((WIDTH,), 2, dtype=torch.int64)):
        torch.save({"norm.bias": torch.ones(WIDTH), "module.norm.bias": other}, file)
        told = r"norm\.bias and module\.norm\.bias differ, and both are 'norm\.bias'"
        with pytest.raises(ValueError, match=told):
            load_checkpoint(model, file)


# Full size.


def test_one_full_training_step_of_eight_clouds() -> None:
    model = PointMAE(15, num_groups=64)
    loss = nn.functional.cross_entropy(model(clouds(8, 1024).float()), torch.arange(8))
    torch.autograd.backward(loss)
    assert abs(float(loss.detach()) - math.log(15)) < 0.3  # a fresh head favours no class
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
