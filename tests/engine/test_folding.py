"""What weights become: in half precision, over shared memory, and why they may not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import surgery
from surgery import OperationError, append, at, lora, parallel, replace, scale_shift
from surgery._preserve import fingerprint
from surgery.spec.snapshot import unchanged
from tests.laws.checks import Linears, stir_parts
from tests.methods.test_methods import rules_of
from tests.models import tiny_vit

HALVES = [torch.bfloat16, torch.float16]


def linear(site: surgery.Site) -> nn.Module:
    return nn.Linear(site.width, site.out)


def filled(model: nn.Module, std: float) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.surgery.parameters():
            p.copy_(std * torch.randn(p.shape, generator=generator))
    return model


# half precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["lora", "repadapter", "fact_tk", "krona", "vera", "arc"])
def test_half_precision_is_rounded_once(dtype: torch.dtype, name: str) -> None:
    model = surgery.apply(tiny_vit().to(dtype), rules_of(name))
    stir_parts(model)
    exact = copy.deepcopy(model).float()
    surgery.merge(model)
    surgery.merge(exact)
    wanted = {key: tensor.to(dtype) for key, tensor in exact.state_dict().items()}
    for key, tensor in model.state_dict().items():
        off = (tensor.float() - wanted[key].float()).abs()
        ulp = torch.finfo(dtype).eps * wanted[key].float().abs()
        assert (off <= ulp).all(), key  # a sum in another order may fall to the other side
        assert (off > 0).float().mean() < 0.01


def test_what_rounding_takes_is_told_with_the_number_and_the_place() -> None:
    model = surgery.apply(Linears().bfloat16(), at(nn.Linear, lora(rank=2)))
    filled(model, 0.02)
    with pytest.warns(UserWarning, match=r"bfloat16 keeps \d+% of what was learnt at (one|two)"):
        surgery.merge(model)
    surgery.unmerge(model)
    surgery.merge(filled(model, 0.5))  # and nothing is said
    surgery.merge(filled(surgery.unmerge(model).float(), 0.02))


def test_a_place_that_is_lost_is_told_beside_one_that_is_not() -> None:
    model = surgery.apply(Linears().bfloat16(), at(nn.Linear, lora(rank=2)))
    filled(model, 0.5)
    for p in model.surgery.default.get_submodule("two/parallel").parameters():
        p.data.mul_(0.03)
    with pytest.warns(UserWarning, match=r"at two; at 1 of 2 places"):
        surgery.merge(model)


def test_parts_in_float32_on_a_half_precision_base() -> None:
    model = surgery.apply(Linears().bfloat16(), at("one", parallel(linear)))
    model.surgery.float()
    was = model.one.weight.float()
    part = model.surgery.default.get_submodule("one/parallel")
    surgery.merge(model)
    assert torch.equal(model.one.weight, (was + part.weight).bfloat16())


# memory ------------------------------------------------------------------------------------------


def refused(model: nn.Module, match: str) -> str:
    before = fingerprint(model)
    with pytest.raises(OperationError, match=match) as error:
        surgery.merge(model)
    unchanged(before, fingerprint(model), "a refused merge", but=["random"])
    assert error.value.remedy
    return str(error.value)


def tied(how: str) -> nn.Module:
    model = Linears()
    if how == "one parameter":
        model.two.weight = model.one.weight
    elif how == "by data":
        model.two.weight.data = model.one.weight.data
    elif how == "a buffer":
        model.register_buffer("first_row", model.one.weight.data[0])
    return model


@pytest.mark.parametrize("how", ["one parameter", "by data", "a buffer"])
def test_both_places_are_named(how: str) -> None:
    told = refused(surgery.apply(tied(how), at("one", lora(rank=2))), "used elsewhere")
    assert "one.weight" in told
    assert ("first_row" if how == "a buffer" else "two.weight") in told


def test_a_shared_bias_is_in_the_way_of_a_part_with_a_bias_alone() -> None:
    for part, fits in ((lora(rank=2), True), (linear, False)):
        model = Linears()
        model.two.bias = model.one.bias
        surgery.apply(model, at("one", parallel(part) if part is linear else part))
        if fits:
            surgery.merge(model)
        else:
            assert "one.bias, two.bias" in refused(model, "its bias is used elsewhere")


@pytest.mark.parametrize("owns", [True, False])
def test_a_part_may_read_the_weight_that_it_is_merged_into(owns: bool) -> None:
    """Merged, it does not run."""

    class Reads(nn.Module):
        def __init__(self, site: surgery.Site) -> None:
            super().__init__()
            if owns:
                self.weight = site.module.weight
            else:
                self.__dict__["weight"] = site.module.weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

        def affine(self) -> tuple[Tensor, None]:
            return self.weight, None

    model, x = surgery.apply(Linears(), at("one", parallel(Reads))), torch.randn(2, 8)
    want = model(x)
    torch.testing.assert_close(surgery.merge(model)(x), want)
    assert torch.equal(surgery.unmerge(model)(x), want)


def test_what_the_model_reads_besides() -> None:
    model = surgery.apply(Linears(), at("one", lora(rank=2)))
    model.surgery.default.read_besides.add("one")
    refused(model, r"at one: its weight is used elsewhere too.*reads it without calling")
    surgery.apply(model, at("two", lora(rank=2)), name="second")
    refused(model, "at one")


def test_a_tensor_that_is_no_parameter() -> None:
    model = Linears()
    model.table = model.one.weight.data.t()
    assert "table" in refused(surgery.apply(model, at("one", lora(rank=2))), "used elsewhere")


# hooks -------------------------------------------------------------------------------------------


def test_hooks_between_a_module_and_its_parts_are_told() -> None:
    model = Linears()
    model.one.register_forward_hook(lambda module, args, out: out.relu())
    surgery.apply(model, at("one", append(linear)))
    with pytest.warns(UserWarning, match=r"hooks of others .*\(one\)"):
        surgery.merge(model)


def test_hooks_beyond_the_parts_are_none_of_our_business() -> None:
    model, x = Linears(), torch.randn(2, 8)
    model.one.register_forward_pre_hook(lambda module, args: (args[0].relu(),))
    surgery.apply(model, at("one", append(linear), parallel(linear)))
    model.one.register_forward_hook(lambda module, args, out: out.relu())
    want = model(x)
    torch.testing.assert_close(surgery.merge(model)(x), want)


# true causes -------------------------------------------------------------------------------------


def old_weight_norm(model: nn.Module) -> Any:
    nn.utils.weight_norm(model.one)
    return lambda: nn.utils.remove_weight_norm(model.one)


def weight_norm(model: nn.Module) -> Any:
    nn.utils.parametrizations.weight_norm(model.one)
    return lambda: nn.utils.parametrize.remove_parametrizations(model.one, "weight")


def spectral_norm(model: nn.Module) -> Any:
    nn.utils.spectral_norm(model.one)
    return lambda: nn.utils.remove_spectral_norm(model.one)


def pruned(model: nn.Module) -> Any:
    prune.l1_unstructured(model.one, "weight", 0.3)
    return lambda: prune.remove(model.one, "weight")


COMPUTED = {
    old_weight_norm: ("weight_g, weight_v", "torch.nn.utils.remove_weight_norm"),
    weight_norm: ("parametrizations.weight", "torch.nn.utils.parametrize.remove_parametrizations"),
    spectral_norm: ("weight_orig, weight_u, weight_v", "torch.nn.utils.remove_spectral_norm"),
    pruned: ("weight_orig, weight_mask", "torch.nn.utils.prune.remove"),
}


@pytest.mark.filterwarnings("ignore")  # torch's own: older forms are to go
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", COMPUTED)
def test_a_computed_weight_is_told_and_the_remedy_works(change: Any, when: str) -> None:
    model, x = Linears(), torch.randn(2, 8)
    take_off = change(model) if when == "before" else None
    surgery.apply(model, at("one", lora(rank=2)))
    stir_parts(model)
    take_off = take_off or change(model)
    model.eval()
    names, remedy = COMPUTED[change]
    told = refused(model, f"computed from its {names}")
    assert remedy in told
    take_off()
    want = model(x)
    torch.testing.assert_close(surgery.merge(model)(x), want)


class Packed(torch.Tensor):
    """A tensor that keeps its numbers in a form of its own, as quantised ones do."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> Packed:
        return Packed(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


def test_a_weight_in_a_form_of_its_own_is_told() -> None:
    model = surgery.apply(Linears(), at("one", lora(rank=2)))
    model.one.weight = nn.Parameter(Packed(torch.randn(8, 8)), requires_grad=False)
    with pytest.raises(OperationError, match=r"(?s)at one.*a Packed.*[Mm]erge .*quanti"):
        surgery.merge(model)
    plain = surgery.merge(surgery.apply(Linears(), at("two", lora(rank=2))))
    plain.one.weight = nn.Parameter(Packed(torch.randn(8, 8)), requires_grad=False)
    surgery.unmerge(plain)  # is no concern of another place


def test_a_merged_weight_that_was_quantised_since_is_told_by_unmerge() -> None:
    model = surgery.merge(surgery.apply(Linears(), at("one", lora(rank=2))))
    kept = model.one.weight
    model.one.weight = nn.Parameter(Packed(torch.randn(8, 8)), requires_grad=False)
    for call in (surgery.unmerge, surgery.revert):
        with pytest.raises(OperationError, match=r"one\.weight is a Packed now"):
            call(model)
    model.one.weight = kept
    surgery.unmerge(model)


@pytest.mark.filterwarnings("ignore")
def test_a_merged_module_that_was_exchanged_since_is_told_by_unmerge() -> None:
    model = surgery.merge(surgery.apply(Linears(), at(nn.Linear, lora(rank=2))))
    kept, model.one = model.one, nn.Linear(8, 8)
    before = fingerprint(model)
    for call in (surgery.unmerge, surgery.revert):
        with pytest.raises(OperationError, match=r"(?s)replaced by another.*keep=False"):
            call(model)
    unchanged(before, fingerprint(model), "a refused call")
    model.one = kept
    surgery.merge(surgery.unmerge(model))
    model.one = nn.Linear(8, 8)
    surgery.merge(model, keep=False)
    assert not hasattr(model, "surgery")


def test_torchaos_weights_are_told() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = surgery.apply(nn.Sequential(nn.Linear(64, 64)), at("0", lora(rank=2)))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(OperationError, match=r"(?s)at 0.*Tensor.*Merge first"):
        surgery.merge(model)


def test_a_module_that_is_no_longer_in_the_model_is_told() -> None:
    model = surgery.apply(Linears(), at(nn.Linear, lora(rank=2)))
    model.one = nn.Linear(8, 8)
    refused(model, r"one.*no longer in the model")


class Router(nn.Module):
    """As Mixtral's in transformers: a weight, and it answers which experts, and how much."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out: Any = (x @ self.weight.T).softmax(-1).topk(2)
        return out[0], out[1]


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Linear(nn.Module):
    """Of torch's name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).relu()


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (Router(), "at a Router, which does more with its weight than multiply by it"),
        (Halved(8, 8), "at a Halved, whose class has a forward of its own"),
        (nn.ConvTranspose1d(8, 8, 1), "at a ConvTranspose1d, which does more"),
        (nn.LSTM(8, 8), "at a LSTM, and only"),
        (Linear(), r"at a tests\.engine\.test_folding\.Linear, which does more"),
    ],
)
def test_what_a_module_does_is_told(module: nn.Module, match: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), module)
    refused(surgery.apply(model, at("1", parallel(lambda site: nn.Linear(8, 8)))), match)


def test_float32_and_float64_are_as_they_were() -> None:
    for dtype in (torch.float32, torch.float64):
        model = surgery.apply(Linears().to(dtype), at("one", append(scale_shift())))
        stir_parts(model)
        part = model.surgery.default.get_submodule("one/append")
        (gamma, beta), w, b = part.affine(), model.one.weight.clone(), model.one.bias.clone()
        surgery.merge(model)
        assert torch.equal(model.one.weight, gamma[:, None] * w)
        assert torch.equal(model.one.bias, gamma * b + beta)
        assert model.one.weight.dtype == dtype


def test_what_replaces_is_rounded_to_the_dtype_of_the_place() -> None:
    model = surgery.apply(Linears().bfloat16(), at("one", replace(linear)))
    want = model.surgery.default.get_submodule("one/replace").weight.detach().clone()
    assert torch.equal(surgery.merge(model).one.weight, want)
