"""Attention is what mixes tokens by data, however it is written; and what does not is none."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from torch import Tensor, einsum, nn
from torch.nn import functional as F

from surgery.structure.anatomy import operands, roles_of
from surgery.structure.dataflow import attach_dataflow
from surgery.structure.module_tree import Tree
from tests.structure.renaming import originals, renamed

D, HEADS = 32, 4


def heads(x: Tensor) -> Tensor:
    return rearrange(x, "b n (h d) -> b h n d", h=HEADS)


def joined(x: Tensor) -> Tensor:
    return rearrange(x, "b h n d -> b n (h d)")


class Apart(nn.Module):
    """Queries, keys and values by three projections; `mix` says what is done with them."""

    def __init__(self, mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.out, self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(4))
        self.mix = mix

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        mixed = self.mix(heads(self.q(x)), heads(self.k(context)), heads(self.v(context)))
        return self.out(joined(mixed))


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / 3).softmax(-1) @ v


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = einsum("b h i d, b h j d -> b h i j", q, k)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return einsum("b h i j, b h j d -> b h i d", weights / weights.sum(-1, keepdim=True), v)


def elementwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)
    return (scores.softmax(-1).unsqueeze(-1) * v.unsqueeze(-3)).sum(-2)


def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    context = einsum("b h n d, b h n e -> b h d e", k, v)
    return einsum("b h n d, b h d e -> b h n e", q, context) / (q * k.sum(-2, keepdim=True)).sum(
        -1, keepdim=True
    )


def efficient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    context = k.softmax(-2).transpose(-1, -2) @ v
    return q.softmax(-1) @ context


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.relu(q) @ (torch.relu(k).transpose(-1, -2) @ v)


def cosine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)) @ v


def channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q.transpose(-1, -2) @ k).softmax(-1) @ v.transpose(-1, -2)).transpose(-1, -2)


def nystrom(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a, b = q[..., ::3, :], k[..., ::3, :]
    first, middle, last = (
        (x @ y.transpose(-1, -2)).softmax(-1) for x, y in ((q, b), (a, b), (a, k))
    )
    return (first @ torch.linalg.pinv(middle)) @ (last @ v)


def agents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    agent = q[..., ::3, :]
    gathered = (agent @ k.transpose(-1, -2)).softmax(-1) @ v
    return (q @ agent.transpose(-1, -2)).softmax(-1) @ gathered


def rotary(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    angle = torch.arange(q.shape[-2])[:, None] / 10 ** torch.arange(q.shape[-1])

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    return softmax(turned(q), turned(k), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def decayed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = torch.arange(q.shape[-2])
    return (q @ k.transpose(-1, -2) * 0.9 ** (n[:, None] - n).clamp(min=0)) @ v


def turning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rotary positions as complex numbers (Llama as Meta writes it)."""
    angle = torch.arange(q.shape[-2])[:, None] / 10 ** torch.arange(q.shape[-1] // 2)
    turn = torch.polar(torch.ones_like(angle), angle)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(rearrange(x, "... (d two) -> ... d two", two=2).contiguous())
        return rearrange(torch.view_as_real(pairs * turn), "... d two -> ... (d two)")

    return softmax(turned(q), turned(k), v)


def correlation(q: Tensor, k: Tensor) -> Tensor:
    n = q.shape[-2]
    spectrum = torch.fft.rfft(q, n=n, dim=-2) * torch.conj(torch.fft.rfft(k, n=n, dim=-2))
    return torch.fft.irfft(spectrum, n=n, dim=-2)


def lags(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Autoformer: how like itself a series is some steps later weighs it, put off so long."""
    scores, steps = torch.topk(correlation(q, k).mean((1, -1)), 2, dim=-1)
    weights, twice = scores.softmax(-1), torch.cat([v, v], -2)
    made = torch.zeros_like(v)
    for i in range(2):
        first = torch.arange(v.shape[-2]) + steps[:, i, None]
        late = torch.gather(twice, -2, first[:, None, :, None].expand_as(v))
        made += late * weights[:, i, None, None, None]
    return made


def lags_of_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in training, one lag for all samples; sizes averaged one after another."""
    scores = correlation(q, k).mean(1).mean(-1)
    steps = torch.topk(scores.mean(0), 2)[1]
    weights = torch.stack([scores[:, step] for step in steps], -1).softmax(-1)
    late = [
        v.roll(-int(step), -2) * weights[:, i, None, None, None] for i, step in enumerate(steps)
    ]
    return sum(late[1:], late[0])


MIXES = (
    softmax, written_out, elementwise, kernel, efficient, keys_first, cosine, channels, nystrom,
    agents, rotary, sdpa, decayed, turning, lags, lags_of_all,
)  # fmt: skip


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(D), nn.LayerNorm(D), attention
        self.ffn = nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, D))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


