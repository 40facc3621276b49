"""Keys and values beside those of attention, against attention written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery import at, attend, attn, where
from surgery.errors import ConflictError, GraftError, RuleError
from surgery.parts import prefix
from tests.methods.reference import BACKBONES, INPUTS, close
from tests.models import encoder, hf_bert, hf_gpt2, hf_llama, images, tiny_vit, words_in

P = 3
RULES = at(attn, prefix(tokens=P))


class Attention(nn.Module):
    """Attention of (b, n, width) by what its `way` calls, heads of keys shared by several."""

    def __init__(self, way: str = "", width: int = 12, heads: int = 6, of_keys: int = 2) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width // heads * of_keys)
        self.v, self.o = nn.Linear(width, width // heads * of_keys), nn.Linear(width, width)
        self.d, self.way = width // heads, way
        self.drop, self.scales_keys = nn.Dropout(0.0), False

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            rearrange(m(x), "b n (h d) -> b h n d", d=self.d) for m in (self.q, self.k, self.v)
        )
        return q, k, v

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        if self.way == "by hand":
            r = q.shape[1] // k.shape[1]
            k, v = (repeat(t, "b h n d -> b (h r) n d", r=r) for t in (k, v))
            scores = q @ (k / self.d**0.5).mT if self.scales_keys else q @ k.mT / self.d**0.5
            if mask is not None and mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -torch.inf)
            elif mask is not None:
                scores = scores + mask
            y = self.drop(scores.softmax(-1)) @ v
        elif self.way == "over queries":
            r = q.shape[1] // k.shape[1]
            k, v = (repeat(t, "b h n d -> b (h r) n d", r=r) for t in (k, v))
            y = (k @ q.mT).softmax(-2).mT @ v
        else:
            causal = self.way == "causal"
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
        out: Tensor = self.o(rearrange(y, "b h n d -> b n (h d)"))
        return out


def by_hand(plain: Any, part: Any, x: Tensor, mask: Tensor) -> Tensor:
    """softmax(q [P_k, K]^T / sqrt(d) + mask) [P_v, V], head by head."""
    q, k, v = plain.heads(x)
    pk, pv = part.prefix.chunk(2, -1)
    answers = []
    for head in range(q.shape[1]):
        of = head * k.shape[1] // q.shape[1]
        columns = slice(of * plain.d, of * plain.d + plain.d)
        keys = torch.cat([pk[:, columns].expand(len(x), -1, -1), k[:, of]], 1)
        values = torch.cat([pv[:, columns].expand(len(x), -1, -1), v[:, of]], 1)
        scores = q[:, head] @ keys.mT / plain.d**0.5 + F.pad(mask, (P, 0))
        answers.append(scores.softmax(-1) @ values)
    out: Tensor = plain.o(torch.cat(answers, -1))
    return out


def part_of(model: nn.Module) -> Any:
    additions: Any = model.surgery
    return next(iter(additions.default.children()))


X = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NONE, CAUSAL = (
    torch.zeros(5, 5, dtype=torch.float64),
    torch.full((5, 5), -torch.inf).triu(1).double(),
)
MASKS = {
    "none": ({}, NONE, ""),
    "numbers": ({"mask": X[0] @ X[0].t()}, X[0] @ X[0].t(), ""),
    "whether": ({"mask": CAUSAL == 0}, CAUSAL, ""),
    "one row": ({"mask": (CAUSAL == 0)[3:4]}, CAUSAL[3:4], ""),
    "one column": ({"mask": X[0][:, :1]}, X[0][:, :1].expand(5, 5), ""),
    "hint": ({}, CAUSAL, "causal"),
    "by hand": ({}, NONE, "by hand"),
    "by hand, masked": ({"mask": CAUSAL == 0}, CAUSAL, "by hand"),
    "by hand, numbers": ({"mask": X[0] @ X[0].t()}, X[0] @ X[0].t(), "by hand"),
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_by_its_formula(name: str) -> None:
    given, mask, way = MASKS[name]
    torch.manual_seed(0)
    model = Attention(way).double()
    surgery.apply(model, at("", attend(prefix(tokens=P))))
    assert surgery.parameters(model)[0].shape == (P, 2 * 4)  # keys of two heads of two
    part = part_of(model)
    got, want = model(X, **given), by_hand(model, part, X, mask)
    close(got.detach(), want.detach())
    weight = torch.randn_like(got)
    (a,) = torch.autograd.grad((got * weight).sum(), part.prefix)
    (b,) = torch.autograd.grad((want * weight).sum(), part.prefix)
    close(a, b)
    surgery.revert(model)
    torch.testing.assert_close(model(X, **given), by_hand_bare(model, mask), rtol=0, atol=1e-14)


def test_keys_that_are_scaled() -> None:
    torch.manual_seed(0)
    model = Attention("by hand").double()
    model.scales_keys = True
    surgery.apply(model, at("", attend(prefix(tokens=P))))
    close(model(X).detach(), by_hand(model, part_of(model), X, NONE).detach())


class Summed(Attention):
    """Weights that are divided by their sum, or weighed by key."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        k, v = (repeat(t, "b h n d -> b (h r) n d", r=3) for t in (k, v))
        weights = (q @ k.mT).softmax(-1)
        if self.way == "sum":
            weights = weights / (weights.sum(-1, keepdim=True) + 1)
        else:
            weights = weights * torch.rand(5, dtype=x.dtype)
        return self.o(rearrange(weights @ v, "b h n d -> b n (h d)"))


