"""Frozen parts summed by learned weights (ScaLearn) or attention (AdapterFusion); one scaled (LAE).

Frohmann et al. 2023, Pfeiffer et al. 2021, Gao et al. 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RuleError
from ..rules.affine import Affine, affine, all_affine
from ..rules.part import Maker, Shared, maker, part
from ..structure.module_tree import Site
from .arguments import declare_as, positive


class Coefficients(nn.Module):
    """How much of each of `count` parts: omega (count, features), features 1 for a scalar each.

    Starts normal around 2 / count with deviation 0.001; dropout falls on its numbers.

    >>> Coefficients(3, 768)().shape
    torch.Size([3, 768])
    """

    def __init__(self, count: int = 3, features: int = 1, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, features).normal_(2 / count, 1e-3))
        self.drop = nn.Dropout(dropout)

    def forward(self) -> Tensor:
        dropped: Tensor = self.drop(self.weight)
        return dropped


class Copies(nn.Module):
    """Frozen parts of one kind, (..., width) to (..., out): their tensors are buffers.

    `surgery.state.fill` brings values.
    """

    def __init__(self, copies: list[nn.Module]) -> None:
        super().__init__()
        self.copies = nn.ModuleList(map(with_buffers, copies))
        declare_as(self, copies)


class Combined(Copies):
    """sum_t omega_t * part_t(x) of frozen parts: only omega is trained.

    omega   gives (count, out) or (count, 1)
    """

    def __init__(self, copies: list[nn.Module], omega: Coefficients) -> None:
        super().__init__(copies)
        self.omega = omega

    def forward(self, x: Tensor) -> Tensor:
        weighted = zip(self.omega(), self.copies, strict=True)
        summed: Tensor = reduce(torch.add, (weight * copy(x) for weight, copy in weighted))
        return summed

    @property
    def affine(self) -> Callable[[], Affine] | None:
        """The sum of the parts' maps; None where one of them is not linear."""
        maps = all_affine(self.copies)
        if maps is None:
            return None
        weighted = zip(self.omega.weight, maps, strict=True)
        scaled = [Affine(weight, None).after(map) for weight, map in weighted]
        return lambda: reduce(Affine.plus, scaled)


class Fused(Copies):
    """V sum_t a_t z_t of frozen parts z_t = part_t(x), a = softmax_t((Q x + q) (K z_t + k)).

    As published, Q and K start normal of deviation 0.02, V as the identity and 1e-6 beside it.
    """

    def __init__(self, copies: list[nn.Module], width: int, out: int) -> None:
        super().__init__(copies)
        self.query, self.key = nn.Linear(width, out), nn.Linear(out, out)
        self.value = nn.Linear(out, out, bias=False)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.value.weight = nn.Parameter(torch.full((out, out), 1e-6).fill_diagonal_(1.0))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.stack([copy(x) for copy in self.copies], -2)
        share = torch.einsum("...c,...tc->...t", self.query(x), self.key(z)).softmax(-1)
        mixed: Tensor = self.value(torch.einsum("...t,...tc->...c", share, z))
        return mixed

    def penalty(self) -> Tensor:
        """0.01 |V - I|^2, of Frobenius: a term of `surgery.penalty`."""
        V = self.value.weight
        return 0.01 * (V - torch.eye(len(V), dtype=V.dtype, device=V.device)).square().sum()


class Scaled(nn.Module):
    """scale * part(x) with a trained scalar, `start` at the beginning.

    >>> Scaled(nn.Identity())(torch.ones(2)).tolist()
    [1.0, 1.0]
    """

    def __init__(self, part: nn.Module, start: float = 1.0) -> None:
        super().__init__()
        self.part = part
        self.scale = nn.Parameter(torch.tensor(float(start)))
        declare_as(self, [part])

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.scale * self.part(x)
        return scaled

    @property
    def affine(self) -> Callable[[], Affine] | None:
        """The part's map, scaled; None where it is not linear."""
        map = affine(self.part)
        return None if map is None else lambda: Affine(self.scale[None], None).after(map)


def with_buffers(module: nn.Module) -> nn.Module:
    """The module itself, with buffers in place of its parameters: stored, never trained.

    >>> sorted(name for name, _ in with_buffers(nn.Linear(2, 2)).named_buffers())
    ['bias', 'weight']
    """
    for owner in module.modules():
        for name, tensor in list(owner._parameters.items()):
            if tensor is not None:
                del owner._parameters[name]
                owner.register_buffer(name, tensor.detach())
    return module


