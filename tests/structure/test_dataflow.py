"""Which norm feeds a place: by structure, and by a forward on an example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import (
    GraftError,
    MatchError,
    RuleError,
    adapter,
    append,
    at,
    ffn,
    key,
    nearest,
    norm,
    parallel,
    query,
    span,
    value,
)
from surgery.engine.planning import plan
from surgery.rules.selector import Where, where
from surgery.structure.module_tree import Tree
from tests import models
from tests.laws import checks as laws

D = 16
TOKENS = torch.randn(2, 5, D)


class Mlp(nn.Sequential):
    def __init__(self, width: int = D) -> None:
        super().__init__(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))


class Block(nn.Module):
    """Attention stands in as one matrix over features; `order` says how the norms are used."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn, self.mlp = nn.Linear(D, D), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "pre":
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        if self.order == "post":
            x = self.norm1(x + self.attn(x))
            return self.norm2(x + self.mlp(x))
        if self.order == "swapped":
            x = x + self.attn(self.norm2(x))
            return x + self.mlp(self.norm1(x))
        x = x + self.norm1(self.attn(x))  # as in Swin V2
        return x + self.norm2(self.mlp(x))


class Blocks(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def paths(model: nn.Module, pattern: Where, example: object = None) -> list[str]:
    made = plan(model, at(pattern, append(adapter(rank=2), residual=True)), example=example)
    return [site.path.removeprefix("blocks.0.") for site in made.sites]


ORDERS = {  # nearest(norm, before=ffn) and span(norm, ffn), as a forward tells
    "pre": (["norm2"], ["(norm2 to mlp)"]),
    "post": (["norm1"], ["(norm1 to mlp)"]),
    "swapped": (["norm1"], ["(norm1 to mlp)"]),
    "after": ([], ["mlp"]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_forward_tells_which_norm_feeds_a_network(order):
    model, (near, spans) = Blocks(Block(order)), ORDERS[order]
    assert paths(model, span(norm, ffn), TOKENS) == spans
    if near:
        assert paths(model, nearest(norm, before=ffn), TOKENS) == near
    else:
        with pytest.raises(MatchError):
            paths(model, nearest(norm, before=ffn), TOKENS)


@pytest.mark.parametrize("order", ORDERS)
def test_what_was_told_by_a_forward_starts_as_the_base_and_trains(order):
    model = Blocks(Block(order)).eval()
    base = model(TOKENS)
    surgery.apply(model, "adaptformer", example=TOKENS)
    torch.testing.assert_close(model(TOKENS), base)
    model(TOKENS).sum().backward()
    assert all(p.grad is not None for p in model.surgery.parameters())


@pytest.mark.parametrize("order", ["swapped", "after"])
def test_a_guess_that_is_wrong_is_loud_and_says_what_to_do(order):
    model = Blocks(Block("after"))
    surgery.apply(model, "adaptformer")
    with pytest.raises(GraftError, match=r"example=inputs"):
        model(TOKENS)


def test_the_report_says_that_a_forward_told():
    model = Blocks(Block("pre"))
    note = "what feeds what was read off a forward on the example"
    assert note in str(plan(model, "adaptformer", example=TOKENS))
    assert note not in str(plan(model, "adaptformer"))
    rules = at("blocks.*.mlp", append(adapter(rank=2)))
    assert note not in str(plan(model, rules, example=TOKENS))  # nobody asked
    surgery.apply(model, "adaptformer", example=TOKENS)
    assert note in str(surgery.report(model))


def test_a_file_goes_to_the_places_that_the_forward_told(tmp_path):
    torch.manual_seed(0)
    trained = surgery.apply(models.encoder().eval(), "adaptformer", example=torch.randn(2, 5, 24))
    for p in trained.surgery.parameters():
        nn.init.normal_(p)
    surgery.save(trained, tmp_path / "a.safetensors")
    x = torch.randn(2, 5, 24)
    for example in (None, torch.randn(2, 5, 24)):
        torch.manual_seed(0)
        again = models.encoder().eval()
        surgery.load(again, tmp_path / "a.safetensors", example=example)
        torch.testing.assert_close(again(x), trained(x), rtol=0, atol=0)


def test_the_example_is_asked_once_and_stays_what_it_is():
    calls = []

    class Counts(Blocks):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.training)
            x.add_(1)
            return super().forward(x)

    model, example = Counts(Block("pre"), Block("pre")), torch.zeros(2, 5, D)
    plan(model, "adaptformer", example=example)
    assert calls == [False]
    assert example.sum() == 0


def test_an_address_that_feeds_nothing_is_taken_by_order():
    """Who names a norm means it, wherever a forward leads."""
    model = Blocks(Block("pre"))
    assert paths(model, nearest("**.norm1", before=ffn), TOKENS) == ["norm1"]


class Shared(nn.Module):
    """One network that two norms feed in turn (CoaT)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.norm_b, self.mlp = nn.LayerNorm(D), nn.LayerNorm(D), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.norm_a(x))
        return x + self.mlp(self.norm_b(x))


def test_a_network_that_several_norms_feed_is_taken_alone():
    assert paths(Blocks(Shared()), span(norm, ffn), TOKENS) == ["mlp"]


class Convolved(nn.Module):
    """Convolution and batch norm as one step, then a network with no norm of its own (RepViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Sequential(nn.Conv2d(D, D, 3, padding=1, groups=D), nn.BatchNorm2d(D))
        self.mlp = nn.Sequential(nn.Conv2d(D, 2 * D, 1), nn.GELU(), nn.Conv2d(2 * D, D, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)
        return x + self.mlp(x)


@pytest.mark.parametrize("example", [None, torch.randn(2, D, 4, 4)])
def test_a_batch_norm_that_is_one_step_with_its_convolution_is_no_beginning(example):
    model = Blocks(Convolved())
    assert paths(model, span(norm, ffn), example) == ["mlp"]
    assert paths(model, nearest("**.mixer.1", before=ffn), example) == ["mixer.1"]


def test_a_norm_of_another_block_is_no_beginning():
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.blocks = nn.LayerNorm(D), nn.ModuleList([Bare()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](self.norm(x))

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.mlp = nn.Linear(D, D), Mlp()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)

    assert paths(Stem(), span(norm, ffn), TOKENS) == ["mlp"]
    assert paths(Stem(), span(norm, ffn)) == ["mlp"]
    assert paths(Stem(), nearest(norm, before=ffn), TOKENS) == ["norm"]  # it does feed it


def test_a_span_does_not_begin_where_tokens_are_in_a_row():
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mix, self.mlp = nn.LayerNorm(D), nn.Linear(D, D), Mlp()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x.flatten(0, 1)).view_as(x))

    assert paths(Blocks(Rows()), span(norm, ffn), TOKENS) == ["mlp"]


def test_lists_side_by_side_pair_by_number():
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))
            self.ffns = nn.ModuleList(Mlp() for _ in range(3))

    pairs = [(f"norms.{i}", f"ffns.{i}") for i in range(3)]
    near = where(nearest(norm, before=ffn)).pairs(Tree(Lists()))
    assert [(a.path, b.path) for a, b in near] == pairs


