"""Merging parts into what holds a weight: linears, convolutions, norms, GPT-2's transposed ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import append, at, parallel, prepend, replace
from surgery.errors import OperationError
from tests.models import hf_gpt2, hf_llama, words_in

EPS = torch.finfo(torch.float64).eps


class Scale(nn.Module):
    """gamma x + beta."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(width))
        self.beta = nn.Parameter(torch.randn(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x if self.beta is None else self.gamma * x + self.beta

    def affine(self) -> tuple[Tensor, Tensor | None]:
        return self.gamma, self.beta


class Root(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.one = copy.deepcopy(module)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.one(x)
        return out


def scale(site: surgery.Site) -> nn.Module:
    return Scale(site.out)


def dense(site: surgery.Site) -> nn.Module:
    return nn.Linear(site.width, site.out)


def bare(site: surgery.Site) -> nn.Module:
    return Scale(site.out, bias=False)


def merged(module: nn.Module, rules: Any, x: Tensor) -> None:
    torch.manual_seed(0)
    model = Root(module).double().eval()
    keys = list(model.state_dict())
    surgery.apply(model, rules)
    with torch.no_grad():
        want = model(x.double())
        have = surgery.merge(model)(x.double())
        assert list(model.state_dict()) == keys
        gap = (have - want).abs().max().item()
        assert gap <= 16 * EPS * max(1.0, want.abs().max().item())
        assert torch.equal(surgery.unmerge(model)(x.double()), want)


MAPS = torch.randn(2, 4, 6, 6)
ROWS = torch.randn(2, 5, 4)


def stirred(norm: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*norm.parameters(), *norm.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5, generator=generator)
    return norm


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(4, 4), ROWS),
        (nn.Conv2d(4, 4, 3, padding=1), MAPS),
        (nn.Conv2d(4, 8, 2, stride=2, groups=2), MAPS),
        (nn.Conv2d(4, 4, 1), MAPS),
        (nn.LayerNorm(4), ROWS),
        (nn.BatchNorm2d(4), MAPS),
        (nn.GroupNorm(2, 4), MAPS),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("residual", [False, True])
def test_a_scale_after_it_merges(module: nn.Module, x: Tensor, residual: bool) -> None:
    merged(stirred(module), at("one", append(scale, residual=residual)), x)


@pytest.mark.parametrize("edit", [parallel(dense, scale=0.5), append(dense), prepend(dense)])
def test_a_linear_part_merges_into_a_pointwise_convolution(edit: Any) -> None:
    merged(nn.Conv2d(4, 4, 1), at("one", edit), MAPS)


def test_a_norm_without_bias_takes_a_scale_alone() -> None:
    merged(stirred(nn.RMSNorm(4)), at("one", append(bare)), ROWS)
    model = surgery.apply(Root(nn.RMSNorm(4)), at("one", append(scale)))
    with pytest.raises(OperationError, match="Scale adds a bias, and this RMSNorm has none"):
        surgery.merge(model)


def test_gpt2_keeps_its_weights_the_other_way_round() -> None:
    model = hf_gpt2().double()
    rules = [
        at("**.c_attn", parallel(dense, scale=0.1)),
        at("**.c_fc", append(scale)),
        at("**.ln_1", append(scale)),
    ]
    surgery.apply(model, rules)
    ids = {"input_ids": words_in()}
    with torch.no_grad():
        want = model(**ids).logits
        have = surgery.merge(model)(**ids).logits
        assert (have - want).abs().max() <= 64 * EPS * want.abs().max()
        assert torch.equal(surgery.unmerge(model)(**ids).logits, want)


class OnePlus(nn.Module):
    """Gemma's RMSNorm: scales by 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


OnePlus.__name__ = "OnePlusRMSNorm"


@pytest.mark.parametrize(
    ("module", "edit", "fact"),
    [
        (OnePlus(), append(bare), "stands at a OnePlusRMSNorm"),
        (nn.LayerNorm(4, elementwise_affine=False), append(lambda s: Scale(4)), "at a LayerNorm"),
        (nn.LayerNorm(4), append(dense), "mixes features, and this LayerNorm holds one number"),
        (nn.LayerNorm(4), prepend(scale), "acts on the input of a LayerNorm"),
        (nn.LayerNorm(4), parallel(dense), "acts on the input of a LayerNorm"),
        (nn.Conv2d(4, 4, 3), prepend(scale), "acts on the input of a Conv2d"),
        (nn.Conv2d(4, 4, 1, padding=1), prepend(scale), "acts on the input of a Conv2d"),
        (nn.LayerNorm(4), replace(dense), "acts on the input of a LayerNorm"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_untouched(
    module: nn.Module, edit: Any, fact: str
) -> None:
    model = surgery.apply(Root(module), at("one", edit))
    mark = surgery.fingerprint(model)
    with pytest.raises(OperationError, match=fact):
        surgery.merge(model)
    assert surgery.fingerprint(model) == mark


def test_llamas_norms_merge() -> None:
    model = hf_llama().double()
    surgery.apply(model, at("**.post_attention_layernorm", append(bare)))
    ids = {"input_ids": words_in()}
    with torch.no_grad():
        want = model(**ids).logits
        have = surgery.merge(model)(**ids).logits
        assert (have - want).abs().max() <= 64 * EPS * want.abs().max()


def test_what_mixes_groups_is_refused() -> None:
    model = surgery.apply(Root(nn.Conv2d(4, 4, 3, padding=1, groups=4)), at("one", append(dense)))
    with pytest.raises(OperationError, match="Linear mixes the groups of a Conv2d"):
        surgery.merge(model)


@pytest.mark.parametrize("edit", [append(dense), parallel(dense), prepend(dense)])
def test_what_is_written_around_a_replacement_stays(edit: Any) -> None:
    merged(nn.Linear(4, 4), [at("one", edit), at("one", replace(dense))], ROWS)
    merged(nn.Linear(4, 4), [at("one", replace(dense)), at("one", edit)], ROWS)


def test_on_the_meta_device_there_is_nothing_to_merge() -> None:
    with torch.device("meta"):
        model = surgery.apply(Root(nn.LayerNorm(4)), at("one", append(bare)))
    with pytest.raises(OperationError, match="on the meta device"):
        surgery.merge(model)


def test_under_autocast_it_merges_exactly() -> None:
    model = surgery.apply(Root(nn.Linear(64, 64)), at("one", parallel(dense)))
    x = torch.randn(3, 64)
    with torch.no_grad():
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            surgery.merge(model)
        torch.testing.assert_close(model(x), want)


def test_a_second_operation_sees_the_module_that_the_first_lives_in() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
    surgery.apply(model, at("1", append(bare)))
    made = surgery.plan(model, at(surgery.norm, append(bare)), name="b")
    assert [site.path for site in made.sites] == ["0"]
    surgery.apply(model, at(surgery.norm, append(bare)), name="b")
    assert surgery.merge(model)(ROWS).shape == ROWS.shape


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.BatchNorm1d(4), torch.randn(2, 4, 6)),
        (nn.BatchNorm3d(4), torch.randn(2, 4, 3, 3, 3)),
    ],
)
def test_norms_of_other_dimensions_merge(module: nn.Module, x: Tensor) -> None:
    merged(stirred(module), at("one", append(scale)), x)


class TurnedLinear(nn.Module):
    """GPT-2's Conv1D, or one that does something else with such a weight."""

    def __init__(self, bias: bool, honest: bool = True) -> None:
        super().__init__()
        self.nf, self.honest = 6, honest
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.bias = nn.Parameter(torch.randn(6)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight if self.honest else x.abs() @ self.weight
        return y if self.bias is None else y + self.bias


@pytest.mark.parametrize("bias", [True, False])
def test_transposed_weights_merge_where_they_are_used_plainly(bias: bool) -> None:
    merged(TurnedLinear(bias), at("one", append(bare)), ROWS)
    merged(TurnedLinear(bias), at("one", prepend(lambda s: Scale(4, bias=False))), ROWS)
    model = surgery.apply(Root(TurnedLinear(bias, honest=False)), at("one", append(bare)))
    with pytest.raises(OperationError, match="Scale stands at a TurnedLinear"):
        surgery.merge(model)


def test_a_fault_while_it_folds_leaves_the_model_as_it_was(monkeypatch: Any) -> None:
    from surgery.engine.journal import Journal

    model = surgery.apply(Root(nn.Linear(4, 4)), at("one", append(scale)))
    surgery.apply(model, at("one", parallel(dense)), name="b")
    mark, real = surgery.fingerprint(model), Journal.write

    def write(self: Journal, *args: Any) -> None:
        real(self, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write", write)
    with pytest.raises(KeyboardInterrupt):
        surgery.merge(model)
    assert surgery.fingerprint(model) == mark
    with pytest.raises(OperationError, match="are not merged"):
        surgery.unmerge(model)