@pytest.mark.parametrize("way", ["sum", "by key"])
def test_weights_of_which_more_is_made_are_refused(way: str) -> None:
    model = surgery.apply(Summed(way).double(), at("", attend(prefix(tokens=P))))
    with pytest.raises(GraftError, match="neither"):
        model(X)


def by_hand_bare(model: Any, mask: Tensor) -> Tensor:
    q, k, v = model.heads(X)
    k, v = (repeat(t, "b h n d -> b (h r) n d", r=3) for t in (k, v))
    y = (q @ k.mT / model.d**0.5 + mask).softmax(-1) @ v
    out: Tensor = model.o(rearrange(y, "b h n d -> b n (h d)"))
    return out


TORCH = {
    "self": {},
    "weights": {"need_weights": True},
    "heads": {"need_weights": True, "average_attn_weights": False},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "causal": {"attn_mask": CAUSAL.isinf(), "is_causal": True},
    "scores": {"attn_mask": X[0] @ X[0].t()},
    "each head": {"attn_mask": torch.randn(4, 5, 5, dtype=torch.float64)},
}


@pytest.mark.parametrize(
    "kinds", [{}, {"bias": False}, {"kdim": 12, "vdim": 12, "bias": True}], ids=str
)
@pytest.mark.parametrize("more", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("name", TORCH)
def test_torchs_own_attention(name: str, kinds: dict[str, Any], more: dict[str, Any]) -> None:
    """Equal to what it gives for a longer sequence, whose projections are the prefix's."""
    torch.manual_seed(1)
    given = {"need_weights": False, **TORCH[name]}
    model = nn.MultiheadAttention(12, 2, batch_first=True, **kinds, **more).double()
    surgery.apply(model, at("", attend(prefix(tokens=P))))
    pk, pv = part_of(model).prefix.chunk(2, -1)
    q, k, v = (F.linear(X, w, b) for w, b in zip(*projections(model), strict=True))
    k, v = (torch.cat([p.expand(2, -1, -1), t], 1) for p, t in ((pk, k), (pv, v)))
    mask = torch.zeros(2, 2, 5, 5, dtype=torch.float64)
    if (attn_mask := given.get("attn_mask")) is not None:
        shown = (
            torch.where(attn_mask, -torch.inf, 0.0) if attn_mask.dtype == torch.bool else attn_mask
        )
        mask = mask + (rearrange(shown, "(b h) l s -> b h l s", h=2) if shown.dim() == 3 else shown)
    if (padding := given.get("key_padding_mask")) is not None:
        mask = mask.masked_fill(padding[:, None, None], -torch.inf)
    mask = F.pad(mask, (P, 0))
    for row in ("bias_k",) if more.get("add_bias_kv") else ():
        assert getattr(model, row) is not None
        k = torch.cat([k, model.bias_k.expand(2, -1, -1)], 1)
        v = torch.cat([v, model.bias_v.expand(2, -1, -1)], 1)
        mask = F.pad(mask, (0, 1))
    if more.get("add_zero_attn"):
        k, v, mask = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), F.pad(mask, (0, 1))
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=2) for t in (q, k, v))
    weights = (q @ k.mT / 6**0.5 + mask).softmax(-1)
    want = model.out_proj(rearrange(weights @ v, "b h n d -> b n (h d)"))
    got, told = model(X, X, X, **given)
    close(got.detach(), want.detach())
    if told is not None:
        mean = given.get("average_attn_weights", True)
        close(told.detach(), (weights.mean(1) if mean else weights).detach())
    if name == "self":
        one, _ = model(X[0], X[0], X[0], need_weights=False)
        close(one.detach(), want[0].detach())


