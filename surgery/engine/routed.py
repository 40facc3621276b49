"""What routers say: kept for the balance loss, or its gradient is sent back unseen."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import GraftError
from ..rules import routing
from .passes import Key, Pass
from .switch import Switch
from .tokens import Action


def routed(switch: Switch, traced: Pass, key: Key, answer: routing.Routed, x: Tensor) -> Tensor:
    """The output of a router, its gates kept for `balance_loss` and `routing`, or its loss sent.

    traced  what compiled code keeps, by the number of an action alone
    """
    balance = switch.balance
    if balance is None:
        _keep(switch, traced, key, answer.gates)
        return answer.output
    if not torch.compiler.is_compiling():
        _keep(switch, traced, key, answer.gates.detach())
    if not callable(balance) and _in_half_autocast(x):
        raise GraftError(
            f"apply(..., balance={balance})",
            "under float16 autocast the loss is scaled, and this gradient would not be.",
            f"Write balance=lambda: {balance} * scaler.get_scale(), with your GradScaler.",
        )
    return routing.with_balance(answer.output, answer.gates, balance)


def _keep(switch: Switch, traced: Pass, key: Key, gates: Tensor) -> None:
    own = "", key[1]
    if torch.compiler.is_compiling():
        traced.gates[own] = gates
    else:
        switch.passes.keep_gates(key, gates, traced.gates.get(own))


def routes(action: Action) -> bool:
    """Whether the part of an action is a router."""
    return bool(getattr(action.part, "routes", False))


def _in_half_autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
