"""What is a norm: found out by what it does, whatever it and its vectors are called."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import FrozenBatchNorm2d

import surgery
from surgery.structure.anatomy import roles_of
from surgery.structure.dataflow import attach_dataflow
from surgery.structure.ffn_traced import traced_ffns
from surgery.structure.layers import Shape, is_norm, norm_shape, shape_of
from surgery.structure.module_tree import Tree
from surgery.structure.trace import trace
from tests.structure.renaming import originals, renamed

D = 16


def vector(*shape: int, of: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.full(shape, of))


class OverMaps(nn.Module):
    """Over channels, its vectors (1, d, 1, 1) (CvT, Twins, CrossFormer) or (d, 1, 1)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.g, self.b = vector(*shape), vector(*shape, of=0.0)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * self.g + self.b


class OverMapsByRows(nn.Module):
    """Over channels, its vector (d,) (ConvNeXt's)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = vector(D)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x


class Root(nn.Module):
    """Root mean square (x-transformers, NaViT), its vector of any shape; by 1 + it in Gemma."""

    def __init__(self, *shape: int, more: float = 0.0) -> None:
        super().__init__()
        self.gamma, self.more = vector(*shape, of=0.0 if more else 1.0), more

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * (self.more + self.gamma)


class Bare(nn.Module):
    """No vectors: of a fixed width (OLMo), or of any."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        self.size = (width,) if width else None

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, self.size or x.shape[-1:])


class Batches(nn.Module):
    """By statistics of the batch in training, by those that it keeps otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = vector(D)
        self.register_buffer("mean", torch.zeros(D))
        self.register_buffer("variance", torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        over = (0, 2, 3)
        mean, variance = (
            (x.mean(over), x.var(over)) if self.training else (self.mean, self.variance)
        )
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return x * self.gain[:, None, None]


class Ours(nn.LayerNorm):
    """torch's own, over the channels of maps (timm's LayerNorm2d)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Either(nn.Module):
    """One class for both, and a word decides (Hugging Face's ConvNeXt)."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.weight, self.order = vector(D), order

    def forward(self, x: Tensor) -> Tensor:
        if self.order == "first":
            x = x.movedim(1, -1)
        x = nn.functional.layer_norm(x, (D,), self.weight)
        return x.movedim(-1, 1) if self.order == "first" else x


class Conditioned(nn.LayerNorm):
    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return super().forward(x) + shift


class KernelNorm(nn.Module):
    """It cannot be tried: it wants a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = vector(D)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return nn.functional.rms_norm(x + residual, (D,), self.weight)


NORMS = {
    "(1, d, 1, 1)": (OverMaps(1, D, 1, 1), Shape(D, D, 1)),
    "(d, 1, 1)": (OverMaps(D, 1, 1), Shape(D, D, 1)),
    "(1, d, 1)": (OverMaps(1, D, 1), Shape(D, D, 1)),
    "(d,) over maps": (OverMapsByRows(), Shape(D, D, 1)),
    "(d,)": (Root(D), Shape(D, D, -1)),
    "(1, 1, d)": (Root(1, 1, D), Shape(D, D, -1)),
    "1 + (d,)": (Root(D, more=1.0), Shape(D, D, -1)),
    "one number": (Root(1), Shape(0, 0, -1)),
    "no vector, fixed": (Bare(D), Shape(D, D, -1)),
    "no vector": (Bare(), Shape(0, 0, -1)),
    "batches": (Batches(), Shape(D, D, 1)),
    "frozen": (FrozenBatchNorm2d(D), Shape(D, D, 1)),
    "of torch's class": (Ours(D), Shape(D, D, 1)),
    "a word": (Either("first"), Shape(D, D, 1)),
    "another word": (Either("last"), Shape(D, D, -1)),
    "of torch's class, with more to take": (Conditioned(D), Shape(D, D, -1)),
    "torch's, over batches": (nn.BatchNorm2d(D), Shape(D, D, 1)),
    "torch's, over groups": (nn.GroupNorm(2, D), Shape(D, D, 1)),
    "torch's, without vectors": (nn.LayerNorm(D, elementwise_affine=False), Shape(D, D, -1)),
    "torch's, of no width": (nn.LocalResponseNorm(2), Shape(0, 0, 1)),
    "timm's, with an activation": (timm.layers.BatchNormAct2d(D), Shape(D, D, 1)),
    "it cannot be tried": (KernelNorm(), Shape(D, D, -1)),
}