def projections(m: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    weights = [m.q_proj_weight, m.k_proj_weight, m.v_proj_weight]
    if m.in_proj_weight is not None:
        weights = [*m.in_proj_weight.chunk(3)]
    return weights, [None] * 3 if m.in_proj_bias is None else [*m.in_proj_bias.chunk(3)]


MODELS: dict[str, tuple[Any, Any]] = {
    "vit": (tiny_vit, images()),
    "encoder": (encoder, torch.randn(2, 5, 24)),
    "llama": (hf_llama, words_in()),
    "gpt2": (hf_gpt2, words_in()),
    "bert": (hf_bert, words_in()),
}


def answer(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    out: Tensor = y if isinstance(y, Tensor) else next(iter(y.values()))
    return out


@pytest.mark.parametrize("name", MODELS)
def test_two_operations_and_one_of_both_prefixes(name: str) -> None:
    build, x = MODELS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    x = x.double() if x.is_floating_point() else x
    base = answer(model, x).detach()
    surgery.apply(model, RULES, name="one")
    first = answer(model, x).detach()
    surgery.apply(model, RULES, name="two", seed=1)
    got = answer(model, x).detach()
    additions: Any = model.surgery
    both = [
        torch.cat([a.prefix, b.prefix])
        for a, b in zip(additions.one.children(), additions.two.children(), strict=True)
    ]
    surgery.revert(model, name="two")
    assert torch.equal(answer(model, x), first)
    surgery.revert(model, name="one")
    assert torch.equal(answer(model, x), base)
    assert not torch.equal(first, base)
    surgery.apply(model, at(attn, prefix(tokens=2 * P)))
    with torch.no_grad():
        for part, rows in zip(model.surgery.default.children(), both, strict=True):
            part.prefix.copy_(rows)
    close(answer(model, x).detach(), got)


@pytest.mark.parametrize("name", MODELS)
def test_compiled_exported_and_without_gradients(name: str) -> None:
    build, x = MODELS[name]
    torch.manual_seed(0)
    model = surgery.apply(build().eval(), RULES, example=x)
    want = answer(model, x).detach()
    with torch.no_grad():
        torch.testing.assert_close(answer(model, x), want)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(answer(compiled, x).detach(), want)
    if name in ("vit", "encoder"):
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(answer(exported, x).detach(), want)


@torch.no_grad()
def test_a_cache_holds_no_prefix() -> None:
    model = surgery.apply(hf_llama().double().eval(), RULES)
    words = words_in(length=6)
    whole = model(words).logits
    first = model(words[:, :3], use_cache=True)
    assert first.past_key_values.get_seq_length() == 3
    rest = [
        model(words[:, i : i + 1], past_key_values=first.past_key_values).logits for i in (3, 4, 5)
    ]
    close(torch.cat([first.logits, *rest], 1), whole)


def test_attention_otherwise_is_refused() -> None:
    model = surgery.apply(Attention("over queries").double(), at("", attend(prefix(tokens=P))))
    with pytest.raises(GraftError, match="neither"):
        model(X)
    with pytest.raises(GraftError, match="neither"):
        surgery.apply(Attention("over queries").double(), at("", attend(prefix())), example=X)


def test_an_error_within_leaves_nothing_on() -> None:
    model = surgery.apply(Attention().double(), at("", attend(prefix(tokens=P))))
    with pytest.raises(RuntimeError):
        model(X, mask=torch.zeros(9, 9))
    q = torch.randn(1, 1, 2, 2)
    assert F.scaled_dot_product_attention(q, q, q).shape == q.shape


def test_widths() -> None:
    for wrong in (3, 10):
        model = surgery.apply(Attention().double(), at("", attend(prefix(width=wrong))))
        with pytest.raises(GraftError, match=r"prefix\(width=4\)"):
            model(X)
    surgery.apply(Attention().double(), at("", attend(prefix(width=4))))(X)
    with pytest.raises(RuleError, match="nothing in it fixes a number of features"):
        surgery.apply(nn.Sequential(nn.Identity(), nn.Linear(9, 9)), at("0", attend(prefix())))


def test_a_span_is_no_one_module() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    with pytest.raises(ConflictError, match="attend acts on one"):
        surgery.apply(model, at(surgery.span("0", "1"), attend(prefix(width=9))))


def test_parts_are_given_tokens_and_hear() -> None:
    class Told(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(width))

        def forward(self, x: Tensor, heard: Tensor) -> tuple[Tensor, Tensor]:
            assert x.shape == (2, 5, 12)
            row = (self.scale * heard.mean((0, 1))[:4])[None]
            return row, row

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Identity(), nn.Identity(), Attention()).double()
    rules = [
        at("0", surgery.parallel(lambda site: nn.Linear(site.width, site.out))),
        at("3", attend(lambda site: Told(4), hears=where("0"))),
    ]
    surgery.apply(model, rules)
    model(X).sum().backward()
    assert all(p.grad is not None for p in surgery.parameters(model))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_named_set_trains_merges_not_and_comes_off(backbone: str) -> None:
    model, x = BACKBONES[backbone](), INPUTS[backbone]
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    before = surgery.fingerprint(model)
    surgery.apply(model, surgery.methods.prefix_tuning(tokens=P, inner=7), example=x)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in surgery.parameters(model))
    with pytest.raises(surgery.SurgeryError):
        surgery.merge(model)
    surgery.revert(model)
    assert surgery.fingerprint(model) == before
