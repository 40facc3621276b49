"""What fixes the number of tokens is named, and the model's own error is not what one reads."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery import at, block, insert
from surgery.parts import prompt
from tests.engine.refusals import apply_error

N = 9  # tokens, the class token among them
SETS = ["vpt_deep", "vpt_shallow", "adapterx", "adapterx_serial", "daptx", "idpt"]


class Attention(nn.Module):
    """Attention over N tokens, which `fixed` knows of in one way or another."""

    def __init__(self, fixed: str) -> None:
        super().__init__()
        self.qkv, self.proj, self.fixed = nn.Linear(24, 72), nn.Linear(24, 24), fixed
        self.bias = nn.Parameter(torch.zeros(2 * N - 1, 3))
        self.table = nn.Parameter(torch.zeros(3, N, N))
        self.rotary = nn.Parameter(torch.zeros(N, 8))
        self.mix = nn.Linear(N, N)
        self.rows = nn.Embedding(N, 24)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if self.fixed == "linear":
            x = self.mix(x.mT).mT
        if self.fixed == "sizes":
            x = x.reshape(-1, N, 24)
        if self.fixed == "windows":
            x = rearrange(x, "b (w k) d -> b (k w) d", w=3)
        if self.fixed == "assert":
            assert n == N, f"expected {N} tokens"
        if self.fixed == "index":
            x = x + self.rows(torch.arange(n))
        if self.fixed == "list":
            x = x + torch.stack([self.rows.weight[list(range(N))[i]] for i in range(n)])
        q, k, v = rearrange(self.qkv(x), "b n (three h c) -> three b h n c", three=3, h=3)
        if self.fixed == "rotary":
            q, k = (t * self.rotary.cos() for t in (q, k))
        scores = q @ k.mT
        if self.fixed == "table":
            scores = scores + self.table
        if self.fixed == "relative":
            steps = torch.arange(N)[:, None] - torch.arange(N) + N - 1
            scores = scores + self.bias[steps].permute(2, 0, 1)
        y = rearrange(scores.softmax(-1) @ v, "b h n c -> b n (h c)")
        return self.proj(y)


class Block(nn.Module):
    def __init__(self, fixed: str) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(24), Attention(fixed)
        self.norm2 = nn.LayerNorm(24)
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Fixed(nn.Module):
    def __init__(self, fixed: str) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 24))
        self.blocks = nn.ModuleList([Block(fixed) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for each in self.blocks:
            x = each(x)
        return self.head(self.norm(x).mean(1))


X = torch.randn(2, N - 1, 24, generator=torch.Generator().manual_seed(1))
KINDS = ["linear", "sizes", "windows", "assert", "index", "list", "rotary", "table", "relative"]


@pytest.mark.parametrize("rules", SETS)
@pytest.mark.parametrize("fixed", KINDS)
def test_what_fixes_the_number_of_tokens_is_named(fixed: str, rules: str) -> None:
    said = apply_error(Fixed(fixed), rules, X)
    assert "Use a method that adds no tokens" in said
    assert "tokens a sample come" in said
    assert ".attn" in said
    assert "inserted" in said


@pytest.mark.parametrize("rules", SETS)
def test_where_nothing_fixes_it_they_run(rules: str) -> None:
    surgery.apply(Fixed("nothing"), rules, example=X)


def test_the_numbers_and_the_module_are_told() -> None:
    said = apply_error(Fixed("linear"), at(block, insert(prompt(tokens=2))), X)
    assert "insert(...) at blocks.0" in said
    assert f"{N + 2} tokens a sample come, 2 of them inserted" in said
    assert "blocks.0.attn.mix (Linear) is made for another number: RuntimeError: " in said


class Fails(Fixed):
    def __init__(self, when: Callable[[Any, Tensor], bool]) -> None:
        super().__init__("nothing")
        self.when = when

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.when(self, x):
            raise ValueError("of its own")
        return y


def test_an_error_that_comes_anyway_is_the_models_own() -> None:
    rule = at(block, insert(prompt(tokens=2)))
    with pytest.raises(ValueError, match="of its own"):
        surgery.apply(Fails(lambda model, x: True), rule, example=X)
    model = surgery.apply(Fails(lambda model, x: model.training), rule, example=X)
    assert "not proved in training: ValueError" in str(surgery.report(model))


def test_without_tokens_an_error_passes() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        surgery.apply(Fixed("linear"), "adapterx_ffn", example=torch.randn(2, 3, 24))


def test_errors_in_training_alone_are_told_too() -> None:
    class Trained(Fixed):
        def forward(self, x: Tensor) -> Tensor:
            for each in self.blocks:
                each.attn.fixed = "linear" if self.training else "nothing"
            return super().forward(x)

    said = apply_error(Trained("nothing"), at(block, insert(prompt(tokens=2))), X)
    assert "blocks.0.attn.mix (Linear)" in said


def test_a_head_that_takes_so_many_tokens_is_named() -> None:
    class Flat(Fixed):
        def __init__(self) -> None:
            super().__init__("nothing")
            self.head = nn.Linear(24 * N, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            for each in self.blocks:
                x = each(x)
            return F.relu(self.head(self.norm(x).flatten(1)))

    assert "head (Linear) is made for another number" in apply_error(Flat(), "daptx", X)
    surgery.apply(Flat(), "adapterx", example=X)


# nested tensors ----------------------------------------------------------------------------------


class Nested(nn.Module):
    """Gives its layers a nested tensor of the tokens that are no padding, as torch's own does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(24, 4, 48, 0.0, batch_first=True), 2
        ).layers
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        y = torch._nested_tensor_from_mask(x, padding.logical_not(), mask_check=False)
        for each in self.layers:
            y = each(y)
        return self.head(y.to_padded_tensor(0.0).mean(1))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 48, 0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(24, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


PADDING = torch.tensor([[False] * 8, [False] * 5 + [True] * 3])
ALL = [str(row[0]) for row in surgery.rulesets().rows]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("build", [Nested, Padded])
@pytest.mark.parametrize("rules", ALL)
def test_nested_tensors_are_refused_by_name_or_right(rules: str, build: Any, given: bool) -> None:
    model = build().eval()
    try:
        surgery.apply(model, rules, example=(X, PADDING) if given else None)
        with torch.no_grad():
            model(X, PADDING)
    except surgery.SurgeryError:
        return


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("vpt_deep", "tokens are put into tensors of one shape"),
        ("convpass_att", "lets tokens hear others, and was given a nested tensor"),
    ],
)
def test_what_is_said_of_nested_tensors(rules: str, said: str) -> None:
    model = surgery.apply(Nested().eval(), rules)
    with torch.no_grad(), pytest.raises(surgery.GraftError, match=said):
        model(X, PADDING)
    with torch.no_grad(), pytest.raises(surgery.OperationError, match="makes or takes nested"):
        surgery.apply(Nested().eval(), rules, example=(X, PADDING))


