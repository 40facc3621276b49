"""One layer in PEFT's format: the edits that its configuration means, and each of its tensors as
it lies in a part of ours, so that a file is read and written by the same table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.stack import Stack
from ..parts.deltas import LoHa, LoKr, Principal, loha, lokr, olora, pissa
from ..parts.low_rank import LoRA, lora
from ..parts.rotations import OFT, oft
from ..parts.row_lengths import Magnitude, Rescale, Shift, magnitude, rescale, shift
from ..parts.shared_low_rank import SharedLoRA, frozen, vera
from ..parts.sparse_updates import Rows
from ..rules.edits import Edit, append, parallel, prepend
from ..rules.part import Maker, shared
from ..rules.selector import where
from ..structure.layers import is_conv
from .foreign import Entry, Joint
from .peft_format import PRINCIPAL, Config, Target

Shapes = Mapping[str, tuple[int, ...]]


# what a configuration means --------------------------------------------------------------------


def edits_of(config: Config, target: Target, shapes: Shapes) -> tuple[Edit, ...]:
    """What is done at one layer."""
    return _EDITS[config.kind](config, target, shapes)


def _lora(config: Config, target: Target, shapes: Shapes) -> tuple[Edit, ...]:
    if target.bias:
        return (append(shift()),)
    rank, alpha = (config.of(f"{name}_pattern", option, target)
                   for name, option in (("rank", "r"), ("alpha", "lora_alpha")))  # fmt: skip
    if is_principal(config, target):
        return (parallel(_principal(config, target, rank)),)
    update = lora(
        rank=rank,
        alpha=abs(alpha),
        root=bool(config["use_rslora"]),
        dropout=0.0 if target.name else float(config["lora_dropout"]),
    )
    if not config["use_dora"]:
        return (parallel(update, scale=math.copysign(target.times, alpha)),)
    if alpha < 0:
        config.fail(f"use_dora at {target.path}, of a negative alpha, is not read here.")
    if isinstance(target.module, nn.Embedding):  # PEFT's lengths there are of columns
        config.fail(f"use_dora at {target.path}, a table of words, is not read here.")
    own = shared(update, by=where("**"))  # of the innermost module: each has its own
    return parallel(own), append(magnitude(own))


def is_principal(config: Config, target: Target) -> bool:
    """Whether PEFT takes from the base what a LoRA starts from. Not of words, whatever is said."""
    return config["init_lora_weights"] in PRINCIPAL and not isinstance(target.module, nn.Embedding)


def _principal(config: Config, target: Target, rank: int) -> Maker:
    kind, scale = config["init_lora_weights"], config.scale(target)
    if target.name or config["use_dora"] or config["lora_dropout"] or scale <= 0:
        config.fail(f"init_lora_weights={kind!r} at {target.place}, so, is not read here.")
    return pissa(rank=rank) if kind == "pissa" else olora(rank=rank, alpha=scale * rank)


def _ia3(config: Config, target: Target, shapes: Shapes) -> tuple[Edit, ...]:
    return (prepend(rescale()),) if config.feeds_forward(target.path) else (append(rescale()),)


def _oft(config: Config, target: Target, shapes: Shapes) -> tuple[Edit, ...]:
    numbers = shapes.get(f"{target.key}.oft_R.weight", (0, 0))[-1]
    terms = config["num_cayley_neumann_terms"] if config["use_cayley_neumann"] else None
    turn = oft(
        size=(1 + math.isqrt(1 + 8 * numbers)) // 2,
        terms=terms and max(terms, 4),  # PEFT sums as many at 3
        one_block=bool(config["block_share"]),
    )
    return (prepend(turn),)


def _vera(config: Config, target: Target, shapes: Shapes) -> tuple[Edit, ...]:
    core = shared(frozen(rank=config["r"]))
    return (parallel(vera(core=core, dropout=float(config["vera_dropout"]))),)


def _loha(config: Config, target: Target, shapes: Shapes) -> tuple[Edit, ...]:
    rank = config.of("rank_pattern", "r", target)
    scale = single(config.of("alpha_pattern", "alpha", target) / rank)
    return (parallel(loha(rank=rank, alpha=scale * rank)),)


def _lokr(config: Config, target: Target, shapes: Shapes) -> tuple[Edit, ...]:
    names = _names(target, shapes)
    both = "lokr_w1_a" in names
    left = names.get("lokr_w1_a" if both else "lokr_w1", ())
    right = names.get("lokr_w1_b" if both else "lokr_w1", ())
    update = lokr(
        rank=config.of("rank_pattern", "r", target),
        blocks=(left[0] if left else 1, right[-1] if right else 1),
        alpha=config.of("alpha_pattern", "alpha", target),
        whole="lokr_w2" in names,
        both=both,
    )
    return (parallel(update),)


def _names(target: Target, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes of its tensors, by their names at the layer."""
    start = f"{target.key}."
    return {k.removeprefix(start): shape for k, shape in shapes.items() if k.startswith(start)}


def single(value: float) -> float:
    """A number as PEFT's LoHa keeps its scale: in float32."""
    return float(torch.tensor(value, dtype=torch.float32))


_EDITS: dict[str, Callable[[Config, Target, Shapes], tuple[Edit, ...]]] = {
    "LORA": _lora, "IA3": _ia3, "OFT": _oft, "VERA": _vera, "LOHA": _loha, "LOKR": _lokr,
}  # fmt: skip


# where its tensors lie -------------------------------------------------------------------------


