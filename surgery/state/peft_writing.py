"""PEFT's folders, written: what an operation added and trained, as PEFT has such."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .._files import check_folder, write_whole
from ..engine.hooked_weights import HookedWeight
from ..engine.operation import Operation, operations
from ..engine.stack import Stack
from ..engine.trained import changed_buffers, trained_of
from ..errors import FileError
from ..parts.arguments import divisors
from ..parts.deltas import LoHa, LoKr
from ..parts.low_rank import LoRA
from ..parts.qkv_rows import placed
from ..parts.rotations import OFT
from ..parts.row_lengths import Magnitude, Rescale
from ..parts.shared_low_rank import SharedLoRA
from ..parts.sparse_updates import Rows
from ..structure.layers import is_conv, is_torch_attention, linear_shape, named_modules
from .checkpoint import state_dict
from .peft_format import PREFIX, Config, Target, targets_of
from .peft_layers import Joint, entries_of, kind_of, matrices, second, single
from .peft_reading import CONFIG, CORES, TENSORS, base_of, joints_of, widest

Layers = list[tuple[Target, list[Joint]]]
Made = tuple[dict[str, Any], dict[str, Tensor]]  # options, and tensors by name
KINDS = {
    LoRA: "LORA", Magnitude: "LORA", Rows: "LORA", Rescale: "IA3", OFT: "OFT", SharedLoRA: "VERA",
    LoHa: "LOHA", LoKr: "LOKR",
}  # fmt: skip
JOINED = {Magnitude: ("after",), Rescale: ("before", "after"), OFT: ("before",)}
AS_LORA = "Make the operation a LoRA first, surgery.as_lora(model, rank=8), and save that."
_NOT_SAVED = "PEFT saves modules, neither the model itself nor layers with parts"
KEEP = "Freeze it; or keep all there is by surgery.save(model, path)."
BIASED = ("LORA", "OFT", "VERA")  # the kinds that may train biases


def save_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = "default",
    base_model_name_or_path: str | None = None,
) -> Path:
    """Write an operation so that PEFT loads it, and answers as this model does; returns the folder.

    An operation is of one kind there: LoRA (with DoRA's lengths, at rows, tables of words,
    convolutions, nn.MultiheadAttention or single parameters), IA3, OFT, VeRA, LoHa, LoKr. What was
    unfrozen besides is saved whole, by module; where nothing else was done it is LN tuning. Of
    other parts `as_lora(model, rank=...)` makes LoRA first.

    folder  gets `adapter_config.json` and `adapter_model.safetensors`, each whole or not at all
    name    of the operation

    Raises FileError where PEFT has no place for a part, by its name; OperationError, OSError.

    >>> from surgery import apply, at, lora
    >>> model = apply(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), at("0", lora(rank=2)))
    >>> import tempfile
    >>> sorted(file.name for file in save_peft(model, tempfile.mkdtemp() + "/tuned").iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    target, call = Path(folder), f'save_peft("{folder}")'
    tensors = state_dict(model, name=name)
    operation = next(op for op in operations(model) if op.name == name)
    if operation.start.lost() or any(tensor.is_meta for tensor in tensors.values()):
        raise FileError(call, "the model is on the meta device: there are no values.", "Load some.")
    with torch.no_grad():
        options, tensors = _described(model, operation, call)
        whole = {
            key if key in CORES else PREFIX + key: tensor.detach().cpu().clone().contiguous()
            for key, tensor in tensors.items()
        }
    options |= {"base_model_name_or_path": base_model_name_or_path, "inference_mode": True}
    text = json.dumps({**options, "task_type": None}, indent=2, sort_keys=True)
    if not target.is_dir():
        check_folder(target, call)
        target.mkdir()
    metadata = {"format": "pt"}
    write_whole(target / TENSORS, lambda half: save_file(whole, half, metadata=metadata))
    write_whole(target / CONFIG, lambda half: half.write_text(text))
    return target


def _described(model: nn.Module, operation: Operation, call: str) -> Made:
    """What PEFT's two files say of an operation: options, and tensors by name."""
    joints = _by_place(model, operation, call)
    kind = _kind(joints, call)
    said = {"peft_type": kind, **_places(model, joints), **_trained(model, operation, call)}
    if kind == "LN_TUNING":
        said["target_modules"] = said.pop("modules_to_save")
    layers = _layers(model, joints, said, call)
    biases = said.pop("bias")
    said |= {"bias": _bias(layers, biases, call)} if biases else {}
    made, tensors = _MAKERS[kind](layers, call)
    config = Config(call, {k: v for k, v in {**said, **made}.items() if v != {}}, AS_LORA)
    base = base_of(config, model, [layer for layer, _ in layers])
    return config.said, {**tensors, **{key: place.tensor for key, place in base.items()}}


def _fail(call: str, place: str, part: object, why: str = "PEFT has no place for it") -> NoReturn:
    what = part if isinstance(part, str) else type(part).__name__
    raise FileError(call, f"{what} at {place}: {why}.", AS_LORA)


# where -----------------------------------------------------------------------------------------


def _by_place(model: nn.Module, operation: Operation, call: str) -> dict[str, list[Joint]]:
    """The parts by place: a layer that is linear by its path, whether its weight is meant or it."""
    modules, found = dict(named_modules(model)), dict[str, list[Joint]]()
    tied = {h.path for h in operation.hooked_sites if isinstance(h, HookedWeight) and h.reads[1:]}
    for place, joint in joints_of(operation):
        holder, _, name = place.rpartition(".")
        module = modules.get(holder)
        if place in tied and kind_of(joint.part) is not Rows:
            _fail(call, place, joint.part, "modules share this weight, and PEFT would change one")
        plain = module is not None and linear_shape(module) and not is_conv(module)
        own = holder if plain and name == "weight" and not _inner(modules, holder) else place
        found.setdefault(own, []).append(joint)
    return found


def _inner(modules: dict[str, nn.Module], path: str) -> bool:
    """Whether it is the projection inside of torch's own attention."""
    above = modules.get(path.rpartition(".")[0])
    return above is not None and is_torch_attention(above)


def _kind(joints: dict[str, list[Joint]], call: str) -> str:
    """PEFT's name of what all parts are. Raises FileError."""
    kinds = dict[str, str]()
    for place, there in joints.items():
        for joint in there:
            kind = KINDS.get(kind_of(joint.part))
            wanted = JOINED.get(kind_of(joint.part), ("beside",))
            if kind is None or joint.place not in wanted:
                _fail(call, place, getattr(joint.part, "each", joint.part))
            if joint.place != "beside" and joint.scale is not None:
                _fail(call, place, joint.part, "it is added to what it is given")
            if kind != "LORA" and (joint.rows is not None or len(there) > 1):
                _fail(call, place, joint.part, "it stands at rows, or with others")
            kinds.setdefault(kind, place)
    if len(kinds) > 1:
        _fail(call, " and ".join(kinds.values()), " and ".join(kinds), "PEFT has one kind in all")
    return next(iter(kinds), "LN_TUNING")


def _places(model: nn.Module, joints: dict[str, list[Joint]]) -> dict[str, Any]:
    """The options that say where the parts are."""
    modules, targets, parameters = dict(named_modules(model)), set[str](), list[str]()
    said: dict[str, Any] = {"trainable_token_indices": {}}
    for place, there in joints.items():
        holder, _, name = place.rpartition(".")
        within = modules.get(holder)
        if place in modules:
            targets.add(place)
        elif _inner(modules, holder):
            targets.add(holder.rpartition(".")[0])
        elif within is not None and _is_layer(within, name):
            if words := _has(there, Rows):
                part: Any = words[0].part
                said["trainable_token_indices"][holder] = part.index.tolist()
            else:
                targets.add(holder)
        else:
            parameters.append(place)
    said["target_modules"], said["target_parameters"] = sorted(targets), sorted(parameters)
    return said


def _is_layer(module: nn.Module, name: str) -> bool:
    """Whether PEFT knows a parameter by the layer that has it."""
    if is_torch_attention(module):
        return name == "in_proj_weight"
    return name == "weight" and (is_conv(module) or isinstance(module, nn.Embedding))


def _trained(model: nn.Module, operation: Operation, call: str) -> dict[str, Any]:
    """The options that say what of the base is saved: modules, but of layers with parts biases."""
    saved, biases = set[str](), set[str]()
    at = {place for place, _ in joints_of(operation)}
    layers = at | {place.rpartition(".")[0] for place in at}
    trained = [*trained_of(model, operation), *changed_buffers(model, operation)]
    names = {id(place.tensor): place.name for place in trained}
    for holder, module in named_modules(model):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if (name := names.get(id(tensor))) is None:
                continue  # of those that are tied, each holder is saved
            if not holder or (holder in layers and name != "bias"):
                where = f"{holder}.{name}".strip(".")
                raise FileError(call, f"{where} is trained, and {_NOT_SAVED}.", KEEP)
            (biases if holder in layers else saved).add(holder)
    return {"modules_to_save": sorted(saved), "bias": sorted(biases)}


def _layers(
    model: nn.Module, joints: dict[str, list[Joint]], said: dict[str, Any], call: str
) -> Layers:
    """The layers that the options mean, which are those with parts, each with its parts."""
    asked, words = set(said["target_modules"]), said["trainable_token_indices"]
    known = {k: v for k, v in said.items() if k != "bias" and v}
    layers = targets_of(
        Config(call, {**known, "target_modules": sorted(asked)}, AS_LORA), model, ()
    )
    if {layer.place for layer in layers if not layer.raw} != asked:  # names that end others
        said["target_modules"] = "|".join(map(re.escape, sorted(asked))) if asked else []
        config = Config(call, {**known, "target_modules": said["target_modules"]}, AS_LORA)
        layers = targets_of(config, model, ())
    modules = dict(named_modules(model))
    layers += [Target(path, modules[path], path, path, "weight") for path in words]
    found = {layer.place: layer for layer in layers}
    paths = {layer.known for layer in layers if not layer.raw} - set(words)
    if lost := [*(place for place in joints if place not in found), *(paths ^ asked)]:
        _fail(call, lost[0], "what is trained", "PEFT's names do not tell it from others")
    return [(layer, joints.get(layer.place, [])) for layer in layers]


def _bias(layers: Layers, holders: list[str], call: str) -> str:
    """The option that says that biases of layers with parts are trained."""
    own = [layer.path for layer, there in layers if there]
    kind = KINDS[kind_of(next(there[0].part for _, there in layers if there))]
    if kind not in BIASED or any(path not in own for path in holders):
        _fail(call, holders[0], "a trained bias", f"{kind} saves none of a layer that has a part")
    return f"{kind.lower()}_only"


# what ------------------------------------------------------------------------------------------


def _tensors(layer: Target, there: list[Joint]) -> dict[str, Tensor]:
    return {key: entry.get() for key, entry in entries_of(layer, there).items()}


def _times(joint: Joint) -> float:
    return 1.0 if joint.scale is None else joint.scale


def _alpha(scale: float, rank: int) -> float:
    """What PEFT divides by the rank."""
    alpha = scale * rank
    return round(alpha) if round(alpha) / rank == scale else alpha


def _patterns(facts: dict[str, tuple[int, float]], alpha: str) -> dict[str, Any]:
    """Rank and alpha of all layers, and the patterns of those that differ from most."""
    if not facts:
        return {}
    said: dict[str, Any] = {}
    for i, (name, pattern) in enumerate((("r", "rank_pattern"), (alpha, "alpha_pattern"))):
        most = Counter(fact[i] for fact in facts.values()).most_common(1)[0][0]
        others = {f"^{re.escape(k)}": fact[i] for k, fact in facts.items() if fact[i] != most}
        said |= {name: most, pattern: others}
    return said


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
    parts: list[tuple[Any, Joint]] = [(j.part, j) for j in there]
    if len(parts) == 1 and there[0].rows is None and len(parts[0][0].rows) == 1:
        part, joint = parts[0]
        scale = part.scale * _times(joint) / layer.times
        if part.rows == [slice(0, part.out)] and scale > 0:
            return _Low(part.A[0], part.B[0], scale)
    W = layer.weight.detach()
    low = [_Low(W.new_zeros(0, W[0].numel()), W.new_zeros(len(W), 0), 1.0)]
    for part, joint in parts:
        A, B = part.maps()
        B = B * (_times(joint) / layer.times)
        rows = slice(0, len(W)) if joint.rows is None else slice(*joint.rows.indices(len(W))[:2])
        low.append(_Low(A, placed([B.mT], [rows], len(W)).mT, 1.0))
    return _Low(torch.cat([each.A for each in low]), torch.cat([each.B for each in low], 1), 1.0)


def _made_lora(layers: Layers, call: str) -> Made:
    facts, tensors = dict[str, tuple[int, float]](), dict[str, Tensor]()
    lengths = {layer.place for layer, there in layers if _has(there, Magnitude)}
    drops: set[float] = set()
    alike: dict[str, list[tuple[Target, _Low]]] = {}
    for layer, there in layers:
        low = [joint for joint in there if kind_of(joint.part) is LoRA]
        drops |= {getattr(j.part.drop, "p", 0.0) for j in low if isinstance(j.part, LoRA)}
        others = [joint for joint in there if joint not in low]
        tensors |= _tensors(layer, others)
        if low and isinstance(low[0].part, Stack):
            inner: Any = low[0].part.each.part
            facts[layer.known] = inner.rank, _alpha(inner.scale * _times(low[0]), inner.rank)
            tensors |= _tensors(layer, low)
        elif low or not _has(there, Rows):
            alike.setdefault(layer.known, []).append((layer, _low(layer, low)))
        if bool(_has(there, Magnitude)) is not bool(lengths) or (
            lengths and (len(low) > 1 or low[0].scale not in (None, 1.0))
        ):
            _fail(call, layer.place, "LoRA", "PEFT has DoRA's lengths at all layers, or at none")
    for known, two in alike.items():  # torch's attention has two, of one rank
        rank = max(len(low.A) for _, low in two) or 1
        same = len({(len(low.A), low.scale) for _, low in two}) == 1 and len(two[0][1].A)
        for layer, found in two:
            own = found if same else found.padded(rank)
            facts[known] = rank, _alpha(own.scale, rank)
            for name, entry in matrices(layer, own.A, own.B).items():
                tensors[f"{layer.key}.{name}"] = entry if isinstance(entry, Tensor) else entry.get()
    drop = drops.pop() if len(drops) == 1 else 0.0
    return {
        **_patterns(facts, "lora_alpha"), "use_dora": bool(lengths), "lora_dropout": drop,
    }, tensors  # fmt: skip


def _has(there: list[Joint], kind: type[nn.Module]) -> list[Joint]:
    return [joint for joint in there if kind_of(joint.part) is kind]


def _made_ia3(layers: Layers, call: str) -> Made:
    before = [layer.path for layer, there in layers if there[0].place == "before"]
    return {"feedforward_modules": before}, _all(layers)


def _all(layers: Layers) -> dict[str, Tensor]:
    return {key: t for layer, there in layers for key, t in _tensors(layer, there).items()}


def _made_oft(layers: Layers, call: str) -> Made:
    parts: list[Any] = [there[0].part for _, there in layers]
    sizes, blocks = {p.size for p in parts}, {p.width // p.size for p in parts}
    forms = {(p.terms, len(p.skew) == 1 != p.width // p.size) for p in parts}
    (terms, one_block), *other = forms
    if other or terms == 3 or (len(sizes) > 1 and len(blocks) > 1):
        _fail(call, layers[0][0].path, "OFT", "PEFT has one size or number of blocks, one form")
    same = len(sizes) == 1
    said = {
        "r": 0 if same else blocks.pop(), "oft_block_size": sizes.pop() if same else 0,
        "use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5,
        "block_share": one_block,
    }  # fmt: skip
    return said, _all(layers)


def _made_loha(layers: Layers, call: str) -> Made:
    facts, tensors = dict[str, tuple[int, float]](), dict[str, Tensor]()
    for layer, there in layers:
        part: Any = there[0].part
        scale, rank = part.scale * _times(there[0]), len(part.A1)
        kept = scale > 0 and single(scale) == scale  # in float32, as PEFT has it
        own = _tensors(layer, there)
        if not kept:
            own[f"{layer.key}.hada_w1_a"] = own[f"{layer.key}.hada_w1_a"] * scale
        facts[layer.known] = rank, _alpha(scale if kept else 1.0, rank)
        tensors |= own
    return _patterns(facts, "alpha"), tensors


def _made_lokr(layers: Layers, call: str) -> Made:
    facts, tensors, sides = dict[str, tuple[int, float]](), dict[str, Tensor](), set[Any]()
    for layer, there in layers:
        part: Any = there[0].part
        outer, inner = part.outer(), part.inner()
        scale = part.scale * _times(there[0])
        right = second(layer, inner).shape
        sides |= {(len(outer) * right[0], len(outer)), (outer.shape[1] * right[1], outer.shape[1])}
        whole = part.A is None or 2 * part.rank >= max(right[:2])  # PEFT goes by the rank
        rank = max(part.rank, -(-max(right[:2]) // 2)) if whole else part.rank
        kept = scale > 0
        tensors[f"{layer.key}.lokr_w1"] = outer if kept else outer * scale
        facts[layer.known] = rank, _alpha(scale if kept else 1.0, rank)
        if whole:
            tensors[f"{layer.key}.lokr_w2"] = second(layer, inner).get()
        else:
            tensors |= {f"{layer.key}.lokr_w2_a": part.B, f"{layer.key}.lokr_w2_b": part.A}
    for factor in (-1, *sorted({side for _, side in sides})):
        if all(_split(size, factor) == side for size, side in sides):
            return {**_patterns(facts, "alpha"), "decompose_factor": factor}, tensors
    _fail(call, layers[0][0].path, "LoKr", "PEFT would cut these layers into other blocks")


def _split(size: int, factor: int) -> int:
    """Into how many blocks PEFT's LoKr cuts a number of features."""
    if factor > 0 and size % factor == 0:
        return factor
    most = size if factor == -1 else factor
    return max(n for n in divisors(size) if n * n <= size and n <= most)


def _made_vera(layers: Layers, call: str) -> Made:
    """The matrices of all layers are slices of two; where they are not, each has ranks there."""
    parts: list[Any] = [there[0].part for _, there in layers]
    cores = list({id(part.core): part.core for part in parts}.values())
    if many := [layer.path for layer, there in layers if len(there[0].part.u) > 1]:  # type: ignore[arg-type]
        _fail(call, many[0], "SharedLoRA", "it has vectors for several rows")
    width, out = widest([layer for layer, _ in layers])
    A = max((core.A for core in cores), key=lambda A: A.shape[1])
    B = max((core.B for core in cores), key=len)
    sliced = all(
        len(core.A) == len(A)
        and torch.equal(core.A, A[:, : core.A.shape[1]])
        and torch.equal(core.B, B[: len(core.B)])
        for core in cores
    )
    ranks = [len(core.A) for core in cores]
    start = {id(core): 0 if sliced else sum(ranks[:i]) for i, core in enumerate(cores)}
    rank = len(A) if sliced else sum(ranks)
    whole = {CORES[0]: A.new_zeros(rank, width), CORES[1]: B.new_zeros(out, rank)}
    for core in cores:
        own = slice(start[id(core)], start[id(core)] + len(core.A))
        whole[CORES[0]][own, : core.A.shape[1]] = core.A
        whole[CORES[1]][: len(core.B), own] = core.B
    for (layer, there), part in zip(layers, parts, strict=True):
        first = start[id(part.core)]
        u = nn.functional.pad(part.u[0], (first, rank - first - part.u.shape[1]))
        scale = part.scale * _times(there[0])
        whole |= {f"{layer.key}.vera_lambda_d": u, f"{layer.key}.vera_lambda_b": part.v[0] * scale}
    return {"r": rank, "save_projection": True}, whole


_MAKERS: dict[str, Callable[[Layers, str], Made]] = {
    "LORA": _made_lora, "IA3": _made_ia3, "OFT": _made_oft, "VERA": _made_vera,
    "LOHA": _made_loha, "LOKR": _made_lokr, "LN_TUNING": lambda layers, call: ({}, {}),
}  # fmt: skip
