"""Shared parts inside other parts: made once, borrowed by all that ask for them, stored once."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import surgery
from surgery import append, at, attn, block, fc1, ffn, parallel, prepend, qkv, shared
from surgery.errors import RuleError
from surgery.rules.part import Maker, part
from surgery.structure.module_tree import Site
from tests.models import hf_vit, images, tiny_vit


class Basis(nn.Module):
    def __init__(self, rank: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rank, width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() @ self.weight


class Scaled(nn.Module):
    """x V^T diag(c) V: V is borrowed."""

    def __init__(self, basis: Any) -> None:
        super().__init__()
        self.basis = basis
        self.scale = nn.Parameter(torch.rand(len(basis.weight)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = (x @ self.basis.weight.t() * self.scale) @ self.basis.weight
        return out


@part
def basis(site: surgery.Site, rank: int = 2) -> nn.Module:
    return Basis(rank, site.width)


@part
def scaled(site: surgery.Site, core: Maker) -> nn.Module:
    return Scaled(core(site))


RULE = at(ffn, parallel(scaled(shared(basis()))))


def operated(rules: Any = RULE, **changes: Any) -> Any:
    return surgery.apply(tiny_vit(**changes).eval(), rules, example=images())


def test_it_is_made_once_and_is_nobodys_child() -> None:
    model = operated()
    room = dict(model.surgery.default.named_children())
    assert list(room)[:2] == ["shared/basis/24", "blocks/0/mlp/parallel"]
    borrowed = {id(part.basis) for key, part in room.items() if key.startswith("blocks")}
    assert borrowed == {id(room["shared/basis/24"])}
    names = [name for name, _ in model.surgery.named_parameters(remove_duplicate=False)]
    assert sum("weight" in name for name in names) == 1


def test_counts_tables_and_plans_know_it() -> None:
    made = surgery.plan(tiny_vit(), RULE)
    assert made.added == 2 * 24 + 3 * 2
    assert "shared/basis/24" in made.record["rows"][0]["keys"]
    model = operated()
    assert str(surgery.report(model)).splitlines()[2].split()[-2] == "54"
    assert sum(p.numel() for p in surgery.parameters(model)) == 54


def test_copies_share_among_themselves() -> None:
    model, x = operated(), images()
    with torch.no_grad():
        y = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for p in surgery.parameters(model):
                p.add_(1.0)
            assert torch.equal(twin(x), y)
            ours = dict(twin.surgery.default.named_children())
            assert {id(p.basis) for k, p in ours.items() if k.startswith("blocks")} == {
                id(ours["shared/basis/24"])
            }
            for p in surgery.parameters(model):
                p.sub_(1.0)


def test_it_compiles_and_moves() -> None:
    model, x = operated(), images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    model.double()
    assert model(x.double()).dtype == torch.float64


def test_it_exports() -> None:
    model, x = operated(), images()
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
        torch.testing.assert_close(program.module()(x), model(x))


def test_a_file_holds_it_once(tmp_path: Any) -> None:
    model = operated()
    file = surgery.save(model, tmp_path / "a.safetensors")
    with safe_open(file, framework="pt") as held:
        keys = list(held.keys())
    assert [key for key in keys if "weight" in key] == ["parts.shared/basis/24.weight"]
    torch.manual_seed(0)
    other = tiny_vit().eval()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "surgery" not in k})
    again = surgery.load(other, file, rules=RULE)
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))


def test_its_seed_is_its_own() -> None:
    """What is borrowed does not depend on who asks first, and draws nothing from who does."""
    a = operated()
    b = operated(at("blocks.[1:].mlp", parallel(scaled(shared(basis())))))
    room, other = (dict(m.surgery.default.named_children()) for m in (a, b))
    assert torch.equal(room["shared/basis/24"].weight, other["shared/basis/24"].weight)
    key = "blocks/1/mlp/parallel"
    assert torch.equal(room[key].scale, other[key].scale)


def test_one_for_each_width_and_two_where_they_are_written_apart() -> None:
    rules = [RULE, at(attn, parallel(scaled(shared(basis(rank=3)))))]
    assert {k for k in surgery.plan(tiny_vit(), rules).parts if "shared" in k} == {
        "shared/basis/24",
        "shared/basis/24/2",
    }
    same = [RULE, at(attn, parallel(scaled(shared(basis()))))]
    assert len([k for k in surgery.plan(tiny_vit(), same).parts if "shared" in k]) == 1


def test_by_a_pattern_there_is_one_for_each_of_its_sites() -> None:
    rule = at(ffn | attn, parallel(scaled(shared(basis(), by=block))))
    made = surgery.plan(tiny_vit(), rule)
    assert sorted(k for k in made.parts if "shared" in k) == [
        f"shared/basis/24/by=blocks_{i}" for i in range(3)
    ]
    joined = at(qkv, prepend(shared(scaled(shared(basis())), by=attn), residual=True))
    found = surgery.plan(hf_vit(), joined)
    assert len(found.sites) == 9
    assert sum("scaled" in key for key in found.parts) == 3
    entries = surgery.plan(tiny_vit(), at(fc1, prepend(shared(basis(), by=ffn))))
    assert len(entries.parts) == 3
    with pytest.raises(RuleError, match=r"head lies in no block, which shared\(basis\(\), by=b"):
        surgery.plan(tiny_vit(), at("head", parallel(shared(basis(), by=block))))


def test_what_is_lent_is_no_element_of_a_list() -> None:
    def listed(site: surgery.Site) -> nn.Module:
        return nn.Sequential(shared(basis())(site))

    with pytest.raises(RuleError, match="in a Sequential, which would own it"):
        surgery.apply(tiny_vit(), at(ffn, parallel(listed)))


def test_a_part_may_read_the_base() -> None:
    class Reads(nn.Module):
        def __init__(self, site: surgery.Site) -> None:
            super().__init__()
            self.fc2 = site.module.get_submodule("fc2")
            self.gate = nn.Parameter(torch.zeros(site.out))

        def forward(self, x: Tensor) -> Tensor:
            return self.gate * self.fc2.weight.sum()  # type: ignore[operator, no-any-return]

    model = tiny_vit()
    mark = surgery.fingerprint(model)
    surgery.apply(model, at(ffn, parallel(Reads)))
    assert sum(p.numel() for p in surgery.parameters(model)) == 3 * 24
    assert not any("fc2" in key for key in surgery.state_dict(model))
    twin = copy.deepcopy(model)
    room = dict(twin.surgery.default.named_children())
    assert room["blocks/0/mlp/parallel"].fc2 is twin.blocks[0].mlp.fc2
    assert surgery.fingerprint(surgery.revert(model)) == mark


def test_one_module_for_all_sites_is_made_and_told_once() -> None:
    core = shared(basis())

    def itself(site: surgery.Site) -> nn.Module:
        return nn.Identity() if site.path.endswith("0.mlp") else core(site)

    one = Scaled(Basis(2, 24))
    for maker in (itself, lambda site: one):
        model = surgery.apply(tiny_vit(), at(ffn, parallel(maker)))
        assert "Report" in str(surgery.report(model))
        surgery.revert(model)
    assert [name for name, _ in one.named_parameters()] == ["scale", "basis.weight"]


def test_what_lies_inside_a_lent_part_is_stored_once() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Basis(2, 24)

    @part
    def two(site: surgery.Site) -> nn.Module:
        return Two()

    core = shared(two())
    model = surgery.apply(tiny_vit(), at(ffn, parallel(lambda s: Scaled(core(s).inner))))
    assert [key for key in surgery.state_dict(model) if "weight" in key] == [
        "parts.shared/two/24.inner.weight"
    ]


class Spectral(nn.Module):
    """Scales frequencies: a complex weight, and a real bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.complex64))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(x) * self.weight).real.to(x.dtype) + self.bias


