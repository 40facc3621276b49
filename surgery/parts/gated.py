"""Attention to prompts through a gate that starts at zero (Zhang et al. 2023, LLaMA-Adapter)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import RuleError
from ..rules.part import part, usually
from ..structure.module_tree import Site
from .arguments import positive

KNOWN = {"qkv", "q_norm", "k_norm", "attn_drop", "softmax", "norm", "proj", "proj_drop"}
TABLES = {"relative_position_bias_table"}  # adds to scores between tokens, which prompts are not
MASKS = {"self", "x", "mask", "attn_mask", "is_causal"}


class GatedPrompt(nn.Module):
    """proj(concat_h tanh(gate_h) softmax(scale q_h K_h^T) V_h): (..., n, width) to (..., n, out).

    q are the queries of the tokens, K and V keys and values of `tokens` trained prompts, all by
    the layer's own projections, which are borrowed as they are, with what is grafted on them; the
    bias of proj is left out, as attention itself adds it. Attention and projection dropout do not
    fall on it.

    attn    a module with qkv, proj and num_heads (timm's Attention, Swin's WindowAttention)

    Prompts start standard normal, gates (one for each head) at zero.
    """

    starts_at_zero = True
    attn: Any

    def __init__(self, attn: nn.Module, width: int, tokens: int = 10) -> None:
        super().__init__()
        self.__dict__["attn"] = attn  # of the base: no child, or it would be stored twice
        self.prompts = nn.Parameter(torch.empty(tokens, width).normal_())
        self.gate = nn.Parameter(torch.zeros(self.attn.num_heads))

    def forward(self, x: Tensor) -> Tensor:
        q, _, _ = self._heads(x)
        _, k, v = self._heads(self.prompts)
        scores = torch.einsum("...nhc,phc->...hnp", q, k) * self.attn.scale
        gated = scores.softmax(-1) * self.gate.tanh()[:, None, None]
        mixed = rearrange(torch.einsum("...hnp,phc->...nhc", gated, v), "... h c -> ... (h c)")
        bias: Tensor = self.attn.proj(mixed.new_zeros(mixed.shape[-1:]))
        out: Tensor = self.attn.proj(mixed) - bias
        return out

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (..., n, heads, c) of tokens (..., n, width), normed."""
        qkv = rearrange(self.attn.qkv(x), "... (k h c) -> k ... h c", k=3, h=len(self.gate))
        q, k, v = qkv.unbind(0)
        return _normed(self.attn, "q_norm", q), _normed(self.attn, "k_norm", k), v

    def extra_repr(self) -> str:
        return f"tokens={len(self.prompts)}, heads={len(self.gate)}"


def _normed(attn: nn.Module, name: str, x: Tensor) -> Tensor:
    norm = getattr(attn, name, None)
    return x if norm is None else norm(x)


@part
@usually("parallel")
def gated_prompt(site: Site, tokens: int = 10) -> nn.Module:
    """Zero-init gated attention to trained prompts, at attention: at(attn, gated_prompt()).

    tokens  how many prompts

    Starts by adding nothing. Raises RuleError where the attention is not made of one linear qkv
    (all of q, then k, then v), proj and num_heads, or does more to queries and keys than norm
    them (rotary positions). Parameters: tokens * width + heads.
    Source: Zhang et al. 2023 (LLaMA-Adapter).

    >>> gated_prompt(tokens=30)
    gated_prompt(tokens=30)
    """
    positive("gated_prompt", tokens=tokens)
    if reason := _foreign(site.module):
        raise RuleError(
            f"gated_prompt(tokens={tokens})",
            f"{site.path or 'the model'}, a {type(site.module).__name__}, {reason}.",
            "Put it on attention with one linear qkv, proj and num_heads, as timm's ViT and Swin "
            "have it, or use prefix or prompt tokens.",
        )
    return GatedPrompt(site.module, site.width, tokens)


def _foreign(attn: Any) -> str:
    """Why an attention's queries, keys and values are not those of qkv alone; "" if they are."""
    if not all(isinstance(attn._modules.get(name), nn.Linear) for name in ("qkv", "proj")):
        return "has no one linear qkv and proj of its own"  # Hugging Face's, LeViT's, PVT's
    if not isinstance(getattr(attn, "num_heads", None), int):
        return "does not say its num_heads"  # Hiera's
    if not isinstance(getattr(attn, "scale", None), float):  # Swin V2's, XCiT's: a parameter
        return "does not scale its scores by a number"
    if attn.qkv.out_features != 3 * attn.proj.in_features:
        return "has other widths for queries, keys and values"
    # EVA's rope, BEiT's shared_rel_pos_bias, MViT's feat_size
    if odd := sorted(set(inspect.signature(attn.forward).parameters) - MASKS):
        return f"takes {', '.join(odd)} (rotary positions or other inputs) beside the tokens"
    # CaiT's talking heads, SAM's relative positions
    inside = {**attn._parameters, **attn._modules}
    names = {name for name, value in inside.items() if value is not None}
    if odd := sorted(names - KNOWN - TABLES):
        return f"has {', '.join(odd)}, which may change its queries, keys or output"
    if not isinstance(attn._modules.get("norm", nn.Identity()), nn.Identity):
        return "norms its output before proj"
    return ""
