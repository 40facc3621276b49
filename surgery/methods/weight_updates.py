"""Updates of weights beyond LoRA: by other products, by what the base weight is, by rotation."""

from __future__ import annotations

from ..parts.deltas import hira as weighed
from ..parts.deltas import loha as hadamard
from ..parts.deltas import lokr as kronecker
from ..parts.deltas import miss as sums
from ..parts.deltas import olora as by_qr
from ..parts.deltas import pissa as principal
from ..parts.deltas import rlrr as rows_and_columns
from ..parts.low_rank import lora as low_rank
from ..parts.rotations import hra as reflections
from ..parts.rotations import oft as rotations
from ..parts.row_lengths import magnitude, rescale
from ..rules.edits import append, parallel, prepend, unfreeze
from ..rules.part import shared
from ..rules.roles import fc1, fc2, fused, head, norm, proj, qkv
from ..rules.rule import Rule, at

LINEAR = qkv | proj | fc1 | fc2
HEAD = at(head, unfreeze, optional=True)


def dora(rank: int = 8) -> list[Rule]:
    """LoRA of queries, keys and values with the lengths of the weight's rows trained apart.

    Source: Liu et al. 2024 (DoRA), Eq. 5
    """
    update = shared(low_rank(rank=rank), by=qkv)
    return [at(qkv, parallel(update), append(magnitude(update))), HEAD]


def pissa(rank: int = 8) -> list[Rule]:
    """LoRA of queries, keys and values that starts from the largest singular triplets of W.

    Source: Meng et al. 2024 (PiSSA)
    """
    return [at(qkv, principal(rank=rank)), HEAD]


def olora(rank: int = 8) -> list[Rule]:
    """LoRA of queries, keys and values that starts from the QR decomposition of W.

    Source: Buyukakyuz 2024 (OLoRA)
    """
    return [at(qkv, by_qr(rank=rank)), HEAD]


def hira(rank: int = 8) -> list[Rule]:
    """A low-rank matrix that weighs the entries of W, of queries, keys and values.

    Source: Huang et al. 2025 (HiRA), Eq. 4
    """
    return [at(qkv, weighed(rank=rank)), HEAD]


def rlrr() -> list[Rule]:
    """Vectors that re-scale rows and columns of every linear of attention and FFN.

    Source: Dong et al. 2024 (RLRR), Eq. 6
    """
    return [at(LINEAR, rows_and_columns()), HEAD]


def loha(rank: int = 8) -> list[Rule]:
    """The entry-wise product of two low-rank updates, of queries, keys and values.

    Source: Hyeon-Woo et al. 2021 (LoHa), Eq. 2
    """
    return [at(qkv, hadamard(rank=rank)), HEAD]


def lokr(rank: int = 8, blocks: int = 8) -> list[Rule]:
    """A Kronecker product of a small matrix and a low-rank one, of queries, keys and values.

    Source: Yeh et al. 2023 (LoKr)
    """
    return [at(qkv, kronecker(rank=rank, blocks=blocks)), HEAD]


def miss(rank: int = 64) -> list[Rule]:
    """One small matrix of sums of features, of queries, keys and values.

    Source: Kang 2024 (MiSS), Eq. 4
    """
    return [at(qkv, sums(rank=rank)), HEAD]


def oft(size: int = 32) -> list[Rule]:
    """Rotations of blocks of features before queries, keys and values.

    Source: Qiu et al. 2023 (OFT), Eq. 6
    """
    return [at(qkv, rotations(size=size)), HEAD]


def hra(rank: int = 8) -> list[Rule]:
    """A chain of reflections before queries, keys and values.

    Source: Yuan et al. 2024 (HRA), Eq. 3
    """
    return [at(qkv, reflections(rank=rank)), HEAD]


def ia3() -> list[Rule]:
    """Vectors that re-scale keys, values and what the FFN's last layer is given.

    Where queries, keys and values are made apart the module tree does not tell which is which, and
    all have one; with an example at(key | value, rescale()) says it.

    Source: Liu et al. 2022 (IA3), Eq. 3
    """
    return [
        at(fused, append(rescale(rows="_q k v")), optional=True),
        at(qkv & ~fused, append(rescale()), optional=True),
        at(fc2, prepend(rescale())),
        HEAD,
    ]


def ln_tuning() -> list[Rule]:
    """The norms alone are trained.

    Source: Zhao et al. 2023 (LN-tuning)
    """
    return [at(norm, unfreeze), HEAD]