def entries_of(target: Target, joints: list[Joint]) -> dict[str, Entry]:
    """The tensors of a layer by their names in a file, as they lie in its parts."""
    found: dict[str, Entry] = {}
    for joint in joints:
        kind = kind_of(joint.part)
        if (kind is Shift) != target.bias:
            continue
        tensors = _TENSORS[kind](target, joint)
        found |= {
            f"{target.key}.{name}": e if isinstance(e, Entry) else Entry(e, tuple(e.shape))
            for name, e in tensors.items()
        }
    return found


def kind_of(part: nn.Module) -> type[nn.Module]:
    """The class of a part, or of the parts of experts."""
    return type(part.each.part if isinstance(part, Stack) else part)


def matrices(target: Target, A: Tensor, B: Tensor) -> dict[str, Tensor | Entry]:
    """LoRA's A (rank, in) and B (out, rank) as a file has them."""
    if isinstance(target.module, nn.Embedding) and not target.raw:
        return {"lora_embedding_A": B.mT, "lora_embedding_B": A.mT}
    kernel = target.weight.shape[2:] if is_conv(target.module) else ()
    down = (len(A), *target.weight.shape[1:]) if kernel else tuple(A.shape)
    up = (*B.shape, *[1 for _ in kernel])
    return {"lora_A.weight": Entry(A, down), "lora_B.weight": Entry(B, up)}


def _lora_tensors(target: Target, joint: Joint) -> dict[str, Tensor | Entry]:
    part: Any = joint.part
    if not isinstance(part, Stack):
        return matrices(target, part.A[0], part.B[0])
    each: Any = part.each.part
    A, B = each.A[:, 0], each.B[:, 0]  # (experts, rank, in), (experts, out, rank)
    if getattr(target.module, "is_transposed", False):  # kept (e, in, out), as PEFT asks (GPT-OSS)
        A, B = B.mT, A.mT
    experts, rank, width = A.shape
    return {
        "lora_A.weight": Entry(A, (experts * rank, width)),
        "lora_B.weight": Entry(B.permute(1, 2, 0), (B.shape[1], rank * experts)),
    }


def _principal_tensors(target: Target, joint: Joint) -> dict[str, Tensor | Entry]:
    part: Any = joint.part
    return matrices(target, part.A, part.B)


def _magnitude_tensors(target: Target, joint: Joint) -> dict[str, Tensor | Entry]:
    part: Any = joint.part
    shape = (1, len(part.dm), *[1 for _ in target.weight.shape[2:]])
    lengths = torch.linalg.vector_norm(part.weight(part.dm), dim=1)
    shape = shape if is_conv(target.module) else tuple(part.dm.shape)
    return {"lora_magnitude_vector": Entry(part.dm, shape, lengths)}


def _rescale_tensors(target: Target, joint: Joint) -> dict[str, Tensor | Entry]:
    part: Any = joint.part
    v = part.v[0] if len(part.v[0]) == part.width else part.affine()[0]
    if is_conv(target.module):
        return {"ia3_l": Entry(v, (1, len(v), *[1 for _ in target.weight.shape[2:]]))}
    return {"ia3_l": Entry(v, (1, len(v)) if joint.place == "before" else (len(v), 1))}


def _vera_tensors(target: Target, joint: Joint) -> dict[str, Tensor | Entry]:
    part: Any = joint.part
    return {"vera_lambda_d": part.u[0], "vera_lambda_b": part.v[0]}


def _loha_tensors(target: Target, joint: Joint) -> dict[str, Tensor | Entry]:
    p: Any = joint.part
    return {"hada_w1_a": p.B1, "hada_w1_b": p.A1, "hada_w2_a": p.B2, "hada_w2_b": p.A2}


def _lokr_tensors(target: Target, joint: Joint) -> dict[str, Tensor | Entry]:
    p: Any = joint.part
    first = {"lokr_w1": p.C} if p.D is None else {"lokr_w1_a": p.C, "lokr_w1_b": p.D}
    if p.A is not None:
        return {**first, "lokr_w2_a": p.B, "lokr_w2_b": p.A}
    return {**first, "lokr_w2": second(target, p.B)}


def second(target: Target, inner: Tensor) -> Entry:
    """LoKr's second factor, whole, as a file has it."""
    kernel = target.weight.shape[2:] if is_conv(target.module) else ()
    return Entry(inner, (len(inner), inner.shape[1] // math.prod(kernel), *kernel))


def _rows_tensors(target: Target, joint: Joint) -> dict[str, Tensor | Entry]:
    part: Any = joint.part
    base = None
    if not part.values.is_meta:
        base = target.weight.detach()[part.index.to(target.weight.device)].to(part.values)
    words = Entry(part.values, tuple(part.values.shape), base)
    return {"token_adapter.trainable_tokens_delta": words}


_TENSORS: dict[type[nn.Module], Callable[[Target, Joint], Mapping[str, Tensor | Entry]]] = {
    LoRA: _lora_tensors,
    Principal: _principal_tensors,
    Shift: lambda target, joint: {"bias": joint.part.bias[0]},  # type: ignore[index]
    Magnitude: _magnitude_tensors,
    Rows: _rows_tensors,
    Rescale: _rescale_tensors,
    OFT: lambda target, joint: {"oft_R.weight": joint.part.skew},  # type: ignore[dict-item]
    SharedLoRA: _vera_tensors,
    LoHa: _loha_tensors,
    LoKr: _lokr_tensors,
}
