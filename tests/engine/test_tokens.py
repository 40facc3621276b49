"""Tokens put among those of a model: where they go, that they come out, what refuses them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
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
    with pytest.raises(GraftError, match=r"it returned \(1, 3, 2\) where new tokens"):
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
            plain = self.reentrant is None
            x = one(x) if plain else checkpoint(one, x, use_reentrant=self.reentrant)
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


# found by a reader who tried to break it ---------------------------------------------------------


class Tokens(nn.Module):
    """Blocks in a list, each token by itself; each block is run as `order` says."""

    def __init__(self, depth: int = 3, order: list[int] | None = None) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.blocks = nn.ModuleList([copy.deepcopy(layer) for _ in range(depth)])
        self.order = list(range(depth)) if order is None else order

    def forward(self, x: Tensor) -> Tensor:
        for i in self.order:
            x = self.blocks[i](x)
        return x


def constant(count: int, value: float) -> Any:
    def make(site: surgery.Site) -> nn.Module:
        part = Ones(site, count)
        nn.init.constant_(part.row, value)
        return part

    return make


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))


def inner(first: int, after: int, count: int = 2, last: str = "*") -> Any:
    return at(
        until(f"blocks.[{first}]", f"blocks.{last}"), insert(constant(count, 7.0), after=after)
    )


def seen_by(model: nn.Module, path: str) -> list[Tensor]:
    kept: list[Tensor] = []
    model.get_submodule(path).register_forward_pre_hook(lambda m, a: kept.append(a[0]))
    return kept


@pytest.mark.parametrize("names", [("a", "a"), ("a", "b")], ids=["one", "two operations"])
def test_what_is_put_in_last_comes_out_first(names: tuple[str, str]) -> None:
    model = Tokens().eval()
    rules = [inner(0, after=1), inner(1, after=3)]
    if names[0] == names[1]:
        surgery.apply(model, rules)
    else:
        for rule, name in zip(rules, names, strict=True):
            surgery.apply(model, rule, name=name)
    kept = seen_by(model, "blocks.1")
    out = model(X)
    assert out.shape == X.shape
    (row,) = kept
    assert [i for i in range(9) if (row[0, i] == 7.0).all()] == [3, 4]
    with pytest.raises(GraftError, match="7 tokens a sample went in, 2 of them inserted"):
        surgery.apply(Tokens(), [inner(0, 1, last="[1]"), inner(1, 1)])(X)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_a_stretch_goes_in_before_what_stands_inside_it(order: list[int]) -> None:
    rules = [inner(0, after=1), at("blocks.*", parallel(adapter(rank=2)))]
    model = surgery.apply(Tokens().eval(), [rules[i] for i in order])
    given: list[int] = []
    for hooked in model.surgery.default.hooked_sites:
        if hooked.path.startswith("blocks.") and "(" not in hooked.path:
            part = hooked.actions[0].part
            part.register_forward_hook(lambda m, a, y: given.append(a[0].shape[1]))
    assert model(X).shape == X.shape
    assert given == [7, 7, 7]


def test_tokens_that_leave_as_others_are_refused() -> None:
    cait = timm.create_model(
        "cait_xxs24_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3
    )
    with pytest.raises(GraftError, match="tokens a sample went in, 10 of them inserted, and"):
        surgery.apply(cait.eval(), "vpt_deep")(images(size=32))


@pytest.mark.parametrize(
    ("order", "fact"),
    [
        ([0, 0, 1, 1, 2, 2], "its beginning ran again before its end"),
        ([0, 1], "its end never ran after its beginning"),
        ([1, 2], "its end ran without its beginning"),
    ],
)
def test_shared_and_skipped_blocks_are_refused(order: list[int], fact: str) -> None:
    model = surgery.apply(Tokens(order=order), inner(0, after=1))
    with pytest.raises(GraftError, match=fact):
        model(X)


def test_a_forward_that_failed_leaves_nothing_behind() -> None:
    model = Tokens(order=[0, 1])
    surgery.apply(model, inner(0, after=1))
    with pytest.raises(GraftError):
        model(X)
    model.order = [0, 1, 2]
    assert model(X).shape == X.shape


@pytest.mark.parametrize("rules", [HEARING, [at(until(block[0], block), prompt(tokens=2))]])
def test_two_forwards_before_one_backward_with_checkpoints(rules: Any) -> None:
    model, plain = Checkpointed(False), Checkpointed(False)
    plain.load_state_dict(model.state_dict())
    plain.reentrant = None  # type: ignore[assignment]
    grads = []
    for each in (model, plain):
        torch.manual_seed(0)
        surgery.apply(each, rules)
        with torch.no_grad():
            for i, p in enumerate(surgery.parameters(each)):
                p.add_(0.1 + 0.01 * i)
        (each(images()).square().sum() + each(-images()).sin().sum()).backward()
        with surgery.disabled(each):
            each(images())
        grads.append([p.grad for p in surgery.parameters(each)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_sequence_first_models_hear_sample_by_sample() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    first = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    second = copy.deepcopy(first)
    for module in second.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.batch_first = True
    rules = [
        at(ffn, parallel(adapter(rank=4))),
        at(until(block[1:], block), insert(prompt_generator(heads=2), hears=ffn)),
    ]
    for model in (first, second):
        surgery.apply(model, rules)
        with torch.no_grad():
            for p in surgery.parameters(model):
                p.add_(0.1)
    for x in (torch.randn(5, 3, 8), torch.randn(4, 4, 8)):
        torch.testing.assert_close(first(x), second(x.transpose(0, 1)).transpose(0, 1))


def test_an_example_tells_where_samples_lie() -> None:
    class SequenceFirst(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    with pytest.raises(GraftError, match="it is given 5 x 2 where the example has 2 samples"):
        surgery.apply(SequenceFirst(), at("blocks.*", prompt(tokens=2)), example=X)


def test_what_is_given_beside_is_judged_by_its_tokens() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            return x + self.lin(x) + c.mean()

    for batch in (4, 5, 6):
        model = surgery.apply(Root2(Conditioned()), at("one", prompt(tokens=2)))
        assert model(torch.randn(batch, 5, 8), torch.randn(batch, 8)).shape == (batch, 5, 8)
        assert model(torch.randn(batch, 5, 8), torch.randn(batch, 5, 8)).shape == (batch, 5, 8)
        with pytest.raises(GraftError, match=r"made for 5 tokens"):
            model(torch.randn(batch, 5, 8), torch.randn(batch, 1, 5, 5))


class Root2(nn.Module):
    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.one = one

    def forward(self, *args: Tensor) -> Tensor:
        out: Tensor = self.one(*args)
        return out


def test_a_dynamic_batch_exports() -> None:
    model = surgery.apply(tiny_vit().eval(), at(block, prompt(tokens=2)))
    batch = torch.export.Dim("batch", min=2, max=8)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},), strict=False)
    x = torch.cat([images()] * 3)
    torch.testing.assert_close(program.module()(x), model(x))


def test_a_part_hears_the_last_part_of_its_own_tower() -> None:
    rules = [at(ffn, parallel(Ones2)), at(ffn, parallel(Twice2)), HEARING[1]]
    made = surgery.plan(tiny_vit(), rules)
    assert {t.edit.part for t in made.heard_from.values()} == {Twice2}


class Ones2(nn.Module):
    def __init__(self, site: surgery.Site) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(site.width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Twice2(Ones2):
    pass


@pytest.mark.parametrize(
    ("table", "refused"),
    [
        (torch.zeros(4, 4, dtype=torch.long), True),
        (torch.zeros(4, 4, dtype=torch.int32), True),
        (torch.zeros(4, 4), False),
        (torch.zeros(4, 4, dtype=torch.bool), False),
        (torch.zeros(4, 5, dtype=torch.long), False),
        (torch.zeros(4, dtype=torch.long), False),
        (torch.zeros(1, 1, dtype=torch.long), False),
        (torch.zeros(4, 4, 4, dtype=torch.long), False),
    ],
)
def test_a_table_of_places_refuses_them_before_anything_runs(table: Tensor, refused: bool) -> None:
    model = Tokens()
    model.blocks[1].register_buffer("first", None)
    model.blocks[1].register_buffer("where", table)
    rule = at("blocks.*", prompt(tokens=2))
    if refused:
        with pytest.raises(RuleError, match=r"TransformerEncoderLayer.where is \(4, 4\)"):
            surgery.plan(model, rule)
    else:
        assert len(surgery.plan(model, rule).sites) == 3


def test_positions_of_the_patches_alone_refuse_them_too() -> None:
    model = surgery.apply(Root2(Rotated()), at("one", prompt(tokens=2)))
    with pytest.raises(GraftError, match=r"a tensor \(4, 3\) that is made for 5 tokens"):
        model(torch.randn(2, 5, 8), torch.randn(4, 3))
    assert model(torch.randn(2, 5, 8), torch.randn(3)).shape == (2, 5, 8)
    assert model(torch.randn(2, 5, 8), torch.randn(7, 9)).shape == (2, 5, 8)


@pytest.mark.parametrize("batch", [1, 2])
def test_relative_positions_from_end_to_end_refuse_them_too(batch: int) -> None:
    model = surgery.apply(Root2(Rotated()), at("one", prompt(tokens=2)))
    with pytest.raises(GraftError, match=r"a tensor \(1, 9, 8\) that is made for 5 tokens"):
        model(torch.randn(batch, 5, 8), torch.randn(1, 9, 8))


class Rotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        return x + self.lin(x) + rope.mean()


class Cached:
    """A cache of keys, one entry a layer; `room` of a fixed length, or growing."""

    def __init__(self, room: int = 0) -> None:
        self.layers: dict[int, Tensor] = {}
        self.room, self.filled = room, [0, 0]

    def update(self, i: int, x: Tensor) -> Tensor:
        if not self.room:
            old = [self.layers[i]] if i in self.layers else []
            self.layers[i] = torch.cat([*old, x], 1)
            return self.layers[i]
        if i not in self.layers:
            self.layers[i] = x.new_zeros(len(x), self.room, x.shape[-1])
        first, self.filled[i] = self.filled[i], self.filled[i] + x.shape[1]
        self.layers[i][:, first : self.filled[i]] = x
        return self.layers[i][:, : self.filled[i]]


class Step(nn.Module):
    def __init__(self, i: int) -> None:
        super().__init__()
        self.proj, self.i = nn.Linear(4, 4), i

    def forward(self, x: Tensor, past: Any = None, context: Any = None) -> Any:
        keys = x if past is None else past.update(self.i, x)
        return x + self.proj(keys).mean(1, keepdim=True)


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Step(i) for i in range(2))

    def forward(self, x: Tensor, past: Any = None, context: Any = None) -> Tensor:
        for each in self.blocks:
            x = each(x, past, context)
        return x


@pytest.mark.parametrize("room", [0, 20])
@pytest.mark.parametrize("place", [at("blocks.*", insert(Ones)), at("blocks.1", insert(Ones))])
def test_a_cache_that_is_filled_refuses_them(place: Any, room: int) -> None:
    model, x = Steps(), torch.randn(2, 3, 4)
    surgery.apply(model, place)
    cache, context = Cached(room), {"text": (torch.randn(2, 3, 4), torch.randn(2, 9, 4))}
    with torch.no_grad():
        assert torch.allclose(model(x, cache, context), model(x, context=context), atol=1e-6)
        model(x, Cached(room), context)
        with pytest.raises(GraftError, match=r"already holds keys(.|\n)*use_cache=False"):
            model(x[:, :1], cache, context)
        model(x, Cached(room), context)


def test_a_decoder_generates_alike_without_a_cache_and_is_refused_with_one() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    surgery.apply(model, "vpt_deep")
    ids = torch.randint(3, 50, (2, 6))
    with pytest.raises(GraftError, match="use_cache=False"):
        model.generate(ids, max_new_tokens=4, do_sample=False)
    model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
