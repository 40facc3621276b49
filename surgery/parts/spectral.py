"""Updates of a weight that are short in another basis: its spectrum, its wavelets, circulants.

FourierFT (Gao et al. 2024), WaveFT (Bilican et al. 2025), C3A (Chen et al. 2024).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..rules.part import Maker, part, shared, usually
from ..structure.module_tree import Site
from .arguments import borrowed, fitted, positive
from .base_weight import wide
from .deltas import Delta
from .qkv_rows import chosen_rows, on_rows, row_size


class Places(nn.Module):
    """Flat positions (n,) of a matrix (out, width), drawn without replacement; never trained."""

    index: Tensor

    def __init__(self, width: int, out: int, n: int) -> None:
        super().__init__()
        self.register_buffer("index", torch.randperm(out * width)[:n].clone())
        self.indices_below = {"index": out * width}


class FourierFT(Delta):
    """alpha * Re(ifft2(F)), where F (out, width) has the trained c at fixed places, else zeros."""

    starts_at_zero = False

    def __init__(
        self, places: Places, width: int, out: int, alpha: float = 300.0, start: float = 1.0
    ) -> None:
        super().__init__()
        self.places, self.alpha, self.shape = places, alpha, (out, width)
        self.c = nn.Parameter(torch.randn(len(places.index)) * start)

    def coefficients(self) -> Tensor:
        """F (out, width), in float32 at least."""
        c = wide(self.c)
        empty = c.new_zeros(math.prod(self.shape))
        return empty.scatter(0, self.places.index, c).view(self.shape)

    def delta(self) -> Tensor:
        whole: Tensor = torch.fft.ifft2(self.coefficients()).real
        return (self.alpha * whole).to(self.c.dtype)


class WaveFT(FourierFT):
    """alpha * what F (out, width) has for Haar wavelets, of one level, in both directions.

    The coefficients are laid out as its authors do: means at the top left, differences of rows at
    the top right, of columns at the bottom left. An odd side is padded at its end, and cut again.
    """

    starts_at_zero = True

    def __init__(self, places: Places, width: int, out: int, alpha: float = 25.0) -> None:
        super().__init__(places, width, out, alpha, start=0.0)

    def delta(self) -> Tensor:
        spectrum = F.pad(self.coefficients(), (0, self.shape[1] % 2, 0, self.shape[0] % 2))
        means, differences = rearrange(spectrum, "(q i) (p j) -> p q i j", p=2, q=2)
        tall = _unfolded(means, differences, -2)
        whole = _unfolded(tall[0], tall[1], -1)
        return (self.alpha * whole[: self.shape[0], : self.shape[1]]).to(self.c.dtype)


def _unfolded(mean: Tensor, difference: Tensor, dim: int) -> Tensor:
    """One step of the inverse Haar transform along an axis, which becomes twice as long."""
    pair = torch.stack([mean + difference, mean - difference], dim)
    return pair.flatten(dim - 1, dim) / 2**0.5


class C3A(Delta):
    """A grid of circulant blocks over the width: each is its first row, turned step by step."""

    def __init__(self, width: int, out: int, size: int) -> None:
        super().__init__()
        self.width, self.size = width, size
        self.kernel = nn.Parameter(torch.zeros(out // size, width // size, size))

    def delta(self) -> Tensor:
        steps = torch.arange(self.size, device=self.kernel.device)
        blocks = self.kernel[..., (steps - steps[:, None]) % self.size]
        return rearrange(blocks, "m n i j -> (m i) (n j)") / self.width

    def forward(self, x: Tensor) -> Tensor:
        """By FFT: size * log(size) for a block, not size ** 2."""
        if not x.numel():  # which MKL's FFT refuses
            return super().forward(x)
        blocks = wide(rearrange(x, "... (n i) -> ... n i", i=self.size))
        spectrum = torch.fft.rfft(wide(self.kernel)).conj()
        mixed = torch.einsum("...nf,mnf->...mf", torch.fft.rfft(blocks), spectrum)
        whole: Tensor = torch.fft.irfft(mixed, n=self.size).flatten(-2)
        return (whole / self.width).to(x.dtype)


@part
def places(site: Site, n: int = 3000) -> nn.Module:
    """Places of a matrix that stay as drawn: n of them, or all where it has no more.

    Parameters: 0; n integers are stored. Source: Gao et al. 2024 (FourierFT), Algorithm 1.

    >>> places(n=1000)
    places(n=1000)
    """
    positive("places", n=n)
    return Places(site.width, site.out, n)


_PLACES = shared(places())


def _on_places(
    word: str, kind: type[FourierFT], site: Site, core: Maker, rows: str | None, *given: float
) -> nn.Module:
    """One for each of the chosen rows, all at the same places."""
    size = row_size(chosen_rows(rows, site.out, word))
    at = borrowed(word, "core", core, site.sized(site.width, size), Places)
    return on_rows(rows, site, word, lambda out: kind(at, site.width, out, *given))


@part
@usually("parallel")
def fourierft(
    site: Site,
    core: Maker = _PLACES,
    alpha: float = 300.0,
    start: float = 1.0,
    rows: str | None = None,
) -> nn.Module:
    """An update whose spectrum has a few trained numbers: alpha * Re(ifft2(F)).

    core   gives their places: shared(places(n=3000)), the same for all sites of one size
    start  the standard deviation of the numbers at the start; 0: nothing is added
    rows   as of `lora`: each chunk has numbers of its own

    Starts at random, as the paper writes. Parameters: n, for each chosen rows.
    Source: Gao et al. 2024 (FourierFT), Eq. 2 to 4.

    >>> fourierft(core=shared(places(n=1000)))
    fourierft(core=shared(places(n=1000)))
    """
    return _on_places("fourierft", FourierFT, site, core, rows, alpha, start)


@part
@usually("parallel")
def waveft(
    site: Site, core: Maker = _PLACES, alpha: float = 25.0, rows: str | None = None
) -> nn.Module:
    """An update of a few trained wavelet coefficients (Haar, one level).

    core, rows  as of `fourierft`

    Starts by adding nothing. Parameters: n, for each chosen rows.
    Source: Bilican et al. 2025 (WaveFT).

    >>> waveft(alpha=10.0)
    waveft(alpha=10.0)
    """
    return _on_places("waveft", WaveFT, site, core, rows, alpha)


@part
@usually("parallel")
def c3a(site: Site, size: int = 256) -> nn.Module:
    """An update of circulant blocks, a convolution along features, computed by FFT.

    size  of the blocks; where it does not divide input and output, the nearest that does

    Starts by adding nothing; it is divided by the width, as in the authors' code.
    Parameters: width * out / size. Source: Chen et al. 2024 (C3A).

    >>> c3a(size=64)
    c3a(size=64)
    """
    positive("c3a", size=size)
    return C3A(site.width, site.out, fitted(math.gcd(site.width, site.out), size))
