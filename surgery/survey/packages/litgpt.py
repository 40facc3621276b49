"""Models of litgpt: decoders of many families in one class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, Tensor]


def _gpt(name: str, **more: int) -> Built:
    """A tiny model of a family, with its norms, networks and attention."""
    from litgpt import GPT, Config

    family = Config.from_name(name)
    groups = min(family.n_query_groups or 2, 2)
    config = Config.from_name(
        name, n_layer=2, n_head=2, n_embd=32, head_size=16, n_query_groups=groups,
        intermediate_size=64, vocab_size=50, padded_vocab_size=50, block_size=16, **more,
    )  # fmt: skip
    return GPT(config), torch.randint(0, 50, (2, 12))


def llama() -> Built:
    """Llama: its head is registered first.

    ffn: transformer.h.*.mlp
    qkv: transformer.h.*.attn.qkv
    proj: transformer.h.*.attn.proj
    head: lm_head
    prompts: no; rotary positions and a mask, cut once to so many words
    """
    return _gpt("Llama-3.2-1B")


def neox() -> Built:
    """Pythia: attention and network side by side.

    ffn: transformer.h.*.mlp
    qkv: transformer.h.*.attn.qkv
    proj: transformer.h.*.attn.proj
    head: lm_head
    prompts: no; rotary positions and a mask, cut once to so many words
    """
    return _gpt("pythia-14m")


def gemma2() -> Built:
    """Gemma 2: norms before and behind both, windows in every other block.

    ffn: transformer.h.*.mlp
    qkv: transformer.h.*.attn.qkv
    proj: transformer.h.*.attn.proj
    head: lm_head
    prompts: no; rotary positions and a mask, cut once to so many words
    """
    return _gpt("Gemma-2-2b", sliding_window_size=8)


def mixtral() -> Built:
    """Mixtral: four experts, two for each word.

    ffn: transformer.h.*.mlp
    qkv: transformer.h.*.attn.qkv
    proj: transformer.h.*.attn.proj
    head: lm_head
    prompts: no; rotary positions and a mask, cut once to so many words
    """
    return _gpt("Mixtral-8x7B-v0.1", n_expert=4)


def falcon() -> Built:
    """Falcon: one norm for attention and network, one key and value for all heads.

    ffn: transformer.h.*.mlp
    qkv: transformer.h.*.attn.qkv
    proj: transformer.h.*.attn.proj
    head: lm_head
    prompts: no; rotary positions and a mask, cut once to so many words
    """
    return _gpt("falcon-7b")
