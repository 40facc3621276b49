"""PointGST against a graph, a Laplacian and a spectrum written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import surgery
from surgery.methods import pointgst
from surgery.parts import spectral_adapter
from surgery.parts.graph_spectrum import SpectralAdapter, SpectralBasis, basis, morton
from tests.laws.test_points import clouds, tiny
from tests.methods.reference import close


def laplacian(points: Tensor) -> Tensor:
    n = len(points)
    L = points.new_zeros(n, n)
    for i in range(n):
        for j in range(n):
            if i != j:
                L[i, j] = -1 / (points[i] - points[j]).norm()
    return L - L.sum(1).diag()


def test_a_basis_is_of_the_eigenvectors_of_the_laplacian() -> None:
    points = clouds(n=8).double()
    U = basis(points)
    for cloud, one in zip(points, U, strict=True):
        close(one.t() @ one, torch.eye(8, dtype=one.dtype))
        L = laplacian(cloud)
        spectrum = one.t() @ L @ one
        close(spectrum, spectrum.diag().diag(), 256)
        assert (spectrum.diag().diff() > 0).all()


def test_points_in_one_place_have_a_basis_too() -> None:
    points = torch.zeros(1, 4, 3)
    points[0, 0] = 1.0
    assert basis(points).isfinite().all()
    assert basis(torch.zeros(1, 4, 3)).isfinite().all()


def test_neighbours_have_a_basis_of_their_own() -> None:
    points = clouds(n=8).double()
    whole, local = SpectralBasis(local=3)(points, points).unbind(1)  # 4: the nearest that divides 8
    assert torch.equal(whole, basis(points))
    for cloud, V, order in zip(points, local, morton(points).argsort(1), strict=True):
        for k in range(2):
            members, columns = order[4 * k : 4 * k + 4], slice(4 * k, 4 * k + 4)
            close(V[members, columns], basis(cloud[members]))
            others = [i for i in range(8) if i not in members.tolist()]
            assert not V[others, columns].any()


def test_a_curve_goes_through_halves_before_it_leaves_them() -> None:
    corners = torch.tensor([[x, y, z] for z in (0, 1) for y in (0, 1) for x in (0, 1)]).double()
    assert morton(corners[None]).argsort(1).tolist() == [list(range(8))]


def adapted(p: Any, x: Tensor, bases: Tensor) -> Tensor:
    """Token by token, from the formula."""
    h = x @ p.down.weight.t() + p.down.bias
    rows = [F.silu(h)]
    for U, norm in zip(bases.unbind(1), p.norms, strict=True):
        t = torch.einsum("bij,bic->bjc", U, h[:, -U.shape[1] :])
        z = F.layer_norm(t, t.shape[-1:], norm.weight, norm.bias)
        s = t + F.silu(z @ p.M.t() + p.b)
        back = torch.einsum("bij,bjc->bic", U, s)
        rows.append(F.pad(back, (0, 0, x.shape[1] - U.shape[1], 0)))
    return sum(rows) @ p.up.weight.t() + p.up.bias  # type: ignore[no-any-return]


def test_the_stream_is_that_of_the_formula() -> None:
    model, plain, points = tiny().double(), tiny().double(), clouds().double()
    surgery.apply(model, pointgst(rank=4, local=4), example=points)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = model(points)
        for p in surgery.parameters(model):
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "surgery." not in k})
        centers: list[Tensor] = []
        plain.pos_embed.register_forward_pre_hook(lambda m, args: centers.append(args[0]))
        own = [p for p in model.surgery.default.children() if isinstance(p, SpectralAdapter)]
        for block, p in zip(plain.blocks.blocks, own, strict=True):
            beside(block, p, centers)
        want = plain(points)
        close(model(points), want, 256)
        assert (want - before).abs().max() > 1e-3


def beside(block: Any, p: Any, centers: list[Tensor]) -> None:
    kept: list[Tensor] = []
    norm, mlp = block.norm2.forward, block.mlp.forward

    def first(x: Tensor) -> Tensor:
        kept[:] = [adapted(p, x, SpectralBasis(4)(x, centers[-1]))]
        y: Tensor = norm(x)
        return y

    def then(x: Tensor) -> Tensor:
        y: Tensor = mlp(x) + kept[0]
        return y

    block.norm2.forward, block.mlp.forward = first, then


def test_it_starts_as_the_base_and_counts_as_its_formula_says() -> None:
    model = tiny()
    with torch.no_grad():
        want = model(clouds())
        surgery.apply(model, pointgst(rank=4, local=4), example=clouds())
        assert torch.equal(model(clouds()), want)
    assert surgery.plan(tiny(), pointgst(rank=4)).added == 3 * (4 * (2 * 24 + 4 + 6) + 24)


def test_it_needs_tokens_of_its_centres() -> None:
    with pytest.raises(surgery.GraftError, match="and 8 centres"):
        SpectralAdapter(8, 4)(torch.randn(2, 7, 8), torch.randn(2, 2, 8, 8))
    with pytest.raises(surgery.RuleError, match=r"spectral_adapter\(rank=0\)"):
        surgery.plan(tiny(), surgery.at(surgery.ffn, surgery.parallel(spectral_adapter(rank=0))))
    with pytest.raises(surgery.MatchError):
        surgery.plan(tiny(), pointgst(centers="**.positions"))
