"""Tokens put among those of a model: where they go, that they come out, what refuses them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import surgery
from surgery import at, block, ffn, head, insert, norm, parallel, unfreeze, until
from surgery.errors import GraftError, RuleError
from surgery.parts import adapter, prompt, prompt_generator
from tests.models import encoder, hf_bert, hf_vit, images, tiny_vit, torchvision_vit

HEARING = [
    at(ffn, parallel(adapter(rank=4))),
    at(until(block[1:], block), insert(prompt_generator(heads=3), hears=ffn)),
]


class Ones(nn.Module):
    def __init__(self, site: surgery.Site, count: int = 2) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.ones(count, site.width))

    def forward(self, x: Tensor) -> Tensor:
        return self.row.expand(len(x), -1, -1)


class Rows(nn.Module):
    """A block that remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return x + 0.0 * self.proj(x)


def operated(edit: Any) -> tuple[Any, Tensor, Tensor]:
    model, x = nn.Sequential(Rows()), torch.arange(24.0).reshape(1, 6, 4)
    surgery.apply(model, at("0", edit))
    return model[0], x, model(x)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_they_go_after_the_first_and_come_out_again(after: int) -> None:
    layer, x, y = operated(insert(Ones, after=after))
    want = torch.cat([x[:, :after], torch.ones(1, 2, 4), x[:, after:]], 1)
    assert torch.equal(layer.seen, want)
    assert torch.equal(y, x)


def test_kept_ones_stay() -> None:
    layer, _, y = operated(insert(Ones, keep=True))
    assert torch.equal(y, layer.seen)
    assert y.shape == (1, 8, 4)


def test_of_two_the_first_rule_is_innermost() -> None:
    model, x = nn.Sequential(Rows()), torch.zeros(1, 3, 4)
    twos = insert(lambda site: Twice(site))
    surgery.apply(model, [at("0", insert(Ones)), at("0", twos)])
    assert torch.equal(model(x), x)
    assert model[0].seen[0, :, 0].tolist() == [0, 1, 1, 2, 2, 0, 0]


class Twice(Ones):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("build", [tiny_vit, torchvision_vit, hf_vit])
def test_any_vit_takes_them(build: Any) -> None:
    model = build().eval()
    x = {"pixel_values": images()} if build is hf_vit else images()
    for rules in (at(block, prompt(tokens=2)), at(until(block[0], block), prompt(tokens=2))):
        surgery.apply(model, rules, example=x)
        surgery.revert(model)


def test_sequence_first_models_take_them_on_the_first_axis() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    first = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    second = copy.deepcopy(first)
    for module in second.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.batch_first = True
    x = torch.randn(5, 3, 8)
    for model in (first, second):
        surgery.apply(model, at(block, prompt(tokens=2)))
    torch.testing.assert_close(first(x), second(x.transpose(0, 1)).transpose(0, 1))


def test_maps_windows_and_masks_refuse_them() -> None:
    conv = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(RuleError, match="features lie on axis 1"):
        surgery.apply(conv, at("0", insert(Ones)))
    flat = surgery.apply(nn.Sequential(Rows()), at("0", insert(Ones)))
    with pytest.raises(GraftError, match=r"is given \(2, 3, 3, 4\), which is no row of tokens"):
        flat(torch.zeros(2, 3, 3, 4))
    model = surgery.apply(encoder().eval(), at(block, prompt(tokens=2)))
    mask = torch.zeros(2, 6, dtype=torch.bool)
    with pytest.raises(GraftError, match=r"a tensor \(2, 6\) that is made for 6 tokens"):
        model(torch.randn(2, 6, 24), src_key_padding_mask=mask)
    bert = surgery.apply(hf_bert(), at(block, prompt(tokens=2)))
    with pytest.raises(GraftError, match="that is made for 6 tokens"):
        bert(torch.zeros(2, 6, dtype=torch.long), torch.tensor([[1] * 5 + [0]] * 2))


