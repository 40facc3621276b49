"""Point-MAE (Pang et al. 2022): the classifier, its masked pre-training, part segmentation.

Names of parameters are the published ones, so released checkpoints load
(`backbones.checkpoint.load_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pointcloud.checks import check_points
from pointcloud.group import group_points, nearest_points
from pointcloud.metrics import chamfer
from pointcloud.sample import gather


class MiniPointNet(nn.Module):
    """One token a patch, (b, g, k, 3) to (b * g, dim): each point, beside the patch's maximum.

    The 1x1 convolutions run over (b * g) short sequences as published: of the layouts that keep
    them called, this one is the fastest on a CPU (channels last and whole clouds are slower).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        c = dim // 3
        self.first_conv = nn.Sequential(
            nn.Conv1d(3, c, 1), nn.BatchNorm1d(c), nn.ReLU(), nn.Conv1d(c, 2 * c, 1)
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(4 * c, 4 * c, 1), nn.BatchNorm1d(4 * c), nn.ReLU(), nn.Conv1d(4 * c, dim, 1)
        )

    def forward(self, patches: Tensor) -> Tensor:
        x = self.first_conv(rearrange(patches, "b g k c -> (b g) c k"))
        whole = reduce(x, "m c k -> m c 1", "max").expand_as(x)
        x = self.second_conv(torch.cat([whole, x], 1))
        return cast(Tensor, reduce(x, "m c k -> m c", "max"))


class Blocks(nn.Module):
    """Pre-norm transformer blocks; positions are added anew before every one of them.

    With every_block=False they are added once, before the first (as DAPT's code does).
    The first `first` tokens, class tokens, come before those that something may insert.
    """

    def __init__(
        self, dim: int, depth: int, heads: int, drop_path: float, every_block: bool = True
    ) -> None:
        super().__init__()
        self.every_block = every_block
        self.blocks = blocks(dim, depth, heads, drop_path)

    def forward(self, x: Tensor, pos: Tensor, first: int = 0) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(placed(x, pos, first) if self.every_block or i == 0 else x)
        return x


def blocks(dim: int, depth: int, heads: int, drop_path: float) -> nn.ModuleList:
    """timm's blocks as published: no bias of queries, keys, values; drop path growing from 0."""
    rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    block = partial(Block, dim, heads, norm_layer=nn.LayerNorm)
    return nn.ModuleList(block(drop_path=rate) for rate in rates)


def placed(x: Tensor, pos: Tensor, first: int) -> Tensor:
    """Tokens (b, first + p + g, d) plus positions (b, first + g, d): the p inserted get none."""
    if new := x.shape[1] - pos.shape[1]:
        none = pos.new_zeros(len(pos), new, pos.shape[2])
        pos = torch.cat([pos[:, :first], none, pos[:, first:]], 1)
    return x + pos