def model(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(8, D), Block(make()), Block(make()), nn.Linear(D, 3)).eval()


X = torch.randn(2, 6, 8)


def found(built: nn.Module, x: Tensor = X) -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """The roles, and what each projection makes, by the names before renaming."""
    tree = Tree(renamed(built))
    attach_dataflow(tree, x)
    roles = {role: originals(sites) for role, sites in roles_of(tree).items()}
    words = operands(tree)
    return roles, dict(zip(originals(words), words.values(), strict=True))


@pytest.mark.parametrize("mix", MIXES)
def test_what_enters_and_what_comes_after_is_found(mix) -> None:
    roles, words = found(model(lambda: Apart(mix)))
    assert roles["attn"] == ["1.attention", "2.attention"]
    assert roles["proj"] == ["1.attention.out", "2.attention.out"]
    assert set(words) == {f"{i}.attention.{name}" for i in (1, 2) for name in "qkv"}
    if mix not in (
        nystrom,
        agents,
    ):  # whose product of kernels comes before keys are mixed with values
        assert words["1.attention.q"] == {"query"}
        assert "key" in words["1.attention.k"]
        assert words["1.attention.v"] == {"value"}


class Relative(Apart):
    """Transformer-XL: positions are projected too; a table is multiplied with queries."""

    def __init__(self, table: bool) -> None:
        super().__init__(softmax)
        self.position = None if table else nn.Linear(D, D)
        self.table = nn.Parameter(torch.randn(6, D // HEADS)) if table else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        if self.position is not None:
            place = heads(self.position(torch.ones_like(x)))
            biases = q @ place.transpose(-1, -2)
        else:
            biases = q @ self.table.t()
        return self.out(joined((q @ k.transpose(-1, -2) + biases).softmax(-1) @ v))


def test_a_projection_of_positions_enters_and_a_table_does_not() -> None:
    roles, _ = found(model(lambda: Relative(table=False)))
    names = [path.rpartition(".")[2] for path in roles["qkv"]]
    assert names == ["q", "k", "v", "position"] * 2
    roles, _ = found(model(lambda: Relative(table=True)))
    assert [path.rpartition(".")[2] for path in roles["qkv"]] == ["q", "k", "v"] * 2
    assert roles["attn"] == ["1.attention", "2.attention"]


class Talking(Apart):
    """Talking heads, re-attention: heads are mixed before the softmax, and after it."""

    def __init__(self) -> None:
        super().__init__(softmax)
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Conv2d(HEADS, HEADS, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        scores = self.before((q @ k.transpose(-1, -2)).movedim(1, -1)).movedim(-1, 1)
        return self.out(joined(self.after(scores.softmax(-1)) @ v))


class LowRank(nn.Module):
    """DeepSeek's: queries, keys and values come of narrower ones."""

    def __init__(self) -> None:
        super().__init__()
        self.q_down, self.q_up = nn.Linear(D, 16), nn.Linear(16, D)
        self.kv_down, self.kv_up = nn.Linear(D, 16), nn.Linear(16, 2 * D)
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv_up(self.norm(self.kv_down(x))).chunk(2, -1)
        return self.out(joined(softmax(heads(self.q_up(self.q_down(x))), heads(k), heads(v))))


class Gated(Apart):
    """The result is gated, and normed, before it is projected (RetNet)."""

    def __init__(self) -> None:
        super().__init__(decayed)
        self.gate, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(heads(self.q(x)), heads(self.k(x)), heads(self.v(x)))
        return self.out(self.norm(joined(mixed)) * F.silu(self.gate(x)))


class Outlook(nn.Module):
    """VOLO: one projection makes the weights, another what they weigh."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.value, self.out = nn.Linear(D, 6), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.weights(x).softmax(-1) @ self.value(x))


class OnMaps(nn.Module):
    """1x1 convolutions, a depthwise one behind them, and attention among channels (Restormer)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv1d(D, 3 * D, 1), nn.Conv1d(D, D, 1)
        self.depthwise = nn.Conv1d(3 * D, 3 * D, 3, padding=1, groups=3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.depthwise(self.qkv(x.transpose(1, 2))).chunk(3, 1)
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return self.out(weights @ v).transpose(1, 2)


class Raw(nn.Module):
    """Queries, keys and values by a matrix of the module's own (open_clip)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(3 * D, D)), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(joined(softmax(*map(heads, F.linear(x, self.weight).chunk(3, -1)))))


class Positional(Apart):
    """DETR: positions are added to what makes queries and keys."""

    def __init__(self) -> None:
        super().__init__(softmax)
        self.place = nn.Parameter(torch.randn(6, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k = heads(self.q(x + self.place)), heads(self.k(x + self.place))
        return self.out(joined(softmax(q, k, heads(self.v(x)))))


OTHERS: dict[type[nn.Module], tuple[str, str]] = {
    Talking: ("q k v", "out"),
    LowRank: ("q_down q_up kv_down kv_up", "out"),
    Gated: ("q k v", "out"),
    Outlook: ("weights value", "out"),
    OnMaps: ("qkv", "out"),
    Raw: ("", "out"),
    Positional: ("q k v", "out"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_ways_to_attend(kind: type[nn.Module]) -> None:
    roles, _ = found(model(kind))
    qkv, proj = OTHERS[kind]
    assert roles["attn"] == ["1.attention", "2.attention"]
    assert set(roles["qkv"]) == {f"{i}.attention.{n}" for i in (1, 2) for n in qkv.split()}
    assert set(roles["proj"]) == {f"{i}.attention.{n}" for i in (1, 2) for n in proj.split()}
    assert len(roles["ffn"]) == 2


class Joint(nn.Module):
    """Two streams attend as one, each by its own projections (SD3, Flux)."""

    def __init__(self) -> None:
        super().__init__()
        self.out_a, self.out_b = nn.Linear(D, D), nn.Linear(D, D)
        self.qkv_a, self.qkv_b = nn.Linear(D, 3 * D), nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, :4], x[:, 4:]
        both = (torch.cat(p, 1) for p in zip(*(
            m.chunk(3, -1) for m in (self.qkv_a(a), self.qkv_b(b))), strict=True))  # fmt: skip
        mixed = joined(sdpa(*map(heads, both)))
        return torch.cat([self.out_a(mixed[:, :4]), self.out_b(mixed[:, 4:])], 1)


def test_joint_attention_has_two_outputs() -> None:
    roles, _ = found(model(Joint))
    assert roles["attn"] == ["1.attention", "2.attention"]
    assert set(roles["proj"]) == {f"{i}.attention.out_{n}" for i in (1, 2) for n in "ab"}
    assert set(roles["qkv"]) == {f"{i}.attention.qkv_{n}" for i in (1, 2) for n in "ab"}


class Several(nn.Module):
    """Two attentions, one after the other, flat in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.q1, self.k1, self.v1, self.o1 = (nn.Linear(D, D) for _ in range(4))
        self.q2, self.k2, self.v2, self.o2 = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o1(joined(softmax(*(heads(f(x)) for f in (self.q1, self.k1, self.v1)))))
        return self.o2(joined(softmax(*(heads(f(x)) for f in (self.q2, self.k2, self.v2)))))


def test_several_in_one_module_are_several() -> None:
    roles, _ = found(model(Several))
    one, two = "1.attention.(q1 to o1)", "1.attention.(q2 to o2)"
    assert roles["attn"][:2] == [one, two]
    assert len(roles["attn"]) == 4
    assert len(roles["qkv"]) == 12
    assert len(roles["proj"]) == 4


# what mixes no tokens by data ----------------------------------------------------------------


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(D, 2 * D, 1), nn.Conv1d(D, D, 1)
        self.middle = nn.Conv1d(D, D, 5, padding=2, groups=D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(F.glu(self.up(x.transpose(1, 2)), 1))
        return self.down(F.silu(y)).transpose(1, 2)


class Gate(nn.Module):
    """Squeeze and excite: two layers weigh channels by the mean of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D // 2), nn.Linear(D // 2, D)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.second(torch.relu(self.first(x.mean(1, keepdim=True)))).sigmoid()


class Selective(nn.Module):
    """SKNet: a softmax over branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.weigh = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2 * D)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.a(x), self.b(x)], -1)
        weights = self.weigh(both.sum(-1).mean(1, keepdim=True)).unflatten(-1, (D, 2))
        return (both * weights.softmax(-1)).sum(-1)


class Context(nn.Module):
    """GCNet: one score a position weighs what comes, unprojected."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.change = nn.Linear(D, 1), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        context = self.score(x).softmax(1).transpose(1, 2) @ x
        return x + self.change(context)


class Gram(nn.Module):
    """Products of features with features, once: no weights of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(D, 8), nn.Linear(D, 8), nn.Linear(64, D)

    def forward(self, x: Tensor) -> Tensor:
        gram = self.a(x).transpose(1, 2) @ self.b(x)
        return self.out(gram.flatten(1))[:, None] * math.pi + x


class Experts(nn.Module):
    """A router's softmax weighs what experts give."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 64), nn.GELU(), nn.Linear(64, D)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return einsum(
            "b n e, b n e d -> b n d", weights, torch.stack([f(x) for f in self.experts], 2)
        )


@pytest.mark.parametrize("kind", [Convolutions, Gate, Selective, Context, Gram, Experts])
def test_what_mixes_no_tokens_by_data_is_no_attention(kind: type[nn.Module]) -> None:
    class Both(Block):
        def __init__(self) -> None:
            super().__init__(Apart(softmax))
            self.other = kind()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.other(x))

    built = nn.Sequential(nn.Linear(8, D), Both(), Both(), nn.Linear(D, 3)).eval()
    roles, _ = found(built)
    assert roles["attn"] == ["1.attention", "2.attention"]
    assert not any(".other." in path for path in (*roles["qkv"], *roles["proj"]))


def test_a_query_that_nothing_projects_is_not_what_embeds() -> None:
    class Unprojected(Apart):
        def forward(self, x: Tensor) -> Tensor:
            return self.out(joined(softmax(heads(x), heads(self.k(x)), heads(self.v(x)))))

    roles, _ = found(model(lambda: Unprojected(softmax)))
    assert set(roles["qkv"]) == {f"{i}.attention.{n}" for i in (1, 2) for n in "kv"}
    assert roles["attn"] == ["1.attention", "2.attention"]


def test_keys_and_values_of_another_block_are_shared() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, D)
            self.blocks = nn.ModuleList(Block(Apart(softmax)) for _ in range(2))
            del self.blocks[1].attention.k, self.blocks[1].attention.v

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.blocks
            x = self.embed(x)
            y = first.norm1(x)
            k, v = heads(first.attention.k(y)), heads(first.attention.v(y))
            for block in (first, second):
                q = heads(block.attention.q(block.norm1(x)))
                x = x + block.attention.out(joined(softmax(q, k, v)))
                x = x + block.ffn(block.norm2(x))
            return x

    roles, _ = found(Shares().eval())
    names = {"0": "qkv", "1": "q"}
    asked = {f"blocks.{i}.attention.{n}" for i, each in names.items() for n in each}
    assert set(roles["qkv"]) == asked
    assert set(roles["proj"]) == {f"blocks.{i}.attention.out" for i in (0, 1)}


class Vectors(nn.Module):
    """Point Transformer: a network makes weights of the difference of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.weigh = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weigh(self.q(x).unsqueeze(2) - self.k(x).unsqueeze(1)).softmax(2)
        return self.out((weights * self.v(x).unsqueeze(1)).sum(2))


def test_weights_may_be_vectors_that_a_network_makes() -> None:
    roles, words = found(model(Vectors))
    assert roles["attn"] == ["1.attention", "2.attention"]
    assert {path.rpartition(".")[2] for path in roles["qkv"]} == {"q", "k", "v"}
    assert words["1.attention.v"] == {"value"}


class Indexer(nn.Module):
    """DeepSeek: scores choose which tokens an attention reads, and mix none themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.weigh = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.relu(heads(self.a(x)) @ heads(self.b(x)).transpose(-1, -2))
        weighed = self.weigh(x)[..., None, :] @ scores.transpose(1, 2)
        return weighed.squeeze(-2).topk(3, -1).indices


class Chosen(Apart):
    def __init__(self) -> None:
        super().__init__(softmax)
        self.indexer = Indexer()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        mask = torch.zeros(len(x), 1, 6, 6).scatter(-1, self.indexer(x)[:, None], 1.0)
        scores = (q @ k.transpose(-1, -2)).masked_fill(mask == 0, -math.inf)
        return self.out(joined(scores.softmax(-1) @ v))


def test_what_chooses_tokens_is_no_attention() -> None:
    roles, _ = found(model(Chosen))
    assert roles["attn"] == ["1.attention", "2.attention"]
    assert set(roles["qkv"]) == {f"{i}.attention.{n}" for i in (1, 2) for n in "qkv"}


class Pooled(nn.Module):
    """Enformer: a softmax pools what comes, and attention follows."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh, self.inner = nn.Linear(D, D, bias=False), Apart(softmax)

    def forward(self, x: Tensor) -> Tensor:
        pairs = rearrange(x, "b (n p) d -> b n p d", p=2)
        pooled = (pairs * self.weigh(pairs).softmax(-2)).sum(-2)
        return self.inner(pooled).repeat_interleave(2, 1)


def test_what_a_softmax_has_pooled_is_no_weight_of_what_follows() -> None:
    roles, _ = found(model(Pooled))
    assert roles["attn"] == ["1.attention.inner", "2.attention.inner"]
    assert {path.rpartition(".")[2] for path in roles["qkv"]} == {"q", "k", "v"}


class Mixed(nn.Module):
    """Gemma 3n's AltUp: streams of features are mixed by numbers that they make themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.inner = nn.Linear(D, 9), Apart(softmax)

    def forward(self, x: Tensor) -> Tensor:
        streams = torch.stack([x, 2 * x, 3 * x], -1)
        streams = streams @ self.numbers(x).unflatten(-1, (3, 3)) + streams
        return (
            self.inner(streams[..., 0]) + (streams @ self.numbers(x).unflatten(-1, (3, 3)))[..., 1]
        )


def test_mixing_streams_is_no_attention() -> None:
    roles, _ = found(model(Mixed))
    assert roles["attn"] == ["1.attention.inner", "2.attention.inner"]
    assert {path.rpartition(".")[2] for path in roles["qkv"]} == {"q", "k", "v"}


class Biased(nn.Module):
    """T5, Graphormer: every block adds the same positions, or pairs, to its scores."""

    def __init__(self, table: bool) -> None:
        super().__init__()
        self.embed, self.near = nn.Linear(8, D), nn.Embedding(11, HEADS) if table else None
        self.pair = (
            None if table else nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, HEADS))
        )
        self.blocks = nn.ModuleList(Block(Apart(softmax)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.near is not None:
            i = torch.arange(x.shape[1])
            bias = rearrange(self.near(i - i[:, None] + 5), "i j h -> h i j")
        else:
            assert self.pair is not None
            bias = rearrange(self.pair(x[:, :, None] - x[:, None]), "b i j h -> b h i j")
        x = self.embed(x)
        for block in self.blocks:
            y, a = block.norm1(x), block.attention
            scores = heads(a.q(y)) @ heads(a.k(y)).transpose(-1, -2) + bias
            x = x + a.out(joined(scores.softmax(-1) @ heads(a.v(y))))
            x = x + block.ffn(block.norm2(x))
        return x


@pytest.mark.parametrize("table", [True, False])
def test_scores_keep_what_they_are_made_of_with_one_bias_for_all_blocks(table: bool) -> None:
    roles, words = found(Biased(table).eval())
    assert set(roles["qkv"]) == {f"blocks.{i}.attention.{n}" for i in range(3) for n in "qkv"}
    assert words["blocks.2.attention.q"] == {"query"}


def test_queries_beside_what_they_gather_are_queries() -> None:
    """Set Transformer: the residual sum is of queries, projected, and not of what comes in."""

    class Gathers(Apart):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
            x = joined(q + softmax(q, k, v))
            return x + torch.relu(self.out(x))

    roles, words = found(model(lambda: Gathers(softmax)))
    assert set(roles["qkv"]) == {f"{i}.attention.{n}" for i in (1, 2) for n in "qkv"}
    assert words["1.attention.q"] == {"query"}
