"""What stands beside an attention, gates it, skips it or feeds on it, is neither of its ends."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.structure.anatomy import roles_of
from surgery.structure.dataflow import attach_dataflow
from surgery.structure.module_tree import Tree
from tests.structure.test_attention import Apart, D, found, heads, joined, model, softmax


class Skipping(nn.Module):
    """No output projection; the input is projected to be added (torch_geometric's)."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.q, self.v, self.skip = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return joined(softmax(*(heads(f(x)) for f in (self.q, self.k, self.v)))) + self.skip(x)


class Layers(nn.Module):
    """Attentions one behind another and nothing else, with a head."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(8, D), nn.Linear(D, 5)
        self.layers = nn.ModuleList([kind(), kind()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_what_skips_an_attention_is_none_and_what_follows_is_no_output() -> None:
    roles, _ = found(Layers(Skipping).eval())
    assert set(roles["qkv"]) == {f"layers.{i}.{n}" for i in (0, 1) for n in "qkv"}
    assert roles["proj"] == []
    assert roles["head"] == ["head"]


def test_a_skip_before_the_output_leaves_it_the_output() -> None:
    class Within(Skipping):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(super().forward(x))

    roles, _ = found(model(Within))
    assert set(roles["proj"]) == {"1.attention.out", "2.attention.out"}


def test_what_enters_the_next_attention_is_no_output_of_the_last() -> None:
    class Bare(Skipping):
        def forward(self, x: Tensor) -> Tensor:
            return joined(softmax(*(heads(f(x)) for f in (self.q, self.k, self.v))))

    roles, _ = found(Layers(Bare).eval())
    names = {f"layers.{i}.{n}" for i in (0, 1) for n in "qkv"}
    assert set(roles["qkv"]) == names
    assert not names & set(roles["proj"])


class Interacting(Apart):
    """A convolution of values beside, each gated by the other (DAT)."""

    def __init__(self) -> None:
        super().__init__(softmax)
        self.convolve = nn.Conv1d(D, D, 3, padding=1, groups=D)
        self.one = nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, D))
        self.other = nn.Sequential(nn.Linear(D, 8), nn.GELU(), nn.Linear(8, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        v = self.v(x)
        mixed = joined(softmax(heads(self.q(x)), heads(self.k(x)), heads(v)))
        near = self.convolve(v.transpose(1, 2)).transpose(1, 2)
        gate, other = self.one(near.mean(1, keepdim=True)).sigmoid(), self.other(mixed).sigmoid()
        return self.out(mixed * gate + near * other)


def test_what_makes_gates_of_an_attention_is_no_output() -> None:
    roles, _ = found(model(Interacting))
    assert set(roles["proj"]) == {"1.attention.out", "2.attention.out"}
    assert set(roles["qkv"]) == {f"{i}.attention.{n}" for i in (1, 2) for n in "qkv"}


class Lit(nn.Module):
    """Channels attend; values are weighed by a map from elsewhere, and give positions.

    (Retinexformer.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.positions = nn.Conv1d(D, D, 3, padding=1, groups=D)

    def forward(self, x: Tensor, light: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        mixed = (q.transpose(1, 2) @ k).softmax(-1) @ (v * light).transpose(1, 2)
        return self.out(mixed.transpose(1, 2)) + self.positions(v.transpose(1, 2)).transpose(1, 2)


class Lights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.light = nn.Linear(8, D), nn.Conv1d(8, D, 3, padding=1)
        self.blocks = nn.ModuleList(nn.ModuleList([Lit(), nn.LayerNorm(D)]) for _ in range(2))
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        light, x = self.light(x.transpose(1, 2)).transpose(1, 2), self.inside(x)
        for attend, norm in self.blocks:
            x = x + attend(norm(x), light)
        return self.head(x)


def test_values_that_a_map_weighs_and_that_positions_are_made_of_are_values() -> None:
    roles, words = found(Lights().eval())
    assert roles["attn"] == ["blocks.0.0", "blocks.1.0"]
    assert set(roles["qkv"]) == {f"blocks.{i}.0.{n}" for i in (0, 1) for n in "qkv"}
    assert words["blocks.1.0.v"] == {"value"}
    assert set(roles["proj"]) == {"blocks.0.0.out", "blocks.1.0.out"}


def test_a_layer_of_gates_is_an_output_where_nothing_else_is() -> None:
    class Gating(Apart):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return x * torch.sigmoid(super().forward(x))

    roles, _ = found(model(lambda: Gating(softmax)))
    assert set(roles["proj"]) == {"1.attention.out", "2.attention.out"}


def test_values_convolved_beside_an_attention_are_no_skip() -> None:
    """Nystromformer: the output stands in a module of its own, behind."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
            self.near = nn.Conv1d(D, D, 3, padding=1, groups=D)

        def forward(self, x: Tensor) -> Tensor:
            v = self.v(x)
            mixed = joined(softmax(heads(self.q(x)), heads(self.k(x)), heads(v)))
            return mixed + self.near(v.transpose(1, 2)).transpose(1, 2)

    roles, _ = found(model(lambda: nn.Sequential(Mixed(), nn.Sequential(nn.Linear(D, D)))))
    assert set(roles["proj"]) == {"1.attention.1.0", "2.attention.1.0"}


class Recurrent(nn.Module):
    """An attention over a state, whose gate, of what it gave, makes the state read next."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
        self.gate, self.decay = nn.Linear(16, 16), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x)
        for _ in range(2):
            q, k, v = self.a(state), self.b(x + state), self.c(x + state)
            out = self.d(torch.softmax(q @ k.mT / 4, -1) @ v)
            z, decay = self.gate(out), self.decay.sigmoid()
            state = decay * z + (1 - decay) * state
        return state


class Segments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm = Recurrent(), nn.LayerNorm(16)
        self.ffn = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        answer: Tensor = x + self.ffn(self.norm(x))
        return answer


def test_the_gate_of_a_state_is_none_of_the_next_segments_projections() -> None:
    tree = Tree(nn.Sequential(*[Segments() for _ in range(2)]).eval())
    attach_dataflow(tree, torch.randn(2, 6, 16))
    roles = roles_of(tree)
    assert [s.path.rsplit(".", 1)[1] for s in roles["qkv"]] == ["a", "b", "c"] * 2
    assert [s.path.rsplit(".", 1)[1] for s in roles["proj"]] == ["d"] * 2
