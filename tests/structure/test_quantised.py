"""What takes no gradient is known by how it is kept, not by the name of a library."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from surgery.structure.quantised import is_packed, is_quantised

pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz.*")


class Int8(Tensor):
    """A weight of int8 and scales that shows itself as floating, as torchao's do."""

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor) -> Int8:
        return Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype)  # type: ignore

    def __init__(self, data: Tensor, scale: Tensor) -> None:
        self.data8, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data8", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.clone.default, aten.alias.default):
            out = cls(args[0].data8, args[0].scale)
            return return_and_correct_aliasing(func, args, kwargs or {}, out)
        plain = [a.data8 * a.scale if isinstance(a, cls) else a for a in args]
        return func(*plain, **(kwargs or {}))


class Bare(Int8):
    """The same, which does not say what it wraps."""

    __tensor_flatten__ = None  # type: ignore[assignment]


class Doubled(Int8):
    """A subclass of floating numbers alone, which may well be trained."""


def int8(kind: type = Int8) -> nn.Parameter:
    data = torch.randint(-9, 9, (4, 4), dtype=torch.int8)
    return nn.Parameter(kind(data, torch.ones(4, 1)), requires_grad=False)


@pytest.mark.parametrize(
    "weight",
    [
        int8(),
        int8(Bare),
        torch.zeros(2, 2, dtype=torch.uint8),
        torch.zeros(2, 2, dtype=torch.int8),
        torch.zeros(2, 2, dtype=torch.int32),
        torch.zeros(2, 2).to(torch.float8_e4m3fn),
    ],
    ids=lambda w: f"{type(w).__name__} {w.dtype}",
)
def test_integers_and_eight_bits_are_quantised(weight):
    assert is_quantised(weight)


@pytest.mark.parametrize(
    "weight",
    [
        nn.Parameter(torch.zeros(2)),
        type("Own", (nn.Parameter,), {})(torch.zeros(2)),
        torch.zeros(2, dtype=torch.bfloat16),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.int64),  # an index
        torch.zeros(2, dtype=torch.bool),
        Doubled(torch.ones(2, 2), torch.ones(2, 1)),
        torch.zeros(2, device="meta"),
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
        nn.parameter.UninitializedParameter(),
    ],
    ids=lambda w: f"{type(w).__name__} {w.dtype}",
)
def test_what_can_be_trained_or_counted_is_not(weight):
    assert not is_quantised(weight)


def test_packed_weights_are_found():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert any(is_packed(module) for module in packed.modules())
    assert not any(is_packed(module) for module in model.modules())


def test_buffers_of_integers_are_packed_weights_where_there_is_no_parameter():
    linear = nn.Module()
    linear.register_buffer("scales", torch.ones(4))
    assert not is_packed(linear)
    linear.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    assert is_packed(linear)
    linear.weight = nn.Parameter(torch.zeros(2))
    assert not is_packed(linear)


@pytest.mark.parametrize("module", [nn.BatchNorm2d(4), nn.Embedding(4, 4), nn.Dropout()])
def test_plain_modules_are_not_packed(module):
    assert not is_packed(module)
