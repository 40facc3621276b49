"""What one module alone tells: its widths and feature axis, and what kind of layer it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from .norms import tried_as_norm

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NARROWEST = 8  # features; anything below is no model width


class Shape(NamedTuple):
    """Features in, features out, and the axis they lie on (-1 last, 1 after the batch)."""

    width: int
    out: int
    axis: int


def linear_shape(module: nn.Module) -> Shape | None:
    """The shape of a projection: Linear, transposed Linear, 1x1 convolution; None for others."""
    if isinstance(module, nn.Linear):
        return Shape(module.in_features, module.out_features, -1)
    if is_conv(module):
        per_position = set(module.kernel_size) == {1} and set(module.stride) == {1}
        mixes = 0 < 2 * module.groups < module.in_channels  # some, though in groups (SqueezeBERT)
        return Shape(module.in_channels, module.out_channels, 1) if per_position and mixes else None
    weight = dict(module._parameters.items()).get("weight")
    if weight is None or weight.dim() != 2 or children(module):
        return None
    if is_turned(module):
        return Shape(weight.shape[0], weight.shape[1], -1)
    if "linear" in type(module).__name__.lower():  # of no common class, as in I-BERT
        return Shape(weight.shape[1], weight.shape[0], -1)
    return None


def is_turned(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as (in, out), as GPT-2's Conv1D does."""
    return isinstance(vars(module).get("nf"), int) and not isinstance(module, nn.Linear)


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a module itself holds, without those below it."""
    return [p for p in module._parameters.values() if p is not None]


def held_weights(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Its own parameters by name, those too of which its parametrizations make its weights."""
    if isinstance(module, ParametrizationList):
        return  # what it makes is a weight of the module that holds it
    made = dict(module._modules.items()).get("parametrizations")
    lists = made.children() if made is not None and is_parametrized(module) else ()
    for each in (module, *lists):
        yield from ((name, p) for name, p in each._parameters.items() if p is not None)


def named_children(module: nn.Module) -> dict[str, nn.Module]:
    """What it is made of, by name, aliases included, without what surgery added to it."""
    return {
        name: child
        for name, child in module._modules.items()
        if child is not None and not getattr(type(child), "_is_surgery_additions", False)
    }


def children(module: nn.Module) -> list[nn.Module]:
    """What it is made of, without what surgery added to it, nor its parametrizations."""
    return list(called_children(module).values())


def called_children(module: nn.Module) -> dict[str, nn.Module]:
    """The same by name: parametrizations are called on weights, and never on features."""
    named = named_children(module)
    if "parametrizations" in named and is_parametrized(module):
        del named["parametrizations"]
    return named


def named_modules(model: nn.Module, aliases: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """A model and all below it by path, without what surgery added to it.

    aliases  a module that has several names comes by each of them
    """
    seen: set[int] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        seen.add(id(module))
        yield path, module
        for name, child in named_children(module).items():
            if id(child) not in seen:
                yield from walk(f"{path}.{name}".strip("."), child)
        if aliases:
            seen.remove(id(module))  # then it is left out inside itself alone

    yield from walk("", model)


def is_token(parameter: nn.Parameter) -> bool:
    """Whether it is a learned token, such as a class token: (1, 1, width)."""
    return parameter.dim() == 3 and parameter.shape[:2] == (1, 1)


def expert_stacks(module: nn.Module) -> list[tuple[int, int, int]]:
    """The shapes (experts, ., .) of the stacks of matrices that a module itself holds."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return []
    stacks = [p for p in own_parameters(module) if p.dim() == 3]
    shapes = [(p.shape[0], p.shape[1], p.shape[2]) for p in stacks]
    return [s for s in shapes if min(s[1:]) > 1 and s[0] > 1]


def is_conv(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Whether it is a convolution."""
    return isinstance(module, CONVS)


def is_spatial_conv(module: nn.Module) -> bool:
    """Whether it is a convolution that mixes positions and channels at once."""
    return is_conv(module) and max(module.kernel_size) > 1 and module.groups != module.in_channels


def is_torch_attention(module: nn.Module) -> bool:
    """Whether it is torch's own attention, which runs without calling the projections in it."""
    return isinstance(module, nn.MultiheadAttention)


def is_sigmoid(module: nn.Module) -> bool:
    """Whether it is a sigmoid, hard ones too: what it gives is no feature but a weight."""
    return "sigmoid" in type(module).__name__.lower()


def may_be_inside_ffn(module: nn.Module) -> bool:
    """Whether it may stand between the projections of a feed-forward network.

    Not what holds a matrix of its own (LeViT's attention has biases), nor what pools or weighs up
    positions (SqueezeBERT's has a softmax); a depthwise convolution may (PVTv2, SegFormer).
    """
    kind = type(module).__name__.lower()
    if is_torch_attention(module) or "pool" in kind or "softmax" in kind:
        return False
    if is_conv(module):
        keeps_size = set(module.stride) == {1}
        return keeps_size and module.groups == module.in_channels == module.out_channels
    return linear_shape(module) is None and all(map(_is_vector, own_parameters(module)))


def _is_vector(tensor: Tensor) -> bool:
    """Whether it varies along one axis at most: (width,), (1, 1, width), (width, 1, 1), ()."""
    return not is_lazy(tensor) and tensor.numel() == max(tensor.shape, default=1)


def is_norm(module: nn.Module) -> bool:
    """Whether it normalises: torch's own norms, and what a trial shows to be one."""
    return norm_shape(module) is not None


def norm_shape(module: nn.Module) -> Shape | None:
    """The shape of a norm, 0 wide where it does not fix how many features it takes (ScaleNorm).

    It holds vectors only. Below it there may be what has no parameters: an activation, a dropout
    (timm's BatchNormAct2d).
    """
    kind = type(module)
    if kind not in _TRIED:
        torchs = kind.__module__.partition(".")[0] == "torch"
        _TRIED[kind] = None if torchs and not issubclass(kind, _NORMS) else kind.forward
    if _TRIED[kind] is None or not _holds_vectors(module):
        return None
    tried, own = None, _torchs_shape(module)
    if _TRIED[kind] not in _FORWARDS:
        tried = tried_as_norm(module)
    if tried is None:
        return own
    width = tried.width or (own.width if own else 0)  # of torch's class (diffusers' in float32)
    return Shape(width, width, tried.axis)


_TRIED: dict[type[nn.Module], object] = {}  # by class, what is tried; None: no norm
_NORMS = (
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.LocalResponseNorm),
    nn.modules.batchnorm._NormBase,
)
_FORWARDS = {kind.forward for kind in (*_NORMS[:4], nn.BatchNorm1d, nn.SyncBatchNorm)} | {
    nn.InstanceNorm1d.forward
}


