"""TracedFFN-forward networks by structure: what is one, and what only looks like it."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from torch import nn

from surgery.structure.anatomy import instead_of_ffns, roles_of
from surgery.structure.module_tree import Tree
from surgery.structure.path import generalise

D, H = 16, 48


class Block(nn.Module):
    """A block that holds these modules under these names, after a norm; nobody runs it here."""

    def __init__(self, width: int | None = D, **children: nn.Module) -> None:
        super().__init__()
        if width:
            self.norm = nn.LayerNorm(width)
        for name, child in children.items():
            self.add_module(name, child)


def stack(*blocks: nn.Module) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList(blocks)
    return model


def found(model: nn.Module, role: str = "ffn") -> list[str]:
    return [site.path for site in roles_of(Tree(model))[role]]


def pair(d: int = D, h: int = H, out: int | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, out or d))


def conv_pair(*between: nn.Module, d: int = D, h: int = H) -> nn.Module:
    return nn.Sequential(nn.Conv2d(d, h, 1), *between, nn.GELU(), nn.Conv2d(h, d, 1))


def depthwise(width: int, kernel: int = 3) -> nn.Module:
    return nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)


class Tokens(nn.Module):
    """The spatial gate of gMLP: a matrix over 49 tokens, between two halves of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(H), nn.Linear(49, 49)


class Stacked(nn.Module):
    """Experts as stacks of matrices [experts, ., .], as in Mixtral."""

    def __init__(self, up: tuple[int, ...], down: tuple[int, ...]) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(up)), nn.Parameter(torch.zeros(down))
        self.act = nn.GELU()


class MergeTarget(nn.Module):
    """One stack of matrices, as in GraniteMoe."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class Biased(nn.Module):
    """What looks like an FFN of 2 * 16 hidden units, but for a matrix of its own: attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.act, self.proj = nn.Linear(D, 2 * H), nn.GELU(), nn.Linear(H, D)
        self.attention_biases = nn.Parameter(torch.zeros(4, 49))


class Flat(nn.Module):
    """No parameters, no children, and yet no activation."""


class OwnDropout(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.1, self.training)


class OwnAct(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(min=0)  # twice of it for twice of x


def gate(width: int = H, narrow: int = 12) -> nn.Module:
    down, up = nn.Conv2d(width, narrow, 1), nn.Conv2d(narrow, width, 1)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), down, nn.ReLU(), up, nn.Sigmoid())


def experts(n: int = 3) -> nn.Module:
    return nn.ModuleList(pair() for _ in range(n))


