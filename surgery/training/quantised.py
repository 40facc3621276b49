"""LoRA that starts from what quantising the base took away (Li et al. 2023, LoftQ)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..errors import OperationError
from ..parts.arguments import positive
from ..parts.low_rank import LoRA
from ..parts.qkv_rows import placed
from ..parts.room import without_room
from .observed import parts_of

Model = TypeVar("Model", bound=nn.Module)
Quantise = Callable[[Tensor], Tensor]


@torch.no_grad()
def loftq(
    model: Model,
    weights: Mapping[str, Tensor],
    quantise: Quantise,
    iterations: int = 1,
) -> Model:
    """A and B of every LoRA become what quantising took away: the best of W - quantise(W).

    The base, which holds quantise(W), is so brought back near to W. With more iterations the two
    take turns: B A is the best of W - Q, and Q = quantise(W - B A) of the turn before; the base
    then holds the last Q, which is quantised from what `loftq_base` gives.

    weights   W (out, width) before it was quantised, by address of the module that a LoRA is at
    quantise  gives the values that a weight has afterwards, as numbers

    Returns the model. Raises OperationError where there is no LoRA, no weight for one, or a base
    that holds other numbers. Source: Li et al. 2023 (LoftQ), Algorithm 1; PEFT's default is 1.
    """
    for part, path, turns in _turns(model, weights, quantise, iterations, "loftq"):
        if iterations > 1 and not _holds(
            model.get_submodule(path), turns.Q, quantise(weights[path])
        ):
            raise OperationError(
                f"loftq(model, ..., iterations={iterations})",
                f"{path} holds other numbers than the last turn quantised.",
                "Quantise what loftq_base(model, ...) gives, with as many iterations.",
            )
        n = len(turns.A[0])
        part.A[:, :n], part.B[:, :, :n] = turns.A.to(part.A), turns.B.to(part.B)
    return model


@torch.no_grad()
def loftq_base(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    quantise: Quantise,
    iterations: int = 5,
) -> dict[str, Tensor]:
    """What to quantise in place of W: W - B A of the last turn but one, by address.

    Takes what `loftq` takes, and changes nothing: the base may be quantised before or after.

    >>> from surgery import apply, at, lora
    >>> model = apply(nn.Sequential(nn.Linear(2, 2)), at("0", lora(rank=1)))
    >>> loftq_base(model, {"0": torch.tensor([[1.4, 0.0], [0.0, 1.0]])}, torch.round, 2)
    {'0': tensor([[1., 0.],
            [0., 1.]])}
    """
    turns = _turns(model, weights, quantise, iterations, "loftq_base")
    return {path: turn.base for _, path, turn in turns}


class _Turn(NamedTuple):
    """A (k, n, width) and B (k, size, n) that are the best of W - Q, Q = quantise(base)."""

    A: Tensor
    B: Tensor
    base: Tensor
    Q: Tensor


def _turns(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    quantise: Quantise,
    iterations: int,
    name: str,
) -> Iterator[tuple[LoRA, str, _Turn]]:
    """The last turn for each LoRA."""
    positive(name, iterations=iterations)
    parts = parts_of(model, LoRA, name, "lora")
    if lost := [path for path in parts.values() if path not in weights]:
        raise OperationError(
            f"{name}(model, ...)",
            f"weights holds none for {lost[0]}.",
            "Give those of the model as it was before, by address of the module.",
        )
    for part, path in parts.items():
        base = W = weights[path]
        scale = without_room(part).scale
        for _ in range(iterations):
            Q = quantise(base)
            pairs = [_best((W - Q)[rows].double(), part.rank, scale) for rows in part.rows]
            A, B = (torch.stack(each) for each in zip(*pairs, strict=True))
            turn = _Turn(A, B, base, Q)
            pieces = [*(scale * B @ A).mT]
            base = (W.double() - placed(pieces, part.rows, part.out).t()).to(W)
        yield part, path, turn


def _best(lost: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (n, width) and B (size, n) with scale * B A nearest to a matrix (size, width)."""
    U, S, V = torch.linalg.svd(lost, full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


def _holds(module: nn.Module, Q: Tensor, first: Tensor) -> bool:
    """Whether a base is nearer to what the last turn quantised than to the first, if it tells."""
    held = getattr(module, "weight", None)
    if not isinstance(held, Tensor) or not held.is_floating_point() or held.shape != Q.shape:
        return True
    return bool((held - Q.to(held)).norm() <= (held - first.to(held)).norm())
