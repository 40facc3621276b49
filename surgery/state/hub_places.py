"""What adapters (adapter-hub) does at a place, as edits here; its tensors, as those of parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import is_integer, is_number
from ..parts.adapters import Adapter, QuickGELU, adapter
from ..parts.low_rank import LoRA, lora
from ..parts.row_lengths import Rescale, rescale
from ..rules.edits import Edit, append, parallel, prepend
from ..rules.part import Maker
from ..rules.relations import inside, span
from ..rules.roles import ffn, norm
from ..rules.selector import Where
from ..structure.anatomy import roles_of
from ..structure.layers import linear_shape, named_modules
from ..structure.module_tree import Tree
from .foreign import Held, fail, times
from .peft_format import LARGEST
from .reading import FIT

MERGE = "Load it by adapters, merge it there where that can be, and save the model."
SILENT = {
    "dropout", "dtype", "factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity",
    "init_weights", "init_weights_seed", "inv_adapter_reduction_factor", "learn_phm", "phm_bias",
    "phm_c_init", "phm_dim", "phm_init_range", "phm_rank", "shared_W_phm", "shared_phm_rule",
    "stochastic_depth", "reduction_factor", "mh_adapter", "output_adapter", "selfattn_lora",
    "intermediate_lora", "output_lora", "architecture", "bottleneck_size", "encoder_prefix",
    "cross_prefix", "shared_gating",
}  # fmt: skip
CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(["original_ln_before", "original_ln_after", "is_parallel", "phm_layer", "flat"],
                    lambda v: isinstance(v, bool)),
    "residual_before_ln": lambda v: isinstance(v, (bool, str)),
    "scaling": lambda v: v in ("learned", "channel") or (is_number(v) and abs(v) <= LARGEST),
    "non_linearity": lambda v: isinstance(v, str),
    **dict.fromkeys(["r", "prefix_length"], lambda v: is_integer(v) and v <= LARGEST),
    "alpha": lambda v: is_number(v) and 0 < v <= LARGEST,
    "composition_mode": lambda v: v in ("add", "scale"),
    "attn_matrices": lambda v: isinstance(v, list) and all(isinstance(m, str) for m in v),
    "leave_out": lambda v: isinstance(v, list) and all(is_integer(n, least=0) for n in v),
}  # fmt: skip
DEFAULTS = {"original_ln_after": True, "residual_before_ln": True, "scaling": 1.0, "r": 8,
            "alpha": 8, "composition_mode": "add", "attn_matrices": ["q", "v"]}  # fmt: skip
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "swish": nn.SiLU, "silu": nn.SiLU, "tanh": nn.Tanh,
    "leakyrelu": nn.LeakyReLU, "sigmoid": nn.Sigmoid, "quick_gelu": QuickGELU, "mish": nn.Mish,
    "relu6": nn.ReLU6,
}  # fmt: skip
# types of models that adapters gives no norm after a sublayer, of those with adapters by its name
PRE_NORM = {"gpt2", "llama", "mistral", "vit"}


Said = Callable[[str], Any]


class Spot(NamedTuple):
    """A part at a place.

    key      for its tensors; site: the path of the place, or of a span what stands before its "("
    kind     of the part; block: which holds a span; within: the span by the address of its block
    """

    key: str
    site: str
    kind: type[nn.Module]
    edits: tuple[Edit, ...]
    tensors: dict[str, Held]
    block: str = ""
    within: Callable[[str], Where] | None = None


class Hub:
    """A folder's configuration, seen to say nothing that is not understood.

    named  what a name in the file is in the model
    """

    def __init__(
        self, call: str, said: Mapping[str, Any], model: nn.Module, named: Callable[[str], str]
    ) -> None:
        self.call, self.said, self.model, self.named = call, said, model, named
        self.modules = dict(named_modules(model))
        self.roles = roles_of(Tree(model))
        config = said["config"]
        if not isinstance(config, dict) or not isinstance(said["model_type"], str):
            fail(call, f"its config is {config!r:.100}, which says too little.", "Save it again.")
        union = config.get("architecture") == "union"
        configs: Any = config.get("configs") if union else [config]
        self.configs: list[dict[str, Any]] = configs
        if not isinstance(self.configs, list) or not all(isinstance(c, dict) for c in self.configs):
            fail(call, "its config is no list of configs.", "Save it again.")
        for each in self.configs:
            self._check(each)

    def _check(self, config: Mapping[str, Any]) -> None:
        if config.get("architecture") not in (None, "lora", "prefix_tuning"):
            fact = f"its architecture is {config['architecture']!r:.100}, which is not read here."
            fail(self.call, fact, MERGE)
        for name, value in config.items():
            if value is None or name in SILENT:
                continue
            if name not in CHECKS and value not in (False, [], ""):
                fail(self.call, f"{name:.100}={value!r:.100} is not known here.", MERGE)
            if name in CHECKS and not CHECKS[name](value):
                fail(self.call, f"{name}={value!r:.100} makes no sense.", MERGE)

    def config(self, *architectures: str | None) -> Said:
        """What the one configuration of an architecture says of an option. Raises FileError."""
        found = [c for c in self.configs if c.get("architecture") in architectures]
        if len(found) != 1:
            fail(self.call, f"it has {len(found)} configurations for its tensors.", MERGE)
        return lambda name: DEFAULTS.get(name) if found[0].get(name) is None else found[0][name]

    def block(self, path: str) -> str:
        """The path of the block that a module is, or is in. Raises FileError."""
        blocks: list[str] = [site.path for site in self.roles["block"]]
        found = [block for block in blocks if f"{path}.".startswith(f"{block}.")]
        if not found:
            fail(self.call, f"{path} is in none of the model's blocks.", FIT)
        return found[0]

    def inner(self, role: str, block: str) -> Any:
        """The one site of a role in a block. Raises FileError."""
        found = [s for s in self.roles[role] if s.entry.path.startswith(f"{block}.")]
        if len(found) != 1:
            fail(self.call, f"{block} has {len(found)} places for {role}.", FIT)
        return found[0]


# LoRA and IA3 ----------------------------------------------------------------------------------


def low_rank(hub: Hub, path: str, tensors: dict[str, Held], shared: Mapping[str, Held]) -> Spot:
    """LoRA at a linear layer, or IA3, of the chosen rows where queries, keys and values are one."""
    said, site = hub.config("lora"), hub.named(path)
    shape = linear_shape(hub.modules[site])
    if shape is None or "lora_B" not in tensors or len(tensors["lora_B"].shape) != 2:
        fail(hub.call, f"{site} is no linear layer that its tensors fit.", FIT)
    out, rank = tensors["lora_B"].shape
    rows = None
    if out != shape.out or tensors.get("lora_A", tensors["lora_B"]).shape[0] not in (rank, out):
        matrices = set(said("attn_matrices") or ())
        rows = " ".join(m if m in matrices else f"_{m}" for m in "qkv")
    if said("composition_mode") == "scale":
        return Spot(path, site, Rescale, (append(rescale(rows=rows)),),
                    {k: _times(held, said("alpha")) for k, held in tensors.items()})  # fmt: skip
    if rank != said("r"):
        fail(hub.call, f"{site} has a rank of {rank} there, and r={said('r')} is said.", FIT)
    update = lora(rank=rank, alpha=said("alpha"), rows=rows)
    return Spot(path, site, LoRA, (parallel(update),), tensors)


# bottlenecks -----------------------------------------------------------------------------------


def bottleneck(hub: Hub, path: str, tensors: dict[str, Held], shared: Mapping[str, Held]) -> Spot:
    """A bottleneck at a sublayer: after it, beside it, or after the sum, as the options say."""
    said, (stem, _, word) = hub.config(None), path.rpartition(".")
    scale, beside = said("scaling"), bool(said("is_parallel"))
    held = _matrices(hub, said, tensors, shared)
    factor: Any = tensors.get("scaling") if isinstance(scale, str) else scale
    if not beside or isinstance(scale, str):
        held |= {k: _times(held[k], factor) for k in ("up.weight", "up.bias") if k in held}
        factor = 1.0
    activation = ACTIVATIONS.get(str(said("non_linearity")).lower())
    if activation is None or "down.weight" not in held or factor is None:
        fail(hub.call, f"{path} has no bottleneck that is known here.", MERGE)
    make = partial(adapter, rank=held["down.weight"].shape[0], activation=activation)
    if not word.endswith("_adapters"):
        return _at_norm(hub, said, Spot(path, hub.named(path), Adapter, (), held), make, factor)
    if hub.said["model_type"] not in PRE_NORM:
        fact = f"it is of a {hub.said['model_type']!r:.50}, of whose blocks nothing is known here."
        fail(hub.call, fact, MERGE)
    spot = Spot(path, hub.named(stem), Adapter, (), held)
    return _before_norm(hub, said, spot, make, factor, word)


def _at_norm(hub: Hub, said: Said, spot: Spot, make: Callable[..., Maker], scale: float) -> Spot:
    """In what holds the last linear layer of a sublayer, and the norm of the sum (BERT)."""
    children = {f"{spot.site}.{name}": m for name, m in hub.modules[spot.site]._modules.items()}
    norms = [path for path, m in children.items() if isinstance(m, nn.LayerNorm)]
    linears = [path for path, m in children.items() if m is not None and linear_shape(m)]
    if len(norms) != 1 or len(linears) != 1:
        fail(hub.call, f"{spot.site} holds no linear layer, and no norm, alone.", MERGE)
    if said("is_parallel"):
        block = hub.block(spot.site)
        if not said("original_ln_after") or hub.inner("ffn", block).exit.path != linears[0]:
            fail(hub.call, f"what it has beside {spot.site} is not known here.", MERGE)
        edits = (parallel(make(), scale=scale),)
        return spot._replace(site=f"{block}.(", edits=edits, block=block, within=_whole_ffn)
    order = _order(hub, said)
    if order == "inside":
        return spot._replace(site=linears[0], edits=(append(make(), residual=True),))
    if order == "after":
        return spot._replace(site=norms[0], edits=(append(make(), residual=True),))
    return spot._replace(site=norms[0], edits=(prepend(make(normed=True), residual=True),))


def _before_norm(
    hub: Hub, said: Said, spot: Spot, make: Callable[..., Maker], scale: float, word: str
) -> Spot:
    """In a block whose norms stand before its sublayers (GPT-2)."""
    block, last = hub.block(spot.site), word == "output_adapters"
    order = "beside" if said("is_parallel") else _order(hub, said)
    if order == "beside" and last and said("original_ln_after"):
        edits = (parallel(make(), scale=scale),)
        return spot._replace(site=f"{block}.(", edits=edits, block=block, within=_from_norm)
    if order == "inside":
        site = hub.inner("ffn" if last else "attn", block)
        if site.is_span:
            fail(hub.call, f"{site.path} is no module, which its adapter could follow.", MERGE)
        return spot._replace(site=site.path, edits=(append(make(), residual=True),))
    if order == "beside" or not last:
        fail(hub.call, f"what it has at {spot.site}, {word}, is not known here.", MERGE)
    return spot._replace(site=block, edits=(append(make(), residual=True),))


def _whole_ffn(block: str) -> Where:
    return ffn & inside(block)


def _from_norm(block: str) -> Where:
    return span(norm, ffn & inside(block))


def _order(hub: Hub, said: Said) -> str:
    """Where a bottleneck stands: inside the residual sum, after it and its norm, or about these."""
    order = said("original_ln_before"), said("original_ln_after"), said("residual_before_ln")
    known = {(True, True, True): "about", (True, False, False): "after",
             (False, True, True): "inside", (False, True, False): "inside"}  # fmt: skip
    if order not in known:
        told = "original_ln_before={}, original_ln_after={}, residual_before_ln={!r:.50}"
        fail(hub.call, f"{told.format(*order)} together are not known here.", MERGE)
    return known[order]


def _matrices(
    hub: Hub, said: Said, tensors: Mapping[str, Held], shared: Mapping[str, Held]
) -> dict[str, Held]:
    """Weights and biases by the names they have in a part; what else there is, by its own."""
    found = dict(tensors)
    if isinstance(said("scaling"), str):
        found.pop("scaling", None)
    for word, start in (("down", "adapter_down.0."), ("up", "adapter_up.")):
        own = {k.removeprefix(start): found.pop(k) for k in tensors if k.startswith(start)}
        if said("phm_layer"):
            try:
                own = _dense(own, shared, word)
            except (LookupError, ValueError):
                fail(hub.call, f"of {word}, there is no sum of Kronecker products.", FIT)
        found |= {f"{word}.{name}": held for name, held in own.items()}
    return found


def _dense(own: Mapping[str, Held], shared: Mapping[str, Held], word: str) -> dict[str, Held]:
    """The matrix that a sum of Kronecker products is (Compacter), and its bias."""
    W = _product(own, "W") or _product(shared, f"W_{word}")
    rule = _product(own, "phm_rule") or _product(shared, "phm_rule")
    if W is None or rule is None:
        raise LookupError
    (_, height, width), (_, p, q) = W.shape, rule.shape
    used = {"W", "W_left", "W_right", "phm_rule", "phm_rule_left", "phm_rule_right", "b"}
    found = {name: held for name, held in own.items() if name not in used}

    def weight() -> Tensor:
        pairs = zip(rule.get(), W.get(), strict=True)
        return torch.stack([torch.kron(a, b) for a, b in pairs]).sum(0).mT

    shape = (q * width, p * height)
    bias = own.get("b", Held("b", shape[:1], "F32", lambda: torch.zeros(shape[0])))
    return {**found, "weight": Held(W.key, shape, W.dtype, weight), "bias": bias}


def _product(held: Mapping[str, Held], name: str) -> Held | None:
    """A stack of matrices, or of products of two."""
    if name in held or f"{name}_left" not in held:
        return held.get(name)
    left, right = held[f"{name}_left"], held[f"{name}_right"]
    (n, height, _), (_, _, width) = left.shape, right.shape
    return Held(left.key, (n, height, width), left.dtype, lambda: left.get() @ right.get())


def _times(held: Held, factor: Held | float | None) -> Held:
    """A tensor by a number, or by one of the file's for each of its rows, or for all."""
    if isinstance(factor, Held):
        fits = factor.shape in ((1,), held.shape[:1])
        shape = (-1, *[1] * (len(held.shape) - 1))
        own = lambda: held.get() * factor.get().reshape(shape)  # noqa: E731
        return held._replace(get=own, shape=held.shape if fits else factor.shape)
    return times(held, 1.0 if factor is None else factor)
