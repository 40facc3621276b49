"""What parts tell of the last forward, and add to the loss."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import GraftError
from ..rules import routing as _routing
from .apply import operated
from .hooks import HookedSite
from .operation import Operation


class Routing(NamedTuple):
    """One site's last forward: gates (sub-tokens, experts); load (experts,), fractions of 1."""

    gates: Tensor
    load: Tensor


def balance_loss(model: nn.Module) -> Tensor:
    """The Switch balance loss of the last forward, summed over sites: a scalar to add to the loss.

    Each site gives N * sum_p t_p * mean(g_p), which is 1 when all is even and at most N (Eq. 6 of
    Li et al. 2024). 0 where no part routes. With apply(..., balance=...) its gradient is added
    anyway, and this is its value without gradient. A module called twice counts its last call.

    Raises GraftError before any forward, and where the last forward ran without gradients though
    gradients are asked for now (no_grad, or reentrant checkpointing, where they would be missing).

    >>> from surgery import apply, at, ffn, moa, parallel, shared
    >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = apply(nn.Sequential(layer), at(ffn, parallel(shared(moa(heads=2, rank=4)))))
    >>> _ = model(torch.randn(1, 5, 16))
    >>> 0 < balance_loss(model).item() <= 4
    True
    """
    done = operated(model, "balance_loss(model)", alone=False)  # once a step: nothing slow
    losses: list[Tensor] = []
    for operation in (operation for operation in done if operation.strength):
        for hooked, gates in _gates(operation, "balance_loss(model)"):
            if operation.balance is None:
                _check_gradient(hooked, gates)
            losses.append(_routing.balance(gates))
    return _sum(losses, model)


def penalty(model: nn.Module, *, balance: float = 0.01) -> Tensor:
    """All that parts add to the loss: a scalar, loss = criterion(model(x), y) + penalty(model).

    `balance` times the balance loss of the last forward, where parts route, and what each part that
    has a method `penalty()` gives, with a weight of its own: AdaLoRA's orthogonality, for example.
    A part that is shared counts once. 0 where there is nothing of it.

    Raises what `balance_loss` does, where parts route.

    >>> from surgery import apply, at, ffn, lora
    >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> penalty(apply(nn.Sequential(layer), at(ffn, lora(rank=2))))
    tensor(0.)
    """
    done = [op for op in operated(model, "penalty(model)", alone=False) if op.strength]
    parts: list[Any] = [part for operation in done for part in operation.modules()]
    own = [part.penalty() for part in parts if callable(getattr(part, "penalty", None))]
    routed = any(operation.routers for operation in done)
    terms = [balance * balance_loss(model)] if routed else []
    return _sum([*terms, *own], model)


def _sum(losses: list[Tensor], model: nn.Module) -> Tensor:
    place = losses[0] if losses else next(model.parameters(), torch.zeros(()))
    return sum((loss.to(place.device) for loss in losses), place.new_zeros(()))


def routing(model: nn.Module) -> dict[str, Routing]:
    """Per site, what its router did in the last forward: gates, and the load of each expert.

    Further routers at one site stand under its address and a number, "blocks.0.mlp/2".

    Raises OperationError on a model never operated, GraftError before any forward.

    >>> from surgery import apply, at, ffn, moa, parallel, shared
    >>> layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> model = apply(nn.Sequential(layer), at(ffn, parallel(shared(moa(heads=2, rank=4)))))
    >>> _ = model(torch.randn(1, 5, 16))
    >>> [(path, round(r.load.sum().item(), 6)) for path, r in routing(model).items()]
    [('0.(linear1 to linear2)', 1.0)]
    """
    kept, seen = dict[str, Routing](), Counter[str]()
    for operation in (op for op in operated(model, "routing(model)") if op.strength):
        for hooked, gates in _gates(operation, "routing(model)"):
            seen[hooked.path] += 1
            n = seen[hooked.path]
            kept[hooked.path if n == 1 else f"{hooked.path}/{n}"] = Routing(
                gates.detach(), _routing.load(gates.detach())
            )
    return kept


def _gates(operation: Operation, call: str) -> list[tuple[HookedSite, Tensor]]:
    """Those of the last forward in this thread, of each router at each site, in rule order.

    Routers that it did not come to (layers that are dropped at random) have none.
    """
    gates, routers = sorted(operation.gates().items()), operation.routers
    found = [(g, value) for g in routers for (path, _), value in gates if path == g.path]
    if routers and not found:
        elsewhere = operation.passes.elsewhere()
        where = " in this thread (or asyncio task), but in another" if elsewhere else ""
        raise GraftError(
            call,
            f"the router at {routers[0].path} has not run{where} since the model was operated, "
            "copied or loaded.",
            "Run a forward first; under torch.compile with balance=..., run one outside of it."
            if not elsewhere
            else "Call it in the thread that ran the forward, right after it.",
        )
    return found


def _check_gradient(hooked: HookedSite, gates: Tensor) -> None:
    trained = any(p.requires_grad for action in hooked.actions for p in action.part.parameters())
    if torch.is_grad_enabled() and trained and not gates.requires_grad:
        raise GraftError(
            "balance_loss(model)",
            f"the last forward at {hooked.path} kept no gradient (no_grad, or reentrant "
            "checkpointing): its own would silently be missing.",
            "Read its value under torch.no_grad(), use checkpointing with use_reentrant=False, or "
            "give apply(..., balance=0.01), which is right in every case.",
        )
