"""What one forward tells: what feeds what, in which order, and where the feed-forwards are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery._preserve import fingerprint
from surgery.errors import OperationError
from surgery.structure.dataflow import norm_before
from surgery.structure.ffn_traced import TracedFFN, traced_ffns
from surgery.structure.trace import Trace, trace, upstream
from tests import models

D, H = 16, 40
TOKENS = (2, 5, D)
IMAGE = (2, D, 4, 4)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Mlp(nn.Module):
    def __init__(self, width: int = D, hidden: int = H) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.gate = nn.Linear(H, D), nn.Linear(D, H), nn.Linear(D, H)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * x)


class Pre(nn.Module):
    """Pre-norm; the norms are registered last, and in the other order than they run."""

    def __init__(self, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.mlp, self.attn = mlp or Mlp(), Attention()
        self.before_mlp, self.before_attn = nn.LayerNorm(D), nn.LayerNorm(D)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.before_attn(x)))
        return x + self.drop(self.mlp(self.before_mlp(x)))


class Post(nn.Module):
    """Post-norm, BERT's split form, written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm1, self.norm2 = Attention(), nn.LayerNorm(D), nn.LayerNorm(D)
        self.intermediate, self.output = nn.ModuleDict(), nn.ModuleDict()
        self.intermediate["dense"], self.output["dense"] = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.attn(x)
        x = self.norm1(x)
        h = F.gelu(self.intermediate["dense"](x)).view(-1, H)
        return self.norm2(self.output["dense"](h).view(x.shape) + x)


class ResPost(nn.Module):
    """Swin V2: each branch is normed after it, so no norm feeds the FFN but through a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm1, self.mlp, self.norm2 = (
            Attention(),
            nn.LayerNorm(D),
            Mlp(),
            nn.LayerNorm(D),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class Side(nn.Module):
    """Attention and FFN side by side behind one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.attn = nn.LayerNorm(D), Mlp(), Attention()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + (self.mlp(y) + self.attn(y))


class Fused(nn.Module):
    """One projection for attention and FFN (timm's ParallelScalingBlock)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(D), nn.Linear(D, 3 * D + H)
        self.proj, self.down = nn.Linear(D, D), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        h, q, k, v = self.up(self.norm(x)).split([H, D, D, D], -1)
        y = self.proj(F.scaled_dot_product_attention(q, k, v))
        return x + y + self.down(F.gelu(h))


class Functional(nn.Module):
    """The weights are read, the modules that hold them not called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(self.norm(x), self.up.weight, self.up.bias).relu()
        return x + h @ self.down.weight.t()


class Inside(nn.Module):
    """The residual is inside the FFN's own module, its last step a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, H), nn.Linear(H, D)
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))


class Conv(nn.Module):
    """Channels first; `spread` puts a depthwise convolution of that size between."""

    def __init__(self, spread: int = 0, out: int = D) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm2d(D), nn.Conv2d(D, H, 1), nn.Conv2d(H, out, 1)
        self.mid: nn.Module = nn.Identity()
        if spread:
            self.mid = nn.Conv2d(H, H, spread, padding=spread // 2, groups=H)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu6(self.mid(self.up(self.norm(x)))))


class LinearSpread(nn.Module):
    """PVT v2: linear, depthwise convolution, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, H), nn.Linear(H, D)
        self.mid = nn.Conv2d(H, H, 3, padding=1, groups=H)

    def forward(self, x: Tensor) -> Tensor:  # b n c, n = 16
        h = self.up(self.norm(x)).transpose(1, 2).view(-1, H, 4, 4)
        h = self.mid(h).flatten(2).transpose(1, 2)
        return x + self.down(F.gelu(h))