# layout ----------------------------------------------------------------------------------------


class MapNorm(nn.LayerNorm):
    """A norm over axis 1 whose class does not tell."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = (
            MapNorm(D),
            nn.Sequential(nn.Conv2d(D, 2 * D, 1), nn.GELU(), nn.Conv2d(2 * D, D, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


@pytest.mark.parametrize("side", [4, D])
def test_a_span_has_the_axis_of_its_network(side):
    """Where there are as many rows as features too."""
    model, x = Blocks(Maps()).eval(), torch.randn(2, D, side, side)
    surgery.apply(model, at(span(norm, ffn), parallel(adapter(rank=2))))
    part = next(p for p in model.surgery.modules() if isinstance(p, surgery.parts.Adapter))
    nn.init.normal_(part.up.weight)
    added = part(x.movedim(1, -1)).movedim(-1, 1)
    y = model(x)
    with torch.no_grad(), surgery.disabled(model):
        torch.testing.assert_close(y, model(x) + added)


def test_the_axis_is_found_when_it_runs():
    model, x = nn.Sequential(MapNorm(D)).eval(), torch.randn(2, D, 3, 5)
    base = model(x)
    surgery.apply(model, at("0", parallel(adapter(rank=2))), example=x)
    nn.init.normal_(model.surgery.get_parameter("default.0/parallel.up.weight"))
    part = model.surgery.get_submodule("default.0/parallel")
    torch.testing.assert_close(model(x), base + part(x.movedim(1, -1)).movedim(-1, 1))


def test_features_of_another_number_are_told():
    model = nn.Sequential(nn.LayerNorm(D))
    surgery.apply(model, at("0", parallel(adapter(rank=2))))
    model[0].normalized_shape = (8,)
    model[0].weight.data, model[0].bias.data = torch.ones(8), torch.zeros(8)
    with pytest.raises(GraftError, match=r"given \(2, 8\) float32.*taken to have 16 features"):
        model(torch.randn(2, 8))


def test_a_mixture_that_gives_its_tokens_in_a_row():
    class Moe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.up(x.flatten(0, 1))))

    model, rules = Moe().eval(), at("", parallel(adapter(rank=2)))
    base = model(TOKENS)
    surgery.apply(model, rules, example=TOKENS)
    part = next(p for p in model.surgery.modules() if isinstance(p, surgery.parts.Adapter))
    nn.init.normal_(part.up.weight)
    torch.testing.assert_close(model(TOKENS), base + part(TOKENS).flatten(0, 1))


@pytest.mark.parametrize("example", [None, torch.randn(2, D, 4, 4)])
def test_a_model_whose_networks_no_norm_feeds_is_operated_too(example):
    model = surgery.apply(Blocks(Convolved()).eval(), "adapterx_ffn", example=example)
    sites = [row[0] for row in surgery.report(model).rows]
    assert sites == ["blocks.*.mlp", "nothing (optional)", "nothing (optional)"]


def test_one_norm_of_branches_side_by_side_feeds_them_all_wherever_it_is_registered():
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp, self.norm = nn.Linear(D, D), Mlp(), nn.LayerNorm(D)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + self.attn(y) + self.mlp(y)

    for example in (None, TOKENS):
        assert paths(Blocks(Parallel()), nearest(norm, before=ffn), example) == ["norm"]
        assert paths(Blocks(Parallel()), span(norm, ffn), example) == ["(norm to mlp)"]


class Esm(nn.Module):
    """Attention with a norm of its own, the norm before the network beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(D, D), "norm": nn.LayerNorm(D)})
        self.up, self.down, self.norm = nn.Linear(D, 2 * D), nn.Linear(2 * D, D), nn.LayerNorm(D)