def test_what_is_no_row_of_tokens_is_refused() -> None:
    model = surgery.apply(nn.Sequential(Rows()), at("0", insert(lambda site: nn.Linear(4, 4))))
    with pytest.raises(GraftError, match=r"it returned \(1, 3, 2\) float32"):
        surgery.apply(nn.Sequential(Rows()), at("0", insert(lambda site: nn.Linear(4, 2))))(
            torch.zeros(1, 3, 4)
        )
    assert model(torch.zeros(1, 3, 4)).shape == (1, 3, 4)
    with pytest.raises(RuleError, match="it is no number of tokens"):
        insert(Ones, after=-1)


def test_who_hears_nothing_is_told_at_once() -> None:
    with pytest.raises(RuleError, match=r"before blocks\.0 no rule joins a part at ffn"):
        surgery.plan(tiny_vit(), at(block, insert(prompt_generator(), hears=ffn)))
    early = [at(ffn, parallel(adapter())), at(block, insert(prompt_generator(), hears=ffn))]
    with pytest.raises(RuleError, match=r"leave the first places out: block\[1:\]"):
        surgery.plan(tiny_vit(), early)


def test_hearing_travels() -> None:
    model, x = surgery.apply(tiny_vit().eval(), HEARING, example=images()), images()
    with torch.no_grad():
        for p in surgery.parameters(model):
            p.add_(0.1)
        y = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for p in surgery.parameters(model):
                p.add_(1.0)
            assert torch.equal(twin(x), y)
            for p in surgery.parameters(model):
                p.sub_(1.0)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.vit, self.reentrant = tiny_vit(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        vit: Any = self.vit
        x = vit._pos_embed(vit.patch_embed(x))
        for one in vit.blocks:
            x = checkpoint(one, x, use_reentrant=self.reentrant)
        out: Tensor = vit.head(vit.norm(x)[:, 0])
        return out


def test_checkpointing_gives_the_right_gradient_or_an_error() -> None:
    torch.manual_seed(0)
    model = surgery.apply(Checkpointed(False), HEARING)
    plain: Any = model.vit
    model(images()).sum().backward()
    have = [p.grad.clone() for p in surgery.parameters(model)]  # type: ignore[union-attr]
    model.zero_grad()
    with torch.no_grad():
        base = model(images())
    x = plain._pos_embed(plain.patch_embed(images()))
    for one in plain.blocks:
        x = one(x)
    y = plain.head(plain.norm(x)[:, 0])
    torch.testing.assert_close(y.detach(), base)
    y.sum().backward()
    for a, p in zip(have, surgery.parameters(model), strict=True):
        torch.testing.assert_close(a, p.grad)
    again = surgery.apply(Checkpointed(True), HEARING)
    with pytest.raises(GraftError, match="came without a gradient"):
        again(images().requires_grad_()).sum().backward()


def test_until_ends_with_the_list_it_begins_in() -> None:
    towers = nn.ModuleDict({"a": tiny_vit(depth=2), "b": tiny_vit(depth=3)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = towers

        def forward(self, x: Tensor) -> Tensor:
            return self.towers["a"](x) + self.towers["b"](x)

    made = surgery.plan(Both(), at(until(block, block), prompt(tokens=1)))
    assert [site.path for site in made.sites] == [
        "towers.a.blocks.(0 to 1)",
        "towers.a.blocks.1",
        "towers.b.blocks.(0 to 2)",
        "towers.b.blocks.(1 to 2)",
        "towers.b.blocks.2",
    ]


def test_rules_with_tokens_print_and_travel_in_files(tmp_path: Any) -> None:
    rules = [*HEARING, at(block[-2:] & ~block[0], prompt(tokens=1)), at(head | norm, unfreeze)]
    names = {**vars(surgery), "prompt": prompt, "prompt_generator": prompt_generator}
    assert eval(repr(rules), names) == rules
    torch.manual_seed(0)
    model = surgery.apply(tiny_vit().eval(), rules)
    torch.manual_seed(0)
    again = surgery.load(tiny_vit().eval(), surgery.save(model, tmp_path / "a.safetensors"))
    assert torch.equal(again(images()), model(images()))
