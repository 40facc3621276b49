"""Kronecker products as weights: KronA, Compacter and KAdaptation.

A (x) B is the matrix of the blocks A[i, j] B. On x it is A X B^T, where the rows of X are the
blocks of x, so that KronA and Compacter never make the whole matrix; KAdaptation, whose dropout
acts on it, does.
"""

from __future__ import annotations

import math

import torch
from einops import einsum, rearrange
from torch import Tensor, nn

from ..errors import RuleError
from ..rules.part import Maker, part, shared, usually
from ..structure.module_tree import Site
from .arguments import borrowed, divisors, near_divisors, positive
from .init import kaiming, xavier
from .qkv_rows import chosen_rows, placed, row_size


class KronA(nn.Module):
    """(A (x) B) x on rows of the output: (..., width) to (..., out), zeros on the other rows.

    A (pieces, a_out, a_in) starts at zero, B (pieces, b_out, b_in) Kaiming uniform (a = sqrt 5);
    every slice of rows has its own pair.

    >>> KronA(768, [slice(0, 768)], out=768, a_out=32, a_in=24)(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 768])
    """

    starts_at_zero = True

    def __init__(self, width: int, rows: list[slice], *, out: int, a_out: int, a_in: int) -> None:
        super().__init__()
        self.rows, self.out = rows, out
        self.a = nn.Parameter(torch.zeros(len(rows), a_out, a_in))
        self.b = nn.Parameter(kaiming(len(rows), row_size(rows) // a_out, width // a_in))

    def forward(self, x: Tensor) -> Tensor:
        blocks = rearrange(x, "... (j l) -> ... j l", j=self.a.shape[2])
        right = einsum(blocks, self.b, "... j l, n k l -> n ... j k")
        pieces = einsum(right, self.a, "n ... j k, n i j -> n ... i k").flatten(-2)
        return placed([*pieces], self.rows, self.out)

    def affine(self) -> tuple[Tensor, None]:
        pieces = [torch.kron(a, b).t() for a, b in zip(self.a, self.b, strict=True)]
        return placed(pieces, self.rows, self.out).t(), None

    def extra_repr(self) -> str:
        a, b = (" x ".join(map(str, factor.shape[1:])) for factor in (self.a, self.b))
        return f"{a} (x) {b}"


@part
@usually("parallel")
def krona(
    site: Site, a_out: int | None = None, a_in: int | None = None, rows: str | None = None
) -> nn.Module:
    """A Kronecker product of two matrices: at(qkv, parallel(krona(), scale=s)).

    a_out, a_in  rows and columns of A; B has out / a_out and width / a_in. None: the smallest
                 divisor of out from its root up, the largest of width up to its root, so that
                 768 -> 768 is A 32 x 24 (x) B 24 x 32
    rows         "q _k v": of a linear that makes q, k and v at once, a product for q and one for
                 v; None: one for all rows

    Starts by adding nothing. Raises RuleError where the sizes of A do not divide.
    Parameters: a_out * a_in + (out * width) / (a_out * a_in), for each piece.
    Source: Edalati et al. 2022 (KronA): W + s A (x) B.

    >>> krona(a_out=32, a_in=24)
    krona(a_out=32, a_in=24)
    """
    slices = chosen_rows(rows, site.out, "krona")
    size = row_size(slices)
    a_out = _near_root(size, up=True) if a_out is None else a_out
    a_in = _near_root(site.width, up=False) if a_in is None else a_in
    divides("krona", "output", size, a_out=a_out)
    divides("krona", "input", site.width, a_in=a_in)
    return KronA(site.width, slices, out=site.out, a_out=a_out, a_in=a_in)


class PHMRule(nn.Module):
    """The n matrices (n, n) that all adapters of a model share; starts normal."""

    def __init__(self, n: int = 4, std: float = 1e-4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, n, n).normal_(0.0, std))


class PHMLinear(nn.Module):
    """x W + b with W = sum_i A_i (x) s_i t_i^T, (width, out): A is borrowed, s, t and b its own.

    s (n, width / n) and t (n, out / n) start as Glorot uniform of gain sqrt 2, b at zero.

    >>> PHMLinear(768, 24, PHMRule(4))(torch.randn(2, 197, 768)).shape
    torch.Size([2, 197, 24])
    """

    def __init__(self, width: int, out: int, rule: PHMRule) -> None:
        super().__init__()
        n = len(rule.weight)
        self.rule = rule
        self.s, self.t = _columns(n, width // n), _columns(n, out // n)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        blocks = rearrange(x, "... (a p) -> ... a p", p=self.s.shape[1])
        hidden = einsum(blocks, self.s, "... a p, i p -> ... i a")
        mixed = einsum(hidden, self.rule.weight, "... i a, i a b -> ... i b")
        y = einsum(mixed, self.t, "... i b, i q -> ... b q")
        return rearrange(y, "... b q -> ... (b q)") + self.bias


class Compacter(nn.Module):
    """up(gelu(down(x))), where both are `PHMLinear` of one rule: (..., width) to (..., out).

    Starts near zero, not at it: A has a deviation of 1e-4, and the output has A in it twice.
    """

    def __init__(self, width: int, rank: int, rule: PHMRule, *, out: int) -> None:
        super().__init__()
        self.down = PHMLinear(width, rank, rule)
        self.act = nn.GELU(approximate="tanh")
        self.up = PHMLinear(rank, out, rule)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.up(self.act(self.down(x)))
        return hidden


@part
def phm_rule(site: Site, n: int = 4, std: float = 1e-4) -> nn.Module:
    """The n matrices (n, n) of Compacter, for `shared`: they know no width, a model has them once.

    n     how many, and how many blocks their layers cut features into
    std   of their start, normal

    Parameters: n ** 3. Source: Karimi Mahabadi et al. 2021 (Compacter).

    >>> phm_rule(n=2)
    phm_rule(n=2)
    """
    positive("phm_rule", n=n)
    return PHMRule(n, std)


_PHM_RULE = shared(phm_rule())


@part
def compacter(site: Site, rank: int = 24, rule: Maker = _PHM_RULE) -> nn.Module:
    """A bottleneck of two layers W = sum_i A_i (x) s_i t_i^T: append(compacter(), residual=True).

    rank  hidden units; n divides them and the width
    rule  makes A, `shared(phm_rule())`: one for both layers and all adapters

    Starts near the identity: A has a deviation of 1e-4, s and t are Glorot uniform (gain sqrt 2).
    Raises RuleError where n does not divide. Parameters: width + 3 * rank + 2 * out, and A's.
    Source: Karimi Mahabadi et al. 2021 (Compacter).

    >>> compacter(rank=8, rule=shared(phm_rule(n=2)))
    compacter(rank=8, rule=shared(phm_rule(n=2)))
    """
    positive("compacter", rank=rank)
    matrices = borrowed("compacter", "rule", rule, site.sized(0, 0), PHMRule)
    n = len(matrices.weight)
    for what, size in (("width", site.width), ("rank", rank), ("output", site.out)):
        divides("compacter", what, size, n=n)
    return Compacter(site.width, rank, matrices, out=site.out)


class SlowFactors(nn.Module):
    """a and b, (pieces, t, t): matrices A_i = a_i b_i^T that all layers share; U(-0.01, 0.01)."""

    def __init__(self, pieces: int, t: int = 32) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(pieces, t, t).uniform_(-0.01, 0.01))
        self.b = nn.Parameter(torch.empty(pieces, t, t).uniform_(-0.01, 0.01))


class KAdaptation(nn.Module):
    """scale * dW x + bias on rows of the output, dW = sum_i (a_i b_i^T) (x) (u_i v_i^T).

    a and b, for each slice of rows, are borrowed; u (pieces, t, size / t), v (pieces, t, width / t)
    and the bias, which the slices share, are its own. u and the bias start at zero, v is Kaiming
    uniform. Dropout acts on dW.
    """

    starts_at_zero = True

    def __init__(
        self,
        width: int,
        rows: list[slice],
        slow: SlowFactors,
        *,
        out: int,
        scale: float = 160.0,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        pieces, t, _ = slow.a.shape
        size = row_size(rows)
        self.rows, self.out, self.scale, self.slow = rows, out, scale, slow
        self.u = nn.Parameter(torch.zeros(pieces, t, size // t))
        self.v = nn.Parameter(kaiming(pieces, t, width // t))
        self.bias = nn.Parameter(torch.zeros(size))
        self.drop = nn.Dropout(dropout)

    def deltas(self) -> Tensor:
        """scale * dW, (pieces, size, width): sum_i (a_i (x) u_i) (b_i (x) v_i)^T."""
        left = einsum(self.slow.a, self.u, "n i j, n i p -> n i j p").flatten(2)
        right = einsum(self.slow.b, self.v, "n i j, n i p -> n i j p").flatten(2)
        return self.scale * left.transpose(1, 2) @ right

    def forward(self, x: Tensor) -> Tensor:
        deltas: Tensor = self.drop(self.deltas())
        pieces = [nn.functional.linear(x, delta, self.bias) for delta in deltas]
        return placed(pieces, self.rows, self.out)

    def affine(self) -> tuple[Tensor, Tensor]:
        weight = placed([delta.t() for delta in self.deltas()], self.rows, self.out).t()
        return weight, placed([self.bias] * len(self.rows), self.rows, self.out)


@part
def slow_factors(site: Site, t: int = 32) -> nn.Module:
    """The slow factors of KAdaptation, for `shared`: they know no width, a model has them once.

    t   how many, and how many numbers in each; must divide the widths

    `site.out` is the number of matrices that a part adapts (2: q and v). Parameters: 2 * t * t for
    each of these. Source: He et al. 2023 (KAdaptation).

    >>> slow_factors(t=8)
    slow_factors(t=8)
    """
    positive("slow_factors", t=t)
    return SlowFactors(site.out, t)


_SLOW_FACTORS = shared(slow_factors())


@part
@usually("parallel")
def kadaptation(
    site: Site,
    slow: Maker = _SLOW_FACTORS,
    rows: str | None = None,
    scale: float = 160.0,
    dropout: float = 0.5,
) -> nn.Module:
    """A sum of t Kronecker products of rank-one matrices, one factor of each shared by all layers.

    slow      makes the shared factors, `shared(slow_factors())`
    rows      "q _k v": of a linear that makes q, k and v at once, a dW for q and one for v, and a
              bias that both add; None: one for all rows
    scale     of dW, not of the bias: alpha / r * 5
    dropout   probability, on the numbers of dW

    Starts by adding nothing. Raises RuleError where t does not divide the widths.
    Parameters: size + pieces * (size + width), and the shared 2 * pieces * t * t.
    Source: He et al. 2023 (KAdaptation).

    >>> kadaptation(slow=shared(slow_factors(t=8)), dropout=0.0)
    kadaptation(slow=shared(slow_factors(t=8)), dropout=0.0)
    """
    slices = chosen_rows(rows, site.out, "kadaptation")
    factors = borrowed("kadaptation", "slow", slow, site.sized(0, len(slices)), SlowFactors)
    t = factors.a.shape[1]
    divides("kadaptation", "output", row_size(slices), t=t)
    divides("kadaptation", "input", site.width, t=t)
    return KAdaptation(site.width, slices, factors, out=site.out, scale=scale, dropout=dropout)


def divides(word: str, what: str, size: int, **values: int) -> None:
    """Raise RuleError unless each value divides `size`."""
    positive(word, **values)
    for name, value in values.items():
        if size % value:
            raise RuleError(
                f"{word}({name}={value})",
                f"the {what} of {size} features does not divide by {value}.",
                f"Its divisors nearest to {value}: {near_divisors(size, value)}.",
            )


def _columns(n: int, features: int) -> nn.Parameter:
    """n vectors, each as a matrix (features, 1): Glorot uniform of gain sqrt 2."""
    return nn.Parameter(xavier(n, features, fans=features + 1, gain=math.sqrt(2)))


def _near_root(size: int, *, up: bool) -> int:
    """The divisor of `size` nearest to its root, from the root up or down."""
    fits = [n for n in divisors(size) if (n * n >= size if up else n * n <= size)]
    return min(fits) if up else max(fits)