class PerHead(nn.Module):
    """Attention with a norm per head, and norms around each branch that order cannot tell."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"q": nn.Linear(D, D), "norm": nn.LayerNorm(D // 2)})
        self.mlp, self.a, self.b = Mlp(), nn.LayerNorm(D), nn.LayerNorm(D)
        self.c, self.d = nn.LayerNorm(D), nn.LayerNorm(D)


class Conformer(nn.Module):
    """All norms after all branches, and one for the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attn, self.second = Mlp(), nn.Linear(D, D), Mlp()
        self.a, self.b, self.c, self.d = (nn.LayerNorm(D) for _ in range(4))


@pytest.mark.parametrize(
    ("kind", "near"), [(Esm, ["norm"]), (PerHead, []), (Conformer, ["a", "c"])]
)
def test_a_norm_inside_another_branch_is_that_branchs_own(kind, near):
    tree = Tree(Blocks(kind()))
    found = [site.path for site in nearest(norm, before=ffn).find(tree)]
    assert found == [f"blocks.0.{name}" for name in near]


class Mixer(nn.Module):
    """A network over tokens, which are in the place of features."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(D), Mlp(10)
        self.norm2, self.mlp = nn.LayerNorm(D), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("example", [None, torch.randn(2, 10, D)])
def test_a_network_over_tokens_has_a_norm_but_no_span_from_it(example):
    model = Blocks(Mixer()).eval()
    assert paths(model, nearest(norm, before=ffn), example) == ["norm1", "norm2"]
    assert paths(model, span(norm, ffn), example) == ["tokens", "(norm2 to mlp)"]
    surgery.apply(model, "adaptformer", example=torch.randn(2, 10, D))


# query, key, value -----------------------------------------------------------------------------


class Attention(nn.Module):
    """Registered in another order than q, k, v; the key is normed and turned."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.one, self.two, self.three = (nn.Linear(D, D) for _ in range(3))
        self.norm, self.out = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.three(x), self.norm(self.one(x)), self.two(x)
        k = torch.cat([-k[..., D // 2 :], k[..., : D // 2]], -1) * torch.linspace(0, 1, D) + k
        if self.how == "kernel":
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v))
        scores = (q @ k.transpose(-1, -2)) / D**0.5 + torch.zeros(5, 5)
        weights = nn.functional.dropout(scores.softmax(-1), 0.1, self.training)
        return self.out(weights @ v)


class Attends(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.attn, self.norm, self.mlp = Attention(how), nn.LayerNorm(D), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(self.norm(x))


@pytest.mark.parametrize("how", ["kernel", "softmax"])
def test_a_forward_tells_queries_keys_and_values_apart(how):
    model = Blocks(Attends(how)).eval()
    for role, name in ((query, "three"), (key, "one"), (value, "two")):
        assert paths(model, role, TOKENS) == [f"attn.{name}"]
    assert paths(model, query | value, TOKENS) == ["attn.two", "attn.three"]
    lines = str(surgery.anatomy(model, TOKENS)).splitlines()
    feeds = {line.split()[1]: line.split()[-1] for line in lines if line.startswith("qkv")}
    assert feeds == {
        "blocks.*.attn.one": "key",
        "blocks.*.attn.two": "value",
        "blocks.*.attn.three": "query",
    }


def test_one_projection_that_makes_all_three_is_none_of_them():
    model, x = models.tiny_vit(), models.images()
    with pytest.raises(MatchError):
        paths(model, query, x)
    assert "query, key, value" in str(surgery.anatomy(model, x))


def test_without_a_forward_queries_are_not_guessed(tmp_path):
    model = Blocks(Attends("kernel")).eval()
    with pytest.raises(RuleError, match=r"(?s)at\(query, \.\.\.\).*example=inputs"):
        paths(model, query)
    surgery.apply(model, at(query | value, append(adapter(rank=2))), example=TOKENS)
    surgery.save(model, tmp_path / "a.safetensors")
    again = Blocks(Attends("kernel")).eval()
    surgery.load(again, tmp_path / "a.safetensors", example=TOKENS)
    assert str(surgery.report(again)) == str(surgery.report(model))


# networks that modules do not show -------------------------------------------------------------


class Bare(nn.Module):
    """As wide inside as outside, the activation a function: two projections, to the tree."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(self.norm(x))))


class Flat(nn.Module):
    """Experts in matrices of two dimensions, cut up as it runs (DBRX)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4 * D, D)) for _ in range(2))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        up, down = self.up.view(2, 2 * D, D), self.down.view(2, 2 * D, D)
        made = [nn.functional.gelu(x @ up[i].T) @ down[i] * weights[..., i, None] for i in (0, 1)]
        return made[0] + made[1]


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router, self.experts = nn.LayerNorm(D), nn.Linear(D, 2), Flat()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x).softmax(-1))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm, self.moe = Attention("kernel"), nn.LayerNorm(D), Routed()
        del self.moe.norm

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.moe(self.norm(x))


