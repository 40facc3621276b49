"""Updates of weights that do not look at W: LoRA's further forms, shared numbers, spectra.

Of queries and values, or values alone: where these are made apart, all three have it (`dylora`).
"""

from __future__ import annotations

from ..parts.banks import bank, bases, pool
from ..parts.banks import randlora as of_bases
from ..parts.banks import unilora as of_a_pool
from ..parts.banks import vblora as of_a_bank
from ..parts.low_rank import lora as low_rank
from ..parts.low_rank_forms import adalora as triplets
from ..parts.low_rank_forms import gralora as grid
from ..parts.low_rank_forms import mlae as masked_ranks
from ..parts.low_rank_forms import snell as kernel
from ..parts.row_lengths import shift
from ..parts.spectral import c3a as circulants
from ..parts.spectral import fourierft as spectrum
from ..parts.spectral import places
from ..parts.spectral import waveft as wavelets
from ..rules.edits import append, parallel, unfreeze
from ..rules.part import shared
from ..rules.roles import fc1, fc2, fused, head, proj, qkv
from ..rules.rule import Rule, at
from .queries_and_values import on_queries_and_values

HEAD = at(head, unfreeze, optional=True)


def rslora(rank: int = 8) -> list[Rule]:
    """LoRA of queries, keys and values, scaled by alpha / sqrt(rank), with alpha the rank.

    Source: Kalajdzievski 2023 (rsLoRA)
    """
    return [at(qkv, low_rank(rank=rank, root=True)), HEAD]


def lora_fa(rank: int = 8) -> list[Rule]:
    """LoRA of queries, keys and values whose A stays as it was drawn.

    Source: Zhang et al. 2023 (LoRA-FA)
    """
    return [at(qkv, low_rank(rank=rank, frozen_A=True)), HEAD]


def hydra(rank: int = 2) -> list[Rule]:
    """Low-rank updates beside and after the last linear of attention and FFN.

    y = W x + b + B A x + D C (W x + b). The paper's code has biases in both, too.

    Source: Kim et al. 2023 (Hydra)
    """
    after = append(low_rank(rank=rank), residual=True)
    return [at(proj | fc2, after, parallel(low_rank(rank=rank))), HEAD]


def beft() -> list[Rule]:
    """The bias of the values alone.

    Source: Huang et al. 2025 (BEFT)
    """
    return on_queries_and_values(lambda rows: append(shift(rows=rows)), rows="_q _k v")


def fourierft(n: int = 3000, alpha: float = 300.0) -> list[Rule]:
    """An update of queries and values of which a few numbers of the spectrum are trained.

    Their places are drawn once for all layers of one size.

    Source: Gao et al. 2024 (FourierFT), Algorithm 1
    """
    core = shared(places(n=n))
    return on_queries_and_values(lambda rows: spectrum(core=core, alpha=alpha, rows=rows))


def waveft(n: int = 3000, alpha: float = 25.0) -> list[Rule]:
    """An update of queries and values of which a few wavelet coefficients are trained.

    Source: Bilican et al. 2025 (WaveFT)
    """
    core = shared(places(n=n))
    return on_queries_and_values(lambda rows: wavelets(core=core, alpha=alpha, rows=rows))


def c3a(size: int = 256) -> list[Rule]:
    """Circulant blocks, computed by FFT, of queries, keys and values.

    Source: Chen et al. 2024 (C3A)
    """
    return [at(qkv, circulants(size=size)), HEAD]


def randlora(rank: int = 32, scale: float = 20.0) -> list[Rule]:
    """A full-rank sum of low-rank updates on random bases, of queries and values.

    Source: Albert et al. 2025 (RandLoRA)
    """
    core = shared(bases(rank=rank))
    return on_queries_and_values(lambda rows: of_bases(core=core, scale=scale, rows=rows))


def vblora(rank: int = 4, size: int = 90, length: int = 256, k: int = 2) -> list[Rule]:
    """LoRA of queries and values, composed of the vectors of one bank.

    Source: Li et al. 2024 (VB-LoRA)
    """
    core = shared(bank(size=size, length=length))
    return on_queries_and_values(lambda rows: of_a_bank(core=core, rank=rank, k=k, rows=rows))


def unilora(rank: int = 4, size: int = 23_040) -> list[Rule]:
    """LoRA of queries and values, all of whose numbers are those of one pool.

    Source: Li et al. 2025 (Uni-LoRA)
    """
    core = shared(pool(size=size))
    return on_queries_and_values(lambda rows: of_a_pool(core=core, rank=rank, rows=rows))


def gralora(rank: int = 32, k: int = 2) -> list[Rule]:
    """A grid of small low-rank updates, of queries, keys and values.

    Source: Jung et al. 2025 (GraLoRA)
    """
    return [at(qkv, grid(rank=rank, k=k)), HEAD]


def mlae(rank: int = 8, mask: float = 0.5) -> list[Rule]:
    """LoRA of queries, keys and values as experts of rank 1, masked at random in training.

    Source: Wang et al. 2024 (MLAE)
    """
    return [at(qkv, masked_ranks(rank=rank, mask=mask)), HEAD]


def adalora(rank: int = 12) -> list[Rule]:
    """LoRA of every linear of attention and FFN as singular triplets, pruned by importance.

    Left to the training loop: `surgery.penalty(model)`, to be added to the loss, and
    `surgery.training.Budget`, which brings the mean rank down to two thirds in the paper.

    Source: Zhang et al. 2023 (AdaLoRA), Eq. 3
    """
    return [at(qkv | proj | fc1 | fc2, triplets(rank=rank)), HEAD]


def snell(rank: int = 8, sparsity: float = 0.9) -> list[Rule]:
    """A sparse update of every linear, made by a kernel of low-rank vectors.

    Source: Shen et al. 2024 (SNELL)
    """
    each = kernel(rank=rank, sparsity=sparsity, rows="q k v")
    return [
        at(fused, each, optional=True),
        at((qkv & ~fused) | proj | fc1 | fc2, kernel(rank=rank, sparsity=sparsity)),
        HEAD,
    ]
