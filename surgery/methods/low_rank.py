"""Low-rank updates of linear layers: LoRA (Hu et al. 2021) and what came of it.

DyLoRA, PRoLoRA; VeRA and Tied-LoRA, whose matrices layers share; ViDA, of two ranks at once.
"""

from __future__ import annotations

from ..parts.low_and_high_rank import vida as both_ranks
from ..parts.low_rank import dylora as dynamic
from ..parts.low_rank import lora as low_rank
from ..parts.low_rank import prolora as tiled
from ..parts.shared_low_rank import frozen, tied
from ..parts.shared_low_rank import tied_lora as tied_low_rank
from ..parts.shared_low_rank import vera as vectors
from ..rules.edits import unfreeze
from ..rules.part import shared
from ..rules.roles import fc1, fc2, head, proj, qkv
from ..rules.rule import Rule, at
from .queries_and_values import on_queries_and_values


def lora(rank: int = 8) -> list[Rule]:
    """A low-rank update (LoRA, rank 8) of the queries, keys and values of every attention.

    Where one linear makes all three it has one A and B, as NOAH's (which has dropout 0.1 too); with
    rows="q _k v" the update is that of Hu et al., of queries and values.

    Source: Hu et al. 2021 (LoRA), Eq. 3
    """
    return [at(qkv, low_rank(rank=rank)), at(head, unfreeze, optional=True)]


def dylora(rank: int = 8) -> list[Rule]:
    """LoRA of queries and values that is trained at all ranks up to 8 at once.

    Where queries, keys and values are made apart, the module tree does not tell which is which,
    and all three have it; with an example, at(query | value, dylora()) says it.

    Source: Valipour et al. 2022 (DyLoRA), Algorithm 1
    """
    return on_queries_and_values(lambda rows: dynamic(rank=rank, rows=rows))


def prolora(rank: int = 8, unshared: int = 2, tiles: tuple[int, int] = (4, 4)) -> list[Rule]:
    """LoRA of queries and values whose A and B are tiled of small chunks, but for two ranks.

    Where queries, keys and values are made apart, all three have it (see `dylora`).

    Source: Wang et al. 2024 (PRoLoRA)
    """
    return on_queries_and_values(
        lambda rows: tiled(rank=rank, unshared=unshared, tiles=tiles, rows=rows)
    )


def vera(rank: int = 256) -> list[Rule]:
    """Two trained vectors a low-rank update of queries and values, on random shared matrices.

    Where queries, keys and values are made apart, all three have it (see `dylora`). Layers of one
    size share a pair of matrices; of several sizes, each has a pair (Swin's stages).

    Source: Kopiczko et al. 2023 (VeRA)
    """
    core = shared(frozen(rank=rank))
    return on_queries_and_values(lambda rows: vectors(core=core, rows=rows))


def tied_lora(
    rank: int = 8, A: bool = True, B: bool = True, u: bool = True, v: bool = True
) -> list[Rule]:
    """LoRA whose A and B all layers share, with two trained vectors for each of them.

    A, B, u, v say what is trained: all of it in the full variant, B and u, v in others.

    Source: Renduchintala et al. 2023 (Tied-LoRA)
    """
    core = shared(tied(rank=rank, A=A, B=B))
    return [at(qkv, tied_low_rank(core=core, u=u, v=v)), at(head, unfreeze, optional=True)]


def vida(low: int = 1, high: int = 128) -> list[Rule]:
    """A low-rank and a high-rank update beside every linear of attention and FFN.

    The paper says linear layers; its code takes those of attention alone: at(qkv | proj, vida()),
    7,133,184 on ViT-B/16.

    Rules say the adapters alone. Left to the training loop: the teacher, a moving average of the
    model; its loss of consistency; and the homeostatic scaling, which sets low_scale and
    high_scale of the parts by how uncertain the teacher is, at every batch. At test time the head
    has no labels to train on: leave out the last rule.

    Source: Liu et al. 2023 (ViDA)
    """
    return [
        at(qkv | proj | fc1 | fc2, both_ranks(low=low, high=high)),
        at(head, unfreeze, optional=True),
    ]
