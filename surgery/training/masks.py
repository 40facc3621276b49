"""Which entries of each weight are trained: by its size, or by a task's gradients.

    rules, indices = chosen(measure(model, batches, loss), model, inputs=1)
    fill(surgery.apply(model, rules), indices)

GPS (Zhang et al. 2024), SHiRA (Bhardwaj et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import RuleError, is_integer
from ..parts.sparse_updates import sparse
from ..rules.edits import unfreeze
from ..rules.roles import head
from ..rules.rule import at
from ..structure.anatomy import roles_of
from ..structure.module_tree import Tree
from .spt import Allotment


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    """The size |w| of every number of the model, by name: scores for `chosen`.

    Source: Bhardwaj et al. 2024 (SHiRA), the masks by weight magnitude.

    >>> magnitudes(nn.Linear(1, 1))["bias"].requires_grad
    False
    """
    return {name: p.detach().abs() for name, p in model.named_parameters()}


def chosen(
    scores: Mapping[str, Tensor],
    model: nn.Module,
    *,
    share: float | None = None,
    inputs: int | None = None,
) -> Allotment:
    """Rules that train the entries of highest score of every nn.Linear but the head, and which.

    scores  by name: `measure(model, batches, loss)`, or `magnitudes(model)`
    share   of the entries of each weight: SHiRA, 0.01 to 0.02
    inputs  so many of each output neuron: GPS, 1

    The head is trained whole. Raises RuleError unless one of share and inputs is given, and where
    scores and model do not belong together.

    >>> scores = {"0.weight": torch.tensor([[1.0, 3.0], [9.0, 2.0]])}
    >>> chosen(scores, nn.Sequential(nn.Linear(2, 2)), inputs=1).indices
    {'0': tensor([1, 2])}
    """
    _check(share, inputs)
    tree = Tree(model)
    heads = {id(m) for site in roles_of(tree)["head"] for m in site.module.modules()}
    indices: dict[str, Tensor] = {}
    for site in tree.sites:
        if type(site.module) is nn.Linear and id(site.module) not in heads:
            score = scores.get(f"{site.path}.weight".strip("."))
            if score is None or score.shape != site.module.weight.shape or score.isnan().any():
                raise RuleError(
                    "chosen(scores, ...)",
                    f"they tell nothing of {site.path} {tuple(site.module.weight.shape)}, or nan.",
                    "Give what measure(model, batches, loss) gave for this model.",
                )
            indices[site.path] = _highest(score, share, inputs)
    rules = [at(path, sparse(entries=len(index))) for path, index in indices.items()]
    return Allotment([*rules, at(head, unfreeze, optional=True)], indices)


def _check(share: float | None, inputs: int | None) -> None:
    fine = is_integer(inputs, least=1) if share is None else inputs is None and 0 < share <= 1
    if not fine:
        raise RuleError(
            f"chosen(share={share!r}, inputs={inputs!r})",
            "one of both says how much is trained.",
            "Give share=0.01, or inputs=1 for each output neuron.",
        )


def _highest(score: Tensor, share: float | None, inputs: int | None) -> Tensor:
    """The flat positions of the highest, in order."""
    if inputs is not None:
        best = score.topk(min(inputs, score.shape[1]), dim=1).indices
        flat = best + torch.arange(len(score), device=best.device)[:, None] * score.shape[1]
    else:
        flat = score.flatten().topk(max(1, round((share or 0) * score.numel()))).indices
    return flat.flatten().sort().values.cpu()
