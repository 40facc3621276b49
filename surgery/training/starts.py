"""What low-rank parts start from, read off batches of a task; and what salient channels are.

    model = surgery.apply(model, surgery.methods.lora(rank=8))
    eva(model, batches)  # before training

EVA (Paischer et al. 2024), CorDA (Yang et al. 2024), LoRA-GA (Wang et al. 2024), LoftQ (Li et al.
2023), SCT (Zhao et al. 2023). The base stays as it is, and but for LoftQ what is added stays zero.
EVA's other half, ranks moved to where
they explain more, needs other rules: at(address, lora(rank=...)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._inputs import call
from .._preserve import preserved
from ..engine.apply import operated
from ..errors import OperationError, RuleError
from ..parts.base_weight import BaseWeight
from ..parts.deltas import Principal
from ..parts.low_rank import LoRA
from ..parts.visual_adapters import Salient

Model = TypeVar("Model", bound=nn.Module)
Part = TypeVar("Part", bound=nn.Module)
Loss = Callable[[nn.Module, Any], Tensor]


@torch.no_grad()
def eva(model: Model, batches: Iterable[Any]) -> Model:
    """A of every LoRA becomes the directions in which most of what comes to it lies.

    batches  inputs of the model: a tensor, a tuple or a dict each

    These are the right singular vectors of all features that come, largest first; B stays. Returns
    the model. Raises OperationError where there is no LoRA, or nothing comes to one; RuleError
    where there is no batch. Source: Paischer et al. 2024 (EVA).

    >>> from surgery import apply, at, lora
    >>> model = apply(nn.Sequential(nn.Linear(2, 3)), at("0", lora(rank=1)))
    >>> eva(model, [torch.tensor([[0.0, 2.0], [0.1, 0.0]])]).surgery.default.get_submodule(
    ...     "0/parallel").A.detach().abs()
    tensor([[[0., 1.]]])
    """
    parts = _found(model, LoRA, "eva", "lora")
    for part, moment in _moments(model, parts, batches, "eva").items():
        directions = torch.linalg.eigh(moment)[1].flip(1).t()[: part.rank]
        part.A[:, : len(directions)] = directions.to(part.A)
    return model


@torch.no_grad()
def corda(model: Model, batches: Iterable[Any], keep: bool = True) -> Model:
    """Parts of `pissa` start from W's triplets in the metric of what comes to them.

    W C = U S V^T, C the mean of x x^T (with a hundredth of its mean diagonal added), and so
    W = U S V^T C^-1, of which A and B take `rank` triplets.

    batches  as of `eva`
    keep     the smallest, so that what the batches need is kept; False: the largest, to learn it

    Returns the model, and raises as `eva` does. Source: Yang et al. 2024 (CorDA).
    """
    parts = _found(model, Principal, "corda", "pissa")
    for part, moment in _moments(model, parts, batches, "corda").items():
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
    parts = _found(model, Principal, "lora_ga", "pissa")
    gradients: dict[Principal, Tensor] = {}

    def see(part: Principal, args: tuple[Tensor, ...], out: Tensor) -> None:
        x = args[0].detach().flatten(0, -2).double()

        def add(slope: Tensor) -> None:
            new = slope.flatten(0, -2).double().t() @ x
            gradients[part] = gradients[part] + new if part in gradients else new

        out.register_hook(add)  # type: ignore[no-untyped-call]

    with _watching(model, parts, see), torch.enable_grad():
        _each(batches, "lora_ga", lambda batch: _slope(loss(model, batch), parts))
    _check_seen(parts, gradients, "lora_ga")
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
def loftq(
    model: Model, weights: Mapping[str, Tensor], quantise: Callable[[Tensor], Tensor]
) -> Model:
    """A and B of every LoRA become what quantising took away: the best of W - quantise(W).

    The base, which holds quantise(W), is so brought back near to W. Of LoftQ's alternation this is
    the first step (PEFT's default): later ones would change the base.

    weights   W (out, width) before it was quantised, by address of the module that a LoRA is at
    quantise  gives the values that a weight has afterwards, as numbers

    Returns the model. Raises OperationError where there is no LoRA, or no weight for one.
    Source: Li et al. 2023 (LoftQ).
    """
    parts = _found(model, LoRA, "loftq", "lora")
    if lost := [path for path in parts.values() if path not in weights]:
        raise OperationError(
            "loftq(model, ...)",
            f"weights holds none for {lost[0]}.",
            "Give those of the model as it was before, by address of the module.",
        )
    for part, path in parts.items():
        W = weights[path]
        lost_to_rounding = (W - quantise(W)).to(part.A.device).double()
        for A, B, rows in zip(part.A, part.B, part.rows, strict=True):
            U, S, V = torch.linalg.svd(lost_to_rounding[rows], full_matrices=False)
            root = (S[: part.rank] / part.scale).sqrt()
            A[: len(root)], B[:, : len(root)] = (
                root[:, None] * V[: len(root)],
                U[:, : len(root)] * root,
            )
    return model


@torch.no_grad()
def aim_at_salient(model: Model, batches: Iterable[Any]) -> Model:
    """Salient parts change the channels in which the features of these batches are longest.

    Measured in the base: while it lasts such parts add nothing. Returns the model, and raises as
    `eva` does. Source: Zhao et al. 2023 (SCT), over all classes at once.
    """
    parts = _found(model, Salient, "aim_at_salient", "sct")
    for part, moment in _moments(model, parts, batches, "aim_at_salient", silent=True).items():
        part.aim(moment.diagonal().topk(len(part.index)).indices)
    return model


# what comes to parts ---------------------------------------------------------------------------


def _moments(
    model: nn.Module,
    parts: dict[Part, str],
    batches: Iterable[Any],
    name: str,
    silent: bool = False,
) -> dict[Part, Tensor]:
    """The mean of x x^T (width, width) of what comes to each part, in double precision.

    silent  the parts give zeros meanwhile
    """
    sums: dict[Part, Tensor] = {}
    counts: dict[Part, int] = {}

    def see(part: Part, args: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        x = args[0].detach().flatten(0, -2).double()
        sums[part] = sums[part] + x.t() @ x if part in sums else x.t() @ x
        counts[part] = counts.get(part, 0) + len(x)
        return torch.zeros_like(out) if silent else None

    with _watching(model, parts, see):
        _each(batches, name, lambda batch: call(model, batch))
    _check_seen(parts, sums, name)
    return {part: total / max(counts[part], 1) for part, total in sums.items()}


@contextmanager
def _watching(model: nn.Module, parts: dict[Part, str], see: Callable[..., Any]) -> Iterator[None]:
    """In eval mode, with a look at what comes to parts; then as it was."""
    with preserved(model, modes=True):
        model.eval()
        handles = [part.register_forward_hook(see) for part in parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _each(batches: Iterable[Any], name: str, run: Callable[[Any], object]) -> None:
    """Run every batch. Raises RuleError where there is none."""
    count = 0
    for count, batch in enumerate(batches, 1):  # noqa: B007
        run(batch)
    if not count:
        raise RuleError(f"{name}(batches=...)", "it holds no batch.", "Give one at least.")


def _found(model: nn.Module, kind: type[Part], name: str, rules: str) -> dict[Part, str]:
    """The parts of a kind, and where they are. Raises OperationError where there are none."""
    found = {
        action.part: hooked.path
        for operation in operated(model, f"{name}(model, ...)")
        for hooked in operation.hooked_sites
        for action in hooked.actions
        if isinstance(action.part, kind)
    }
    if not found:
        raise OperationError(
            f"{name}(model, ...)",
            f"this {type(model).__name__} has no part of the kind {kind.__name__}.",
            f'Operate it first: apply(model, "{rules}").',
        )
    return found


def _check_seen(parts: dict[Part, str], seen: dict[Part, Tensor], name: str) -> None:
    if lost := [path for part, path in parts.items() if part not in seen]:
        raise OperationError(
            f"{name}(model, ...)",
            f"nothing came to the part at {lost[0]} (at a parameter, or never run).",
            "Join it to a module that is called.",
        )


def _weight(part: Principal) -> BaseWeight:
    if part.weight is None:
        raise OperationError(
            "corda(model, ...)",
            "a part knows no base weight.",
            'Operate the model with "pissa".',
        )
    return part.weight
