"""While a module runs, its attention attends to more keys and values than it makes."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import GraftError
from .written_attention import Riders

OF_TORCH = inspect.signature(F.multi_head_attention_forward)


class Prefix(NamedTuple):
    """Keys and values, each (tokens, width), width that of all heads."""

    keys: Tensor
    values: Tensor


class Attending(TorchFunctionMode):
    """Puts a prefix among what attention is computed of: softmax(q [P_k, K]^T) [P_v, V].

    No mask hides it, and no cache holds it: what a cache holds is among K and V.
    """

    def __init__(self, prefixes: list[Prefix], path: str) -> None:
        super().__init__()
        self.prefix = Prefix(*(torch.cat(of) for of in zip(*prefixes, strict=True)))
        self.path, self.called = path, False
        self.riders = Riders(self.prefix, self._fitted)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.called = True
            return self._attention(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            self.called = True
            return func(**self._of_torch(OF_TORCH.bind(*args, **(kwargs or {})).arguments))
        return self.riders.call(func, args, kwargs or {})

    @property
    def ran(self) -> bool:
        """Whether all attention that was met attended to the prefix, and some was met."""
        return (self.called or self.riders.ran) and not self.riders.open

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> Tensor:
        """Attention of queries (..., l, d) to keys and values (..., s, d), and to the prefix."""
        if is_causal:
            attn_mask = torch.ones(
                query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device
            ).tril()
        if attn_mask is not None:
            seen = 1.0 if attn_mask.dtype == torch.bool else 0.0
            attn_mask = attn_mask.expand(*attn_mask.shape[:-1], key.shape[-2])
            attn_mask = F.pad(attn_mask, (len(self.prefix.keys), 0), value=seen)
        key = torch.cat([self._heads(self.prefix.keys, key), key], -2)
        value = torch.cat([self._heads(self.prefix.values, value), value], -2)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **more)

    def _heads(self, given: Tensor, like: Tensor) -> Tensor:
        """(tokens, width) as keys (batch, heads, s, d) are. Raises GraftError where it is not."""
        heads = self._fitted(given, like)
        if heads is None:
            raise self._misfit(
                given, like, like.shape[-1] * (like.shape[1] if like.dim() == 4 else 1)
            )
        return heads.expand(*like.shape[:-2], *heads.shape[-2:])

    def _misfit(self, given: Tensor, keys: Tensor, width: int) -> GraftError:
        return GraftError(
            f"attend(...) at {self.path or 'the model'}",
            f"its attention has keys {tuple(keys.shape)}, and a part gave {tuple(given.shape)}, "
            "which are not the same features of each of its heads.",
            f"Give the width of all its heads, prefix(width={width}).",
        )

    def _fitted(self, given: Tensor, like: Tensor) -> Tensor | None:
        """(tokens, width) as (heads, tokens, d); heads that share keys are next to each other."""
        d, heads, width = like.shape[-1], like.shape[1] if like.dim() == 4 else 1, given.shape[-1]
        if like.dim() == 3 and width > d and not width % d and not len(like) % (width // d):
            heads = len(like)  # (batch heads, n, d), of as many for queries as for keys
            return repeat(given, "p (h d) -> (b h) p d", d=d, b=heads * d // width).to(like)
        if width < d or width % d or heads % (width // d) or like.dim() < 3:
            return None
        return repeat(given, "p (h d) -> (h r) p d", d=d, r=heads * d // width).to(like)

    def _of_torch(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of torch's own attention, (s, b, width), with keys and values made here.

        It takes them as static, and then has none to make: its own are given no features. Rows that
        it adds by itself (add_bias_kv) come last, as there.
        """
        (w_q, w_k, w_v), biases = _projections(given)
        rows, p = given["key"].shape[:-1], len(self.prefix.keys)
        last = 0 if given["bias_k"] is None else len(given["bias_k"])
        none = given["query"].new_empty(p + rows[0] + last, *rows[1:], 0)
        static = {
            "static_k": self._joined(given, "key", w_k, biases[1], self.prefix.keys),
            "static_v": self._joined(given, "value", w_v, biases[2], self.prefix.values),
        }
        empty = w_q.new_empty(len(w_q), 0)
        weights = {"q_proj_weight": w_q, "k_proj_weight": empty, "v_proj_weight": empty}
        masks = {
            name: F.pad(given[name], (p, last))
            for name in ("attn_mask", "key_padding_mask")
            if given.get(name) is not None
        }
        tokens = {"key": none, "value": none, "use_separate_proj_weight": True}
        none_added = {"bias_k": None, "bias_v": None, "is_causal": False}
        return {**given, **tokens, **weights, **static, **masks, **none_added}

    def _joined(
        self, given: dict[str, Any], name: str, weight: Tensor, bias: Tensor | None, prefix: Tensor
    ) -> Tensor:
        """Keys or values (b h, n, d) of tokens, with a prefix before them, added rows behind."""
        h, static = given["num_heads"], given.get(f"static_{name[0]}")
        if static is None:
            made = F.linear(given[name], weight, bias)
            made = made if made.dim() == 3 else made[:, None]
        else:  # of an operation on top of this one
            made = rearrange(static, "(b h) s d -> s b (h d)", h=h)
        if prefix.shape[-1] != made.shape[-1]:
            raise self._misfit(prefix, made, made.shape[-1])
        added = [] if given["bias_k"] is None else [given[f"bias_{name[0]}"].squeeze(1)]
        rows = [repeat(t.to(made), "p c -> p b c", b=made.shape[1]) for t in (prefix, *added)]
        joined = torch.cat([rows[0], made, *rows[1:]])
        return rearrange(joined, "s b (h d) -> (b h) s d", h=h)


def _projections(given: dict[str, Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases of queries, keys and values of torch's own attention."""
    bias = given["in_proj_bias"]
    biases = [None] * 3 if bias is None else [*bias.chunk(3)]
    if given.get("use_separate_proj_weight"):
        return [given[f"{word}_proj_weight"] for word in "qkv"], biases
    return [*given["in_proj_weight"].chunk(3)], biases


def no_attention(path: str) -> GraftError:
    """The error of a place that ran, and in which nothing attended."""
    return GraftError(
        f"attend(...) at {path or 'the model'}",
        "something in it attended to no keys and values but its own: it is neither "
        "F.scaled_dot_product_attention, nn.MultiheadAttention nor softmax of a product, times v; "
        "or its keys have another width than was thought.",
        "Say prefix(width=...); let it attend so (attn_implementation='sdpa' in Hugging Face "
        "models, TIMM_FUSED_ATTN=2 for timm's); or use prompt, tokens that are put in.",
    )