@part
def coefficients(
    site: Site, count: int = 3, by_feature: bool = True, dropout: float = 0.0
) -> nn.Module:
    """The omega of `combined`, for `count` parts; shared(coefficients()) has one for all layers.

    by_feature  a vector of the site's width for each part (ScaLearn); else a scalar (Uniform)
    dropout     probability, on the numbers of omega while training

    Starts normal, mean 2 / count, deviation 0.001. Parameters: count * out, or count.
    Source: Frohmann et al. 2023 (ScaLearn).

    >>> coefficients(count=2, by_feature=False)
    coefficients(count=2, by_feature=False)
    """
    positive("coefficients", count=count)
    return Coefficients(count, site.out if by_feature else 1, dropout=dropout)


OF_THREE = coefficients()


@part
def combined(site: Site, part: Maker, omega: Maker = OF_THREE) -> nn.Module:
    """sum_t omega_t * part_t(x): as many frozen copies of `part` as omega counts; omega is trained.

    part   what makes one copy; `surgery.state.fill` brings the values that were trained before,
           and until then nothing but the start of `part` is combined
    omega  coefficients(count=3), or shared(coefficients(count=3)) (ScaLearn++)

    Raises RuleError where omega is no coefficients, or `part` is shared or routes.
    Parameters: count * out, or count, and none for what is shared.
    Source: Frohmann et al. 2023 (ScaLearn).

    >>> from surgery.parts.adapters import adapter
    >>> combined(adapter(rank=8), coefficients(count=2))
    combined(part=adapter(rank=8), omega=coefficients(count=2))
    """
    weights: Any = maker(omega, "combined")(site)
    if not isinstance(weights, Coefficients):
        raise RuleError(
            f"combined(omega={omega!r})",
            f"it makes a {type(weights).__name__}, which does not say how much of each part.",
            "Write omega=coefficients(count=3), or shared(coefficients(count=3)).",
        )
    return Combined(_copies("combined", site, part, len(weights.weight)), weights)


@part
def fusion(site: Site, part: Maker, count: int = 3) -> nn.Module:
    """What several frozen parts give, mixed by attention: as many copies of `part` as are counted.

    part   as of `combined`

    Starts as `part` does, until filled. Raises RuleError where `part` is shared or routes.
    Parameters: width * out + 2 * out^2 + 2 * out. Source: Pfeiffer et al. 2021 (AdapterFusion),
    section 3.2, without its dropout; `surgery.penalty` keeps V near the identity, as in its code.

    >>> from surgery.parts.adapters import adapter
    >>> fusion(adapter(rank=8), count=2)
    fusion(part=adapter(rank=8), count=2)
    """
    positive("fusion", count=count)
    return Fused(_copies("fusion", site, part, count), site.width, site.out)


def _copies(word: str, site: Site, part: Maker, count: int) -> list[nn.Module]:
    """Parts with values of their own. Raises RuleError where such a part is shared or routes."""
    if isinstance(part, Shared):
        raise RuleError(
            f"{word}({part!r}, ...)",
            "each of its copies has values of its own.",
            "Leave out shared. What may be shared is omega: shared(coefficients()).",
        )
    alone = site.seen(shape=site.shape, captures=site.captures)
    alone.borrow = None  # what a copy would borrow it has for itself
    copies = [maker(part, word)(alone) for _ in range(count)]
    if any(getattr(copy, "routes", False) for copy in copies):
        raise RuleError(
            f"{word}({part!r}, ...)",
            "it gives a mixture's gates too, which have no sum.",
            "Combine parts that give a tensor.",
        )
    return copies


@part
def scaled(site: Site, part: Maker, start: float = 1.0) -> nn.Module:
    """scale * part(x) with a trained scalar: the adapters of LAE.

    start  of the scale

    Parameters: 1, and those of the part. Source: He et al. 2022 (a learned scale);
    Gao et al. 2023 (LAE), whose released configuration trains it.

    >>> from surgery.parts.adapters import adapter
    >>> scaled(adapter(rank=5))
    scaled(part=adapter(rank=5))
    """
    return Scaled(maker(part, "scaled")(site), start)
