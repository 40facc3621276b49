"""python tests/data/adapters/make.py: a folder of each kind by the real adapters, and the answers.

By adapters 1.3.0 with transformers 4.57.6; it is needed for this alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

HERE = Path(__file__).parent
WORDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 16, "max_position_embeddings": 8,
}  # fmt: skip


def bare(name: str) -> nn.Module:
    import transformers as t

    if name == "bert":
        return t.BertForSequenceClassification(t.BertConfig(**SIZES)).eval()
    if name == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
        config = t.GPT2Config(**sizes, vocab_size=16, bos_token_id=0, eos_token_id=0)
        return t.GPT2LMHeadModel(config).eval()
    return t.LlamaForCausalLM(t.LlamaConfig(**SIZES)).eval()


def base(name: str) -> nn.Module:
    """The model that the folders are for: its weights are kept beside them."""
    model = bare(name)
    lost, more = model.load_state_dict(load_file(HERE / f"{name}.safetensors"), strict=False)
    assert not more
    assert set(lost) <= {"lm_head.weight"}  # GPT-2's is the table of words
    return model


R = {"reduction_factor": 4}
LORA = {"r": 2, "alpha": 3}
ALL = {"attn_matrices": ["q", "k", "v", "o"], "intermediate_lora": True, "output_lora": True}
# of which class, with what options, for which models
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "seq_bn": ("SeqBnConfig", R, "bert gpt2 llama"),
    "double": ("DoubleSeqBnConfig", R, "bert gpt2 llama"),
    "par": ("ParBnConfig", R, "bert gpt2 llama"),
    "plus": ("AdapterPlusConfig", {**R, "stochastic_depth": 0.0}, "bert gpt2"),
    "learned": ("SeqBnConfig", {**R, "scaling": "learned", "non_linearity": "gelu"}, "bert"),
    "learned_beside": ("ParBnConfig", {**R, "scaling": "channel"}, "gpt2"),
    "left_out": ("SeqBnConfig", {"reduction_factor": {"1": 8, "default": 4}, "leave_out": [0],
                                 "scaling": 2.0, "non_linearity": "leakyrelu"}, "bert gpt2"),
    "compacter": ("CompacterConfig", {**R, "phm_dim": 2}, "bert"),
    "compacter_pp": ("CompacterPlusPlusConfig", {
        **R, "phm_dim": 2, "factorized_phm_rule": True, "shared_W_phm": True,
        "shared_phm_rule": False}, "gpt2"),
    "lora": ("LoRAConfig", LORA, "bert gpt2 llama"),
    "lora_all": ("LoRAConfig", {**LORA, **ALL}, "bert gpt2 llama"),
    "lora_k": ("LoRAConfig", {**LORA, "attn_matrices": ["k"]}, "gpt2"),
    "ia3": ("IA3Config", {}, "bert gpt2 llama"),
    "union": ("ConfigUnion", {"LoRAConfig": {**LORA, "output_lora": True},
                              "DoubleSeqBnConfig": R}, "bert gpt2"),
    "prefix": ("PrefixTuningConfig", {"prefix_length": 3, "bottleneck_size": 4}, "bert gpt2"),
    "prefix_left_out": ("PrefixTuningConfig", {
        "prefix_length": 3, "bottleneck_size": 4, "leave_out": [0]}, "bert"),
    "prefix_flat": ("PrefixTuningConfig", {"prefix_length": 3, "flat": True}, "bert gpt2 llama"),
    "mam": ("ConfigUnion", {"PrefixTuningConfig": {"prefix_length": 3, "bottleneck_size": 4},
                            "ParBnConfig": R}, "bert"),
    # what is refused
    "unipelt": ("UniPELTConfig", {}, "bert"),
    "dora": ("DoRAConfig", {"r": 2}, "bert"),
    "gated": ("SeqBnConfig", {**R, "use_gating": True}, "bert"),
    "invertible": ("SeqBnInvConfig", R, "bert"),
    "norm_after": ("SeqBnConfig", {**R, "ln_after": True}, "bert"),
    "odd_sum": ("SeqBnConfig", {**R, "residual_before_ln": "post_add"}, "bert"),
    "prompt": ("PromptTuningConfig", {"prompt_length": 3}, "bert"),
    "loreft": ("LoReftConfig", {"r": 2}, "bert"),
    "vera": ("VeraConfig", {"r": 2}, "bert"),
}  # fmt: skip
WITH_HEAD = {"bert_seq_bn", "bert_lora"}
SAFE = {"double", "lora"}  # written as safetensors; the others by torch.save, as is usual there


def made(kind: str, options: dict[str, Any], name: str, case: str) -> torch.Tensor:
    """Write the folder; the answer."""
    import adapters

    folder, head = HERE / f"{name}_{case}", f"{name}_{case}" in WITH_HEAD
    build: Callable[..., Any] = getattr(adapters, kind)
    if kind == "ConfigUnion":
        config = build(*(getattr(adapters, each)(**its) for each, its in options.items()))
    else:
        config = build(**options)
    model: Any = base(name)
    adapters.init(model)
    model.add_adapter("task", config=config)
    model.train_adapter("task")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.eval().named_parameters():
            if parameter.requires_grad and (head or ".task" in key):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        shutil.rmtree(folder, ignore_errors=True)
        safe = {"use_safetensors": True} if case in SAFE else {}
        model.save_adapter(str(folder), "task", with_head=head, **safe)
        answer: torch.Tensor = model(WORDS).logits
    return answer


if __name__ == "__main__":
    torch.manual_seed(0)
    for each in ("bert", "gpt2", "llama"):
        whole = bare(each)
        for parameter in whole.parameters():
            nn.init.normal_(parameter, std=0.3)
        state = {
            k: v for k, v in whole.state_dict().items() if (each, k) != ("gpt2", "lm_head.weight")
        }
        save_file(state, HERE / f"{each}.safetensors")
    save_file(
        {f"{name}_{case}": made(kind, options, name, case)
         for case, (kind, options, names) in CASES.items() for name in names.split()},
        HERE / "answers.safetensors",
    )  # fmt: skip
