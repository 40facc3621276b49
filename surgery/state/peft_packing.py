"""The parts of an operation as PEFT has them: the options of their kind, and their tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from ..engine.stack import Stack
from ..errors import FileError
from ..parts.arguments import divisors
from ..parts.deltas import LoHa, LoKr, Principal
from ..parts.low_rank import LoRA
from ..parts.qkv_rows import placed
from ..parts.rotations import OFT
from ..parts.row_lengths import Magnitude, Rescale, Shift
from ..parts.shared_low_rank import Factors, SharedLoRA
from ..parts.sparse_updates import Rows
from ..structure.layers import is_turned
from .foreign import Joint
from .peft_format import CORES, Target
from .peft_layers import entries_of, kind_of, matrices, second, single
from .peft_targets import widest

Layers = list[tuple[Target, list[Joint]]]
Packed = tuple[dict[str, Any], dict[str, Tensor]]  # options, and tensors by name
Facts = dict[str, tuple[int, float]]  # rank and alpha of each layer
KINDS: dict[type[nn.Module], str] = {
    LoRA: "LORA", Magnitude: "LORA", Rows: "LORA", Rescale: "IA3", OFT: "OFT", SharedLoRA: "VERA",
    LoHa: "LOHA", LoKr: "LOKR", Shift: "LORA", Principal: "LORA",
}  # fmt: skip
AS_LORA = "Make the operation a LoRA first, surgery.as_lora(model, rank=8), and save that."


def refuse(call: str, place: str, part: object, why: str = "PEFT has no place for it") -> NoReturn:
    """Raise FileError of a part at a place."""
    what = part if isinstance(part, str) else type(part).__name__
    raise FileError(call, f"{what} at {place}: {why}.", AS_LORA)


def packed(kind: str, layers: Layers, call: str) -> Packed:
    """Options and tensors of layers of one kind. Raises FileError where PEFT has none such."""
    return _PACKERS[kind](layers, call)


def having(there: list[Joint], *kinds: type[nn.Module]) -> list[Joint]:
    """Those of some parts that are of a kind."""
    return [joint for joint in there if kind_of(joint.part) in kinds]


def _tensors(layer: Target, there: list[Joint]) -> dict[str, Tensor]:
    return {key: entry.get() for key, entry in entries_of(layer, there).items()}


def _all(layers: Layers) -> dict[str, Tensor]:
    return {key: t for layer, there in layers for key, t in _tensors(layer, there).items()}


def _times(joint: Joint) -> float:
    return 1.0 if joint.scale is None else joint.scale


def _alpha(scale: float, rank: int) -> float:
    """What PEFT divides by the rank."""
    alpha = scale * rank
    return round(alpha) if round(alpha) / rank == scale else alpha


def _patterns(facts: Facts, alpha: str) -> dict[str, Any]:
    """Rank and alpha of most layers, and the patterns of those that differ."""
    said: dict[str, Any] = {}
    for i, (name, pattern) in enumerate((("r", "rank_pattern"), (alpha, "alpha_pattern"))):
        most = Counter(fact[i] for fact in facts.values()).most_common(1)[0][0]
        others = {f"^{re.escape(k)}": fact[i] for k, fact in facts.items() if fact[i] != most}
        said |= {name: most, pattern: others}
    return said


# LoRA ------------------------------------------------------------------------------------------


class _Low(NamedTuple):
    """scale * B A: A (rank, in), B (out, rank)."""

    A: Tensor
    B: Tensor
    scale: float

    def padded(self, rank: int) -> _Low:
        """Of more ranks, and no scale."""
        more = rank - len(self.A)
        A, B = nn.functional.pad(self.A, (0, 0, 0, more)), nn.functional.pad(self.B, (0, more))
        return _Low(A, B * self.scale, 1.0)


def _low(layer: Target, there: list[Joint]) -> _Low:
    """All LoRAs of a layer as one: as it is where it is one, of all rows."""
    for joint in there if len(there) == 1 and there[0].rows is None else ():
        part: Any = joint.part
        scale = part.scale * _times(joint) / layer.times
        if isinstance(part, LoRA) and part.rows == [slice(0, part.out)] and scale > 0:
            return _Low(part.A[0], part.B[0], scale)
    W, found = layer.weight.detach(), list[tuple[Tensor, Tensor]]()
    for joint in there:
        part = joint.part
        A, B = part.maps()
        B = B * (_times(joint) / layer.times)
        found.append((A, B if joint.rows is None else placed([B.mT], [joint.rows], len(W)).mT))
    if not found:  # the other half of torch's attention
        return _Low(W.new_zeros(0, W[0].numel()), W.new_zeros(len(W), 0), 1.0)
    return _Low(torch.cat([A for A, _ in found]), torch.cat([B for _, B in found], 1), 1.0)


def _pack_lora(layers: Layers, call: str) -> Packed:
    has_lengths = _check_lengths(layers, call)
    facts, tensors, groups = Facts(), dict[str, Tensor](), dict[str, Layers]()
    added = [(layer, there) for layer, there in layers if layer.bias]
    for layer, there in (each for each in layers if not each[0].bias):
        low, beside = having(there, LoRA, Principal), having(there, Shift)
        apart = [j for j in there if j not in (*low, *beside) or isinstance(j.part, Stack)]
        tensors |= _tensors(layer, apart)
        if low or not apart:
            groups.setdefault(layer.known, []).append((layer, low))
    for known, group in groups.items():
        facts[known], more = _pack_group(group)
        tensors |= more
    if not facts:
        refuse(call, layers[0][0].path, "rows of words", "PEFT has them beside a LoRA")
    tensors |= _added(added, facts, call)
    drops = {
        getattr(getattr(joint.part, "drop", None), "p", 0.0)
        for _, there in layers
        for joint in there
    }
    said = {"use_dora": has_lengths, "lora_dropout": max(drops, default=0.0)}
    return {**_patterns(facts, "lora_alpha"), **said}, tensors


def _added(layers: Layers, facts: Facts, call: str) -> dict[str, Tensor]:
    """What is added to all that each layer gives, over the scale of its LoRA."""
    tensors = dict[str, Tensor]()
    for layer, there in layers:
        rank, alpha = facts[layer.known]
        shifts: list[Any] = [joint.part for joint in having(there, Shift)]
        if not rank:
            refuse(call, layer.path, shifts[0], "PEFT has it beside a LoRA")
        out = len(layer.weight.t() if is_turned(layer.module) else layer.weight)
        bias = sum((part.affine()[1] for part in shifts), layer.weight.new_zeros(out))
        tensors[f"{layer.key}.bias"] = bias * (rank / alpha)
    return tensors


def _pack_group(group: Layers) -> tuple[tuple[int, float], dict[str, Tensor]]:
    """The LoRA of one layer; the two of torch's attention, of one rank and scale."""
    if group[0][1] and isinstance(stack := group[0][1][0].part, Stack):
        part: Any = stack.each.part
        return (part.rank, _alpha(part.scale * _times(group[0][1][0]), part.rank)), {}
    lows = [_low(layer, there) for layer, there in group]
    if len({(len(low.A), low.scale) for low in lows}) > 1:
        lows = [low.padded(max(len(low.A) for low in lows)) for low in lows]
    tensors = {
        f"{layer.key}.{name}": entry if isinstance(entry, Tensor) else entry.get()
        for (layer, _), low in zip(group, lows, strict=True)
        for name, entry in matrices(layer, low.A, low.B).items()
    }
    rank = len(lows[0].A)
    return (rank, _alpha(lows[0].scale, rank) if rank else 1.0), tensors


