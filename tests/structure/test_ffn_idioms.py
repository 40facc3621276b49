"""Feed-forward networks as authors write them: in a loop, w1 w2 w3, in wrappers, of two inputs.

Each model runs, and each is read with other names for everything, without a forward and with one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.structure.anatomy import roles_of
from surgery.structure.dataflow import attach_dataflow
from surgery.structure.module_tree import Tree
from tests.structure.renaming import originals, renamed

D, H = 32, 88
TOKENS = (2, 6, D)


class Attention(nn.Module):
    def __init__(self, context: int = D) -> None:
        super().__init__()
        self.to_q, self.to_kv = nn.Linear(D, D), nn.Linear(context, 2 * D)
        self.to_out = nn.Linear(D, D)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        k, v = self.to_kv(x if context is None else context).chunk(2, -1)
        weights = torch.softmax(self.to_q(x) @ k.transpose(-1, -2) / 6, -1)
        return self.to_out(weights @ v)


class Block(nn.Module):
    def __init__(self, ff: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.ff = (
            *(nn.LayerNorm(D), Attention(), nn.LayerNorm(D)),
            ff,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


# run in a loop


class Gelu(nn.Module):
    """The first projection, with its activation (diffusers)."""

    def __init__(self, gated: bool = False) -> None:
        super().__init__()
        self.proj, self.gated = nn.Linear(D, 2 * H if gated else H), gated

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(self.proj(x))
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class Looped(nn.Module):
    def __init__(self, gated: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.net = nn.ModuleList([Gelu(gated), nn.Dropout(0.0), nn.Linear(H, D)])
        if twice:
            self.net = nn.ModuleList([nn.ModuleList(self.net)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net[0] if isinstance(self.net[0], nn.ModuleList) else self.net:
            x = module(x)
        return x


class LoopedBlock(nn.Module):
    """No module that is called holds the network and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(D), Attention(), nn.LayerNorm(D)
        self.net = nn.ModuleList([Gelu(), nn.Linear(H, D)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y = self.norm2(x)
        for module in self.net:
            y = module(y)
        return x + y


# w1, w2, w3


class Gated(nn.Module):
    """Registered in this order: which narrows, which of the two is the gate (LLaMA's w1 w2 w3)."""

    def __init__(self, order: str) -> None:
        super().__init__()
        for word in order.split():
            narrows = word == "down"
            setattr(self, word, nn.Linear(H, D) if narrows else nn.Linear(D, H))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class FlatGated(nn.Module):
    """The same in a block that holds all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(D), Attention(), nn.LayerNorm(D)
        self.w1, self.w2, self.w3 = nn.Linear(D, H), nn.Linear(H, D), nn.Linear(D, H)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        y = self.norm2(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class NormedGated(nn.Module):
    """Its norm inside, so that the network is what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.w1, self.w2 = nn.LayerNorm(D), nn.Linear(D, H), nn.Linear(H, D)
        self.w3 = nn.Linear(D, H)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.w2(F.silu(self.w1(y)) * self.w3(y))


# in wrappers


class PreNorm(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn, self.norm = fn, nn.LayerNorm(D)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.fn(self.norm(x), *context)


def mlp(width: int = D, hidden: int = 2 * D, out: int = D) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


class Wrapped(nn.Module):
    def __init__(self, context: int = D) -> None:
        super().__init__()
        self.attn, self.ff = PreNorm(Attention(context)), PreNorm(mlp())

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        x = self.attn(x, *context) + x
        return self.ff(x) + x


class Perceiver(nn.Module):
    """One block beside those in the list."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, 5, D))
        self.encode, self.layers = Wrapped(12), nn.ModuleList([Wrapped()])
        self.head = nn.Linear(D, 3)

    def forward(self, data: Tensor) -> Tensor:
        x = self.encode(self.latents.expand(len(data), -1, -1), data)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class NormedInLone(nn.Module):
    """A lone block whose network lies in a Sequential with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.head = Block(nn.Sequential(nn.LayerNorm(D), *mlp())), nn.Linear(D, 3)
        self.pool.norm2 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(x))


class Projected(nn.Module):
    """A projector behind the blocks, with a norm of its own, is no network of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(D, D), nn.Sequential(Block(mlp()), Block(mlp()))
        self.projector, self.head = nn.Sequential(nn.LayerNorm(D), *mlp()), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.projector(self.blocks(self.embed(x))))


# of two inputs


class Matching(nn.Module):
    """What attention gives is joined to what it was given (LoFTR, LightGlue)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm1, self.norm2 = Attention(), nn.LayerNorm(D), nn.LayerNorm(D)
        self.mlp = mlp(2 * D, 2 * D)

    def forward(self, x: Tensor) -> Tensor:
        message = self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(torch.cat([x, message], -1)))


# over tokens


class Channels(nn.Module):
    """1x1 convolutions over tokens, or linear layers over channels (lucidrains' MLP-Mixer)."""

    def __init__(self, width: int, over_tokens: bool) -> None:
        super().__init__()
        one: Callable[[int, int], nn.Module] = nn.Linear
        if over_tokens:
            one = lambda a, b: nn.Conv1d(a, b, 1)  # noqa: E731
        self.norm = nn.LayerNorm(D)
        self.fn = nn.Sequential(one(width, 2 * width), nn.GELU(), one(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(self.norm(x))


def mixer() -> nn.Module:
    pairs = (nn.Sequential(Channels(16, True), Channels(D, False)) for _ in range(2))
    return nn.Sequential(nn.Linear(8, D), *pairs, nn.LayerNorm(D))


Case = tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]


def two(make: Callable[[], nn.Module], path: str) -> Case:
    """A model of two such blocks, with a network at this path in each."""
    return lambda: Model(make(), make()), TOKENS, [f"blocks.{i}.{path}" for i in (0, 1)]


def wrapped(ff: nn.Module) -> nn.Module:
    block = Wrapped()
    block.ff.fn = ff
    return block


CASES: dict[str, Case] = {
    "in a loop": two(lambda: Block(Looped()), "ff"),
    "in a loop, gated": two(lambda: Block(Looped(gated=True)), "ff"),
    "in a loop over a list in a list": two(lambda: Block(Looped(twice=True)), "ff"),
    "in a loop of the block": two(LoopedBlock, "net.(0.proj to 1)"),
    "w1 w2 w3": two(lambda: Block(Gated("gate down up")), "ff"),
    "w2 w1 w3": two(lambda: Block(Gated("down gate up")), "ff"),
    "w1 w3 w2": two(lambda: Block(Gated("gate up down")), "ff"),
    "w1 w2 w3 in the block": two(FlatGated, "(w1 to w2)"),
    "w1 w2 w3 behind a norm": two(lambda: Block(NormedGated()), "ff.(w1 to w2)"),
    "a lone block": (Perceiver, (2, 6, 12), ["encode.ff.fn", "layers.0.ff.fn"]),
    "a lone block, its norm in a Sequential": (NormedInLone, TOKENS, ["pool.ff.(1 to 3)"]),
    "a projector is none": (Projected, TOKENS, ["blocks.0.ff", "blocks.1.ff"]),
    "narrow": two(lambda: Block(mlp(D, D // 2)), "ff"),
    "narrow, in a wrapper": two(lambda: wrapped(mlp(D, D // 2)), "ff.fn"),
    "of two inputs": two(Matching, "mlp"),
    "mixer": (mixer, (2, 16, 8), ["1.0.fn", "1.1.fn", "2.0.fn", "2.1.fn"]),
}


def read(model: nn.Module, example: Any = None) -> dict[str, list[str]]:
    """The sites of every role, by the names that the model had before it was renamed."""
    tree = Tree(model)
    attach_dataflow(tree, example)
    return {role: originals(sites) for role, sites in roles_of(tree).items()}


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("told", [False, True], ids=["by the tree", "by a forward"])
@pytest.mark.parametrize("name", CASES)
def test_the_network_is_found(name: str, told: bool, seed: int | None) -> None:
    make, sizes, wanted = CASES[name]
    model = make().eval()
    model = model if seed is None else renamed(model, seed)
    assert read(model, torch.randn(sizes) if told else None)["ffn"] == wanted


@pytest.mark.parametrize("rules", ["adapterx_ffn", "adaptformer", "ssf"])
@pytest.mark.parametrize("name", CASES)
def test_rules_run_there(name: str, rules: str) -> None:
    make, sizes, _ = CASES[name]
    model, x = renamed(make().eval()), torch.randn(sizes)
    before = model(x)
    surgery.apply(model, rules, example=x)
    if rules != "ssf":  # which starts near the base, and not as it
        torch.testing.assert_close(model(x), before)
    surgery.revert(model)
    assert torch.equal(model(x), before)


def test_layers_are_told_apart_wherever_they_are_registered() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.gate, self.up = nn.Linear(H, D), nn.Linear(D, H), nn.Linear(D, H)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    model = nn.Sequential(Block(Backwards()), Block(Backwards()))
    for example in (None, torch.randn(TOKENS)):
        found = read(model, example)
        assert found["fc1"] == ["0.ff.gate", "0.ff.up", "1.ff.gate", "1.ff.up"]
        assert found["fc2"] == ["0.ff.down", "1.ff.down"]


class Routing(nn.Module):
    """Networks by themselves in no list, each behind its norm, with experts between (ST-MoE)."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after, self.hint = (
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, H), nn.GELU(), nn.Linear(H, D))
            for _ in range(3)
        )
        self.gate, self.norm = nn.Linear(D, 2, bias=False), nn.LayerNorm(D)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.hint(x.flip(1))  # of something else: conditions (DiffusionGemma)
        x = x + self.before(x)
        y = self.norm(x)
        weights = self.gate(y).softmax(-1)
        x = x + sum(e(y) * weights[..., i, None] for i, e in enumerate(self.experts))
        return x + self.after(x)


def test_a_network_in_no_list_that_a_norm_feeds_is_one_where_it_ran() -> None:
    found = read(renamed(Routing().eval()), torch.randn(TOKENS))
    networks = ["before.(1 to 3)", "after.(1 to 3)", "experts.0", "experts.1"]
    assert sorted(found["ffn"]) == sorted(networks)
    assert found["head"] == []