FOUND = {
    "linear": (Block(mlp=pair()), ["mlp"]),
    "split": (Block(up=nn.Linear(D, H), act=nn.GELU(), down=nn.Linear(H, D)), ["(up to down)"]),
    "gated": (
        Block(mlp=Block(None, a=nn.Linear(D, H), b=nn.Linear(D, H), c=nn.Linear(H, D))),
        ["mlp"],
    ),
    "packed": (Block(mlp=Block(None, a=nn.Linear(D, 2 * H), b=nn.Linear(H, D))), ["mlp"]),
    "1x1 convolutions": (Block(mlp=conv_pair()), ["mlp"]),
    "depthwise between linears": (
        Block(mlp=Block(None, a=nn.Linear(D, H), dw=depthwise(H), b=nn.Linear(H, D))),
        ["mlp"],
    ),
    "depthwise before convolutions": (
        Block(mlp=nn.Sequential(depthwise(D), *conv_pair())),
        ["mlp.(1 to 3)"],
    ),
    "norm first": (Block(mlp=nn.Sequential(nn.LayerNorm(D), *pair())), ["mlp.(1 to 3)"]),
    "gMLP": (
        Block(mlp=Block(None, a=nn.Linear(D, 2 * H), gate=Tokens(), b=nn.Linear(H, D))),
        ["mlp"],
    ),
    "listed experts": (Block(moe=Block(None, gate=nn.Linear(D, 3), experts=experts())), ["moe"]),
    "listed experts and a shared one": (
        Block(moe=Block(None, gate=nn.Linear(D, 3), experts=experts(), shared=pair())),
        ["moe"],
    ),
    "stacked experts": (Block(moe=Block(None, experts=Stacked((4, 2 * H, D), (4, D, H)))), ["moe"]),
    "stacked experts, transposed": (
        Block(moe=Block(None, router=nn.Linear(D, 4), experts=Stacked((4, D, H), (4, H, D)))),
        ["moe"],
    ),
    "stacked experts, some of them none": (
        Block(moe=Block(None, router=nn.Linear(D, 6), experts=Stacked((6, 2 * H, D), (4, D, H)))),
        ["moe"],
    ),
    "split, with more after its end": (
        Block(
            inter=Block(None, dense=nn.Linear(D, H), act=nn.GELU()),
            out=Block(None, dense=nn.Linear(H, D), adapters=nn.ModuleList([pair(D, 4)])),
        ),
        ["(inter.dense to out.dense)"],
    ),
    "convolutions in groups": (
        Block(mlp=nn.Sequential(nn.Conv1d(D, H, 1, groups=4), nn.GELU(), nn.Conv1d(H, D, 1))),
        ["mlp"],
    ),
    "as wide inside, with an activation of its own": (
        Block(mlp=Block(None, a=nn.Linear(D, D), act=OwnAct(), b=nn.Linear(D, D))),
        ["mlp"],
    ),
    "beside a shared query and key": (
        Block(
            attn=Block(
                None,
                inner=Block(None, qk=nn.Linear(D, H), v=nn.Linear(D, H)),
                out=Block(None, dense=nn.Linear(H, D)),
            ),
            up=Block(None, dense=nn.Linear(D, H), act=nn.GELU()),
            down=Block(None, dense=nn.Linear(H, D)),
        ),
        ["(up.dense to down.dense)"],
    ),
    "held experts": (
        Block(
            moe=Block(
                None, router=nn.Linear(D, 4), up=MergeTarget(4, 2 * H, D), down=MergeTarget(4, D, H)
            )
        ),
        ["moe"],
    ),
    "narrow, beside attention": (
        Block(
            attn=Block(None, q=nn.Linear(D, D), k=nn.Linear(D, D), o=nn.Linear(D, D)),
            act=nn.GELU(),
            up=nn.Linear(D, 8),
            down=nn.Linear(8, D),
        ),
        ["(up to down)"],
    ),
    "two in a block": (Block(first=pair(), second=pair()), ["first", "second"]),
    "beside a gate": (Block(se=gate(D, 4), mlp=conv_pair()), ["mlp"]),
    "a list in a module that is called": (
        Block(mlp=Block(None, layers=nn.ModuleList(pair()))),
        ["mlp"],
    ),
    "a dict beside attention": (
        Block(
            attn=nn.MultiheadAttention(D, 2),
            mlp=nn.ModuleDict({"up": nn.Linear(D, H), "act": nn.GELU(), "down": nn.Linear(H, D)}),
        ),
        ["mlp.(up to down)"],
    ),
    "several in a list": (Block(attn=pair(D, 4), ffns=experts(2)), ["ffns.0", "ffns.1"]),
    "inline, beside inline attention": (
        Block(
            q=nn.Linear(D, D),
            k=nn.Linear(D, D),
            o=nn.Linear(D, D),
            up=nn.Linear(D, H),
            down=nn.Linear(H, D),
        ),
        ["(up to down)"],
    ),
    "beside an attention of low rank": (
        Block(
            attn=Block(
                None,
                q=nn.Linear(D, 8),
                kv=nn.Linear(D, 24),
                a=nn.Linear(D, H),
                b=nn.Linear(H, D),
            ),
            mlp=pair(),
        ),
        ["mlp"],
    ),
    "beside a gate of another embedding": (
        Block(mlp=pair(), act=nn.GELU(), gate=nn.Linear(D, 8), out=nn.Linear(8, D)),
        ["mlp"],
    ),
    "wrapped leaves": (
        Block(mlp=nn.Sequential(nn.Sequential(nn.Linear(D, H)), nn.Sequential(nn.Linear(H, D)))),
        ["mlp"],
    ),
}
REFUSED = {
    "squeeze and excite": Block(se=gate()),
    "a gate as wide as its input": Block(se=nn.Sequential(*pair(D, D), nn.Sigmoid())),
    "inverted bottleneck": Block(conv=conv_pair(depthwise(H))),
    "inverted bottleneck with a gate": Block(conv=conv_pair(depthwise(H), gate())),
    "bottleneck": Block(pair=pair(D, 4)),
    "convolutions over positions": Block(mlp=conv_pair(nn.Conv2d(H, H, 3, padding=1))),
    "pooling in between": Block(mlp=conv_pair(nn.AvgPool2d(2))),
    "attention with biases": Block(attn=Biased()),
    "attention with a softmax": Block(
        attn=Block(None, q=nn.Linear(D, D), k=nn.Linear(D, D), v=nn.Linear(D, D), p=nn.Softmax(-1))
    ),
    "attention with experts": Block(
        attn=Block(None, router=nn.Linear(D, 4), q=MergeTarget(4, H, D), out=MergeTarget(4, D, H))
    ),
    "branches of a list": Block(
        projs=nn.ModuleList(
            [nn.Sequential(nn.ReLU(), nn.Linear(D, H)), nn.Sequential(nn.ReLU(), nn.Linear(H, D))]
        )
    ),
    "query and value": Block(attn=Block(None, query=nn.Linear(D, D), value=nn.Linear(D, D))),
    "strided between linears": Block(
        mlp=Block(
            None,
            a=nn.Linear(D, H),
            dw=nn.Conv1d(H, H, 3, stride=2, groups=H),
            b=nn.Linear(H, D),
        )
    ),
    "q, k and v after convolutions": Block(
        attn=Block(
            None,
            pre=Block(None, conv=depthwise(D), flat=Flat()),
            q=nn.Linear(D, D),
            k=nn.Linear(D, D),
            v=nn.Linear(D, D),
        )
    ),
    "convolutions are no experts": Block(
        units=nn.Sequential(nn.Conv1d(D, D, 3), nn.GELU(), nn.Conv1d(D, D, 3)),
    ),
    "q, k and v with dropouts of their own": Block(
        attn=Block(None, q=nn.Linear(D, D), k=nn.Linear(D, D), v=nn.Linear(D, D), drop=OwnDropout())
    ),
    "too narrow": Block(4, mlp=pair(4, 12)),
    "another width": Block(mlp=pair(out=24)),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_a_feed_forward_network(name):
    block, paths = FOUND[name]
    wanted = [f"blocks.{i}.{path}" for i in range(2) for path in paths]
    assert found(stack(block, _another(block))) == wanted


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_looks_like_one(name):
    assert found(stack(REFUSED[name], _another(REFUSED[name]))) == []


def _another(block: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(block)


def test_networks_listed_at_the_root_are_one_each():
    model = Block(None, attns=experts(0), ffns=experts(3), norms=nn.ModuleList([nn.LayerNorm(D)]))
    assert found(model) == ["ffns.0", "ffns.1", "ffns.2"]


def test_experts_have_the_width_of_the_norms_of_their_block():
    moe = Stacked((4, D, H), (4, H, D))
    attn = Block(None, q_norm=nn.LayerNorm(H), q=nn.Linear(D, D), o=nn.Linear(D, D))
    (site,) = roles_of(Tree(stack(Block(None, attn=attn, moe=moe, norm=nn.LayerNorm(D)))))["ffn"]
    assert (site.path, site.width) == ("blocks.0.moe", D)


def test_dense_blocks_that_happen_to_close_once_are_none():
    assert found(stack(*(Block(mlp=pair(D + 8 * i, H, D)) for i in range(4)))) == []


def test_a_last_block_that_widens_does_not_spoil_the_others():
    blocks = [Block(mlp=pair()) for _ in range(3)]
    assert len(found(stack(*blocks, Block(mlp=pair(out=2 * D))))) == 3


def test_a_projector_outside_of_blocks_is_none_and_one_beside_attention_is():
    assert found(Block(mlp=pair())) == []
    attention = nn.MultiheadAttention(D, 2)
    assert found(Block(pool=Block(attn=attention, mlp=pair()))) == ["pool.mlp"]


def test_the_layer_of_a_single_transformer_layer_is_found():
    assert found(nn.TransformerEncoderLayer(D, 2, H)) == ["(linear1 to linear2)"]
    assert found(nn.TransformerEncoderLayer(D, 2, D)) == ["(linear1 to linear2)"]


# entries of timm, and how many sites each address has
ZOO = {
    "vit_tiny_patch16_224": {"blocks.*.mlp": 12},
    "swinv2_cr_tiny_224": {"stages.*.blocks.*.mlp": 12},
    "pvt_v2_b0": {"stages.*.blocks.*.mlp": 8},
    "mixer_s32_224": {"blocks.*.mlp_channels": 8, "blocks.*.mlp_tokens": 8},
    "gmlp_ti16_224": {"blocks.*.mlp_channels": 30},
    "fasternet_t0": {"stages.*.blocks.*.mlp": 13},
    "crossvit_9_240": {"blocks.*.blocks.*.*.mlp": 12},
    "resnet18": {},
    "seresnet50": {},
    "efficientnet_b0": {},
    "mobilenetv3_large_100": {},
    "rdnet_tiny": {},
    "nfnet_f0": {},
    "ghostnet_100": {},
    "cspnext_n.untrained": {},
}


@pytest.mark.parametrize("name", [name for name in ZOO if timm.is_model(name)])
def test_sites_of_timm(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert dict(Counter(map(generalise, found(model)))) == ZOO[name]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resnet18", "17 convolutions over positions (conv1)"),
        ("efficientnet_b0", "inverted bottlenecks, which mix positions as they widen (blocks.*.*)"),
        ("vit_pwee_patch16_reg1_gap_256", "16 blocks whose attention and feed-forward network"),
        ("vit_base_patch16_xp_224", "12 blocks whose attention and feed-forward network"),
    ],
)
def test_what_a_model_has_instead_is_told(name, told):
    with torch.device("meta"):
        tree = Tree(timm.create_model(name))
    assert roles_of(tree)["ffn"] == []
    assert told in instead_of_ffns(tree)