def _check_lengths(layers: Layers, call: str) -> bool:
    """Whether all have DoRA's lengths. Raises FileError where some have."""
    some = [(layer, there) for layer, there in layers if not layer.bias and not having(there, Rows)]
    with_lengths = [bool(having(there, Magnitude)) for _, there in some]
    plain = all(
        len(having(there, LoRA)) == 1 and not having(there, Shift) and _times(there[0]) == 1.0
        for _, there in some
    )
    if any(with_lengths) and not (all(with_lengths) and plain):
        place = some[with_lengths.index(False)][0].place if not all(with_lengths) else "a layer"
        refuse(call, place, "LoRA", "PEFT has DoRA's lengths at all layers, or at none")
    return any(with_lengths)


# the other kinds -------------------------------------------------------------------------------


def _pack_ia3(layers: Layers, call: str) -> Packed:
    before = [layer.path for layer, there in layers if there[0].place == "before"]
    return {"feedforward_modules": before}, _all(layers)


def _pack_oft(layers: Layers, call: str) -> Packed:
    parts: list[Any] = [there[0].part for _, there in layers]
    sizes, blocks = {p.size for p in parts}, {p.width // p.size for p in parts}
    (terms, one_block), *other = {(p.terms, len(p.skew) < p.width // p.size) for p in parts}
    if other or terms == 3 or (len(sizes) > 1 and len(blocks) > 1):
        refuse(call, layers[0][0].path, "OFT", "PEFT has one size or number of blocks, one form")
    of_size = len(sizes) == 1
    said = {
        "r": 0 if of_size else blocks.pop(), "oft_block_size": sizes.pop() if of_size else 0,
        "use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5,
        "block_share": one_block,
    }  # fmt: skip
    return said, _all(layers)


def _pack_loha(layers: Layers, call: str) -> Packed:
    facts, tensors = Facts(), _all(layers)
    for layer, there in layers:
        part: Any = there[0].part
        scale, rank = part.scale * _times(there[0]), len(part.A1)
        if scale <= 0 or single(scale) != scale:  # PEFT has it in float32
            tensors[f"{layer.key}.hada_w1_a"] = part.B1 * scale
            scale = 1.0
        facts[layer.known] = rank, _alpha(scale, rank)
    return _patterns(facts, "alpha"), tensors


def _pack_lokr(layers: Layers, call: str) -> Packed:
    facts, tensors, sides = Facts(), dict[str, Tensor](), set[tuple[int, int]]()
    for layer, there in layers:
        part: Any = there[0].part
        outer, right = part.outer(), second(layer, part.inner())
        scale, rank, half = part.scale * _times(there[0]), part.rank, max(right.shape[:2]) / 2
        for size, n in zip(outer.shape, right.shape, strict=False):
            sides.add((size * n, size))
        if part.A is None or rank >= half:  # PEFT goes by the rank
            rank = max(rank, int(half + 0.5))
            own = {"lokr_w2": right.get()}
        else:
            own = {"lokr_w2_a": part.B, "lokr_w2_b": part.A}
        own["lokr_w1"] = outer if scale > 0 else outer * scale
        facts[layer.known] = rank, _alpha(scale if scale > 0 else 1.0, rank)
        tensors |= {f"{layer.key}.{name}": tensor for name, tensor in own.items()}
    for factor in (-1, *sorted({side for _, side in sides})):
        if all(_split(size, factor) == side for size, side in sides):
            return {**_patterns(facts, "alpha"), "decompose_factor": factor}, tensors
    refuse(call, layers[0][0].path, "LoKr", "PEFT would cut these layers into other blocks")


def _split(size: int, factor: int) -> int:
    """Into how many blocks PEFT's LoKr cuts a number of features."""
    if factor > 0 and size % factor == 0:
        return factor
    return max(n for n in divisors(size) if n * n <= size and (factor == -1 or n <= factor))


def _pack_vera(layers: Layers, call: str) -> Packed:
    """The matrices of all layers are slices of two; where they are not, each has ranks there."""
    parts: list[Any] = [there[0].part for _, there in layers]
    if many := [
        layer.path for (layer, _), part in zip(layers, parts, strict=True) if part.u[1:].numel()
    ]:
        refuse(call, many[0], "SharedLoRA", "it has vectors for several rows")
    cores: dict[int, Factors] = {id(part.core): part.core for part in parts}
    width, out = widest([layer for layer, _ in layers])
    A = max((core.A for core in cores.values()), key=lambda A: A.shape[1])
    B = max((core.B for core in cores.values()), key=len)
    start, rank = dict.fromkeys(cores, 0), len(A)
    if not all(_is_slice(core, A, B) for core in cores.values()):
        rank = 0
        for i, core in cores.items():
            start[i], rank = rank, rank + len(core.A)
    tensors = {CORES[0]: A.new_zeros(rank, width), CORES[1]: B.new_zeros(out, rank)}
    for i, core in cores.items():
        own = slice(start[i], start[i] + len(core.A))
        tensors[CORES[0]][own, : core.A.shape[1]] = core.A
        tensors[CORES[1]][: len(core.B), own] = core.B
    for (layer, there), part in zip(layers, parts, strict=True):
        first = start[id(part.core)]
        u = nn.functional.pad(part.u[0], (first, rank - first - part.u.shape[1]))
        v = part.v[0] * (part.scale * _times(there[0]))
        tensors |= {f"{layer.key}.vera_lambda_d": u, f"{layer.key}.vera_lambda_b": v}
    return {"r": rank, "save_projection": True}, tensors


def _pack_tokens(layers: Layers, call: str) -> Packed:
    parts: list[Any] = [there[0].part for _, there in layers]
    ids = parts[0].index
    if any(not torch.equal(part.index, ids) for part in parts):
        refuse(call, layers[0][0].path, "rows of words", "PEFT has the same rows of all tables")
    tensors = {key.replace(".token_adapter.", "."): t for key, t in _all(layers).items()}
    return {"token_indices": ids.tolist()}, tensors


def _is_slice(core: Factors, A: Tensor, B: Tensor) -> bool:
    same = len(core.A) == len(A) and torch.equal(core.A, A[:, : core.A.shape[1]])
    return same and torch.equal(core.B, B[: len(core.B)])


_PACKERS: dict[str, Callable[[Layers, str], Packed]] = {
    "LORA": _pack_lora, "IA3": _pack_ia3, "OFT": _pack_oft, "VERA": _pack_vera,
    "LOHA": _pack_loha, "LOKR": _pack_lokr, "TRAINABLE_TOKENS": _pack_tokens,
    "LN_TUNING": lambda layers, call: ({}, {}),
}  # fmt: skip