def test_complex_numbers_of_a_part_stay_complex() -> None:
    model = surgery.apply(nn.Sequential(nn.Linear(8, 8)).double(), at("0", append(_spectral)))
    dtypes = {name.rpartition(".")[2]: p.dtype for name, p in model.surgery.named_parameters()}
    assert dtypes == {"weight": torch.complex64, "bias": torch.float64}


def _spectral(site: Site) -> nn.Module:
    return Spectral(site.width)


class Kept(nn.Module):
    """What it is given, as its child."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.core(x)
        return out


def test_what_is_borrowed_keeps_its_own_children() -> None:
    @part
    def core(site: surgery.Site) -> nn.Module:
        return Kept(nn.Linear(site.width, site.width))

    rule = at(ffn, append(lambda site: Kept(borrowed(site))))
    borrowed = shared(core())
    model = surgery.apply(tiny_vit(), rule, example=images())
    assert [p.shape for p in surgery.parameters(model)] == [(24, 24), (24,)]
    weight = "parts.shared/core/24.core.weight"
    assert weight in surgery.state_dict(model)
    assert surgery.plan(tiny_vit(), rule).added == 24 * 25


def test_what_is_read_of_the_base_keeps_its_children() -> None:
    model = tiny_vit()
    mark = surgery.fingerprint(model)
    surgery.apply(model, at("blocks.1", append(lambda site: Kept(model.blocks[0].mlp))))
    assert not surgery.parameters(model)
    assert list(model.blocks[0].mlp._modules)
    assert surgery.fingerprint(surgery.revert(model)) == mark
