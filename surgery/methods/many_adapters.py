"""Several parts put together: over time (LAE), tasks (ScaLearn, AdapterFusion), domains (MAD-X)."""

from __future__ import annotations

from torch import nn

from ..parts.adapter_sum import coefficients, combined, fusion, scaled
from ..parts.adapters import adapter
from ..parts.domain_adapters import domains as for_each_domain
from ..rules.edits import append, parallel, unfreeze
from ..rules.relations import inside
from ..rules.roles import block, ffn, head
from ..rules.rule import Rule, at


def lae(rank: int = 5, blocks: int = 5) -> list[Rule]:
    """A parallel adapter (rank 5, GELU, a learned scale) beside the FFN of the first 5 blocks.

    Of LAE's three variants (adapter, LoRA, prefix) this is the adapter. The rest of the method is
    the training loop's: `surgery.state.accumulate` after each step, `surgery.state.ensemble`
    to answer with the online and the offline state, and keeping the online parts still in the
    first epochs of a task, while the head learns.

    Source: Gao et al. 2023 (LAE)
    """
    beside = parallel(scaled(adapter(rank=rank, activation=nn.GELU)))
    return [
        at(ffn & inside(block[:blocks]), beside),
        at(head, unfreeze, optional=True),
    ]


def scalearn(count: int = 3, rank: int = 48, by_feature: bool = True) -> list[Rule]:
    """A learned sum of frozen adapters (3 of rank 48), trained before, after every FFN.

    The adapters are trained by at(ffn, append(adapter(rank=48), residual=True)), one model for
    each source task; `surgery.state.fill` brings them in, and before that there is nothing to
    sum. Without `by_feature` this is ScaLearnUniform; with omega=shared(coefficients(count=3)) in
    rules of one's own, ScaLearn++.

    Source: Frohmann et al. 2023 (ScaLearn)
    """
    omega = coefficients(count=count, by_feature=by_feature, dropout=0.3)
    return [
        at(ffn, append(combined(adapter(rank=rank), omega), residual=True)),
        at(head, unfreeze, optional=True),
    ]


def adapter_fusion(count: int = 3, rank: int = 48) -> list[Rule]:
    """Attention over what frozen adapters (3 of rank 48), trained before, give after every FFN.

    Trained, and filled in, as those of `scalearn`: fill(model, states), a `surgery.state_dict` for
    each. `surgery.penalty` belongs to its loss.

    Source: Pfeiffer et al. 2021 (AdapterFusion)
    """
    return [
        at(ffn, append(fusion(adapter(rank=rank), count=count), residual=True)),
        at(head, unfreeze, optional=True),
    ]


def language_adapter(domains: int = 2, rank: int = 384) -> list[Rule]:
    """A serial adapter (rank 384) for each domain after every FFN, of which one runs.

    `surgery.parts.domain_adapters.choose(model, 1)` says which; `surgery.state.one_domain` and
    `average` merge domains into one plain adapter.

    Source: Pfeiffer et al. 2020 (MAD-X)
    """
    return [
        at(ffn, append(for_each_domain(adapter(rank=rank), count=domains), residual=True)),
        at(head, unfreeze, optional=True),
    ]
