"""What a place hears: the last part before it on its own stream; first blocks hear nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import at, block, ffn, insert, parallel, until
from surgery.errors import FileError, RuleError
from surgery.parts import adapter, prompt_generator
from tests.models import images, tiny_vit

WHOLE = ["adapterx", "adapterx_serial"]


def layer(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)


class Towers(nn.Module):
    """Two towers, each a list of blocks, or blocks that are attributes of a module."""

    def __init__(self, widths: tuple[int, int] = (32, 48), listed: bool = True) -> None:
        super().__init__()
        self.a, self.b = (self.tower(width, listed) for width in widths)

    @staticmethod
    def tower(width: int, listed: bool) -> nn.Module:
        if listed:
            return nn.ModuleList([layer(width), layer(width)])
        holder = nn.Module()
        holder.one, holder.two = layer(width), layer(width)
        return holder

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for each in self.a.children():
            x = each(x)
        for each in self.b.children():
            y = each(y)
        return x, y


class Mixed(nn.Module):
    """One list of two towers, one after the other or taking turns."""

    def __init__(self, turns: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer(32) for _ in range(4)])
        self.turns = turns

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b, c, d = self.layers
        if self.turns:
            return c(a(x)), d(b(y))
        return b(a(x)), d(c(y))


class Joint(nn.Module):
    """A block of two streams, with a network for each."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm, self.norm_context = nn.LayerNorm(32), nn.LayerNorm(32)
        self.ff, self.ff_context = (
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2)
        )

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([x, c], 1)
        mixed = self.attn(both, both, both)[0]
        x, c = x + mixed[:, : x.shape[1]], c + mixed[:, x.shape[1] :]
        return x + self.ff(self.norm(x)), c + self.ff_context(self.norm_context(c))


class JointAndSingle(nn.Module):
    """Joint blocks, then single ones on both streams side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.ModuleList([Joint(), Joint(), Joint()])
        self.single = nn.ModuleList([layer(32), layer(32)])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for each in self.joint:
            x, c = each(x, c)
        z = torch.cat([c, x], 1)
        for each in self.single:
            z = each(z)
        return z


def pair(a: int = 32, b: int = 48) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 6, a), torch.randn(2, 5, b)


def heard(model: nn.Module, rules: Any, example: Any = None) -> dict[str, str]:
    """By the entry of each place that hears, the place that it hears."""
    made = surgery.plan(model, rules, example=example)
    return {p.place.entry.path: s.place.path for p, s in made.heard_from.items()}


FFN = "(linear1 to linear2)"


@pytest.mark.parametrize("rules", [*WHOLE, "daptx"])
@pytest.mark.parametrize("widths", [(32, 48), (32, 32)])
@pytest.mark.parametrize("given", [False, True])
def test_the_first_block_of_each_tower_is_left_out(
    rules: str, widths: tuple[int, int], given: bool
) -> None:
    model, example = Towers(widths).eval(), pair(*widths) if given else None
    chosen = surgery.methods.daptx(last=False)[:-2] if rules == "daptx" else rules  # no token
    known = heard(model, chosen, example)
    assert known == {"a.1": f"a.0.{FFN}", "b.1": f"b.0.{FFN}"}


@pytest.mark.parametrize("rules", WHOLE)
@pytest.mark.parametrize("listed", [True, False])
def test_prompts_run_in_both_towers_and_come_out(rules: str, listed: bool) -> None:
    model, example = Towers((32, 32), listed).eval(), pair(32, 32)
    base = model(*example)
    surgery.apply(model, rules, example=example)
    keys = [key for key in surgery.state_dict(model) if "insert" in key]
    assert len(keys) == 4
    assert [y.shape for y in model(*example)] == [y.shape for y in base]
    sum(y.square().sum() for y in model(*example)).backward()
    assert all(p.grad is not None for p in surgery.parameters(model))
    assert "nothing is heard before a." in str(surgery.report(model))
    surgery.revert(model)
    assert all(torch.equal(a, b) for a, b in zip(model(*example), base, strict=True))


def test_blocks_that_are_attributes_hear_those_of_their_own_tower() -> None:
    known = heard(Towers((32, 32), listed=False), "adapterx")
    assert known == {"a.two": f"a.one.{FFN}", "b.two": f"b.one.{FFN}"}


def test_blocks_each_in_a_module_of_its_own_hear_one_another() -> None:
    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.scale = layer(32), nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.inner(x)

    class Stages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Stage(), Stage()

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    assert heard(Stages(), "adapterx") == {"two.inner": f"one.inner.{FFN}"}


def test_a_forward_tells_towers_of_one_list_apart() -> None:
    assert heard(Mixed(turns=False), "adapterx", pair(32, 32)) == {
        "layers.1": f"layers.0.{FFN}",
        "layers.3": f"layers.2.{FFN}",
    }
    assert heard(Mixed(turns=True), "adapterx", pair(32, 32)) == {}


def test_a_forward_tells_the_streams_of_a_block_apart() -> None:
    example = pair(32, 32)
    known = heard(JointAndSingle(), "adapterx", example)
    assert known == {
        "joint.1": "joint.0.ff",
        "joint.2": "joint.1.ff",
        "single.1": f"single.0.{FFN}",
    }


def test_without_a_forward_the_stream_is_a_guess_and_said_to_be(tmp_path: Any) -> None:
    said = "heard is the last in each block, joint.0.ff_context (joint.(1 to 2))"
    assert said in str(surgery.plan(JointAndSingle(), "adapterx"))
    example = pair(32, 32)
    assert said not in str(surgery.plan(JointAndSingle(), "adapterx", example=example))
    model = surgery.apply(JointAndSingle().eval(), "adapterx", example=example)
    path = surgery.save(model, tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=r"example=inputs"):
        surgery.load(JointAndSingle().eval(), path)
    surgery.load(JointAndSingle().eval(), path, example=example)


def test_features_of_another_width_are_not_heard() -> None:
    class Widens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([layer(32), layer(32), layer(48), layer(48)])
            self.widen = nn.Linear(32, 48)

        def forward(self, x: Tensor) -> Tensor:
            a, b, c, d = self.blocks
            return d(c(self.widen(b(a(x)))))

    assert list(heard(Widens(), "adapterx")) == ["blocks.1", "blocks.3"]


def test_where_a_rule_is_not_optional_it_is_an_error() -> None:
    rules = [
        at(ffn, parallel(adapter(rank=4))),
        at(until(block[1:], block), insert(prompt_generator(), hears=ffn)),
    ]
    with pytest.raises(RuleError, match=r"before b(.|\n)*optional=True for those of every tower"):
        surgery.plan(Towers(), rules)


def test_the_rules_print_and_travel_in_files(tmp_path: Any) -> None:
    model, example = Towers((32, 32)).eval(), pair(32, 32)
    surgery.apply(model, "adapterx", example=example)
    path = surgery.save(model, tmp_path / "a.safetensors")
    fresh = Towers((32, 32)).eval()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "surgery" not in k})
    surgery.load(fresh, path)
    for a, b in zip(fresh(*example), model(*example), strict=True):
        assert torch.equal(a, b)


def test_one_tower_hears_as_before() -> None:
    known = heard(tiny_vit(), "adapterx", images())
    assert known == heard(tiny_vit(), "adapterx")
    assert known == {"blocks.1": "blocks.0.mlp", "blocks.2": "blocks.1.mlp"}