class Excite(nn.Module):
    """A squeeze-excite gate; `added`: a global context that is added instead."""

    def __init__(self, added: bool = False) -> None:
        super().__init__()
        self.added, self.up, self.down = added, nn.Conv2d(D, H, 1), nn.Conv2d(H, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.relu(self.up(x.mean((2, 3), keepdim=True))))
        return x + y if self.added else x + x * y.sigmoid()


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(D, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.three = nn.Conv2d(8, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.three(F.relu(self.two(F.relu(self.one(x))))))


class Mixer(nn.Module):
    """As many tokens as features: only the axis tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.tokens, self.norm2, self.channels = (
            nn.LayerNorm(D),
            Mlp(),
            nn.LayerNorm(D),
            Mlp(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Stacked(nn.Module):
    """Experts as 3-D parameters, all at once."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, D, 2 * H))
        self.down = nn.Parameter(torch.randn(experts, H, D))
        self.gate = nn.Linear(D, experts)

    def forward(self, x: Tensor) -> Tensor:
        gate, h = torch.einsum("bnd,edh->ebnh", x, self.up).chunk(2, -1)
        y = torch.einsum("ebnh,ehd->ebnd", F.silu(gate) * h, self.down)
        return (y * self.gate(x).softmax(-1).permute(2, 0, 1)[..., None]).sum(0)


class Looped(nn.Module):
    """Experts as modules, each on the tokens sent to it; beside them one for all tokens."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp() for _ in range(experts))
        self.shared = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        y = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            chosen = torch.arange(i, len(flat), len(self.experts), device=x.device)
            y.index_add_(0, chosen, expert(flat[chosen]))
        return y.view(x.shape) + self.shared(x)


class Sequence(nn.Sequential):
    """Some blocks, and an input for them."""

    def found(self, *sizes: int) -> list[TracedFFN]:
        return traced_ffns(trace(self, torch.randn(*(sizes or TOKENS))))


def only(block: nn.Module, *sizes: int) -> TracedFFN:
    (feed,) = Sequence(block).found(*sizes)
    return feed


def times(found: Trace) -> dict[str, int]:
    """How often each module was called, in order of their first calls."""
    return dict(Counter(found.path(call.module) for call in found.calls))


def uncalled(found: Trace) -> list[str]:
    called = {id(call.module) for call in found.calls}
    return [path for key, path in found.paths.items() if key not in called]


def functional(found: Trace) -> dict[str, list[str]]:
    """The parameters that were read while no module that holds them ran, by their owner."""
    read: dict[str, dict[str, None]] = {}
    for op in found.ops:
        for weight in (w for v in op.inputs if v.op is None for w in v.weights or ()):
            owner = weight.owner(op)
            if all(call.module is not owner for call in op.stack()):
                read.setdefault(found.path(owner), {})[weight.name] = None
    return {path: list(names) for path, names in read.items()}


def feeds(found: Trace, a: str, b: str) -> bool:
    """Whether what `a` gives reaches what `b` takes through cheap operations alone."""
    made = {value for call in found.calls_of(a) for value in call.outputs}
    given = [value for call in found.calls_of(b) for value in call.inputs]
    return any(value in made for value in upstream(given))


# facts -----------------------------------------------------------------------------------------


def test_order_is_that_of_the_calls_not_of_registration():
    found = trace(Sequence(Pre()), torch.randn(TOKENS))
    order = [path for path in times(found) if path in ("0.before_mlp", "0.before_attn", "0.mlp")]
    assert order == ["0.before_attn", "0.before_mlp", "0.mlp"]
    assert [path for path, n in times(found).items() if n > 1] == ["0.drop"]


def test_a_module_called_again_is_counted_and_one_never_called_is_named():
    class Albert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.spare = Pre(), nn.Linear(D, D)
            self.groups = nn.ModuleList([self.layer])

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.groups[0](x)
            return x

    found = trace(Albert(), torch.randn(TOKENS))
    assert times(found)["layer"] == 3
    assert uncalled(found) == ["spare", "groups"]
    assert [(feed.owner, feed.calls) for feed in traced_ffns(found)] == [("layer.mlp", 3)]


def test_a_weight_read_without_its_module_is_told():
    found = trace(Sequence(Functional()), torch.randn(TOKENS))
    assert functional(found) == {"0.up": ["weight", "bias"], "0.down": ["weight"]}
    assert uncalled(found) == ["0.up", "0.down"]


def test_the_out_projection_of_torch_attention_is_told():
    found = trace(nn.MultiheadAttention(D, 2), (torch.randn(TOKENS),) * 3)
    assert functional(found) == {"out_proj": ["weight", "bias"]}


def test_a_tied_weight_belongs_to_the_module_that_runs():
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    model[1].weight = model[0].weight
    found = trace(model, torch.randn(TOKENS))
    assert functional(found) == {}
    assert next(w.holders for v in found.ops[0].inputs for w in v.weights or ()) == list(model)


def test_feeds_passes_cheap_operations_only():
    found = trace(Sequence(Pre()), torch.randn(TOKENS))
    assert feeds(found, "0.before_mlp", "0.mlp.fc1")
    assert feeds(found, "0.attn", "0.mlp") is False  # the norm is between
    assert feeds(found, "0.attn", "0.before_mlp")  # dropout and a residual sum
    assert feeds(found, "0.before_attn", "0.before_mlp") is False
    assert feeds(found, "0.mlp", "0.attn") is False


def test_a_gate_is_not_cheap():
    found = trace(Sequence(Gated()), torch.randn(TOKENS))
    assert feeds(found, "0.up", "0.down") is False


def test_what_a_hook_does_before_a_module_is_inside_it():
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    model[1].register_forward_pre_hook(lambda module, args: (args[0].tanh(),))
    found = trace(model, torch.randn(TOKENS))
    (tanh,) = [op for op in found.ops if op.name == "tanh"]
    assert [found.path(call.module) for call in tanh.stack()] == ["1", ""]
    assert feeds(found, "0", "1")


def test_feeds_takes_one_value_given_three_times():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(D), nn.MultiheadAttention(D, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.attn(x, x, x, need_weights=False)[0]

    found = trace(Own(), torch.randn(TOKENS))
    assert feeds(found, "norm", "attn")
    assert feeds(found, "attn", "norm") is False


def test_feeds_sees_what_is_written_into_a_view():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            whole = torch.zeros_like(x)
            early = whole + 0
            whole.view(-1, D)[3:].add_(self.a(x).view(-1, D)[3:])
            return self.b(whole) + self.c(early)

    found = trace(Writes(), torch.randn(TOKENS))
    assert feeds(found, "a", "b")
    assert feeds(found, "a", "c") is False


def test_keyword_inputs_and_dicts():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, D), Mlp()

        def forward(self, *, tokens: Tensor) -> dict[str, Tensor]:
            return {"y": self.out(x=self.words(tokens))}

    found = trace(Words(), {"tokens": torch.zeros(2, 3, dtype=torch.long)})
    assert feeds(found, "words", "out.fc1")
    assert feeds(found, "words", "out.fc2") is False


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_random_numbers_are_as_they_were(training):
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.norm = Pre(), nn.BatchNorm1d(5)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            assert not self.norm.training
            assert not torch.backends.mha.get_fastpath_enabled()
            self.count += 1
            return self.norm(self.block(x)) + torch.rand(1)

    model = Noisy().train(training)
    model.block.attn.eval()
    before = fingerprint(model)
    trace(model, torch.randn(TOKENS, generator=torch.Generator()))
    assert fingerprint(model) == before
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_model_is_as_it_was_after_an_error():
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Pre()

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError(self.block(x).shape)

    model = Fails().train()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="5"):
        trace(model, torch.zeros(TOKENS))
    assert fingerprint(model) == before
    assert torch.backends.mha.get_fastpath_enabled()
    assert not torch.overrides._get_current_function_mode_stack()


def test_the_meta_device_tells_the_same():
    model = Sequence(Pre(), Post(), Pre(Looped()))
    real = model.found()
    with torch.device("meta"):
        found = trace(model.to("meta"), torch.randn(TOKENS))
    assert traced_ffns(found) == real
    assert len(real) == 4


# feed-forward networks -------------------------------------------------------------------------

CASES: list[tuple[nn.Module, tuple[int, ...], dict[str, Any]]] = [
    (Pre(), TOKENS, {"owner": "0.mlp", "entry": "0.mlp.fc1", "exit": "0.mlp.fc2", "gated": False}),
    (Pre(), TOKENS, {"norm": "0.before_mlp", "direct": True, "inside": False, "axis": -1}),
    (Pre(Gated()), TOKENS, {"entry": "0.mlp.gate", "exit": "0.mlp.down", "gated": True}),
    (Pre(Packed()), TOKENS, {"entry": "0.mlp.up", "exit": "0.mlp.down", "gated": True}),
    (Post(), TOKENS, {"entry": "0.intermediate.dense", "exit": "0.output.dense", "owner": "0"}),
    (Post(), TOKENS, {"norm": "0.norm1", "direct": True, "inside": True}),
    (ResPost(), TOKENS, {"norm": "0.norm1", "direct": False, "owner": "0.mlp"}),
    (Side(), TOKENS, {"norm": "0.norm", "direct": True, "owner": "0.mlp"}),
    (Fused(), TOKENS, {"kind": "fused", "entry": "0.up", "exit": "0.down"}),
    (Functional(), TOKENS, {"entry": "0.up", "exit": "0.down", "norm": "0.norm"}),
    (Inside(), TOKENS, {"owner": "0", "inside": True, "norm": "0.norm"}),
    (Conv(), IMAGE, {"entry": "0.up", "exit": "0.down", "axis": 1, "norm": "0.norm"}),
    (Conv(3), IMAGE, {"kind": "inverted bottleneck"}),
    (Conv(1), IMAGE, {"kind": "ffn"}),  # a depthwise scale carries nothing across positions
    (LinearSpread(), (2, 16, D), {"entry": "0.up", "exit": "0.down", "axis": -1}),
    (Pre(Stacked()), TOKENS, {"owner": "0.mlp", "entry": "0.mlp", "exit": "0.mlp", "gated": True}),
]


@pytest.mark.parametrize(("block", "sizes", "told"), CASES)
def test_a_feed_forward_is_found(block, sizes, told):
    feed = only(block, *sizes)
    told = {"kind": "ffn", "width": D, "hidden": H, "calls": 1, **told}
    assert {name: getattr(feed, name) for name in told} == told


@pytest.mark.parametrize(
    ("block", "sizes"),
    [
        (Mlp(), TOKENS),  # added to nothing
        (Attention(), TOKENS),
        (Excite(), IMAGE),
        (Excite(added=True), IMAGE),
        (nn.Sequential(Bottleneck(), Bottleneck()), IMAGE),
        (Conv(out=1), IMAGE),
        (Pre(nn.Sequential(nn.Linear(D, H), nn.Linear(H, D))), TOKENS),  # no nonlinearity
        (Pre(nn.Sequential(nn.Linear(D, H), nn.Softmax(-1), nn.Linear(H, D))), TOKENS),
        (Pre(nn.Sequential(nn.Linear(D, H), nn.GELU(), nn.AvgPool1d(1), nn.Linear(H, D))), TOKENS),
    ],
)
def test_what_only_looks_like_one_is_not(block, sizes):
    assert Sequence(block).found(*sizes) == []


def test_a_gate_of_two_sources_is_not_one():
    class Cross(Pre):
        def forward(self, x: Tensor) -> Tensor:
            gate = F.silu(self.mlp.gate(self.before_attn(x)))
            return x + self.mlp.down(gate * self.mlp.up(self.before_mlp(x)))

    assert Sequence(Cross(Gated())).found() == []


def test_a_stem_that_the_blocks_build_upon_is_not_one():
    assert [f.owner for f in Sequence(Mlp(), Pre()).found()] == ["1.mlp"]


def test_a_mixer_of_tokens_is_told_by_its_axis_alone():
    feeds = Sequence(Mixer()).found(2, D, D)
    assert [(f.owner, f.kind) for f in feeds] == [("0.tokens", "tokens"), ("0.channels", "ffn")]


def test_experts_side_by_side_are_one_and_the_shared_one_is_another():
    feeds = Sequence(Pre(Looped())).found()
    assert [(f.owner, f.entry, f.exit) for f in feeds] == [
        ("0.mlp.experts", "0.mlp.experts.*.fc1", "0.mlp.experts.*.fc2"),
        ("0.mlp.shared", "0.mlp.shared.fc1", "0.mlp.shared.fc2"),
    ]
    assert [f.norm for f in feeds] == ["0.before_mlp"] * 2


def test_chunks_are_calls():
    class Chunked(Pre):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.cat([self.mlp(part) for part in self.before_mlp(x).split(2, 1)], 1)

    assert only(Chunked(), 2, 6, D).calls == 3


def test_layers_one_after_the_other_are_not_experts():
    assert [f.owner for f in Sequence(Pre(), Pre()).found()] == ["0.mlp", "1.mlp"]


def test_of_norms_behind_sums_the_last_that_ran_is_nearest():
    feeds = Sequence(nn.LayerNorm(D), ResPost(), ResPost()).found()
    assert [(f.norm, f.direct) for f in feeds] == [("1.norm1", False), ("2.norm1", False)]


def test_a_constant_makes_no_residual_sum():
    class Offset(Pre):
        def forward(self, x: Tensor) -> Tensor:
            y = self.before_mlp(x)
            return x + self.mlp(y + torch.ones_like(x))

    assert only(Offset()).direct


def test_a_norm_before_any_value():
    found = trace(Sequence(Pre()), torch.randn(TOKENS))
    call = found.calls_of("0.attn.proj")[0]
    assert norm_before(found, call.inputs) == (None, False)
    assert norm_before(found, found.calls_of("0.attn")[0].inputs) == ("0.before_attn", True)


@pytest.mark.parametrize("first", [True, False])
def test_torch_layers_run_no_kernel_that_hides_them(first):
    model = models.encoder(norm_first=first).eval().requires_grad_(False)
    found = trace(model, torch.randn(2, 5, 24))
    feeds = traced_ffns(found)
    assert [(f.entry, f.exit) for f in feeds] == [
        (f"layers.{i}.linear1", f"layers.{i}.linear2") for i in range(2)
    ]
    assert [f.norm for f in feeds] == [f"layers.{i}.norm{1 + first}" for i in range(2)]
    assert set(functional(found)) == {f"layers.{i}.self_attn.out_proj" for i in range(2)}


# models of others ------------------------------------------------------------------------------


def told(model: nn.Module, example: Any) -> set[tuple[str, str, str, str, bool]]:
    feeds = traced_ffns(trace(model, example))
    assert feeds
    blocks = {(f.owner, f.entry, f.exit, f.norm or "", f.gated) for f in feeds if ".1" in f.owner}
    return {(a, b.removeprefix(a), c.removeprefix(a), d, e) for a, b, c, d, e in blocks}


def test_timm_vit():
    found = told(models.tiny_vit(), models.images())
    assert found == {("blocks.1.mlp", ".fc1", ".fc2", "blocks.1.norm2", False)}


def test_timm_swin():
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2)
    )
    feeds = traced_ffns(trace(model, models.images(size=32)))
    assert [(f.owner, f.norm) for f in feeds] == [
        (f"layers.{i}.blocks.{j}.mlp", f"layers.{i}.blocks.{j}.norm2")
        for i in range(2)
        for j in range(2)
    ]


@pytest.mark.parametrize("conv", [True, False])
def test_timm_convnext(conv):
    from timm.models.convnext import ConvNeXt

    model = ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), conv_mlp=conv)
    feeds = traced_ffns(trace(model, models.images(size=64)))
    assert [(f.owner, f.norm) for f in feeds] == [
        (f"stages.{i}.blocks.0.mlp", f"stages.{i}.blocks.0.norm") for i in range(4)
    ]
    assert {f.axis for f in feeds} == {1 if conv else -1}


def test_hf_bert():
    owner = "bert.encoder.layer.1"
    norm = f"{owner}.attention.output.LayerNorm"
    found = told(models.hf_bert(), models.words_in())
    assert found == {(owner, ".intermediate.dense", ".output.dense", norm, False)}


def test_hf_llama():
    norm = "model.layers.1.post_attention_layernorm"
    found = told(models.hf_llama(), models.words_in())
    assert found == {("model.layers.1.mlp", ".gate_proj", ".down_proj", norm, True)}


def test_hf_gpt2():
    found = told(models.hf_gpt2(), models.words_in())
    assert found == {("transformer.h.1.mlp", ".c_fc", ".c_proj", "transformer.h.1.ln_2", False)}


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
def test_hf_mixtral(how):
    from transformers import MixtralConfig, MixtralModel

    config = MixtralConfig(
        **models.hf_sizes(), vocab_size=32, num_key_value_heads=3, num_local_experts=4
    )
    model = MixtralModel(config).eval()
    model.set_experts_implementation(how)
    norm = "layers.1.post_attention_layernorm"
    found = told(model, models.words_in())
    assert found == {("layers.1.mlp.experts", "", "", norm, True)}
    assert {f.calls for f in traced_ffns(trace(model, models.words_in()))} == {1}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_model_that_makes_nested_tensors_is_refused_by_name() -> None:
    class Nesting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            nested = torch.nested.nested_tensor([x[0], x[1][:1]])
            return torch.nested.to_padded_tensor(nested, 0.0)

    model = nn.Sequential(nn.Linear(4, 4), Nesting(), nn.Linear(4, 4)).eval()
    with pytest.raises(OperationError, match=r"1 \(Nesting\) makes or takes nested tensors"):
        trace(model, torch.ones(2, 3, 4))
