"""Vectors on shared low-rank factors (Kopiczko et al. 2023, VeRA; Renduchintala et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import RuleError
from ..rules.part import Maker, part, shared, usually
from ..structure.module_tree import Site
from .arguments import positive
from .init import kaiming, register
from .low_rank import LowRank, scale_of
from .qkv_rows import chosen_rows, placed, row_size


class Factors(nn.Module):
    """A (rank, width) and B (out, rank), each trained (a parameter) or frozen (a buffer).

    What is frozen starts Kaiming uniform with `gain`, and so does A; B starts at zero where it is
    trained, and A where it alone is.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self, width: int, out: int, rank: int, *, gain: float, A: bool = True, B: bool = True
    ) -> None:
        super().__init__()
        down = torch.zeros(rank, width) if A and not B else kaiming(rank, width, gain=gain)
        up = torch.zeros(out, rank) if B else kaiming(out, rank, gain=gain)
        register(self, "A", down, trained=A)
        register(self, "B", up, trained=B)

    @property
    def is_trained(self) -> bool:
        """Whether any of it is; then it starts at zero."""
        return bool(self._parameters)


class SharedLoRA(LowRank):
    """scale * v B (u A x) for each of the chosen rows: A and B are shared, u and v of the site.

    core  has A (rank, width) and B (size, rank)
    u, v  the numbers that they start from; None: not trained, and 1. (k, rank) and (k, size).

    >>> core = Factors(768, 768, 256, gain=2**0.5, A=False, B=False)
    >>> SharedLoRA(core, 768, u=0.1, v=0.0)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    core: Factors
    u: Tensor
    v: Tensor

    def __init__(
        self,
        core: Factors,
        out: int,
        *,
        u: float | None,
        v: float | None,
        rows: list[slice] | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(rows or [slice(0, out)], out, dropout)
        self.core, self.scale = core, scale
        k, (size, rank) = len(self.rows), core.B.shape
        for name, start, features in (("u", u, rank), ("v", v, size)):
            vector = torch.full((k, features), 1.0 if start is None else start)
            register(self, name, vector, trained=start is not None)

    def maps(self) -> tuple[Tensor, Tensor]:
        A, B = self.core.A, self.core.B
        pieces = [self.scale * u[:, None] * B.mT * v for u, v in zip(self.u, self.v, strict=True)]
        return A, placed(pieces, self.rows, self.out).mT


@part
def frozen(site: Site, rank: int = 256) -> nn.Module:
    """Random matrices A (rank, width) and B (out, rank) that stay as they are, VeRA's.

    Kaiming uniform with gain sqrt 2. Stored with the parts. Parameters: 0.
    Source: Kopiczko et al. 2023 (VeRA).

    >>> frozen(rank=64)
    frozen(rank=64)
    """
    positive("frozen", rank=rank)
    return Factors(site.width, site.out, rank, gain=2**0.5, A=False, B=False)


@part
def tied(site: Site, rank: int = 8, A: bool = True, B: bool = True) -> nn.Module:
    """Matrices A (rank, width) and B (out, rank) that the sites of Tied-LoRA share.

    A, B   whether they are trained

    B starts at zero where it is trained, else A does where that is; anything else Kaiming uniform
    (a = sqrt 5). Parameters: rank * width for A, rank * out for B, where trained.
    Source: Renduchintala et al. 2023 (Tied-LoRA).

    >>> tied(rank=4, A=False)
    tied(rank=4, A=False)
    """
    positive("tied", rank=rank)
    return Factors(site.width, site.out, rank, gain=3**-0.5, A=A, B=B)


_FROZEN, _TIED = shared(frozen()), shared(tied())


@part
@usually("parallel")
def vera(
    site: Site,
    core: Maker = _FROZEN,
    rows: str | None = None,
    start: float = 0.1,
    dropout: float = 0.0,
) -> nn.Module:
    """A low-rank update of two trained vectors: W x + v B (u A x), with A, B frozen and shared.

    core     gives A and B: shared(frozen(rank=256)), once for all sites of one size
    rows     chunks of the output with vectors of their own, as in `lora`; the same A and B
    start    of u, which the paper calls lambda_d (v: lambda_b, which starts at zero)
    dropout  probability, on x

    Raises RuleError where `core` has no such A and B. Starts by adding nothing.
    Parameters: rank + out; with rows, rank + out / chunks for each chosen one.
    Source: Kopiczko et al. 2023 (VeRA).

    >>> vera(core=shared(frozen(rank=64)), rows="q _k v")
    vera(core=shared(frozen(rank=64)), rows="q _k v")
    """
    chosen = chosen_rows(rows, site.out, "vera")
    factors = _factors(core, site, chosen, "vera")
    return SharedLoRA(factors, site.out, u=start, v=0.0, rows=chosen, dropout=dropout)


@part
@usually("parallel")
def tied_lora(
    site: Site,
    core: Maker = _TIED,
    alpha: float | None = None,
    u: bool = True,
    v: bool = True,
    rows: str | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """A low-rank update with shared A and B: W x + alpha / rank * v B (u A x).

    core     gives A and B, and says which are trained: shared(tied(rank=8, A=False))
    alpha    None: the scale alpha / rank is 1
    u, v     whether these vectors of the site, (rank,) and (out,), are trained
    rows, dropout  as in `lora`

    u and v are ones; where neither A nor B is trained, v starts at zero instead, or u where v is
    frozen too. Starts by adding nothing. Raises RuleError where nothing is trained.
    Parameters: rank + out a site. Source: Renduchintala et al. 2023 (Tied-LoRA).

    >>> tied_lora(core=shared(tied(rank=4)), u=False)
    tied_lora(core=shared(tied(rank=4)), u=False)
    """
    chosen = chosen_rows(rows, site.out, "tied_lora")
    factors = _factors(core, site, chosen, "tied_lora")
    scale = scale_of("tied_lora", alpha, factors.B.shape[1])
    if not (u or v or factors.is_trained):
        raise RuleError(
            "tied_lora(u=False, v=False)",
            "A and B are frozen too, so nothing would be trained.",
            "Train one of them: tied(A=True), for example.",
        )
    # of what is trained one starts at zero: B, or A (see Factors), or else v, or else u
    start_u = 1.0 if factors.is_trained or v else 0.0
    start_v = 1.0 if factors.is_trained else 0.0
    return SharedLoRA(
        factors, site.out, u=start_u if u else None, v=start_v if v else None, rows=chosen,
        scale=scale, dropout=dropout,
    )  # fmt: skip


def _factors(core: Maker, site: Site, rows: list[slice], rule: str) -> Factors:
    """The shared A and B for rows of one size. Raises RuleError where `core` makes no such."""
    factors = core(site.sized(site.width, row_size(rows)))
    if not isinstance(factors, Factors):
        raise RuleError(
            f"{rule}(core={core!r})",
            f"it gave a {type(factors).__name__}, which has no A and B.",
            "Give shared(frozen(rank=256)) or shared(tied(rank=8)).",
        )
    return factors
