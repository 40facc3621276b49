"""A gradient of zeros is none: what cannot move the output is told, what starts at zero is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import surgery
from surgery import adapter, at, block, ffn, insert, lora, parallel, qkv, unfreeze
from surgery.methods import rules_named
from surgery.parts import prompt
from surgery.rules.edits import Insert
from tests.engine.refusals import apply_error
from tests.laws import checks as laws

TOKENS = [
    "vpt_deep",
    "vpt_shallow",
    "adapterx",
    "adapterx_serial",
    "noah",
    "daptx",
    "dapt",
    "idpt",
    "point_peft",
]


class Apart(nn.Module):
    """A block whose tokens hear no others: what stands for attention is a gate."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.gate = nn.Sequential(nn.Linear(width, width), nn.Sigmoid(), nn.Linear(width, width))
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gate(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Pooled(nn.Module):
    """Blocks, and a head that reads what `read` says."""

    def __init__(self, kind: Callable[[], nn.Module], read: str = "mean") -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 24))
        self.blocks = nn.ModuleList([kind() for _ in range(3)])
        self.norm, self.head, self.read = nn.LayerNorm(24), nn.Linear(24, 5), read

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for each in self.blocks:
            x = each(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.read == "mean" else x[:, 0])


def mixing() -> nn.Module:
    return Block(24, 3, qkv_bias=True)


X = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1))


def has_tokens(rules: str) -> bool:
    edits = [edit for rule in rules_named(rules) for edit in rule.rest]
    return any(isinstance(edit, Insert) for edit in edits)


def test_these_are_the_rule_sets_that_insert_tokens() -> None:
    names = [str(row[0]) for row in surgery.rulesets().rows]
    assert {name for name in names if has_tokens(name)} == set(TOKENS)


@pytest.mark.parametrize("rules", ["vpt_deep", "vpt_shallow", "adapterx", "adapterx_serial"])
def test_tokens_that_no_others_hear_are_refused(rules: str) -> None:
    said = apply_error(Pooled(Apart), rules, X)
    assert "the output does not depend on them" in said
    assert "insert" in said
    surgery.apply(Pooled(mixing), rules, example=X)


def test_tokens_without_effect_in_some_blocks_are_refused_there_alone() -> None:
    model = Pooled(mixing)
    model.blocks[1] = Apart()
    said = apply_error(model, at(block, prompt(tokens=2)), X)
    assert "blocks/1/insert.tokens is zero" in said
    surgery.apply(model, at(block & ~surgery.where("blocks.1"), prompt(tokens=2)), example=X)


def test_the_last_of_dapt_are_for_a_head_that_reads_them() -> None:
    model = surgery.apply(Pooled(mixing, read="first"), "daptx", example=X)
    assert "norm/insert.gamma, norm/insert.beta is zero with this example" in str(
        surgery.report(model)
    )
    model = surgery.apply(Pooled(mixing, read="mean"), "daptx", example=X)
    assert "is zero with this example" not in str(surgery.report(model))


class Scaled(nn.Module):
    """A block whose branches start at zero, as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.norm = nn.MultiheadAttention(24, 3, batch_first=True), nn.LayerNorm(24)
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.scale = nn.Parameter(torch.zeros(24))
        self.how = how
        if how == "last layer":
            for last in (self.inner.out_proj, self.mlp[2]):
                nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale if self.how == "scale" else 1.0
        x = x + scale * self.inner(x, x, x)[0]
        return x + scale * self.mlp(self.norm(x))


@pytest.mark.parametrize("how", ["scale", "last layer", "head"])
@pytest.mark.parametrize("rules", ["vpt_deep", "adapterx_ffn", "bitfit", "adapterx"])
def test_what_starts_at_zero_is_given_numbers_before_it_is_judged(how: str, rules: str) -> None:
    model = Pooled(lambda: Scaled(how))
    if how == "head":
        nn.init.zeros_(model.head.weight)
    before = laws.fingerprint(model)
    surgery.apply(model, rules, example=X)
    surgery.revert(model)
    laws.assert_same(before, laws.fingerprint(model), "a proof with numbers in place of zeros")


def test_what_moves_nothing_is_named_by_its_rule() -> None:
    class Multiplied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + 0.0 * self.two(x)

    part = parallel(adapter(rank=2))
    said = apply_error(Multiplied(), at("two", part), torch.randn(2, 8))
    assert 'at("two", ...)' in said
    assert "two/parallel" in said
    model = surgery.apply(Multiplied(), at("{one,two}", part), example=torch.randn(2, 8))
    assert "two/parallel" in str(surgery.report(model))
    rules = [at("one", part), at("two", unfreeze, optional=True)]
    model = surgery.apply(Multiplied(), rules, example=torch.randn(2, 8))
    assert "two.weight, two.bias is zero with this example" in str(surgery.report(model))


def test_what_is_normed_or_a_distribution_still_depends() -> None:
    class Normed(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(-1)

    surgery.apply(Normed(mixing), "vpt_deep", example=X)


def test_no_gradient_is_left_and_no_hook_of_an_optimiser_runs() -> None:
    model = Pooled(mixing)
    called: list[str] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: called.append("stepped"))
    surgery.apply(model, [at(ffn, unfreeze), at(qkv, lora(rank=2))], example=X)
    assert not called
    assert all(p.grad is None for p in model.parameters())


def test_an_insertion_by_hand_is_proved_too() -> None:
    said = apply_error(Pooled(Apart), at("blocks.0", insert(prompt(tokens=1))), X)
    assert 'at("blocks.0", ...)' in said