@pytest.mark.parametrize(("kind", "site"), [(Bare, "(one to two)"), (Layer, "moe")])
def test_a_forward_shows_networks_that_modules_do_not(kind, site):
    model = Blocks(kind(), kind()).eval()
    with pytest.raises(
        MatchError, match=r"has no feed-forward network.*(?s:.*)With example=inputs"
    ):
        surgery.apply(model, "adapterx_ffn")
    assert paths(model, ffn, TOKENS) == [site, f"blocks.1.{site}"]
    surgery.apply(model, "adapterx_ffn", example=TOKENS)
    assert "read off a forward" in str(surgery.report(model))


def test_a_model_that_is_one_network_is_its_own_block():
    class Alone(Bare):
        def __init__(self) -> None:
            super().__init__()
            del self.norm

        def forward(self, x: Tensor) -> Tensor:
            return x + self.two(torch.relu(self.one(x)))

    model = Alone().eval()
    assert paths(model, ffn, TOKENS) == [""]
    assert surgery.anatomy(model, TOKENS).rows[-1][:3] == ("ffn", "", 1)
    surgery.apply(model, "adapterx_ffn", example=TOKENS)


def test_a_forward_adds_what_structure_does_not_show():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Bare(), Attends("kernel")

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    assert paths(Blocks(Both()), ffn) == ["b.mlp"]
    assert paths(Blocks(Both()), ffn, TOKENS) == ["a.(one to two)", "b.mlp"]