def _holds_vectors(module: nn.Module) -> bool:
    """Whether it holds vectors, or nothing at all, and nothing below it holds any other."""
    vectors, inside = own_parameters(module), children(module)
    if not all(map(_is_vector, vectors)) or (inside and not vectors):
        return False
    own = {id(vector) for vector in vectors}
    return all(id(p) in own for child in inside for p in child.parameters())


def _torchs_shape(module: nn.Module) -> Shape | None:
    if not isinstance(module, _NORMS):
        return None
    names = ("normalized_shape", "num_features", "num_channels")
    size = next((size for name in names if (size := getattr(module, name, None))), 0)
    width = size if isinstance(size, int) else size[-1]
    return Shape(width, width, -1 if isinstance(module, _NORMS[:2]) else 1)


def keeps_statistics(module: nn.Module) -> bool:
    """Whether it normalises by running statistics, which every forward in training changes."""
    buffers = module._buffers.items()
    return any(name.startswith("running_") and tensor is not None for name, tensor in buffers)


def shape_of(module: nn.Module) -> Shape | None:
    """The shape of any layer that fixes a number of features; None for others."""
    if shape := linear_shape(module):
        return shape
    if isinstance(module, nn.MultiheadAttention):
        return Shape(module.embed_dim, module.embed_dim, -1)
    if is_conv(module):
        return Shape(module.in_channels, module.out_channels, 1)
    norm = norm_shape(module)
    return norm if norm and norm.width else None


def forward_of(module: nn.Module) -> object:
    """The function that a call of the module runs; that of nn.Module where it has none."""
    own, of_class = module.__dict__.get("forward"), getattr(type(module), "forward", None)
    if own is None or (getattr(own, "__func__", None), getattr(own, "__self__", None)) == (
        of_class,
        module,
    ):  # the class's own, which accelerate leaves there when it takes its hooks off
        return of_class
    forward: object = own
    return forward


def is_list(module: nn.Module) -> bool:
    """Whether it only lists modules, and is never called itself."""
    lists = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return lists and forward_of(module) is nn.Module.forward


def is_nonlinear(module: nn.Module) -> bool:
    """Whether it has neither children nor parameters, and yet does more than pass on or scale.

    A class that is not torch's own is tried on a few numbers, in eval mode and on a copy: an
    activation bends them, a dropout or a change of shape does not.
    """
    if children(module) or module._parameters:
        return False
    kind = type(module)
    if kind not in _NONLINEAR:
        activation = kind.__module__ == nn.ReLU.__module__ or isinstance(module, nn.GLU)
        others = kind.__module__.split(".")[0] != "torch"
        _NONLINEAR[kind] = activation or (others and _bends_numbers(module))
    return _NONLINEAR[kind]


_NONLINEAR: dict[type[nn.Module], bool] = {}


def _bends_numbers(module: nn.Module) -> bool:
    x = torch.linspace(-2, 2, 8, device="cpu").reshape(1, 1, 8)
    try:
        copied = copy.copy(module)
        copied.training = False
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            once, twice, minus = (copied.forward(scale * x) for scale in (1, 2, -1))
            return not (torch.equal(2 * once, twice) and torch.equal(-once, minus))
    except Exception:  # it takes something else
        return False
