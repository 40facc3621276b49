"""What low-rank parts start from, read off batches of a task; and what salient channels are.

    rules = eva_rules(model, surgery.methods.lora(rank=8), batches)  # ranks moved; or as they are
    eva(surgery.apply(model, rules), batches)  # before training

EVA (Paischer et al. 2024), CorDA (Yang et al. 2024), LoRA-GA (Wang et al. 2024), SCT (Zhao et al.
2023). The base stays as it is, and what is added stays zero.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..engine.apply import revert
from ..engine.operation import operations
from ..engine.planning import plan
from ..errors import OperationError, RuleError, is_number
from ..parts.base_weight import BaseWeight
from ..parts.deltas import Principal
from ..parts.low_rank import LoRA
from ..parts.visual_adapters import Salient
from ..rules.edits import Edit
from ..rules.part import Part
from ..rules.rule import Rule, Rules, at
from ..rules.selector import where
from .observed import check_seen, moments, parts_of, run_each, watching

Model = TypeVar("Model", bound=nn.Module)
Loss = Callable[[nn.Module, Any], Tensor]


@torch.no_grad()
def eva(model: Model, batches: Iterable[Any]) -> Model:
    """A of every LoRA becomes the directions in which what comes to it varies most.

    batches  inputs of the model: a tensor, a tuple or a dict each

    These are the principal components of all features that come, about their mean as in its code;
    B stays. Returns the model. Raises OperationError where there is no LoRA, or nothing comes to
    one; RuleError where there is no batch. Source: Paischer et al. 2024 (EVA).

    >>> from surgery import apply, at, lora
    >>> model = apply(nn.Sequential(nn.Linear(2, 3)), at("0", lora(rank=1)))
    >>> eva(model, [torch.tensor([[1.0, 2.0], [1.0, 0.0]])]).surgery.default.get_submodule(
    ...     "0/parallel").A.detach().abs()
    tensor([[[0., 1.]]])
    """
    parts = parts_of(model, LoRA, "eva", "lora")
    for part, moment in moments(model, parts, batches, "eva", centred=True).items():
        directions = torch.linalg.eigh(moment)[1].flip(1).t()[: part.rank]
        part.A[:, : len(directions)] = directions.to(part.A)
    return model


@torch.no_grad()
def eva_rules(
    model: nn.Module, rules: Rules, batches: Iterable[Any], rho: float = 2.0
) -> list[Rule]:
    """The rules with the ranks of LoRA moved to where a component explains more; for `eva`.

    Of all components of all places those are taken that explain the largest shares of the variance
    there, as many as there were ranks. A place left without any has no LoRA. Scales stay.

    model  as it is before these rules, and afterwards
    rho    how many times its rank a place may get

    Raises what `apply` and `eva` raise, and RuleError where no rule joins a LoRA of its own to each
    place. Source: Paischer et al. 2024 (EVA), with shares as in its code.

    >>> from surgery import at, lora
    >>> model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4))
    >>> eva_rules(model, at("*", lora(rank=2)), [torch.eye(4)])
    [at("0", parallel(lora(rank=3))), at("1", parallel(lora(rank=1)))]
    """
    if not (is_number(rho) and 1 <= rho < math.inf):
        raise RuleError(f"eva_rules(rho={rho!r})", "it is no number from 1 up.", "Give 2.0.")
    planned = plan(model, rules, name="eva_rules")
    planned.apply()
    try:
        held: dict[str, Any] = dict(operations(model)[-1].named_children())
        found = {
            held[p.key]: p
            for p in planned.placements
            if isinstance(held[p.key], LoRA) and isinstance(p.edit.part, Part)
        }
        if not found:
            raise RuleError("eva_rules(rules=...)", "they join no LoRA.", 'Give "lora".')
        paths = {part: p.place.path for part, p in found.items()}
        ranks = _spread(moments(model, paths, batches, "eva_rules", centred=True), rho)
    finally:
        revert(model, name="eva_rules")
    changes = {
        (id(p.rule), id(p.edit), p.place.path): (ranks[part], part.scale)
        for part, p in found.items()
    }
    return [
        new
        for rule, sites in planned.matches
        for new in _moved(rule, [site.path for site in sites], changes)
    ]


def _spread(seen: dict[LoRA, Tensor], rho: float) -> Counter[LoRA]:
    """How many ranks each part gets: as many components as explain the largest shares."""
    shares = [
        (share, part)
        for part, moment in seen.items()
        for share in (torch.linalg.eigvalsh(moment).flip(0) / moment.trace().clamp(min=1e-300))[
            : round(rho * part.rank)
        ].tolist()
    ]
    shares.sort(key=lambda each: -each[0])
    return Counter(part for _, part in shares[: sum(part.rank for part in seen)])


def _moved(
    rule: Rule, paths: list[str], changes: Mapping[tuple[int, int, str], tuple[int, float]]
) -> Iterator[Rule]:
    """A rule as one for each rank, or, of several edits, for all of their ranks."""
    alike: dict[tuple[tuple[int, float] | None, ...], list[str]] = {}
    for path in paths:
        key = tuple(changes.get((id(rule), id(edit), path)) for edit in rule.rest)
        alike.setdefault(key, []).append(path)
    if not any(change for key in alike for change in key):
        yield rule
        return
    for key, places in alike.items():
        edits = [_ranked(edit, *c) if c else edit for edit, c in zip(rule.rest, key, strict=True)]
        if left := [edit for edit in edits if edit]:
            yield at(reduce(or_, map(where, places)), *left, optional=rule.optional)


def _ranked(edit: Any, rank: int, scale: float) -> Edit | None:
    """An edit whose part has another rank, and is scaled as before; None where there is no rank."""
    named = {**dict(edit.part.named), "rank": rank}
    if named.get("root"):
        named["alpha"] = scale * math.sqrt(rank)
    elif named["alpha"] is not None:
        named["alpha"] = scale * rank
    return replace(edit, part=Part(edit.part.build, tuple(named.items()))) if rank else None


@torch.no_grad()
def corda(model: Model, batches: Iterable[Any], keep: bool = True) -> Model:
    """Parts of `pissa` start from W's triplets in the metric of what comes to them.

    W C = U S V^T, C the mean of x x^T (with a hundredth of its mean diagonal added), and so
    W = U S V^T C^-1, of which A and B take `rank` triplets.

    batches  as of `eva`
    keep     the smallest, so that what the batches need is kept; False: the largest, to learn it

    Returns the model, and raises as `eva` does. Source: Yang et al. 2024 (CorDA).
    """
    parts = parts_of(model, Principal, "corda", "pissa")
    for part, moment in moments(model, parts, batches, "corda").items():
        part.restart(*oriented(_weight(part)(moment), moment, len(part.A), keep))
    return model


def oriented(W: Tensor, C: Tensor, rank: int, keep: bool) -> tuple[Tensor, Tensor]:
    """A (rank, width) and B (out, rank): triplets of W (out, width) in the metric of C."""
    C = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device)
    U, S, V = torch.linalg.svd(W @ C, full_matrices=False)
    chosen = slice(-rank, None) if keep else slice(rank)
    root = S[chosen].sqrt()
    A: Tensor = torch.linalg.solve(C, root[:, None] * V[chosen], left=False)
    return A, U[:, chosen] * root


def lora_ga(model: Model, batches: Iterable[Any], loss: Loss, gamma: float = 16.0) -> Model:
    """Parts of `pissa` start so that their first step is as near as can be to that of W itself.

    Of the gradient U S V^T of W, A = c V^T of the first `rank` and B = c U of the next, with
    c = out^(1/4) / gamma^(1/2).

    batches  any; their gradients are summed
    loss     a scalar of the model and one batch: lambda m, b: cross_entropy(m(b[0]), b[1])

    Returns the model. Raises as `eva` does, and RuleError where W has no 2 * rank triplets.
    Source: Wang et al. 2024 (LoRA-GA).
    """
    parts = parts_of(model, Principal, "lora_ga", "pissa")
    gradients: dict[Principal, Tensor] = {}

    def see(part: Principal, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0].detach().flatten(0, -2).double()

        def add(slope: Tensor) -> None:
            new = slope.flatten(0, -2).double().t() @ x
            gradients[part] = gradients[part] + new if part in gradients else new

        out.register_hook(add)  # type: ignore[no-untyped-call]

    with watching(model, parts, see), torch.enable_grad():
        run_each(batches, "lora_ga", lambda batch: _slope(loss(model, batch), parts))
    check_seen(parts, gradients, "lora_ga")
    for part, gradient in gradients.items():
        rank, (out, _) = len(part.A), gradient.shape
        if 2 * rank > min(gradient.shape):
            raise RuleError(
                "lora_ga(model, ...)",
                f"a weight {tuple(gradient.shape)} has no 2 * {rank} singular triplets.",
                "Operate the model with a smaller rank.",
            )
        U, _, V = torch.linalg.svd(gradient, full_matrices=False)
        c = out**0.25 / gamma**0.5
        part.restart(c * V[:rank], c * U[:, rank : 2 * rank])
    return model


def _slope(value: Tensor, parts: dict[Any, str]) -> None:
    torch.autograd.grad(value, [part.B for part in parts], allow_unused=True)


@torch.no_grad()
def aim_at_salient(model: Model, batches: Iterable[Any]) -> Model:
    """Salient parts change the channels in which the features of these batches are longest.

    Measured in the base: while it lasts such parts add nothing. Returns the model, and raises as
    `eva` does. Source: Zhao et al. 2023 (SCT), over all classes at once.
    """
    parts = parts_of(model, Salient, "aim_at_salient", "sct")
    for part, moment in moments(model, parts, batches, "aim_at_salient", silent=True).items():
        part.aim(moment.diagonal().topk(len(part.index)).indices)
    return model


def _weight(part: Principal) -> BaseWeight:
    if part.weight is None:
        raise OperationError(
            "corda(model, ...)",
            "a part knows no base weight.",
            'Operate the model with "pissa".',
        )
    return part.weight