class Modulated(nn.Module):
    """SD3: two streams, the norms of both registered first; conditions shift and scale each."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mlp_a, self.mlp_b, self.ada = Mlp(), Mlp(), nn.Linear(D, 4 * D)

    def forward(self, a: Tensor, b: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        c, d, e, f = self.ada(condition)[:, None].chunk(4, -1)
        a = a + self.mlp_a(self.norm_a(a) * (1 + c) + d)
        return a, b + self.mlp_b(self.norm_b(b) * (1 + e) + f)


class TwoStreams(Blocks):
    def forward(self, a: Tensor, b: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            a, b = block(a, b, condition)
        return torch.cat([a, b], 1)


def test_what_is_scaled_and_shifted_by_conditions_is_still_of_its_norm() -> None:
    model = TwoStreams(Modulated(), Modulated())
    example = (TOKENS, torch.randn(2, 3, D), torch.randn(2, D))
    fed = paths(model, nearest(norm, before=ffn), example)
    assert fed == ["norm_a", "norm_b", "blocks.1.norm_a", "blocks.1.norm_b"]


class Turned(nn.Module):
    """Samples and tokens change places before the network, and again behind it (SpeechBrain's)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(32), nn.MultiheadAttention(32, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(32)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.net(self.norm2(x).transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("tokens", [5, 2], ids=["oblong", "square"])
def test_a_span_does_not_begin_where_samples_and_tokens_lie_otherwise(tokens: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Turned(), Turned(), nn.Linear(32, 3)).eval()
    x = torch.randn(2, tokens, 32)
    surgery.apply(model, "adaptformer", example=x)
    laws.stir_parts(model)
    moved = model(x)[:1] - model(torch.cat([x[:1], torch.randn_like(x[1:])]))[:1]
    torch.testing.assert_close(moved, torch.zeros_like(moved))  # no sample hears another
    places = list(surgery.plan(nn.Sequential(Turned()).eval(), "adaptformer", example=x).sites)
    assert [site.path for site in places] == ["0.net"]


def test_a_square_example_of_a_plain_model_begins_at_its_norm() -> None:
    model = models.tiny_vit()
    tokens = model.pos_embed.shape[1]
    (site, *_) = surgery.plan(model, "adaptformer", example=torch.randn(tokens, 3, 16, 16)).sites
    assert site.path == "blocks.0.(norm2 to mlp)"