def positions(dim: int) -> nn.Sequential:
    """The embedding of centres, (b, g, 3) to (b, g, dim)."""
    return nn.Sequential(nn.Linear(3, dim // 3), nn.GELU(), nn.Linear(dim // 3, dim))


def start(module: nn.Module) -> None:
    """The published start: weights normal, 0.02, cut at 2; biases 0."""
    if isinstance(module, nn.Linear | nn.Conv1d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """What pre-training fills and the three models share: tokens, positions, blocks, norm."""

    def __init__(
        self, dim: int, depth: int, heads: int, drop_path: float, every_block: bool = True
    ) -> None:
        super().__init__()
        self.encoder = MiniPointNet(dim)
        self.pos_embed = positions(dim)
        self.blocks = Blocks(dim, depth, heads, drop_path, every_block)
        self.norm = nn.LayerNorm(dim)

    def tokens(self, patches: Tensor) -> Tensor:
        """Patches (b, g, k, 3) as tokens (b, g, d)."""
        return cast(Tensor, self.encoder(patches).unflatten(0, patches.shape[:2]))  # b may be 0


class PointMAE(Encoder):
    """The classifier that is fine-tuned: clouds (b, n, 3) to logits (b, num_classes).

    num_classes    0: no head, forward gives the features
    num_groups     patches of a cloud, of group_size points: 64 / 128 / 512 for 1k / 2k / 8k points
    drop_path      stochastic depth of the last block, growing linearly from 0
    head_dim       width of the head's two hidden layers; drop_rate, their dropout
    reads          what the head is given, in this order: "cls", the class token; "prompt", the
                   mean of tokens that something (a hook on a block) inserted after the class
                   token, zeros where there are none; "patch", the maximum over the patches
    every_block    positions are added before every block (Point-MAE), or False, once (DAPT)
    skip_origin    no centre within |p|^2 <= 1e-3 of the origin, as in the CUDA code that the
                   published weights were trained with

    Inserted tokens are carried to the head and get no position. Clouds may also be a
    torch_geometric Data or Batch. 22,093,327 parameters with 15 classes.

    Raises ValueError if `reads` names nothing, or something else; and in training for a batch of
    one cloud, of which the head's batch norm can measure nothing.
    Source: Pang et al. 2022 (Point-MAE), section 3; reads and every_block: Zhou et al. 2024 (DAPT).

    >>> model = PointMAE(15, num_groups=8, group_size=4, embed_dim=24, depth=2, num_heads=2)
    >>> model(torch.randn(2, 64, 3)).shape
    torch.Size([2, 15])
    """

    def __init__(
        self,
        num_classes: int = 15,
        *,
        num_groups: int = 128,
        group_size: int = 32,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        drop_path: float = 0.1,
        head_dim: int = 256,
        drop_rate: float = 0.5,
        reads: Sequence[str] = ("cls", "patch"),
        every_block: bool = True,
        skip_origin: bool = False,
    ) -> None:
        super().__init__(embed_dim, depth, num_heads, drop_path, every_block)
        if not reads or not {"cls", "prompt", "patch"}.issuperset(reads):
            raise ValueError(
                f"PointMAE(reads={reads!r}): the head reads of 'cls', 'prompt' and 'patch'. "
                "Give a tuple of one or more of these, such as ('cls', 'patch')."
            )
        self.num_groups, self.reads = num_groups, tuple(reads)
        self.group = partial(
            group_points, groups=num_groups, size=group_size, skip_origin=skip_origin
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.cls_pos = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.cls_head_finetune = head(embed_dim * len(self.reads), head_dim, drop_rate, num_classes)
        self.apply(start)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.cls_pos, std=0.02)

    def forward(self, points: Tensor) -> Tensor:
        centers, patches, _ = self.group(points)
        b = len(patches)
        x = torch.cat([repeat(self.cls_token, "1 1 d -> b 1 d", b=b), self.tokens(patches)], 1)
        pos = torch.cat([repeat(self.cls_pos, "1 1 d -> b 1 d", b=b), self.pos_embed(centers)], 1)
        x = self.norm(self.blocks(x, pos, first=1))
        check_batch(self.cls_head_finetune, b)
        return cast(Tensor, self.cls_head_finetune(self.read(x)))

    def read(self, x: Tensor) -> Tensor:
        """What the head is given, (b, d * len(reads)), of normed tokens (b, 1 + p + g, d)."""
        token, prompts, patches = x[:, 0], x[:, 1 : -self.num_groups], x[:, -self.num_groups :]
        mean = prompts.sum(1) / max(prompts.shape[1], 1)
        tokens = {"cls": token, "prompt": mean, "patch": patches.amax(1)}
        return torch.cat([tokens[name] for name in self.reads], -1)


def head(features: int, hidden: int, drop: float, classes: int) -> nn.Module:
    if classes == 0:
        return nn.Identity()
    return nn.Sequential(
        nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(drop),
        nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(drop),
        nn.Linear(hidden, classes),
    )  # fmt: skip


def check_batch(head: nn.Module, clouds: int) -> None:
    """Raise ValueError where a head's batch norm, in training, would have one cloud to measure."""
    measures = any(m.training for m in head.modules() if isinstance(m, nn.BatchNorm1d))
    if measures and clouds == 1:
        raise ValueError(
            "PointMAE: a batch of one cloud in training, whose statistics batch norm in the head "
            "cannot measure. Give two or more: where a last batch is smaller, leave it out "
            "(drop_last=True of pointcloud.batches or a DataLoader); or call eval() to test."
        )


class MaskedEncoder(Encoder):
    """Tokens of the patches that are seen: (b, g, k, 3), centres (b, g, 3), seen (b, v) indices.

    Every patch goes through the mini-PointNet, as published: its batch statistics are of all.
    """

    def forward(self, patches: Tensor, centers: Tensor, seen: Tensor) -> Tensor:
        x, pos = gather(self.tokens(patches), seen), self.pos_embed(gather(centers, seen))
        return cast(Tensor, self.norm(self.blocks(x, pos)[:, -seen.shape[1] :]))


class Decoder(nn.Module):
    """Blocks over seen and masked tokens (b, g, d); the last `m`, the masked ones, normed."""

    def __init__(self, dim: int, depth: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.blocks = blocks(dim, depth, heads, drop_path)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, pos: Tensor, m: int) -> Tensor:
        for block in self.blocks:
            x = block(x + pos)
        return cast(Tensor, self.norm(x[:, -m:]))


class Rebuilt(NamedTuple):
    """Patches: visible (b, v, k, 3); masked: rebuilt and true (b, m, k, 3), centers (b, m, 3)."""

    visible: Tensor
    rebuilt: Tensor
    true: Tensor
    centers: Tensor


class PointMAEPretrain(nn.Module):
    """Masked pre-training: clouds (b, n, 3) to the Chamfer-L2 loss of the rebuilt patches.

    mask_ratio   int(mask_ratio * num_groups) patches of each cloud are masked: 38 of 64
    block_mask   mask the patches nearest to one drawn at random, instead of any
    Others as in PointMAE; the decoder has decoder_depth blocks. 29,006,432 parameters.

    Raises ValueError if nothing, or everything, would be masked.
    Source: Pang et al. 2022 (Point-MAE), section 3, equations 1 to 6.

    >>> model = PointMAEPretrain(num_groups=8, group_size=4, embed_dim=24, depth=2, num_heads=2)
    >>> model(torch.randn(2, 64, 3)).backward()
    >>> model.reconstruct(torch.randn(2, 64, 3)).rebuilt.shape  # 4 of 8 masked
    torch.Size([2, 4, 4, 3])
    """

    def __init__(
        self,
        *,
        num_groups: int = 64,
        group_size: int = 32,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        decoder_depth: int = 4,
        decoder_heads: int = 6,
        drop_path: float = 0.1,
        mask_ratio: float = 0.6,
        block_mask: bool = False,
        skip_origin: bool = False,
    ) -> None:
        super().__init__()
        self.group = partial(
            group_points, groups=num_groups, size=group_size, skip_origin=skip_origin
        )
        self.num_masked, self.block_mask = int(mask_ratio * num_groups), block_mask
        if not 0 < self.num_masked < num_groups:
            raise ValueError(
                f"PointMAEPretrain(mask_ratio={mask_ratio}, num_groups={num_groups}): "
                f"{self.num_masked} patches would be masked. Give a ratio between, such as 0.6."
            )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.MAE_encoder = MaskedEncoder(embed_dim, depth, num_heads, drop_path)
        self.decoder_pos_embed = positions(embed_dim)
        self.MAE_decoder = Decoder(embed_dim, decoder_depth, decoder_heads, drop_path)
        self.increase_dim = nn.Sequential(nn.Conv1d(embed_dim, 3 * group_size, 1))
        self.apply(start)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, points: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        centers, patches, _ = self.group(points)
        seen, masked = self.split(centers, generator)
        rebuilt = self.rebuild(patches, centers, seen, masked)
        true = gather_patches(patches, masked)
        return chamfer(rebuilt.flatten(0, 1), true.flatten(0, 1), norm=2)

    @torch.no_grad()
    def reconstruct(self, points: Tensor, *, generator: torch.Generator | None = None) -> Rebuilt:
        """What a picture needs, in the clouds' own frame; call eval() before."""
        centers, patches, _ = self.group(points)
        seen, masked = self.split(centers, generator)
        whole = patches + centers[:, :, None]
        hidden = gather(centers, masked)
        rebuilt = self.rebuild(patches, centers, seen, masked) + hidden[:, :, None]
        return Rebuilt(gather_patches(whole, seen), rebuilt, gather_patches(whole, masked), hidden)

    def split(self, centers: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Indices of seen (b, g - m) and masked patches (b, m) of centres (b, g, 3), ascending."""
        (b, g, _), m, device = centers.shape, self.num_masked, centers.device
        if self.block_mask:
            first = torch.randint(g, (b, 1), generator=generator, device=device)
            rank = (centers - gather(centers, first)).square().sum(-1)
        else:
            rank = torch.rand(b, g, generator=generator, device=device)
        order = rank.argsort(1)
        return order[:, m:].sort(1).values, order[:, :m].sort(1).values

    def rebuild(self, patches: Tensor, centers: Tensor, seen: Tensor, masked: Tensor) -> Tensor:
        """The masked patches (b, m, k, 3), about their centres, from those that are seen."""
        tokens = self.MAE_encoder(patches, centers, seen)
        b, m = masked.shape
        x = torch.cat([tokens, repeat(self.mask_token, "1 1 d -> b m d", b=b, m=m)], 1)
        pos = self.decoder_pos_embed(gather(centers, torch.cat([seen, masked], 1)))
        x = self.increase_dim(rearrange(self.MAE_decoder(x, pos, m), "b m d -> b d m"))
        return cast(Tensor, rearrange(x, "b (k c) m -> b m k c", c=3))


def gather_patches(patches: Tensor, index: Tensor) -> Tensor:
    """Patches (b, g, k, 3) at index (b, m): (b, m, k, 3)."""
    rows = gather(rearrange(patches, "b g k c -> b g (k c)"), index)
    return rearrange(rows, "b m (k c) -> b m k c", c=3)


class Propagation(nn.Module):
    """Features of centres spread over the points: 3 nearest, by inverse square distance; an MLP.

    Source: Qi et al. 2017 (PointNet++), section 3.4, equation 2.
    """

    def __init__(self, features: int, widths: Sequence[int]) -> None:
        super().__init__()
        sizes = [features, *widths]
        pairs = list(zip(sizes, widths, strict=False))
        self.mlp_convs = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in pairs)
        self.mlp_bns = nn.ModuleList(nn.BatchNorm1d(b) for _, b in pairs)

    def forward(self, points: Tensor, centers: Tensor, tokens: Tensor) -> Tensor:
        index, square = nearest_points(points, centers, 3)
        near = 1 / (square.to(torch.promote_types(square.dtype, torch.float32)) + 1e-8)
        share = (near / near.sum(-1, keepdim=True)).to(tokens.dtype)
        spread = share.new_zeros(*points.shape[:2], centers.shape[1]).scatter(2, index, share)
        x = rearrange(torch.cat([points, spread @ tokens], -1), "b n c -> b c n")
        for conv, norm in zip(self.mlp_convs, self.mlp_bns, strict=True):
            x = F.relu(norm(conv(x)))
        return x


class PointMAEPartSeg(Encoder):
    """Part segmentation: clouds (b, n, 3) and their categories (b,) to logits (b, n, parts).

    reads    the blocks, from 1, whose output is read; others as in PointMAE, without class token
    Logits of all parts; the published evaluation looks only at those of the category.

    Tokens that something inserts before the first patch are carried through the blocks and get no
    position; behind it they would take the place of patches. There is no class token, so a prompt
    is inserted with after=0. Points are a tensor: what is said of every point has a row for each.

    The structure is the published one; the names of its own layers (label_conv, propagation_0,
    convs, bns) follow the published code, but no list of its keys was there to check them by.
    Source: Pang et al. 2022 (Point-MAE), section 4.2.

    >>> model = PointMAEPartSeg(
    ...     num_groups=8, group_size=4, embed_dim=24, depth=3, num_heads=2, reads=(1, 2, 3))
    >>> model(torch.randn(2, 64, 3), torch.tensor([0, 5])).shape
    torch.Size([2, 64, 50])
    """

    def __init__(
        self,
        parts: int = 50,
        categories: int = 16,
        *,
        num_groups: int = 128,
        group_size: int = 32,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        drop_path: float = 0.1,
        reads: Sequence[int] = (4, 8, 12),
    ) -> None:
        super().__init__(embed_dim, depth, num_heads, drop_path)
        if not reads or not set(range(1, depth + 1)).issuperset(reads):
            raise ValueError(
                f"PointMAEPartSeg(reads={reads!r}, depth={depth}): blocks are numbered from 1 to "
                f"{depth}. Give one or more of these, such as ({depth},)."
            )
        self.num_groups, self.group_size, self.reads = num_groups, group_size, tuple(reads)
        self.categories, read = categories, embed_dim * len(reads)
        self.label_conv = nn.Sequential(
            nn.Conv1d(categories, 64, 1, bias=False), nn.BatchNorm1d(64), nn.LeakyReLU(0.2)
        )
        self.propagation_0 = Propagation(read + 3, (4 * embed_dim, 1024))
        self.convs1, self.bns1 = nn.Conv1d(1024 + 2 * read + 64, 512, 1), nn.BatchNorm1d(512)
        self.dp1 = nn.Dropout(0.5)
        self.convs2, self.bns2 = nn.Conv1d(512, 256, 1), nn.BatchNorm1d(256)
        self.convs3 = nn.Conv1d(256, parts, 1)
        self.apply(start)

    def forward(self, points: Tensor, category: Tensor) -> Tensor:
        check_points("PointMAEPartSeg", points)  # no Batch, whose clouds may be ragged
        centers, patches, _ = group_points(points, self.num_groups, self.group_size)
        tokens = self.read(self.tokens(patches), self.pos_embed(centers))
        kind = F.one_hot(category, self.categories).to(tokens.dtype)
        label = self.label_conv(kind[:, :, None])[:, :, 0]
        whole = torch.cat([tokens.amax(1), tokens.mean(1), label], 1)
        features = self.propagation_0(points, centers, tokens)
        x = torch.cat([features, repeat(whole, "b c -> b c n", n=points.shape[1])], 1)
        x = self.dp1(F.relu(self.bns1(self.convs1(x))))
        x = self.convs3(F.relu(self.bns2(self.convs2(x))))
        return cast(Tensor, rearrange(x, "b c n -> b n c"))

    def read(self, x: Tensor, pos: Tensor) -> Tensor:
        """Normed outputs of the blocks in `reads`, side by side: (b, g, d * len(reads))."""
        kept = []
        for i, block in enumerate(self.blocks.blocks, start=1):
            x = block(placed(x, pos, first=0))
            if i in self.reads:
                kept.append(self.norm(x[:, -self.num_groups :]))
        return torch.cat(kept, -1)
