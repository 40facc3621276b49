"""What routers say: kept for the balance loss, or its gradient is sent back unseen."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import GraftError
from ..rules import routing
from .passes import Key
from .switch import Switch
from .tokens import Action
from .tracing import is_exporting


class Left:
    """The gates that compiled code has left at one site, an attribute for each action.

    (Compiled code is made again once a dict that it writes to has other keys than it had.)
    """

    def leave(self, i: int, gates: Tensor) -> None:
        """Those of action i."""
        setattr(self, f"of_{i}", gates)

    def gates(self) -> dict[int, Tensor]:
        """All of them, by the number of the action."""
        return {int(name.removeprefix("of_")): gates for name, gates in vars(self).items()}


def routed(switch: Switch, left: Left, key: Key, answer: routing.Routed, x: Tensor) -> Tensor:
    """The output of a router, its gates kept for `balance_loss` and `routing`, or its loss sent."""
    balance = switch.balance
    if balance is None:
        _keep(switch, left, key, answer.gates)
        return answer.output
    if not torch.compiler.is_compiling():
        _keep(switch, left, key, answer.gates.detach())
    if not callable(balance) and _in_half_autocast(x):
        raise GraftError(
            f"apply(..., balance={balance})",
            "under float16 autocast the loss is scaled, and this gradient would not be.",
            f"Write balance=lambda: {balance} * scaler.get_scale(), with your GradScaler.",
        )
    return routing.with_balance(answer.output, answer.gates, balance)


def _keep(switch: Switch, left: Left, key: Key, gates: Tensor) -> None:
    if is_exporting():
        return  # nobody asks a graph that is written down what its routers said
    if torch.compiler.is_compiling():
        left.leave(key[1], gates)
    else:
        switch.passes.keep_gates(key, gates, left.gates().get(key[1]))


def routes(action: Action) -> bool:
    """Whether the part of an action is a router."""
    return bool(getattr(action.part, "routes", False))


def _in_half_autocast(x: Tensor) -> bool:
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