def forward_error(model: nn.Module, x: Tensor) -> Exception:
    """What a forward raises."""
    try:
        model(x)
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


def told(error: Exception) -> str:
    """An error as it is printed, with its notes."""
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("rules", SETS)
@pytest.mark.parametrize("fixed", KINDS)
def test_without_an_example_the_models_own_error_says_it_too(fixed: str, rules: str) -> None:
    model = surgery.apply(Fixed(fixed).eval(), rules)
    error = forward_error(model, X)
    assert not isinstance(error, surgery.SurgeryError)
    assert "tokens a sample came" in told(error)
    assert ".attn" in told(error).rpartition("insert(...) at")[2]
    assert "Use a method that adds no tokens" in told(error)
    with surgery.disabled(model), torch.no_grad():
        assert model(X).shape == (2, 5)


def test_no_more_is_said_of_errors_that_are_none_of_tokens() -> None:
    rule = at(block, insert(prompt(tokens=2)))
    model = surgery.apply(Fails(lambda model, x: len(x) > 2).eval(), rule)
    for x in (torch.randn(3, N - 1, 24), torch.randn(2, N - 1, 23)):  # behind blocks, before them
        assert "inserted" not in told(forward_error(model, x))
    operated = surgery.apply(Fixed("linear").eval(), "adapterx_ffn")
    assert "inserted" not in told(forward_error(operated, torch.randn(2, 3, 24)))
    around = ValueError("handled around it")
    try:
        raise around
    except ValueError:
        model(X)
    assert "inserted" not in told(around)