class LayerScale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = vector(*shape, of=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class ResponseNorm(nn.Module):
    """A gate: what it gives grows with what it is given (ConvNeXt V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = vector(D), vector(D)

    def forward(self, x: Tensor) -> Tensor:
        g = x.norm(dim=1, keepdim=True)
        return x + x * g / (g.mean(-1, keepdim=True) + 1e-6) * self.weight + self.bias


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.weight = vector(1), vector(D)

    def forward(self, x: Tensor) -> Tensor:
        return (self.alpha * x).tanh() * self.weight


class Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sign()


class Constant(nn.Module):
    """A table that looks at no number (positions)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = vector(D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.arange(x.numel()).reshape(x.shape) + 0.5 * self.weight


class Colours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("std", torch.ones(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class NormOfMatrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = vector(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x @ self.weight, dim=-1)


class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.fn = vector(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(nn.functional.normalize(x, dim=-1) * self.gamma)


OTHERS = {
    "layer scale": LayerScale(D),
    "layer scale of maps": LayerScale(D, 1, 1),
    "layer scale of one number": LayerScale(1),
    "a gate called norm": ResponseNorm(),
    "an activation with vectors": Tanh(),
    "an activation of torch's": nn.PReLU(D),
    "signs": Sign(),
    "positions": Constant(),
    "colours": Colours(),
    "a matrix": NormOfMatrix(),
    "a norm and more": PreNorm(),
    "a linear layer": nn.Linear(D, D),
    "an identity": nn.Identity(),
    "a dropout": nn.Dropout(),
    "a softmax": nn.Softmax(-1),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_has_the_shape_of_its_vectors(name):
    module, shape = NORMS[name]
    assert norm_shape(module) == shape
    assert shape_of(module) == (shape if shape.width else None)


@pytest.mark.parametrize("name", [name for name in NORMS if name != "it cannot be tried"])
def test_names_do_not_make_a_norm(name):
    module, shape = NORMS[name]
    assert norm_shape(renamed(copy.deepcopy(module))) == shape


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_norm(name):
    assert not is_norm(OTHERS[name])
    assert not is_norm(renamed(copy.deepcopy(OTHERS[name])))


def test_neither_the_device_nor_the_numbers_matter():
    assert norm_shape(Root(D).to("meta")) == Shape(D, D, -1)
    assert norm_shape(OverMaps(1, 2 * D, 1, 1).to(torch.bfloat16)) == Shape(2 * D, 2 * D, 1)
    zero = Root(4 * D)
    nn.init.zeros_(zero.gamma)
    assert norm_shape(zero) == Shape(4 * D, 4 * D, -1)


def test_the_trial_changes_nothing():
    norm = Batches().train()
    before, state = surgery.fingerprint(norm), torch.get_rng_state()
    assert is_norm(norm)
    assert surgery.fingerprint(norm) == before
    assert norm.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_trial_calls_no_hook_and_no_forward_of_the_instance():
    norm = Root(3 * D)
    norm.register_forward_hook(lambda *_: pytest.fail("called"))
    norm.forward = lambda x: pytest.fail("called")
    assert is_norm(norm)


class Block(nn.Module):
    def __init__(self, one: nn.Module, two: nn.Module, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.mlp, self.norm2 = one, attn, mlp, two

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(torch.softmax(q @ k.transpose(-1, -2) / D**0.5, -1) @ v)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D))


@pytest.mark.parametrize("make", [lambda: Root(1), Bare, lambda: Root(1, 1, D)])
@pytest.mark.parametrize("rules", ["ssf", "adaptformer", "adapterx_ffn"])
def test_a_part_measures_a_norm_of_ones_own(make, rules):
    blocks = [Block(make(), make(), Attention(), mlp()) for _ in range(2)]
    model = renamed(nn.Sequential(*blocks, make()).eval())
    norms = roles_of(Tree(model))["norm"]
    assert [(s.width, s.out, s.axis) for s in norms] == [(D, D, -1)] * 5
    x = torch.randn(2, 5, D)
    surgery.apply(model, rules, example=x)
    assert model(x).shape == x.shape


def test_a_norm_of_no_width_behind_all_is_as_wide_as_what_comes_out():
    tree = Tree(nn.Sequential(nn.Linear(D, 3 * D), Bare()))
    assert tree.sites[-1].shape == Shape(3 * D, 3 * D, -1)
    assert Tree(nn.Sequential(Bare())).sites[-1].shape == Shape(0, 0, -1)


# parametrizations


class UnitRows(nn.Module):
    """nViT's: the rows of a matrix, normed. It is called on a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return nn.functional.normalize(weight, dim=-1)


def parametrized() -> nn.Module:
    blocks = [Block(nn.LayerNorm(D), nn.LayerNorm(D), Attention(), mlp()) for _ in range(2)]
    for block in blocks:
        for linear in (block.attn.qkv, block.mlp[0], block.mlp[2]):
            nn.utils.parametrize.register_parametrization(linear, "weight", UnitRows())
    return nn.Sequential(weight_norm(nn.Linear(D, D)), *blocks).eval()


@pytest.mark.parametrize("told", [False, True])
def test_what_makes_weights_is_no_place(told):
    model = renamed(parametrized())
    tree = Tree(model)
    attach_dataflow(tree, torch.randn(2, 5, D) if told else None)
    assert [s.path for s in tree.sites if "parametrizations" in s.path] == []
    roles = roles_of(tree)
    assert originals(roles["norm"]) == ["1.norm1", "1.norm2", "2.norm1", "2.norm2"]
    assert originals(roles["ffn"]) == ["1.mlp", "2.mlp"]
    assert originals(roles["fc1"]) == ["1.mlp.0", "2.mlp.0"]
    assert originals(roles["qkv"]) == ["1.attn.qkv", "2.attn.qkv"]


def test_a_forward_tells_whose_weights_were_made():
    found = trace(parametrized(), torch.randn(2, 5, D))
    assert [ffn.layers for ffn in traced_ffns(found)] == [
        ("1.mlp.0", "1.mlp.2"),
        ("2.mlp.0", "2.mlp.2"),
    ]


@pytest.mark.parametrize("rules", ["ssf", "adaptformer", "adapterx_ffn", "lora"])
def test_rules_run_on_parametrized_modules(rules):
    model, x = parametrized(), torch.randn(2, 5, D)
    before = model(x)
    surgery.apply(model, rules, example=x)
    assert model(x).shape == x.shape
    surgery.revert(model)
    assert torch.equal(model(x), before)


class InFloat32(nn.LayerNorm):
    """Diffusers': torch's without weights, with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        shape = self.normalized_shape
        return nn.functional.layer_norm(x.float(), shape, None, None, self.eps).to(x.dtype)


@pytest.mark.parametrize("width", [32, 24])
def test_torchs_norm_without_weights_tells_its_width(width: int) -> None:
    norm = InFloat32(width, elementwise_affine=False, bias=False)
    shape = norm_shape(norm)
    assert shape
    assert tuple(shape) == (width, width, -1)
