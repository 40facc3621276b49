"""The layers that a configuration of PEFT's means in a model, as PEFT finds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from ..structure.layers import (
    CONVS,
    is_conv,
    is_torch_attention,
    is_turned,
    linear_shape,
    named_modules,
)
from .peft_format import Config, Target


def targets_of(config: Config, model: nn.Module, keys: Iterable[str]) -> list[Target]:
    """The layers of a model that a configuration means. Raises FileError where PEFT knows none."""
    if config["target_modules"] is None and config["target_parameters"] is None:
        config.fail("it names no target_modules.", "Add them, as PEFT writes them.")
    if str(config["target_modules"]).lower() == "all-linear":  # all but the head, PEFT says
        config.said["target_modules"] = _linears(model, keys)
    found: list[Target] = []
    modules = dict(named_modules(model))
    for path, module in modules.items():
        if path and config["target_modules"] and config.targets(path):
            if is_torch_attention(modules[path.rpartition(".")[0]]) and config.kind != "LN_TUNING":
                config.fail(f"{path} is inside torch's attention, where PEFT's layers do nothing.")
            found += _layers(config, path, module)
        found += _single(config, path, module)
    _check_once(config, model, found)
    return [layer._replace(key=inner_key(layer.path, found, layer.key)) for layer in found]


def inner_key(path: str, layers: list[Target], key: str = "") -> str:
    """The key of what is at a path: PEFT wraps a module once for each parameter of it that is
    meant, and what is inside that module is its base_layer's."""
    key = key or path
    depths = Counter(layer.path for layer in layers if layer.raw)
    for outer in sorted(depths, key=len, reverse=True):
        if path.startswith(f"{outer}."):
            key = outer + ".base_layer" * depths[outer] + key.removeprefix(outer)
    return key


def _check_once(config: Config, model: nn.Module, found: list[Target]) -> None:
    """Raise FileError where a layer is meant twice, or is the model's twice."""
    keys_of = Counter(layer.key for layer in found)
    if both := [key for key, times in keys_of.items() if times > 1]:
        config.fail(f"{both[0]} is meant as a layer, and its parameter by name, too.")
    names = Counter(id(module) for _, module in named_modules(model, aliases=True))
    if twice := [layer.path for layer in found if names[id(layer.module)] > 1]:
        config.fail(f"{twice[0]} has several names, of which PEFT would change one.")


def _single(config: Config, path: str, module: nn.Module) -> list[Target]:
    """The parameters of a module that are meant by name; of several, PEFT wraps one in another."""
    names, wanted = config["target_parameters"] or [], list[str]()
    for name, parameter in module._parameters.items():
        known = f"{path}.{name}"
        if known in names or any(known.endswith(f".{each}") for each in names):
            wanted.append(name)
            if not path or parameter is None or parameter.dim() not in (2, 3):
                config.fail(f"{known} is no matrix, nor a stack of them, in a module.")
    return [
        Target(
            path, module, ".".join([path, *["base_layer"] * depth]), f"{path}.{name}", name, True
        )
        for depth, name in enumerate(reversed(wanted))
    ]


def _linears(model: nn.Module, keys: Iterable[str]) -> list[str]:
    layers = [p for p, m in named_modules(model) if isinstance(m, nn.Linear) or is_turned(m)]
    holders = {key.rpartition(".")[0].rpartition(".")[0] for key in keys}
    return [path for path in layers if path in holders or f"{path}.ia3_l" in keys]


# the convolutions that each kind knows
KERNELS: dict[str, tuple[type[nn.Module], ...]] = {
    "LORA": CONVS, "IA3": CONVS[1:], "LOHA": CONVS[:2], "LOKR": CONVS[:2],
}  # fmt: skip


TABLES: dict[str, tuple[type[nn.Module], ...]] = {
    "LORA": (nn.Embedding,), "TRAINABLE_TOKENS": (nn.Embedding, nn.Linear),
}  # fmt: skip


def _layers(config: Config, path: str, module: nn.Module) -> list[Target]:
    """One layer; two, of torch's own attention. Raises FileError where PEFT would not take it."""
    own, kind = Target(path, module, path, path), config.kind
    whole = kind == "LN_TUNING" or _is_linear(config, module)
    kernel = isinstance(module, KERNELS.get(kind, ()))
    table = isinstance(module, TABLES.get(kind, ()))
    added = [own._replace(key=f"{path}.lora_B", bias=True)] if config["lora_bias"] else []
    if added and not (whole or kernel):
        config.fail(f"{path} is a {type(module).__name__}, to which lora_bias does not fit.")
    if kind == "LORA" and is_torch_attention(module):
        inner, key = module.get_submodule("out_proj"), f"{path}.base_layer.out_proj"
        proj = Target(f"{path}.out_proj", inner, key, path, "weight")
        return [own._replace(name="in_proj_weight"), proj]
    if not (whole or kernel or table):
        config.fail(f"{path} is a {type(module).__name__}, which {kind} does not fit.")
    if whole or kind == "IA3":
        return [own, *added]
    _check_alone(config, path, module)
    return [own._replace(name="weight"), *added]


def _is_linear(config: Config, module: nn.Module) -> bool:
    """Whether a kind takes a module as it is, and not its weight."""
    turned = is_turned(module) and config.kind in ("LORA", "IA3", "VERA")
    return turned or (isinstance(module, nn.Linear) and config.kind != "TRAINABLE_TOKENS")


def _check_alone(config: Config, path: str, module: nn.Module) -> None:
    """Raise FileError where what PEFT runs beside a layer is no change of its weight: a convolution
    padded otherwise, for LoRA also in groups or dilated; words that are of a length at most."""
    lora = config.kind == "LORA"
    if is_conv(module) and lora and (module.groups > 1 or set(module.dilation) != {1}):
        config.fail(f"{path} is a convolution in groups, or dilated.")
    if is_conv(module) and module.padding_mode != "zeros":
        config.fail(f"{path} is a convolution that pads by {module.padding_mode}, not zeros.")
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        config.fail(f"{path} shortens its words as they are read, and PEFT those of LoRA, too.")


def widest(layers: list[Target]) -> tuple[int, int]:
    """The features of the widest layer, and of the one that gives most."""
    shapes = [shape for layer in layers if (shape := linear_shape(layer.module))]
    return max(shape.width for shape in shapes), max(shape.out for shape in shapes)
