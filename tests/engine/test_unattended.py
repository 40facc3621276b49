"""Attentions and networks in lists of their own, walked side by side: no block holds one of each.

Prompts there would reach some attentions, or none; they are refused by name, with an example and
without, and the model is left as it was.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import at, attn, block, insert, prompt
from surgery.errors import RuleError
from tests.engine.test_uncalled_blocks import WIDTH, Attention, ffn, inputs
from tests.laws import checks as laws
from tests.laws.checks import raised


class Adding(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


class Zip(nn.Module):
    """`for attn, ff in zip(self.attns, self.ffs)`."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 3)
        self.make(depth)

    def make(self, depth: int) -> None:
        self.attns = nn.ModuleList(Attention() for _ in range(depth))
        self.ffs = nn.ModuleList(ffn() for _ in range(depth))

    def pairs(self) -> Any:
        return zip(self.attns, self.ffs, strict=False)

    def run(self, x: Tensor) -> Tensor:
        for a, f in self.pairs():
            x = x + a(x)
            x = x + f(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.inp(x)).mean(1))  # type: ignore[no-any-return]


class Longer(Zip):
    def make(self, depth: int) -> None:
        super().make(depth)
        self.attns.append(Attention())

    def run(self, x: Tensor) -> Tensor:
        x = super().run(x)
        return x + self.attns[-1](x)  # type: ignore[no-any-return]


class NetworkFirst(Zip):
    def run(self, x: Tensor) -> Tensor:
        for a, f in self.pairs():
            x = x + f(x)
            x = x + a(x)
        return x


class SideBySide(Zip):
    def run(self, x: Tensor) -> Tensor:
        for a, f in self.pairs():
            x = x + f(x) + a(x)
        return x


class Twice(Zip):
    def run(self, x: Tensor) -> Tensor:
        return super().run(super().run(x))


class Attributes(Zip):
    def make(self, depth: int) -> None:
        self.depth = depth
        for i in range(depth):
            self.add_module(f"a{i}", Attention())
            self.add_module(f"f{i}", ffn())

    def pairs(self) -> Any:
        return [(getattr(self, f"a{i}"), getattr(self, f"f{i}")) for i in range(self.depth)]


class DictOfLists(Zip):
    def make(self, depth: int) -> None:
        super().make(depth)
        self.lists = nn.ModuleDict({"a": self.attns, "f": self.ffs})
        del self.attns, self.ffs

    def pairs(self) -> Any:
        return zip(self.lists["a"], self.lists["f"], strict=True)


class Wrapped(Zip):
    """Each adds what came to what it gives: the attentions are blocks of their own."""

    def make(self, depth: int) -> None:
        self.attns = nn.ModuleList(Adding(Attention()) for _ in range(depth))
        self.ffs = nn.ModuleList(Adding(ffn()) for _ in range(depth))

    def run(self, x: Tensor) -> Tensor:
        for a, f in self.pairs():
            x = f(a(x))
        return x


class Normed(Zip):
    """As XLM: norms in lists of their own, too, and nothing in a list but a network alone."""

    def make(self, depth: int) -> None:
        super().make(depth)
        for a, f in self.pairs():
            a.norm, f[0] = nn.Identity(), nn.Identity()
        self.ffs = nn.ModuleList(f[1:] for f in self.ffs)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * depth))

    def run(self, x: Tensor) -> Tensor:
        for i, (a, f) in enumerate(self.pairs()):
            x = self.norms[2 * i](x + a(x))
            x = self.norms[2 * i + 1](x + f(x))
        return x


KINDS = [
    Zip, Longer, NetworkFirst, SideBySide, Twice, Attributes, DictOfLists, Wrapped, Normed,
]  # fmt: skip
RULES = ["vpt_deep", "vpt_shallow", "adapterx"]
CASES = [
    (kind, rules) for kind in KINDS for rules in RULES if (kind, rules) != (Normed, "adapterx")
]


def fresh(kind: type[Zip]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize("told", [True, False], ids=["example", "without"])
@pytest.mark.parametrize(("kind", "rules"), CASES, ids=lambda c: getattr(c, "__name__", c))
def test_tokens_are_refused_where_no_block_holds_an_attention_and_its_network(
    kind: type[Zip], rules: str, told: bool
) -> None:
    model = fresh(kind)
    before = laws.fingerprint(model)
    example = inputs() if told else None
    error = raised(RuleError, lambda: surgery.apply(model, rules, example=example))
    assert "walked" in str(error)
    assert "side by side" in str(error)
    assert ("Give example=inputs" in str(error)) is not told
    laws.assert_same(before, laws.fingerprint(model), "a refusal")


def test_one_network_beside_another_list_is_told_from_pooling() -> None:
    """An attention behind all blocks, as SigLIP's, is no part of them."""

    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.pool = nn.Linear(8, WIDTH), Attention()
            self.ffs = nn.ModuleList([Mixes()])

        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            for each in self.ffs:
                x = each(x)
            return self.pool(x).mean(1)  # type: ignore[no-any-return]

    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = ffn()

        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.fft.fft(x, dim=1).real  # FNet's
            return x + self.ffn(x)  # type: ignore[no-any-return]

    surgery.apply(Pools().eval(), "vpt_deep", example=inputs())


def test_the_remedy_helps() -> None:
    """Behind an attention a token of its own is heard no more: prompts at it are VPT-deep's."""

    class Blocks(Zip):
        def make(self, depth: int) -> None:
            super().make(depth)
            self.blocks = nn.ModuleList(
                nn.Sequential(Adding(a), Adding(f)) for a, f in self.pairs()
            )
            del self.attns, self.ffs

        def run(self, x: Tensor) -> Tensor:
            for each in self.blocks:
                x = each(x)
            return x

    model, want = fresh(Zip), fresh(Blocks)
    surgery.apply(model, at(attn, prompt(tokens=3)), example=inputs())
    surgery.apply(want, at(block, prompt(tokens=3)), example=inputs())
    ours, theirs = model.get_submodule("surgery"), want.get_submodule("surgery")
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q.data.copy_(p)
    torch.testing.assert_close(model(inputs()), want(inputs()))


def test_what_is_no_token_may_stand_there() -> None:
    for rules in ("adaptformer", "lora", "adapterx_ffn"):
        surgery.apply(fresh(Zip), rules, example=inputs())


def test_a_place_by_address_is_left_to_who_writes_it() -> None:
    model = fresh(Zip)
    surgery.apply(model, at("attns.*", insert(prompt(tokens=3))), example=inputs())
